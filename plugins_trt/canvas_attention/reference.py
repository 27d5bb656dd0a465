"""The meaning of canvas attention in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from plugins_trt.quantized_linear.reference import quantize_rows


def canvas_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    page_table: Tensor,
    page_base: Tensor,
    start: Tensor,
    kv_start: Tensor,
    kv_end: Tensor,
) -> Tensor:
    """Grouped-query attention of `B` rows of `S` tokens over their prefix in the pool and over themselves.

    Token `i` of row `b` stands at `start[b] + i` and sees the positions `kv_start[b, i] <= p < kv_end[b, i]`:
    those below `start[b]` in the pool, the others in the row. Scores are not scaled: the model norms its queries.

    Args:
        query: `[B, S, heads, D]`, normed and rotated.
        key, value: the row's own, `[B, S, kv_heads, D]`.
        key_pool, value_pool: `[pages, page_size, kv_heads, D]`.
        page_table: pages of each row's prefix in order, `[B, P]` int64; entries past the prefix are never seen.
        page_base: position of the first slot of each row's table, `[B]` int64.
        start: position of each row's first token, `[B]` int64.
        kv_start, kv_end: half-open interval of each token, `[B, S]` int64; never empty.

    Returns:
        `[B, S, heads, D]`.
    """
    slots = torch.arange(page_table.shape[1] * key_pool.shape[1], device=query.device)
    own = start[:, None] + torch.arange(query.shape[1], device=query.device)
    cached = page_base[:, None] + slots
    # A slot at or past `start` holds no token of this prefix yet: give it a position that no interval contains.
    cached = torch.where(cached < start[:, None], cached, -1)
    positions = torch.cat((cached, own), dim=1)
    visible = (positions[:, None] >= kv_start[..., None]) & (positions[:, None] < kv_end[..., None])
    keys = torch.cat((key_pool[page_table].flatten(1, 2), key), dim=1)
    values = torch.cat((value_pool[page_table].flatten(1, 2), value), dim=1)
    attended = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=visible[:, None],
        scale=1.0,
        enable_gqa=True,
    )
    return attended.transpose(1, 2)


def canvas_attention_codes(query: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    """`canvas_attention`, its results rounded to float8_e4m3fn with a scale for each token (`quantize_rows`).

    Args:
        query: and all others as there.

    Returns:
        codes: `[B, S, heads * D]` float8_e4m3fn.
        scale: float32 `[B, S]`.
    """
    return quantize_rows(canvas_attention(query, *others).flatten(2))
