"""The two passes of a batch: encode the prefixes, then denoise canvases that see them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from export.model import Rows, StepModel


class Prefix(NamedTuple):
    """Encoded prefixes: each layer's K and V `[B, P, kv_heads, head_dim]`, and how much of them is real, `[B]`."""

    keys: list[Tensor]
    values: list[Tensor]
    length: Tensor

    def select(self, rows: Tensor) -> Prefix:
        """Those of some rows."""
        return Prefix([key[rows] for key in self.keys], [value[rows] for value in self.values], self.length[rows])


def encode(model: StepModel, tokens: Tensor, length: Tensor) -> tuple[Tensor, Prefix]:
    """Encode prefixes `[B, P]`, padded at the end; returns the final states `[B, P, H]` and what canvases see."""
    B, P = tokens.shape
    positions = torch.arange(P, device=tokens.device).expand(B, P)
    window = (positions - model.config.sliding_window + 1).clamp(min=0)
    rows = _rows(
        tokens, torch.zeros_like(length), False, (window, torch.zeros_like(positions), positions + 1), None, model
    )
    none = torch.zeros(0, device=tokens.device, dtype=model.embed_tokens.weight.dtype)
    empty = [none.view(B, 0, layer.kv_heads, layer.head_dim) for layer in model.config.layers]
    hidden, keys, values = model.transform(rows, empty, empty)
    return hidden, Prefix(keys, values, length)


def denoise(model: StepModel, canvas: Tensor, prefix: Prefix, soft_embedding: Tensor | None) -> Tensor:
    """Final states `[B, C, H]` of canvases `[B, C]`; `soft_embedding [B, C, H]` is None at the first step."""
    start = prefix.length[:, None].expand_as(canvas)
    window = (start - model.config.sliding_window + 1).clamp(min=0)
    intervals = (window, torch.zeros_like(start), start + canvas.shape[1])
    rows = _rows(canvas, prefix.length, True, intervals, soft_embedding, model)
    hidden, _, _ = model.transform(rows, prefix.keys, prefix.values)
    return hidden


def _rows(
    tokens: Tensor, start: Tensor, denoises: bool, intervals: tuple[Tensor, ...], soft: Tensor | None, model: StepModel
) -> Rows:
    B, S = tokens.shape
    sliding, full, end = intervals
    pages, base = torch.arange(B, device=tokens.device)[:, None], torch.zeros_like(start)
    if soft is None:
        dtype = model.embed_tokens.weight.dtype
        soft = torch.zeros(B, S, model.config.hidden_size, dtype=dtype, device=tokens.device)
    kind = torch.full((B,), denoises, device=tokens.device)
    return Rows(tokens, start, kind, sliding, end, full, end, pages, base, pages, base, soft)
