"""The canvas readout in Triton: against its reference in the interpreter, and compiled for GPUs that are not here."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from plugins_trt.canvas_readout import kernel
from plugins_trt.canvas_readout.reference import canvas_readout, readout_logits
from tests.plugins_trt.readout_canvases import CASES, Canvas, arguments
from tests.plugins_trt.triton_support import SHARED_MEMORY, Interpreter, compile_launch, launches_of

EPS = torch.finfo(torch.float32).eps
SOFTCAP = 30.0

LARGER = [
    Canvas("several blocks of the vocabulary, the last one not full", vocabulary=9001, guarded=(1, 9000)),
    Canvas("blocks that are all full, in more than one", vocabulary=8192, rows=1, positions=2, guarded=(3, 5000)),
    Canvas("a guarded token in every block", vocabulary=9001, guarded=(0, 4096, 8192)),
]


def read_out(interpreter: Interpreter, case: Canvas, inputs: list[Tensor], at_a_time: int = 512) -> list[Tensor]:
    results: list[Tensor] = interpreter(kernel.canvas_readout, *inputs, SOFTCAP, case.hidden**0.5, at_a_time=at_a_time)
    return results


@pytest.mark.parametrize("case", [*CASES, *LARGER], ids=lambda case: case.catches)
def test_readout(case: Canvas, interpreter: Interpreter) -> None:
    inputs = arguments(case)
    got_argmax, got_candidates, got_entropy, got_soft = read_out(interpreter, case, inputs)
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    argmax, candidates, entropy, soft = canvas_readout(*wide, SOFTCAP, case.hidden**0.5)
    # A logit is a sum of `hidden` terms, then capped (by a tanh that is off by 4 places): its error over the
    # temperature is what all else follows.
    hidden, embedding = inputs[0], inputs[1]
    products = (hidden.abs() @ embedding.abs().T).max().item() if case.rows else 0.0
    logit = EPS * ((case.hidden + 2) * products + 8 * SOFTCAP) / case.temperature
    soft_bound = (4 * logit + 2 * case.vocabulary * EPS) * embedding.abs().max().item() * case.hidden**0.5
    spread = 2 * SOFTCAP / case.temperature
    assert got_argmax.dtype == got_candidates.dtype == torch.int64
    assert torch.equal(got_argmax, argmax)
    assert torch.equal(got_candidates, candidates)
    torch.testing.assert_close(got_soft.double(), soft, rtol=0, atol=soft_bound)
    torch.testing.assert_close(got_entropy.double(), entropy, rtol=0, atol=2 * logit * (1 + spread) + 64 * EPS * spread)


def test_half_precision(interpreter: Interpreter) -> None:
    """Catches weights or logits read in the wrong dtype; ids are those of the logits that the library rounds."""
    case = replace(LARGER[0], temperature=1.0)
    inputs = [x.half() if index < 2 else x for index, x in enumerate(arguments(case))]
    argmax, candidates, entropy, soft = read_out(interpreter, case, inputs)
    logits = inputs[0] @ inputs[1].T
    identity = torch.eye(case.vocabulary, dtype=torch.float32)
    expected = canvas_readout(logits.float(), identity, *inputs[2:], SOFTCAP, 1.0)
    p = expected[3].double()
    assert torch.equal(argmax, expected[0])
    assert torch.equal(candidates, expected[1])
    torch.testing.assert_close(entropy, expected[2], rtol=0, atol=64 * EPS * 2 * SOFTCAP)
    # Weights, their sum with the embedding, and the result are rounded to float16; a sum below its normal numbers is
    # off by an absolute 2^-25 for each weight.
    table, scale = inputs[1].double(), case.hidden**0.5
    allowed = 2**-11 * (p @ table.abs()) + 2 * 2**-11 * (p @ table).abs() + 2**-24 * p.max() * table.abs().sum(0)
    assert soft.dtype == torch.float16
    assert bool(((soft.double() - p @ table * scale).abs() <= allowed * scale).all())


def test_canvases_that_do_not_fit_are_read_out_in_parts(interpreter: Interpreter) -> None:
    """Catches a part that reads another's temperature, uniform numbers or guard."""
    case = replace(CASES[0], rows=3)
    inputs = arguments(case)
    inputs[2] = torch.tensor([0.4, 0.6, 0.8])
    whole, parts = (read_out(interpreter, case, inputs, at_a_time) for at_a_time in (512, 2 * case.positions))
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 if one.is_floating_point() else 0)
    assert torch.equal(parts[0], canvas_readout(*inputs, SOFTCAP, 4.0)[0])


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2.0**-24])
def test_candidates_at_the_ends_of_the_distribution_have_a_positive_probability(
    uniform: float, interpreter: Interpreter
) -> None:
    """The largest float32 below 1 times the total rounds to the total; no token's cumulative sum exceeds that."""
    case = replace(CASES[0], vocabulary=8600, guarded=(0, 1, 4095, 4096, 8598, 8599), spread=0.1)
    inputs = arguments(case)
    inputs[3] = torch.full_like(inputs[3], uniform)
    inputs[4] = torch.ones_like(inputs[4])
    _, candidates, _, _ = read_out(interpreter, case, inputs)
    assert not set(candidates[:, 0].tolist()) & set(case.guarded)
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    p = readout_logits(*wide[:3], *wide[4:], SOFTCAP).softmax(-1)
    above = p.cumsum(-1).gather(-1, candidates[..., None])[..., 0]
    below = above - p.gather(-1, candidates[..., None])[..., 0]
    # Sums of 8600 terms in two levels.
    assert bool((below <= uniform + 128 * EPS).all())
    assert bool((uniform <= above + 128 * EPS).all())


