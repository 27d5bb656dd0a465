"""How the experts' weights are stored, and how a kernel widens them, in Triton.

Codes are read as 16-bit words, two columns of float8 or four of 4-bit codes at a time: what one thread of a matrix
unit wants of a row is then one word, and widening costs 3 to 5 instructions a weight in all of the loop (counted in
sm_90 code of Triton 3.6), against 6 to 8 byte by byte, which made the products wait for it and not for the memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

WIDE = tl.constexpr(0)
"""Weights in the dtype of the activations."""
INT4 = tl.constexpr(1)
"""Codes -8..7, stored plus 8, two in a byte: of a group of 32 columns byte `j` holds column `j` in its low half and
column `j + 16` in its high half; a scale a group, in the dtype of the activations."""
E4M3_BITS = tl.constexpr(2)
"""Weights are float8_e4m3fn, widened to the dtype of the activations; a float32 scale a row, as in every encoding from
this one on."""
E4M3_DOT = tl.constexpr(3)
"""Weights and activations are float8_e4m3fn, a float32 scale a weight row and one a token."""

GROUP = tl.constexpr(32)
"""Columns of a row of 4-bit weights that share a scale."""

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

# Two words of four codes each to two pairs of bfloat16 for their low halves and two for their high ones: a half byte
# set below 0x43 is 128 plus the code plus 8. Then times the word's scale, which comes twice in its register.
_INT4_TO_BF16 = tl.constexpr("""{
    .reg .b32 codes, upper, one, offset, zero;
    mov.b32 upper, 0x43434343;
    mov.b32 one, 0x3F803F80;
    mov.b32 offset, 0xC308C308;
    mov.b32 zero, 0x80008000;
    and.b32 codes, $4, 0x0F0F0F0F;
    prmt.b32 $0, codes, upper, 0x4140;
    prmt.b32 $1, codes, upper, 0x4342;
    fma.rn.bf16x2 $0, $0, one, offset;
    fma.rn.bf16x2 $1, $1, one, offset;
    fma.rn.bf16x2 $0, $0, $5, zero;
    fma.rn.bf16x2 $1, $1, $6, zero;
    shr.u32 codes, $4, 4;
    and.b32 codes, codes, 0x0F0F0F0F;
    prmt.b32 $2, codes, upper, 0x4140;
    prmt.b32 $3, codes, upper, 0x4342;
    fma.rn.bf16x2 $2, $2, one, offset;
    fma.rn.bf16x2 $3, $3, one, offset;
    fma.rn.bf16x2 $2, $2, $5, zero;
    fma.rn.bf16x2 $3, $3, $6, zero;
}""")


@triton.jit
def decode_e4m3(words, like):
    """Exact values `[R, 2 W]` of float8_e4m3fn codes, two in each of `words [R, W]` uint16, in the dtype of `like`.

    Sign and the other seven bits are moved into place, then the exponents' bias is mended by a product, which also
    serves the subnormal numbers. Works where the GPU knows no float8.
    """
    if like.dtype == tl.bfloat16:
        first, second = halves(
            tl.inline_asm_elementwise(_E4M3_TO_BF16, "=&r,=&r,r", [words], tl.uint32, is_pure=True, pack=2)
        )
    else:
        first, second = widen_e4m3(words & 0xFF, like), widen_e4m3(words >> 8, like)
    return tl.reshape(tl.join(first, second), [words.shape[0], 2 * words.shape[1]])


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
def decode_int4(words, scale, like):
    """Weights `[R, 2 W]` of the low and the high halves of the bytes in uint16 `words [R, W]`, in the dtype of `like`.

    `scale [R, W / 8]` holds one factor a group; a weight is rounded once, after it is applied.
    """
    rows: tl.constexpr = words.shape[0]
    columns: tl.constexpr = words.shape[1]
    if like.dtype == tl.bfloat16:
        once = scale.to(tl.uint16, bitcast=True).to(tl.uint32)
        factor = spread(once | (once << 16), rows, columns)
        lows, highs = tl.inline_asm_elementwise(
            _INT4_TO_BF16, "=&r,=&r,=&r,=&r,r,r,r", [words, factor], (tl.uint32, tl.uint32), is_pure=True, pack=2
        )
        first_low, second_low = halves(lows)
        first_high, second_high = halves(highs)
    else:
        factor = spread(scale, rows, columns)
        first_low = ((words & 0xF).to(like.dtype) - 8.0) * factor
        first_high = ((words >> 4 & 0xF).to(like.dtype) - 8.0) * factor
        second_low = ((words >> 8 & 0xF).to(like.dtype) - 8.0) * factor
        second_high = ((words >> 12).to(like.dtype) - 8.0) * factor
    low = tl.reshape(tl.join(first_low, second_low), [rows, 2 * columns])
    high = tl.reshape(tl.join(first_high, second_high), [rows, 2 * columns])
    return low, high


@triton.jit
def spread(scale, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Each group's factor for all its words, `[ROWS, WORDS]`."""
    groups: tl.constexpr = scale.shape[1]
    return tl.reshape(tl.broadcast_to(scale[:, :, None], [ROWS, groups, GROUP // 4]), [ROWS, WORDS])


@triton.jit
def halves(pairs):
    """The two bfloat16 in each word of 32 bits, the lower half first."""
    lower = (pairs & 0xFFFF).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return lower, (pairs >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


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
