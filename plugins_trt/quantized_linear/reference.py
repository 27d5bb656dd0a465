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
        return product_fp8(*quantize_rows(x), weight, scale, x.dtype)
    return (x.float() @ weight.float().T * scale).to(x.dtype)


def product_fp8(codes: Tensor, code_scale: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`(codes * code_scale[..., None]) @ (weight * scale[:, None]).T`, summed in float32, scaled, rounded once.

    Args:
        codes: float8_e4m3fn `[..., K]`.
        code_scale: of each row, float32 `[...]`.
        weight: float8_e4m3fn `[N, K]`.
        scale: of each output channel, float32 `[N]`.
        dtype: of the result.

    Returns:
        `[..., N]`.
    """
    return (codes.float() @ weight.float().T * code_scale.unsqueeze(-1) * scale).to(dtype)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric quantisation of each row to 8-bit floating point: `x ~ codes * scale[..., None]`.

    Args:
        x: `[..., K]`.

    Returns:
        codes: float8_e4m3fn `[..., K]`, rounded to nearest, ties to even.
        scale: `absmax / 448`, float32 `[...]`.
    """
    wide = x.float()
    # Divided in float64 and rounded, which is the float32 quotient (Figueroa 1995, "When is double rounding
    # innocuous?"): compiled for a GPU, float32 division is off by up to two units in the last place, and codes of
    # numbers half-way between two would depend on who computes them.
    largest = wide.abs().amax(-1).clamp(min=_SMALLEST_ABSMAX).double()
    scale = (largest / LARGEST).float()
    inverse = (1.0 / scale.double()).float()
    codes = (wide * inverse.unsqueeze(-1)).clamp(-LARGEST, LARGEST)
    return codes.to(torch.float8_e4m3fn), scale
