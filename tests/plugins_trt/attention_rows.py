"""Rows of tokens over a paged pool, for the faces of canvas attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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


def arguments(case: Rows) -> list[Tensor]:
    """Arguments of `canvas_attention`, float32; slots that no token sees hold other requests' numbers."""
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
