"""Rows for running a step outside the runtime: what an encode row and a denoise row see."""

from __future__ import annotations

import torch
from torch import Tensor

from export.config import ModelConfig
from export.model import Rows


def build_rows(
    config: ModelConfig,
    token_ids: Tensor,
    start: int,
    denoise: bool,
    pages: Tensor,
    self_conditioning: Tensor | None = None,
) -> Rows:
    """One row of text at position `start`, its prefix at `pages` from position 0 in sliding and in full layers alike.

    An encode row is causal. A denoise row sees all of itself and its prefix, of which sliding layers keep the last
    `sliding_window - 1` positions whatever the token's own place in the canvas.

    Args:
        config: the model's shape.
        token_ids: `[S]` int64.
        start: absolute position of the first token.
        denoise: the kind of row.
        pages: pages of the prefix in order, `[P]` int64.
        self_conditioning: `[S, H]`, zeros where None.
    """
    length, window = len(token_ids), config.sliding_window
    positions = start + torch.arange(length)
    if denoise:
        ends = torch.full((length,), start + length)
        windows = torch.full((length,), start - window + 1)
    else:
        ends, windows = positions + 1, positions - window + 1
    if self_conditioning is None:
        self_conditioning = torch.zeros(length, config.hidden_size)
    base = torch.zeros(1, dtype=torch.int64)
    return Rows(
        token_ids=token_ids[None],
        start=torch.tensor([start]),
        denoise=torch.tensor([denoise]),
        sliding_kv_start=windows.clamp(min=0)[None],
        sliding_kv_end=ends[None],
        full_kv_start=torch.zeros_like(ends)[None],
        full_kv_end=ends[None],
        sliding_page_table=pages[None],
        sliding_page_base=base,
        full_page_table=pages[None],
        full_page_base=base,
        self_conditioning=self_conditioning[None],
    )
