"""How the experts' weights are stored, and how a kernel widens them, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

WIDE = tl.constexpr(0)
"""Weights in the dtype of the activations."""
INT4 = tl.constexpr(1)
"""Codes -8..7, stored plus 8, two in a byte: of a group of 32 columns byte `j` holds column `j` in its low half and
column `j + 16` in its high half; a scale a group, in the dtype of the activations."""
E4M3_BITS = tl.constexpr(2)
"""Weights are bits of float8_e4m3fn in uint8, decoded to the dtype of the activations; a float32 scale a row, as in
every encoding from this one on."""
E4M3_DOT = tl.constexpr(3)
"""Weights and activations are float8_e4m3fn, a float32 scale a weight row and one a token."""

GROUP = tl.constexpr(32)
"""Columns of a row of 4-bit weights that share a scale."""

TWO_TO_120 = tl.constexpr(2.0**120)
"""Between the exponents' bias of float8_e4m3fn, 7, and that of float32 and bfloat16, 127."""


@triton.jit
def decode_e4m3(bits, like):
    """Exact value of float8_e4m3fn bits in the dtype of `like`.

    Sign and the other seven bits are moved into place, then the exponents' bias is mended by a product, which also
    serves the subnormal numbers. Works where the GPU knows no float8.
    """
    if like.dtype == tl.float32:
        word = bits.to(tl.uint32)
        weights = (((word & 0x80) << 24) | ((word & 0x7F) << 20)).to(tl.float32, bitcast=True) * TWO_TO_120
    else:
        half = bits.to(tl.uint16)
        if like.dtype == tl.float16:
            weights = (((half & 0x80) << 8) | ((half & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0
        else:
            weights = (((half & 0x80) << 8) | ((half & 0x7F) << 4)).to(tl.bfloat16, bitcast=True) * TWO_TO_120
    return weights


@triton.jit
def round_to_e4m3(states):
    """Nearest values of float8_e4m3fn to float32 `states` of at most 448, ties to even, still in float32.

    Not left to the cast, for which old GPUs have no instruction and which Triton's interpreter gets wrong (3.9 loses
    the carry into the exponent): that of these values is exact.
    """
    bits = states.to(tl.uint32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & 0xFFF00000).to(tl.float32, bitcast=True)
    # Below 2^-6 the step is 2^-9, which is the last place of a float32 about 1.5 * 2^14.
    subnormal = (states + 24576.0) - 24576.0
    return tl.where(tl.abs(states) < 0.015625, subnormal, normal)


@triton.jit
def decode_int4(codes, scale, like):
    """Weights of the low and the high halves of `codes [R, D / 2]` by `scale [R, D / 32]`, in the dtype of `like`."""
    rows: tl.constexpr = codes.shape[0]
    groups: tl.constexpr = scale.shape[1]
    factor = tl.broadcast_to(scale.to(like.dtype)[:, :, None], [rows, groups, GROUP // 2])
    factor = tl.reshape(factor, [rows, groups * (GROUP // 2)])
    return widen_nibble(codes & 0xF, like) * factor, widen_nibble(codes >> 4, like) * factor


@triton.jit
def widen_nibble(nibble, like):
    """`nibble - 8` in the dtype of `like`: set into the mantissa of a power of two, whose last place is one."""
    if like.dtype == tl.float32:
        code = nibble.to(tl.float32) - 8.0
    else:
        half = nibble.to(tl.uint16)
        if like.dtype == tl.float16:
            code = (half | 0x6400).to(tl.float16, bitcast=True) - 1032.0
        else:
            code = (half | 0x4300).to(tl.bfloat16, bitcast=True) - 136.0
    return code
