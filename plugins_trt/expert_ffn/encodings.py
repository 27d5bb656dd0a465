"""How the experts' weights are stored, and how a kernel widens them, in Triton.

Codes are read in words, two columns of float8 at a time, that hold what one thread of a matrix unit wants of a row:
widening then costs 3 to 5 instructions a weight in all of the loop (counted in sm_90 code of Triton 3.6), against 6 to
8 byte by byte.
"""

from __future__ import annotations

import triton
import triton.language as tl

WIDE = tl.constexpr(0)
"""Weights in the dtype of the activations."""
INT4 = tl.constexpr(1)
"""Codes of 4 bits, which `int4_products.py` reads."""
E4M3_BITS = tl.constexpr(2)
"""Weights are float8_e4m3fn, widened to the dtype of the activations; a float32 scale a row, as in the next one."""
E4M3_DOT = tl.constexpr(3)
"""Weights and activations are float8_e4m3fn, a float32 scale a weight row and one a token."""

TWO_TO_120 = tl.constexpr(2.0**120)
"""Between the exponents' bias of float8_e4m3fn, 7, and that of float32 and bfloat16, 127."""

# Two words of two codes each to two pairs of bfloat16: a byte into the upper half, seven bits moved down by four, the
# sign kept, times 2^120.
_E4M3_TO_BF16 = tl.constexpr("""{
    .reg .b32 codes, low, factor, zero;
    mov.b32 factor, 0x7B807B80;
    mov.b32 zero, 0x80008000;
    prmt.b32 codes, $2, 0, 0x1404;
    shr.u32 low, codes, 4;
    and.b32 low, low, 0x07F007F0;
    lop3.b32 codes, codes, zero, low, 0xEA;
    fma.rn.bf16x2 $0, codes, factor, zero;
    prmt.b32 codes, $2, 0, 0x3424;
    shr.u32 low, codes, 4;
    and.b32 low, low, 0x07F007F0;
    lop3.b32 codes, codes, zero, low, 0xEA;
    fma.rn.bf16x2 $1, codes, factor, zero;
}""")


@triton.jit
def decode_e4m3(words, like):
    """Exact values `[R, 2 W]` of float8_e4m3fn codes, two in each of `words [R, W]` uint16, in the dtype of `like`.

    Sign and the other seven bits are moved into place, then the exponents' bias is mended by a product, which also
    serves the subnormal numbers. Works where the GPU knows no float8.
    """
    if like.dtype == tl.bfloat16:
        pairs = tl.inline_asm_elementwise(_E4M3_TO_BF16, "=&r,=&r,r", [words], tl.uint32, is_pure=True, pack=2)
        weights = halves(pairs)
    else:
        weights = tl.join(widen_e4m3(words & 0xFF, like), widen_e4m3(words >> 8, like))
    return tl.reshape(weights, [words.shape[0], 2 * words.shape[1]])


@triton.jit
def widen_e4m3(code, like):
    """One code in the low half of each word, in float16 or float32."""
    if like.dtype == tl.float16:
        weights = (((code & 0x80) << 8) | ((code & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0
    else:
        word = code.to(tl.uint32)
        weights = (((word & 0x80) << 24) | ((word & 0x7F) << 20)).to(tl.float32, bitcast=True) * TWO_TO_120
    return weights


@triton.jit
def halves(pairs):
    """The two bfloat16 in each word of 32 bits along a new last axis, the lower half first."""
    lower = (pairs & 0xFFFF).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return tl.join(lower, (pairs >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True))


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
