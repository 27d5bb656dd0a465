"""One canvas against the reference's schedule, sampler and stopping, and against loops written out plainly."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    EntropyBoundSampler,
    EntropyBoundSamplerConfig,
    LinearTemperatureScheduleLogitsProcessor,
    StableAndConfidentStoppingCriteria,
)

from runtime.diffusion import CanvasDiffusion, accept, temperature_at
from runtime.engines.protocol import Readout
from runtime.random import CanvasStream
from runtime.request import SamplingParameters

SAMPLING = SamplingParameters(
    seed=0,
    max_output_tokens=256,
    max_denoising_steps=48,
    entropy_bound=0.1,
    t_min=0.4,
    t_max=0.8,
    stability_threshold=1,
    confidence_threshold=0.005,
)
LENGTH, VOCABULARY = 16, 50


def new_canvas(sampling: SamplingParameters = SAMPLING) -> CanvasDiffusion:
    return CanvasDiffusion(sampling, CanvasStream(sampling.seed, 0, LENGTH), VOCABULARY)


def readout(argmax: int, entropy: float) -> Readout:
    return Readout(
        argmax_ids=np.full(LENGTH, argmax),
        candidate_ids=np.arange(LENGTH) + 100,  # outside the vocabulary: told apart from fresh tokens
        entropy=np.full(LENGTH, entropy, dtype=np.float32),
    )


@pytest.mark.parametrize(
    ("steps", "t_min", "t_max"),
    [(48, 0.4, 0.8), (48, 0.1, 1.3), (7, 0.7, 0.9), (1, 0.001, 1000.0), (256, 1 / 3, 2 / 3)],
)
def test_temperatures_are_the_references_to_the_bit(steps: int, t_min: float, t_max: float) -> None:
    schedule = LinearTemperatureScheduleLogitsProcessor(t_min, t_max, steps)
    sampling = replace(SAMPLING, max_denoising_steps=steps, t_min=t_min, t_max=t_max)
    logits = torch.linspace(-30, 30, 101)
    for remaining in range(1, steps + 1):
        theirs = schedule(None, logits, torch.tensor(remaining, dtype=torch.int32))
        temperature = temperature_at(remaining, sampling)
        assert np.float32(temperature) == temperature
        assert torch.equal(theirs, logits / torch.tensor(temperature))


@pytest.mark.parametrize("bound", [1e-30, 0.005, 0.1, 1.0, 7.0, 1e30])
@pytest.mark.parametrize("spread", [0.1, 1.0, 6.0, 40.0])
def test_accepts_what_the_reference_accepts(spread: float, bound: float) -> None:
    """Spreads from near uniform to all but certain; bounds from one position to all of them."""
    generator = torch.Generator().manual_seed(int(spread * 10))
    sampler = EntropyBoundSampler(EntropyBoundSamplerConfig(bound), 256, VOCABULARY, 1)
    counts = set()
    for _ in range(20):
        logits = spread * torch.randn(1, 256, VOCABULARY, generator=generator)
        entropy = torch.distributions.Categorical(logits=logits).entropy()[0]
        sampler.accept_canvas(torch.zeros(1, 256), torch.zeros(1, 256), logits, 1)
        accepted = accept(entropy.numpy(), bound)
        assert accepted.tolist() == sampler.accepted_token_mask[0].tolist()
        counts.add(int(accepted.sum()))
    if bound == 1e30:
        assert counts == {256}
    if bound == 1e-30 and spread < 40.0:  # at 40 several entropies are 0
        assert counts == {1}


def test_bound_is_met_to_the_bit() -> None:
    """Bounds that some position meets exactly: a sum rounded otherwise than the reference's is found out."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        logits = 3 * torch.randn(1, 256, VOCABULARY, generator=generator)
        entropy = torch.distributions.Categorical(logits=logits).entropy()[0]
        ascending = entropy.sort().values
        for bound in (ascending.cumsum(0) - ascending)[5::25].tolist():
            sampler = EntropyBoundSampler(EntropyBoundSamplerConfig(bound), 256, VOCABULARY, 1)
            sampler.accept_canvas(torch.zeros(1, 256), torch.zeros(1, 256), logits, 1)
            assert accept(entropy.numpy(), bound).tolist() == sampler.accepted_token_mask[0].tolist()


