"""Norms and rotation of the heads in Triton: against the reference in the interpreter, and compiled."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from plugins_trt.gpu import Gpu
from plugins_trt.head_norm import kernel
from plugins_trt.head_norm.reference import head_norm
from plugins_trt.rotation import rotate
from tests.plugins_trt.triton_support import SHARED_MEMORY, Interpreter, compile_launch, launches_of

EPS = 1e-6


@dataclass(frozen=True)
class Heads:
    """Projections of some tokens."""

    catches: str
    B: int = 2
    S: int = 3
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    shared: bool = False
    """Whether V comes from the K projection."""
    joined: bool = False
    """Whether the three are slices of one projection."""


CASES = [
    Heads("fewer K/V heads than query heads, whose block is the larger"),
    Heads("sizes that are no powers of two", heads=6, kv_heads=3, head_dim=20),
    Heads("V from the K projection: K must not be normed in place", shared=True),
    Heads("slices of one projection, whose tokens stand apart", joined=True),
    Heads("one token", B=1, S=1),
    Heads("no token", B=0),
]


def arguments(case: Heads, dtype: torch.dtype) -> list[Tensor]:
    random = torch.Generator().manual_seed(case.head_dim)
    sizes = [case.heads, case.kv_heads, case.kv_heads]
    joined = torch.randn(case.B, case.S, sum(sizes), case.head_dim, generator=random).to(dtype)
    query, key, value = joined.split(sizes, dim=2)
    if not case.joined:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    angles = 100 * torch.rand(case.B, case.S, case.head_dim // 2, generator=random)
    weights = torch.randn(2, case.head_dim, generator=random).to(dtype)
    return [query, key, key if case.shared else value, *weights, angles.cos().to(dtype), angles.sin().to(dtype)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.catches)
def test_head_norm(case: Heads, dtype: torch.dtype, interpreter: Interpreter) -> None:
    inputs = arguments(case, dtype)
    got = interpreter(kernel.head_norm, *inputs, EPS)
    true = head_norm(*(x.double() for x in inputs), EPS)
    for one, other in zip(got, true, strict=True):
        assert one.dtype == dtype
        assert one.is_contiguous()
        # A sum of squares, a root, a product or two and a rotation in float32, then one rounding of the result.
        wide = (case.head_dim + 8) * torch.finfo(torch.float32).eps
        largest = other.abs().max().item() if other.numel() else 0.0
        assert bool(
            ((one.double() - other).abs() <= torch.finfo(dtype).eps / 2 * other.abs() + 2 * wide * largest).all()
        )


def test_the_reference_rotates_as_the_model_does() -> None:
    """Catches an oracle that drifts from the rotation that other faces trace."""
    query, key, value, query_weight, key_weight, cosine, sine = arguments(CASES[0], torch.float64)
    got = head_norm(query, key, value, query_weight, key_weight, cosine, sine, EPS)
    normed = query * torch.rsqrt(query.square().mean(-1, keepdim=True) + EPS) * query_weight
    torch.testing.assert_close(got[0], rotate(normed, cosine, sine), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got[2], value * torch.rsqrt(value.square().mean(-1, keepdim=True) + EPS))


@pytest.mark.parametrize("capability", sorted(SHARED_MEMORY), ids=lambda capability: f"sm_{capability}")
@pytest.mark.parametrize(("kv_heads", "head_dim"), [(8, 256), (2, 512)], ids=["sliding", "full"])
def test_compiles(capability: int, kv_heads: int, head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches heads that are read in small pieces, and a wait for the kernel before that older GPUs do not know."""
    monkeypatch.setattr(kernel, "gpu_of", lambda _: Gpu(capability, 132))

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    heads = [empty(1, 256, 16, head_dim), empty(1, 256, kv_heads, head_dim), empty(1, 256, kv_heads, head_dim)]
    angles = empty(1, 256, head_dim // 2)
    (launch,) = launches_of(kernel.head_norm, *heads, empty(head_dim), empty(head_dim), angles, angles, EPS)
    ptx = compile_launch(launch, capability).asm["ptx"]
    assert "ld.global.v4.b32" in ptx
    assert ("griddepcontrol.wait" in ptx) == (capability >= 90)
