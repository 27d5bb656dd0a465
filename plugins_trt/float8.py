"""Rounding to float8_e4m3fn inside Triton kernels: what rows of activations are quantised with."""

from __future__ import annotations

import triton
import triton.language as tl

LARGEST = tl.constexpr(448.0)
"""Largest finite number of float8_e4m3fn (Micikevicius et al. 2022, table 1)."""
_SMALLEST_ABSMAX = tl.constexpr(2.0**-100)
"""A row's largest magnitude counts as at least this, so that a row of zeros gets a scale to divide by."""


@triton.jit
def row_step(absmax):
    """The scale of a row's codes, in float32: `absmax / 448`."""
    return tl.math.div_rn(tl.maximum(absmax, _SMALLEST_ABSMAX), LARGEST.value)


@triton.jit
def encode_e4m3(values, DTYPE: tl.constexpr, ROUNDS: tl.constexpr):
    """Nearest float8_e4m3fn to float32 `values`, ties to even; what is larger than the largest becomes that.

    `ROUNDS` where the GPU has an instruction for that.
    """
    if not ROUNDS:
        values = round_to_e4m3(tl.minimum(tl.maximum(values, -LARGEST), LARGEST))
    return values.to(DTYPE)


@triton.jit
def round_to_e4m3(values):
    """Nearest values of float8_e4m3fn to float32 `values` of at most 448, ties to even, still in float32.

    Not left to the cast, for which old GPUs have no instruction and which Triton's interpreter gets wrong (3.9 loses
    the carry into the exponent, so that 127.4 becomes 64): that of these values is exact.
    """
    bits = values.to(tl.uint32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & 0xFFF00000).to(tl.float32, bitcast=True)
    # Below 2^-6 the step is 2^-9, which is the last place of a float32 about 1.5 * 2^14.
    subnormal = (values + 24576.0) - 24576.0
    return tl.where(tl.abs(values) < 0.015625, subnormal, normal)
