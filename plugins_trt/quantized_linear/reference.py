"""The meaning of the quantised linear layer in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 448.0
"""Largest finite number of float8_e4m3fn (Micikevicius et al. 2022, table 1)."""
_SMALLEST_ABSMAX = 2.0**-100
"""A row's largest magnitude counts as at least this, so that a row of zeros gets a scale to divide by."""


def linear_fp8(x: Tensor, weight: Tensor, scale: Tensor, dynamic_activations: bool = True) -> Tensor:
    """`x @ (weight * scale[:, None]).T`, summed in float32, scaled, and rounded once to the dtype of `x`.

    Args:
        x: `[..., K]`.
        weight: float8_e4m3fn `[N, K]`.
        scale: of each output channel, float32 `[N]`.
        dynamic_activations: quantise the activations too, each row by its own scale (`quantize_rows`); else they stay
            as they are.

    Returns:
        `[..., N]` in the dtype of `x`.
    """
    if dynamic_activations:
        codes, row_scale = quantize_rows(x)
        product = codes.float() @ weight.float().T * row_scale.unsqueeze(-1)
    else:
        product = x.float() @ weight.float().T
    return (product * scale).to(x.dtype)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric quantisation of each row to 8-bit floating point: `x ~ codes * scale[..., None]`.

    Args:
        x: `[..., K]`.

    Returns:
        codes: float8_e4m3fn `[..., K]`, rounded to nearest, ties to even.
        scale: `absmax / 448`, float32 `[...]`.
    """
    wide = x.float()
    scale = wide.abs().amax(-1).clamp(min=_SMALLEST_ABSMAX) / LARGEST
    codes = (wide * scale.reciprocal().unsqueeze(-1)).clamp(-LARGEST, LARGEST)
    return codes.to(torch.float8_e4m3fn), scale
