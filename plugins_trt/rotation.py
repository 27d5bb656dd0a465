"""Rotary position embedding: no operation of our own, since ONNX has it, but traced as one node as it is there."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate the halves of each head against each other (Su et al. 2021).

    Args:
        x: `[B, S, heads, D]`.
        cosine, sine: of each position's angles, `[B, S, D / 2]`.
    """
    first, second = x.chunk(2, dim=-1)
    cosine, sine = cosine.unsqueeze(2), sine.unsqueeze(2)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


def rotate_as_one_node(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """`rotate` for tracing: ONNX Runtime takes 23 microseconds for 256 rows of 8 x 32, and 86 for the eight nodes."""
    rotated: Tensor = torch.onnx.ops.rotary_embedding(x.flatten(2), cosine, sine, num_heads=x.shape[2])
    return rotated.view(x.shape)
