"""The ONNX face of canvas attention against its reference, in ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from plugins_trt.canvas_attention.onnx import function
from plugins_trt.canvas_attention.reference import canvas_attention
from tests.plugins_trt.onnx_session import OperationSession

EPS = torch.finfo(torch.float32).eps
NAMES = (
    "query key value key_pool value_pool page_table page_base start kv_start kv_end".split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Rows:
    """Rows over a pool."""

    catches: str
    starts: tuple[int, ...] = (9,)
    tokens: int = 5
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 6
    page_size: int = 4
    window: int | None = None
    causal: bool = False
    base: int = 0
    """Position of the table's first slot."""
    pages: int = 6


CASES = [
    Rows("a canvas over a prefix that ends inside a page"),
    Rows("a prefix that ends at a page's border", starts=(8,)),
    Rows("no prefix: pages are there and nothing in them is seen", starts=(0,)),
    Rows("no prefix and no pages", starts=(0,), pages=0),
    Rows("causal rows: no token sees the next", causal=True),
    Rows("a window that starts inside a page, the table starting later than position 0", base=4, window=4),
    Rows("a causal window that begins in the pool for some tokens and in the row for others", causal=True, window=3),
    Rows("rows of different lengths in one call", starts=(3, 17)),
    Rows("one token", tokens=1, causal=True),
    Rows("one query head a K/V head", kv_heads=4),
    Rows("all query heads on one K/V head, odd sizes", heads=3, kv_heads=1, head_dim=5, page_size=7, tokens=3),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.catches)
def test_attention(case: Rows) -> None:
    arguments = _arguments(case)
    attributes = {
        "grouped_query": [0, 0, case.kv_heads, case.heads // case.kv_heads, case.head_dim],
        "joined_pages": [0, -1, case.kv_heads, case.head_dim],
    }
    session = OperationSession(function(), dict(zip(NAMES, arguments, strict=True)), [(torch.float32, 4)], attributes)
    (attended,) = session(*arguments)
    wide = [argument.double() if argument.is_floating_point() else argument for argument in arguments]
    true = canvas_attention(*wide)
    # A score of head_dim terms is off by head_dim * eps * |q| |k|; the shares follow it relatively, and T of them are
    # added with values up to the largest.
    query, keys = arguments[0], torch.cat([arguments[1].flatten(), arguments[3].flatten()])
    score = case.head_dim * query.abs().max() * keys.abs().max()
    values = torch.cat([arguments[2].flatten(), arguments[4].flatten()]).abs().max()
    keys_seen = case.pages * case.page_size + case.tokens
    allowed = EPS * (2 * case.head_dim * score + 2 * keys_seen) * values
    assert (attended.double() - true).abs().max() <= allowed


def test_pages_beyond_the_prefix_do_not_matter() -> None:
    """A page table may name any page behind the prefix, and its slots may hold another request's K/V."""
    case = CASES[0]
    arguments = _arguments(case)
    session = OperationSession(
        function(),
        dict(zip(NAMES, arguments, strict=True)),
        [(torch.float32, 4)],
        {"grouped_query": [0, 0, 2, 2, 6], "joined_pages": [0, -1, 2, 6]},
    )
    (before,) = session(*arguments)
    table = arguments[5].clone()
    table[:, 3:] = 7
    (after,) = session(*arguments[:5], table, *arguments[6:])
    assert torch.equal(before, after)


def _arguments(case: Rows) -> list[Tensor]:
    random = torch.Generator().manual_seed(sum(case.starts))

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    B, S = len(case.starts), case.tokens
    start = torch.tensor(case.starts)
    positions = start[:, None] + torch.arange(S)
    ends = positions + 1 if case.causal else (start[:, None] + S).expand(B, S)
    lowest = positions if case.causal else start[:, None].expand(B, S)
    begins = (lowest - case.window + 1).clamp(min=0) if case.window else torch.zeros_like(ends)
    table = torch.stack([torch.randperm(8, generator=random)[: case.pages] for _ in range(B)])
    pool = (8, case.page_size, case.kv_heads, case.head_dim)
    return [
        draw(B, S, case.heads, case.head_dim),
        draw(B, S, case.kv_heads, case.head_dim),
        draw(B, S, case.kv_heads, case.head_dim),
        draw(*pool),
        draw(*pool),
        table,
        torch.full((B,), case.base),
        start,
        begins,
        ends.contiguous(),
    ]
