"""The ONNX face of the canvas readout against its reference, in ONNX Runtime."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from plugins_trt.canvas_readout.onnx import block_size, function
from plugins_trt.canvas_readout.reference import canvas_readout, readout_logits
from tests.plugins_trt.onnx_session import OperationSession
from tests.plugins_trt.readout_canvases import CASES, Canvas, arguments

EPS = torch.finfo(torch.float32).eps
SOFTCAP = 30.0
NAMES = ("hidden", "embedding", "temperature", "uniform", "guard", "guarded_ids")


def run(case: Canvas, inputs: list[Tensor]) -> list[Tensor]:
    session = OperationSession(
        function(case.vocabulary),
        dict(zip(NAMES, inputs, strict=True)),
        [(torch.int64, 2), (torch.int64, 2), (torch.float32, 2), (torch.float32, 3)],
        {"softcap": SOFTCAP, "embedding_scale": case.hidden**0.5},
    )
    return session(*inputs)


MIXED = Canvas("certain positions beside open ones, in both rows", positions=40, spread=12.0, temperature=0.1)


@pytest.mark.parametrize("case", [*CASES, MIXED], ids=lambda case: case.catches)
def test_readout(case: Canvas) -> None:
    inputs = arguments(case)
    got_argmax, got_candidates, got_entropy, got_soft = run(case, inputs)
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    argmax, candidates, entropy, soft = canvas_readout(*wide, SOFTCAP, case.hidden**0.5)
    # A logit is a sum of `hidden` terms, then capped: its error over the temperature is what all else follows.
    hidden, embedding = inputs[0], inputs[1]
    products = (hidden.abs() @ embedding.abs().T).max().item() if case.rows else 0.0
    logit = EPS * ((case.hidden + 2) * products + 4 * SOFTCAP) / case.temperature
    if case is MIXED:
        assert {True, False} == set((got_entropy == 0).flatten().tolist())
    assert torch.equal(got_argmax, argmax)
    assert torch.equal(got_candidates, candidates)
    torch.testing.assert_close(got_soft.double(), soft, rtol=0, atol=_soft_bound(case, inputs, logit))
    spread = 2 * SOFTCAP / case.temperature
    torch.testing.assert_close(got_entropy.double(), entropy, rtol=0, atol=2 * logit * (1 + spread) + 64 * EPS * spread)


def _soft_bound(case: Canvas, inputs: list[Tensor], logit: float) -> float:
    """Shares follow the logits relatively, and V of them are added."""
    return (4 * logit + 2 * case.vocabulary * EPS) * inputs[1].abs().max().item() * case.hidden**0.5


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2.0**-24])
def test_candidates_at_the_ends_of_the_distribution_have_a_positive_probability(uniform: float) -> None:
    """The largest float32 below 1 times the total rounds to the total; no token's cumulative sum exceeds that."""
    case = replace(CASES[0], vocabulary=400, guarded=(0, 1, 398, 399), spread=0.1)
    inputs = arguments(case)
    inputs[3] = torch.full_like(inputs[3], uniform)
    inputs[4] = torch.ones_like(inputs[4])
    _, candidates, _, _ = run(case, inputs)
    assert not set(candidates[:, 0].tolist()) & set(case.guarded)
    assert torch.equal(candidates, canvas_readout(*inputs, SOFTCAP, 4.0)[1])


def test_the_guard_blocks_position_0_alone() -> None:
    """A guarded token, though the most probable by far, is taken everywhere but at position 0 of guarded rows."""
    case = replace(CASES[0], guarded=(7,))
    inputs = arguments(case)
    inputs[0] = 50 * inputs[1][7].expand_as(inputs[0]).contiguous()
    argmax, candidates, entropy, _ = run(case, inputs)
    assert argmax[0, 0] != 7
    assert candidates[0, 0] != 7
    assert bool(torch.isfinite(entropy).all())
    assert (argmax[0, 1:] == 7).all()
    assert (argmax[1] == 7).all(), "row 1 is not guarded"


@pytest.mark.parametrize("second", [8, 52])
def test_a_tie_is_not_certain(second: int) -> None:
    """Two tokens share all positions, within a block of 6 or in two of them, and the others are hundreds of nats away:
    the lead of the first over the second is 0, not the distance to the rest."""
    case = replace(CASES[0], temperature=0.05, guarded=())
    inputs = arguments(case)
    inputs[1] = torch.eye(case.vocabulary, case.hidden) - 0.5
    inputs[1][second] = inputs[1][7] = torch.linspace(-1, 1, case.hidden)
    inputs[0] = 10 * inputs[1][7].expand_as(inputs[0]).contiguous()
    inputs[3] = torch.tensor([0.25, 0.75]).repeat(case.rows * case.positions)[: inputs[3].numel()].view_as(inputs[3])
    argmax, candidates, entropy, soft = run(case, inputs)
    assert (argmax == 7).all()
    assert set(candidates.flatten().tolist()) == {7, second}
    torch.testing.assert_close(entropy, torch.full_like(entropy, math.log(2)), rtol=0, atol=4 * EPS)
    torch.testing.assert_close(soft, (inputs[1][7] * case.hidden**0.5).expand_as(soft), rtol=4 * EPS, atol=0)


def test_a_uniform_number_of_0_draws_the_first_possible_token() -> None:
    """Also where another token is certain: what `reference.canvas_readout` says of it."""
    case = replace(CASES[0], temperature=0.3, guarded=())
    inputs = arguments(case)
    inputs[1] = torch.zeros_like(inputs[1])
    inputs[1][7] = 1.0
    inputs[0] = torch.full_like(inputs[0], 20 / case.hidden)  # leads by 30 tanh(20 / 30) / 0.3 = 58 nats
    inputs[3] = torch.zeros_like(inputs[3])
    inputs[3][:, 1] = 2.0**-24
    argmax, candidates, _, _ = run(case, inputs)
    assert (argmax == 7).all()
    assert torch.equal(candidates, canvas_readout(*inputs, SOFTCAP, 4.0)[1])
    assert candidates[0].tolist() == [0, 7, 0, 0, 0]


def test_candidates_follow_the_distribution() -> None:
    """Over evenly spaced uniform numbers each token is drawn as often as its probability says, to within one draw."""
    case = replace(CASES[0], rows=1, positions=4000, guarded=())
    inputs = arguments(case)
    inputs[0] = inputs[0][:, :1].expand_as(inputs[0]).contiguous()
    inputs[3] = ((torch.arange(4000) + 0.5) / 4000)[None]
    counts = run(case, inputs)[1].flatten().bincount(minlength=case.vocabulary)
    logits = readout_logits(*(inputs[i].double() for i in (0, 1, 2)), inputs[4], inputs[5], SOFTCAP)
    expected = logits[0, 0].softmax(-1) * 4000
    assert (counts - expected).abs().max() <= 1.01


@pytest.mark.parametrize(("vocabulary", "size"), [(4096, 64), (262_144, 512), (61, 1), (60, 6), (1, 1)])
def test_blocks_are_near_the_root(vocabulary: int, size: int) -> None:
    assert block_size(vocabulary) == size
