"""The step's inputs, derived on the device from the little that the host hands over."""

from __future__ import annotations

import torch
from torch import Tensor


def encode_inputs(
    window: int, token_ids: Tensor, start: Tensor, sliding_table: Tensor, sliding_base: Tensor, full_table: Tensor
) -> dict[str, Tensor]:
    """The step's inputs for encode rows, from what the host hands over."""
    positions = start[:, None] + torch.arange(token_ids.shape[1], device=start.device)
    oldest = (positions - (window - 1)).clamp(min=0)
    intervals = (oldest, positions + 1, torch.zeros_like(positions), positions + 1)
    tables = (sliding_table, sliding_base, full_table)
    return {"token_ids": token_ids, "start": start, **_visibility(intervals, tables)}


def denoise_inputs(
    window: int,
    states: Tensor,
    slots: Tensor,
    first_step: Tensor,
    token_ids: Tensor,
    start: Tensor,
    sliding_table: Tensor,
    sliding_base: Tensor,
    full_table: Tensor,
    **readout: Tensor,
) -> dict[str, Tensor]:
    """The step's inputs for denoise rows, from what the host hands over and the self-conditioning states."""
    shape = token_ids.shape
    # Every token of a canvas sees the same window: the last w - 1 positions before the canvas, and the canvas.
    oldest = (start - (window - 1)).clamp(min=0)[:, None].expand(shape).contiguous()
    end = (start + shape[1])[:, None].expand(shape).contiguous()
    condition = torch.where(first_step[:, None, None], 0, states.index_select(0, slots))
    tables = (sliding_table, sliding_base, full_table)
    visibility = _visibility((oldest, end, torch.zeros_like(end), end), tables)
    return {"token_ids": token_ids, "start": start, "self_conditioning": condition, **readout, **visibility}


def _visibility(intervals: tuple[Tensor, ...], tables: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    """The step's inputs that say what the rows see."""
    sliding_table, sliding_base, full_table = tables
    return {
        **dict(zip(("sliding_kv_start", "sliding_kv_end", "full_kv_start", "full_kv_end"), intervals, strict=True)),
        "sliding_page_table": sliding_table,
        "sliding_page_base": sliding_base,
        "full_page_table": full_table,
        "full_page_base": torch.zeros_like(sliding_base),
    }