def test_ties_go_to_the_lowest_token(interpreter: Interpreter) -> None:
    """Catches the last of equal logits, inside a block and across blocks."""
    case = replace(CASES[0], vocabulary=8300, guarded=())
    inputs = arguments(case)
    # Sixteenths, so that sums are exact and equal embeddings have equal logits.
    inputs[1] = (16 * inputs[1]).round() / 16
    inputs[1][[9, 5000, 8299]] = inputs[1][7].clone()
    inputs[0] = (40 * inputs[1][7]).expand_as(inputs[0]).contiguous()
    assert bool((read_out(interpreter, case, inputs)[0] == 7).all())


def test_the_guard_blocks_position_0_alone(interpreter: Interpreter) -> None:
    """A guarded token, though the most probable by far, is taken everywhere but at position 0 of guarded rows."""
    case = replace(CASES[0], guarded=(7,))
    inputs = arguments(case)
    inputs[0] = 50 * inputs[1][7].expand_as(inputs[0]).contiguous()
    argmax, candidates, entropy, _ = read_out(interpreter, case, inputs)
    assert argmax[0, 0] != 7
    assert candidates[0, 0] != 7
    assert bool(torch.isfinite(entropy).all())
    assert bool((argmax[0, 1:] == 7).all())
    assert bool((argmax[1] == 7).all()), "row 1 is not guarded"


def released(canvases: int) -> list[Tensor | float]:
    """Arguments of the released shape in bfloat16, without memory."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    states = empty(canvases, 256, 2816, dtype=torch.bfloat16), empty(262_144, 2816, dtype=torch.bfloat16)
    numbers = empty(canvases), empty(canvases, 256), empty(canvases, dtype=torch.bool), empty(3, dtype=torch.int64)
    return [*states, *numbers, 30.0, 2816**0.5]


@pytest.mark.parametrize("capability", sorted(SHARED_MEMORY), ids=lambda capability: f"sm_{capability}")
def test_compiles(capability: int) -> None:
    """Catches what a target cannot run, passes over the logits that read them in small pieces, and fused operations
    that give the largest logit an exponent other than 0, beside which the entropy of a sure position vanishes."""
    for launch in launches_of(kernel.canvas_readout, *released(1)):
        ptx = compile_launch(launch, capability).asm["ptx"]
        if launch.kernel.__name__ in {"find_largest", "exponentiate"}:
            assert "ld.global.v4.b32" in ptx
        assert launch.kernel.__name__ != "exponentiate" or "fma." not in ptx


def test_nothing_of_the_vocabularys_size_is_float32() -> None:
    """Catches the temporaries that make other servers run out of memory, and parts that grow with the batch."""
    for launch in launches_of(kernel.canvas_readout, *released(16)):
        for value in launch.arguments.values():
            if isinstance(value, Tensor) and value.dtype == torch.float32:
                assert value.nbytes < 1 << 20
            if isinstance(value, Tensor):
                assert value.nbytes <= 512 * 262_144 * 2
