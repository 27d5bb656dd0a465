"""The residual stream's joints in Triton: against float64 in the interpreter, and compiled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from plugins_trt.gpu import Gpu
from plugins_trt.residual_norm import reference
from tests.plugins_trt.triton_support import SHARED_MEMORY, Interpreter, compile_launch, launches_of

kernel = pytest.importorskip("plugins_trt.residual_norm.kernel", reason="Triton is not installed")

EPS = 1e-6


@dataclass(frozen=True)
class Joint:
    """A joint of some rows."""

    catches: str
    B: int = 2
    S: int = 3
    size: int = 48
    parts: int = 1
    beside: bool = False
    scalar: bool = False
    quantized: tuple[bool, ...] = (False,)


CASES = [
    Joint("one branch, one norm: a norm of the branch in place of the sum"),
    Joint("parts of other rows, a second branch that is not normed, a scalar that the norm sees", parts=4, beside=True,
          scalar=True),
    Joint("three norms: one's weight or factor applied to another", quantized=(False, False, False)),
    Joint("codes and plain norms in turn: results handed out in another order", quantized=(True, False, True)),
    Joint("no norm behind the sum", quantized=()),
    Joint("a prime size, whose last columns are padding that a mean must not count", size=37, parts=3, beside=True),
    Joint("a row of one", size=1),
    Joint("no token: an empty grid", B=0),
]  # fmt: skip


def arguments(case: Joint, dtype: torch.dtype) -> list[Any]:
    random = torch.Generator().manual_seed(case.size)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(dtype)

    rows = case.B, case.S, case.size
    weights = [normal(case.size) for _ in case.quantized]
    return [
        normal(*rows),
        normal(case.B * case.S, case.parts, case.size),
        normal(case.size),
        normal(*rows) if case.beside else None,
        normal(case.size) if case.beside else None,
        normal(case.size) if case.beside else None,
        torch.tensor([-0.7]).to(dtype) if case.scalar else None,
        weights,
        [1.0, 0.25, 3.0][: len(weights)],
        list(case.quantized),
        EPS,
    ]


def double(argument: Any) -> Any:
    if isinstance(argument, list):
        return [double(each) for each in argument]
    return argument.double() if isinstance(argument, Tensor) else argument


def oracle(case: Joint, inputs: list[Any], total: Tensor) -> list[Tensor]:
    """The total in float64, and the norms in float64 of the total as it was returned."""
    exact = reference.residual_norm(*double(inputs[:7]), [], [], [], EPS)
    wide = total.double()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    return exact + [normed * weight.double() * factor for weight, factor in zip(*inputs[7:9], strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.catches)
def test_residual_norm(case: Joint, dtype: torch.dtype, interpreter: Interpreter) -> None:
    inputs = arguments(case, dtype)
    got = interpreter(kernel.residual_norm, *inputs)
    assert len(got) == 1 + len(case.quantized) + sum(case.quantized)
    true = oracle(case, inputs, got[0])
    # A norm is a sum of squares, a root and two products in float32, relative to its largest element; of these, up to
    # three follow each other, and what they make is added to the residual.
    wide = 3 * (case.size + case.parts + 8) * torch.finfo(torch.float32).eps
    added = (true[0] / (-0.7 if case.scalar else 1.0) - inputs[0].double()).abs()
    terms = inputs[0].double().abs() + added.amax(-1, keepdim=True) if added.numel() else added
    results = iter(got)
    for index, exact in enumerate(true):
        one = next(results)
        codes = index > 0 and case.quantized[index - 1]
        largest = exact.abs().amax(-1, keepdim=True) if exact.numel() else exact
        slack = wide * (largest if index else terms)
        if codes:
            # Half of a code's last place, of three bits and the hidden one, or of the subnormals' steps of 2^-9.
            step = next(results).double().unsqueeze(-1)
            assert bool(((step * 448 - largest).abs() <= slack + 2.0**-24 * largest).all())
            one, rounding = one.double() * step, torch.maximum(exact.abs() / 16, step * 2.0**-10)
        else:
            assert one.dtype == dtype
            one, rounding = one.double(), torch.finfo(dtype).eps / 2 * exact.abs()
        assert bool(((one - exact).abs() <= rounding + slack).all()), case.catches


@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "codes"])
def test_the_reference_is_what_a_model_computes(quantized: bool) -> None:
    """Catches an oracle that norms twice, leaves out the second branch, or adds the parts of other tokens."""
    case = Joint("", parts=2, beside=True, scalar=True, quantized=(quantized,))
    residual, branch, branch_weight, beside, *others = arguments(case, torch.float64)
    others[4] = [0.25]
    beside_weight, joint_weight, scalar, [weight], [factor], _, eps = others

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight

    both = norm((branch[:, 0] + branch[:, 1]).view(2, 3, -1), branch_weight) + norm(beside, beside_weight)
    total = (residual + norm(both, joint_weight)) * scalar
    got = reference.residual_norm(residual, branch, branch_weight, beside, *others)
    torch.testing.assert_close(got[0], total, rtol=1e-13, atol=1e-13)
    if quantized:
        exact = norm(total, weight) * factor
        torch.testing.assert_close(got[2].double() * 448, exact.abs().amax(-1), rtol=1e-6, atol=0)
        step = got[2].double().unsqueeze(-1)
        assert bool(((got[1].double() * step - exact).abs() <= torch.maximum(exact.abs() / 16, step * 2.0**-10)).all())
    else:
        torch.testing.assert_close(got[1], norm(total, weight) * factor, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("capability", "quantized"),
    # GPUs below sm_89 have no 8-bit products to quantise for.
    [(each, codes) for each in sorted(SHARED_MEMORY) for codes in (False, True) if each >= 89 or not codes],
)
def test_compiles(capability: int, quantized: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches rows that are read in small pieces, and a wait that older GPUs do not know."""
    monkeypatch.setattr(kernel, "gpu_of", lambda _: Gpu(capability, 132))

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    rows, weight = empty(1, 256, 2816), empty(2816, dtype=torch.float32)
    flags = [quantized] * 3
    joint = rows, empty(256, 8, 2816), weight, rows, weight, weight, empty(1), [weight] * 3, [1.0, 0.5, 1.0], flags, EPS
    (launch,) = launches_of(kernel.residual_norm, *joint)
    compiled = compile_launch(launch, capability)
    assert "ld.global.v4.b32" in compiled.asm["ptx"]
    assert ("griddepcontrol.wait" in compiled.asm["ptx"]) == (capability >= 90)
