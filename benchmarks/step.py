"""One denoising step, readout and loop included: ours in ONNX Runtime against the reference's in PyTorch.

Both run the same checkpoint in float32 on the same number of threads, in one process, a few steps of the one and a few
of the other in turn; the first step of each turn, which finds the other's data in the caches, does not count. The
reference runs without gradients, with whichever of its experts implementations is fastest here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.figures import Figure, Setting, Unavailable, milliseconds, quiet_milliseconds
from runtime.bundle import Bundle
from runtime.engines.onnxruntime import OnnxRuntimeEngine, Options
from runtime.engines.protocol import DenoiseRow, EncodeRow
from runtime.generation import Encode, Generation
from runtime.pool import PagePool
from runtime.request import MAX_DENOISING_STEPS, GenerationRequest, SamplingOverrides
from runtime.vocabulary import Vocabulary

PROMPT_TOKENS = 100
TURN = 3
"""Steps of one side before it is the other's turn; the first does not count."""
EXPERTS_IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
BAR = 3.0
OPEN_TEMPERATURE = 2.0
"""No token leads another one by more than 60 / 2 nats where logits lie within 30: no position is certain. The pocket's
tasks leave 3 of 100 positions open, its stories up to 86."""


def run(setting: Setting) -> list[Figure]:
    """The step's medians and their ratio.

    Raises:
        Unavailable: there is no checkpoint, or PyTorch or transformers are not installed.
    """
    bundle = Bundle(setting.bundle)
    prompt = np.random.default_rng(0).integers(bundle.manifest.model.vocab_size // 2, size=PROMPT_TOKENS)
    reference = _reference(setting, prompt)
    implementation = f"{reference.choose_experts()} experts"
    ours = Ours(bundle, prompt, setting.threads)
    reference.interleave(ours.turn, setting.rounds)
    ours.close()
    figures = [
        Figure("denoising step, ours", milliseconds(ours.seconds), "ms", note="median"),
        Figure("of which outside the engine", milliseconds(ours.loop_seconds), "ms", note="median"),
        Figure("certain positions", 100 * float(np.mean(ours.certain)), "%", note="left out of softmax and product"),
        Figure("denoising step, reference", milliseconds(reference.seconds), "ms", note=implementation),
        *_ratios("reference / ours", reference, ours, least=BAR),
    ]
    unsure = Ours(bundle, prompt, setting.threads, OPEN_TEMPERATURE)
    reference.seconds.clear()
    reference.interleave(unsure.turn, setting.rounds)
    unsure.close()
    return figures + _ratios("where no position is certain", reference, unsure)


def _ratios(name: str, reference: Reference, ours: Ours, least: float | None = None) -> list[Figure]:
    quiet = quiet_milliseconds(reference.seconds), quiet_milliseconds(ours.seconds)
    ratio = milliseconds(reference.seconds) / milliseconds(ours.seconds)
    counted = f"{len(reference.seconds)} steps of one, {len(ours.seconds)} of the other"
    return [
        Figure(name, ratio, "x", least=least, note=counted),
        Figure("the same of first deciles", quiet[0] / quiet[1], "x", note=f"{quiet[0]:.1f} / {quiet[1]:.1f} ms"),
    ]


class Ours:
    """A request that never converges, denoised step by step through the state machine that serves."""

    def __init__(
        self, bundle: Bundle, prompt: NDArray[np.int64], threads: int, temperature: float | None = None
    ) -> None:
        self.seconds: list[float] = []
        """Of each counted step."""
        self.loop_seconds: list[float] = []
        """Of each counted step, the part outside the engine."""
        self.certain: list[float] = []
        """Of each step, the share of positions of which the engine was certain."""
        manifest = bundle.manifest
        self._engine = OnnxRuntimeEngine.load(bundle, Options(threads=threads))
        # A threshold of 0 never stops early.
        overrides = SamplingOverrides(
            seed=0,
            max_denoising_steps=MAX_DENOISING_STEPS,
            confidence_threshold=0.0,
            t_min=temperature,
            t_max=temperature,
        )
        room = manifest.model.canvas_length
        request = GenerationRequest(manifest.model.name, prompt, overrides.resolve(manifest.generation, room))
        vocabulary = Vocabulary.load(bundle)
        self._new: Callable[[], Generation] = partial(
            Generation, request, manifest.model, manifest.generation, vocabulary
        )
        self._generation = self._new()
        pool = PagePool(self._engine.pool, manifest.model)
        self._pages = pool.reserve(self._generation.total_positions)
        self._prefill()

    def turn(self) -> None:
        """A turn of steps."""
        for index in range(TURN):
            if self._generation.finished:
                # The same prompt again: its K/V are in the pool already.
                self._generation = self._new()
                self._prefill()
            began = time.perf_counter()
            engine_seconds = self._step()
            if index:
                self.seconds.append(time.perf_counter() - began)
                self.loop_seconds.append(self.seconds[-1] - engine_seconds)

    def close(self) -> None:
        self._engine.close()

    def _prefill(self) -> None:
        while isinstance(call := self._generation.next_call(), Encode):
            prefix = self._pages.cover(call.start, call.start + len(call.token_ids))
            self._engine.encode([EncodeRow(call.token_ids, call.start, prefix)])
            self._generation.encoded(0.0)

    def _step(self) -> float:
        """One step; the engine's seconds."""
        call = self._generation.next_call()
        assert not isinstance(call, Encode)
        prefix = self._pages.cover(call.start, call.start)
        row = DenoiseRow(
            call.canvas, call.start, prefix, 0, call.first_step, call.temperature, call.uniform, call.guard_first
        )
        began = time.perf_counter()
        [readout] = self._engine.denoise([row])
        seconds = time.perf_counter() - began
        self.certain.append(float((readout.entropy == 0).mean()))
        self._generation.denoised(readout, seconds, draft=False)
        return seconds


class _Enough(Exception):
    """Ends the reference's `generate` once all is measured."""


@dataclass
class Reference:
    """The reference's `generate`, whose every denoising step is timed."""

    model: Any
    """DiffusionGemmaForBlockDiffusion."""
    prompt: Any
    """`[1, n]` int64 tensor."""
    config: Any
    """DiffusionGemmaGenerationConfig."""
    seconds: list[float] = field(default_factory=list)
    """Of each counted step."""

    def choose_experts(self) -> str:
        """Set the fastest experts implementation."""
        medians = {}
        for name in EXPERTS_IMPLEMENTATIONS:
            self.model.set_experts_implementation(name)
            taken: list[float] = []
            self._generate(partial(_collect, taken, TURN))
            medians[name] = milliseconds(taken[1:])
        fastest = min(medians, key=medians.__getitem__)
        self.model.set_experts_implementation(fastest)
        return fastest

    def interleave(self, others_turn: Callable[[], None], rounds: int) -> None:
        """`rounds` turns of the reference, each followed by one of the other's."""
        steps = 0

        def after_step(seconds: float) -> None:
            nonlocal steps
            steps += 1
            if steps % TURN != 1:
                self.seconds.append(seconds)
            if steps % TURN == 0:
                others_turn()
            if steps == rounds * TURN:
                raise _Enough

        while steps < rounds * TURN:
            self._generate(after_step)

    def _generate(self, after_step: Callable[[float], None]) -> None:
        """Generate until `after_step`, told each step's seconds, raises `_Enough`."""
        import torch

        plain = type(self.model)._denoising_step

        def timed(*arguments: Any, **keywords: Any) -> Any:
            began = time.perf_counter()
            result = plain(self.model, *arguments, **keywords)
            after_step(time.perf_counter() - began)
            return result

        self.model._denoising_step = timed
        try:
            with torch.inference_mode():
                self.model.generate(self.prompt, generation_config=self.config)
        except _Enough:
            pass


def _collect(taken: list[float], enough: int, seconds: float) -> None:
    taken.append(seconds)
    if len(taken) == enough:
        raise _Enough


def _reference(setting: Setting, prompt: NDArray[np.int64]) -> Reference:
    if setting.checkpoint is None:
        raise Unavailable("the reference needs --checkpoint, the directory that the bundle was made of")
    try:
        import torch
        from transformers import DiffusionGemmaForBlockDiffusion
        from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
            DiffusionGemmaGenerationConfig,
            EntropyBoundSamplerConfig,
        )
        from transformers.utils import logging
    except ImportError as error:
        raise Unavailable(f"the reference needs torch and transformers >= 5.23 ({error})") from error
    torch.set_num_threads(setting.threads)
    # It tells at length that the pocket has no vision tower.
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    # transformers leaves some of its functions without types.
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(setting.checkpoint, dtype=torch.float32)
    model.train(False)
    config = DiffusionGemmaGenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=model.config.canvas_length,
        max_denoising_steps=MAX_DENOISING_STEPS,
        sampler_config=EntropyBoundSamplerConfig(entropy_bound=0.1),
        t_min=0.4,
        t_max=0.8,
        stability_threshold=1,
        confidence_threshold=1e-30,
        eos_token_id=[1],
        pad_token_id=0,
    )
    return Reference(model, torch.from_numpy(prompt)[None], config)
