"""How the experts' weights are stored, and how a kernel widens them, in Triton.

Codes are read in words, two columns of float8 or eight of 4-bit codes at a time, that hold what one thread of a matrix
unit wants of a row: widening then costs 3 to 5 instructions a weight in all of the loop (counted in sm_90 code of
Triton 3.6), against 6 to 8 byte by byte.
"""

from __future__ import annotations

import triton
import triton.language as tl

WIDE = tl.constexpr(0)
"""Weights in the dtype of the activations."""
INT4 = tl.constexpr(1)
"""Codes -8..7, stored plus 8, two in a byte: of a group of 32 columns byte `4 t + 2 j + h` holds column `8 h + 2 t + j`
in its low half and the column 16 further on in its high half; a scale a group, in the dtype of the activations."""
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

# A word of eight codes to four pairs of bfloat16: four bits set below 0x4300 are 128 plus the code plus 8. Then times
# the scale, which comes twice in its register.
_INT4_TO_BF16 = tl.constexpr("""{
    .reg .b32 word, upper, one, offset, zero;
    mov.b32 upper, 0x43004300;
    mov.b32 one, 0x3F803F80;
    mov.b32 offset, 0xC308C308;
    mov.b32 zero, 0x80008000;
    lop3.b32 $0, $4, 0x000F000F, upper, 0xEA;
    shr.u32 word, $4, 8;
    lop3.b32 $1, word, 0x000F000F, upper, 0xEA;
    shr.u32 word, $4, 4;
    lop3.b32 $2, word, 0x000F000F, upper, 0xEA;
    shr.u32 word, $4, 12;
    lop3.b32 $3, word, 0x000F000F, upper, 0xEA;
    fma.rn.bf16x2 $0, $0, one, offset;
    fma.rn.bf16x2 $1, $1, one, offset;
    fma.rn.bf16x2 $2, $2, one, offset;
    fma.rn.bf16x2 $3, $3, one, offset;
    fma.rn.bf16x2 $0, $0, $5, zero;
    fma.rn.bf16x2 $1, $1, $5, zero;
    fma.rn.bf16x2 $2, $2, $5, zero;
    fma.rn.bf16x2 $3, $3, $5, zero;
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
def decode_int4(words, scale, like):
    """Weights `[R, 8 W]` of the codes in uint32 `words [R, W]`, in the dtype of `like`.

    `scale [R, W / 4]` holds one factor a group; a weight is rounded once, after it is applied.
    """
    rows: tl.constexpr = words.shape[0]
    columns: tl.constexpr = words.shape[1]
    if like.dtype == tl.bfloat16:
        once = scale.to(tl.uint16, bitcast=True).to(tl.uint32)
        low_0, low_1, high_0, high_1 = tl.inline_asm_elementwise(
            _INT4_TO_BF16, "=&r,=&r,=&r,=&r,r,r", [words, spread(once | (once << 16), rows, columns)],
            (tl.uint32, tl.uint32, tl.uint32, tl.uint32), is_pure=True, pack=1,
        )  # fmt: skip
        low, high = tl.join(halves(low_0), halves(low_1)), tl.join(halves(high_0), halves(high_1))
    else:
        factor = spread(scale, rows, columns)
        low, high = widen_int4(words, factor), widen_int4(words >> 4, factor)
    # From word, byte of the word (2 j + h) and half of the byte to columns: 16 for the half, 8 for h, 2 for the word in
    # its group, 1 for j.
    weights = tl.reshape(tl.join(low, high), [rows, columns // (GROUP // 8), GROUP // 8, 2, 2, 2])
    return tl.reshape(tl.permute(weights, [0, 1, 5, 4, 2, 3]), [rows, 8 * columns])


@triton.jit
def widen_int4(words, factor):
    """Weights of the lower half of each byte, `[R, W, j, h]` for byte `2 j + h`."""
    first = tl.join(
        ((words & 0xF).to(factor.dtype) - 8.0) * factor, ((words >> 16 & 0xF).to(factor.dtype) - 8.0) * factor
    )
    second = tl.join(
        ((words >> 8 & 0xF).to(factor.dtype) - 8.0) * factor, ((words >> 24 & 0xF).to(factor.dtype) - 8.0) * factor
    )
    return tl.join(first, second)


@triton.jit
def spread(scale, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Each group's factor for all its words, `[ROWS, WORDS]`."""
    groups: tl.constexpr = scale.shape[1]
    return tl.reshape(tl.broadcast_to(scale[:, :, None], [ROWS, groups, GROUP // 8]), [ROWS, WORDS])


@triton.jit
def halves(pairs):
    """The two bfloat16 in each word of 32 bits along a new last axis, the lower half first."""
    lower = (pairs & 0xFFFF).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return tl.join(lower, (pairs >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True))