def test_equal_entropies_are_accepted_in_order_of_position() -> None:
    entropy = np.array([2, 1, 0, 1, 0, 1], dtype=np.float32)
    assert accept(entropy, 1.0).tolist() == [False, True, True, True, True, False]
    assert accept(entropy, 0.0).tolist() == [False, True, True, False, True, False]


def test_next_canvas_is_candidates_where_accepted_and_fresh_tokens_elsewhere() -> None:
    canvas = new_canvas()
    stream = CanvasStream(SAMPLING.seed, 0, LENGTH)
    assert canvas.canvas.tolist() == stream.tokens(VOCABULARY).tolist()
    for number in (1, 2, 3):
        entropy = np.random.default_rng(number).permutation(LENGTH).astype(np.float32) / 50
        assert canvas.uniform.tolist() == stream.uniforms().tolist()
        fresh = stream.tokens(VOCABULARY)
        step = canvas.advance(replace(readout(number, 0.0), entropy=entropy))
        expected = [
            position + 100 if accepted else fresh[position] for position, accepted in enumerate(step.accepted.tolist())
        ]
        assert 0 < sum(step.accepted) < LENGTH
        assert canvas.canvas.tolist() == expected
        assert step.number == number


@given(
    steps=st.lists(st.tuples(st.integers(0, 1), st.booleans()), min_size=1, max_size=12),
    stability=st.integers(0, 4),
)
def test_stops_when_the_reference_stops(steps: list[tuple[int, bool]], stability: int) -> None:
    """Argmax canvases of two kinds, confident or not, in any order."""
    threshold = 0.5
    sampling = replace(
        SAMPLING, stability_threshold=stability, confidence_threshold=threshold, max_denoising_steps=len(steps)
    )
    canvas, criteria = new_canvas(sampling), StableAndConfidentStoppingCriteria(stability, threshold)
    for number, (argmax, confident) in enumerate(steps, start=1):
        logits = torch.randn(1, LENGTH, VOCABULARY, generator=torch.Generator().manual_seed(number))
        logits = logits * (50.0 if confident else 1.0)
        entropy = torch.distributions.Categorical(logits=logits).entropy()[0].numpy()
        stops = bool(criteria(torch.full((1, LENGTH), argmax), logits))
        canvas.advance(replace(readout(argmax, 0.0), entropy=entropy))
        assert canvas.converged == stops
        assert canvas.finished == (stops or number == len(steps))
        assert canvas.argmax.tolist() == [argmax] * LENGTH
        if stops:
            break


def test_one_position_elsewhere_is_not_stable() -> None:
    canvas = new_canvas()
    canvas.advance(readout(3, 0.0))
    almost = readout(3, 0.0)
    almost.argmax_ids[-1] = 4
    canvas.advance(almost)
    assert not canvas.finished
    canvas.advance(almost)
    assert canvas.converged


def test_threshold_zero_never_stops_early() -> None:
    canvas = new_canvas(replace(SAMPLING, confidence_threshold=0.0, stability_threshold=0, max_denoising_steps=3))
    finished = []
    for _ in range(3):
        canvas.advance(readout(1, 0.0))
        finished.append(canvas.finished)
    assert finished == [False, False, True]
    assert not canvas.converged


def test_thresholds_beyond_float32_accept_and_stop_alike() -> None:
    canvas = new_canvas(replace(SAMPLING, entropy_bound=1e300, confidence_threshold=1e300, stability_threshold=0))
    step = canvas.advance(readout(1, 5.0))
    assert step.accepted.all()
    assert canvas.converged
