"""The meaning of the heads' norms and rotation in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def head_norm(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    cosine: Tensor,
    sine: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """RMS norm over each head (Zhang & Sennrich 2019), then for query and key the rotation of its halves (Su 2021).

    Args:
        query: projected, `[B, S, heads, D]`.
        key, value: projected, `[B, S, kv_heads, D]`; the same tensor in layers that take V from the K projection.
        query_weight, key_weight: of the norms, `[D]`; values are normed without one.
        cosine, sine: of each position's angles, `[B, S, D / 2]`.
        eps: added to the mean square.

    Returns:
        The three tensors that attention reads, in the shapes and dtypes of the projections.
    """
    return (
        _rotated(_normed(query, query_weight, eps), cosine, sine),
        _rotated(_normed(key, key_weight, eps), cosine, sine),
        _normed(value, None, eps),
    )


def _normed(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(wide), x.shape[-1:], None if weight is None else weight.to(wide), eps).to(x.dtype)


def _rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    cosine, sine = cosine.unsqueeze(2), sine.unsqueeze(2)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
