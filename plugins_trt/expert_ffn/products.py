"""The experts' two grouped products and the sum over a token's experts, in Triton.

A program owns one tile of an expert's weight rows and one block of its token rows, and walks along the columns. The
weights are the left operand, for the matrix units want 64 rows there and an expert rarely has as many tokens.
Programs of one block follow each other, so that an expert's weights are read in one stream, and blocks of one expert
find them in the L2 cache.

Padding rows of a block repeat the last pair: they cost no mask in the loop, and nothing stores them. Columns of a
product never mix, so a token's result does not depend on what else is in its block.
"""

from __future__ import annotations

import triton
import triton.language as tl

WIDE = tl.constexpr(0)
"""Weights in the dtype of the activations."""
E4M3_BITS = tl.constexpr(1)
"""Weights are bits of float8_e4m3fn in uint8, decoded to the dtype of the activations; a float32 scale a row."""
E4M3_DOT = tl.constexpr(2)
"""Weights and activations are float8_e4m3fn, a float32 scale a weight row and one a token."""

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
def multiply(weights, states, sums, ENCODING: tl.constexpr):
    """`sums + weights @ states` with float32 sums, `weights [R, D]` in their encoding, `states [D, B]`."""
    if ENCODING == E4M3_BITS:
        weights = decode_e4m3(weights, states)
    return tl.dot(weights, states, sums, input_precision="ieee")


@triton.jit(do_not_specialize=["pairs"])
def gate_up_product(
    X, X_SCALE, ROWS, BLOCK_EXPERT, GATE_UP, GATE_UP_SCALE, HIDDEN, pairs,
    HIDDEN_SIZE: tl.constexpr, INTERMEDIATE: tl.constexpr, TOP_K: tl.constexpr, ENCODING: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, WEIGHT_ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """`HIDDEN[row] = gelu_tanh(gate @ x) * (up @ x)` for a block of rows, in the order of the dispatch plan."""
    tiles: tl.constexpr = (INTERMEDIATE + WEIGHT_ROWS - 1) // WEIGHT_ROWS
    block = tl.program_id(0) // tiles
    expert = tl.load(BLOCK_EXPERT + block)
    if expert < 0:
        return
    row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    pair = tl.load(ROWS + row)
    token = tl.minimum(pair, pairs - 1) // TOP_K
    channel = (tl.program_id(0) % tiles) * WEIGHT_ROWS + tl.arange(0, WEIGHT_ROWS)
    # Rows past the last one read it again, which is cheaper than a mask, and are not stored.
    readable = channel if INTERMEDIATE % WEIGHT_ROWS == 0 else tl.minimum(channel, INTERMEDIATE - 1)
    column = tl.arange(0, DEPTH)

    x = X + token.to(tl.int64)[None, :] * HIDDEN_SIZE + column[:, None]
    gate = GATE_UP + expert.to(tl.int64) * (2 * INTERMEDIATE * HIDDEN_SIZE) + readable[:, None] * HIDDEN_SIZE + column
    gate_sums = tl.zeros([WEIGHT_ROWS, BLOCK_ROWS], tl.float32)
    up_sums = tl.zeros([WEIGHT_ROWS, BLOCK_ROWS], tl.float32)
    for start in range(0, HIDDEN_SIZE, DEPTH):
        if HIDDEN_SIZE % DEPTH == 0:
            states = tl.load(x + start)
            gate_weights = tl.load(gate + start, eviction_policy="evict_first")
            up_weights = tl.load(gate + start + INTERMEDIATE * HIDDEN_SIZE, eviction_policy="evict_first")
        else:
            inside = start + column < HIDDEN_SIZE
            states = tl.load(x + start, mask=inside[:, None], other=0.0)
            gate_weights = tl.load(gate + start, mask=inside[None, :], other=0.0)
            up_weights = tl.load(gate + start + INTERMEDIATE * HIDDEN_SIZE, mask=inside[None, :], other=0.0)
        gate_sums = multiply(gate_weights, states, gate_sums, ENCODING)
        up_sums = multiply(up_weights, states, up_sums, ENCODING)

    if ENCODING != WIDE:
        scale = GATE_UP_SCALE + expert * (2 * INTERMEDIATE) + readable
        gate_sums *= tl.load(scale)[:, None]
        up_sums *= tl.load(scale + INTERMEDIATE)[:, None]
    if ENCODING == E4M3_DOT:
        state_scale = tl.load(X_SCALE + token)[None, :]
        gate_sums *= state_scale
        up_sums *= state_scale
    # gelu_tanh(g) = g * (1 + tanh(z)) / 2 = g * sigmoid(2z), z = sqrt(2 / pi) * (g + 0.044715 g^3) (Hendrycks and
    # Gimpel, Gaussian Error Linear Units, 2016).
    twice = 1.5957691216057308 * (gate_sums + 0.044715 * gate_sums * gate_sums * gate_sums)
    hidden = gate_sums / (1.0 + tl.exp(-twice)) * up_sums
    place = HIDDEN + row.to(tl.int64)[None, :] * INTERMEDIATE + channel[:, None]
    stored = (pair < pairs)[None, :] & (channel < INTERMEDIATE)[:, None]
    tl.store(place, hidden.to(HIDDEN.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["pairs"])
def down_product(
    HIDDEN, HIDDEN_SCALE, ROWS, BLOCK_EXPERT, DOWN, DOWN_SCALE, EXPERT_WEIGHTS, PARTS, pairs,
    HIDDEN_SIZE: tl.constexpr, INTERMEDIATE: tl.constexpr, ENCODING: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, WEIGHT_ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """`PARTS[pair] = expert_weight * (down @ HIDDEN[row])` for a block of rows, in the order of the pairs."""
    tiles: tl.constexpr = (HIDDEN_SIZE + WEIGHT_ROWS - 1) // WEIGHT_ROWS
    block = tl.program_id(0) // tiles
    expert = tl.load(BLOCK_EXPERT + block)
    if expert < 0:
        return
    row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    pair = tl.load(ROWS + row)
    channel = (tl.program_id(0) % tiles) * WEIGHT_ROWS + tl.arange(0, WEIGHT_ROWS)
    readable = channel if HIDDEN_SIZE % WEIGHT_ROWS == 0 else tl.minimum(channel, HIDDEN_SIZE - 1)
    column = tl.arange(0, DEPTH)

    hidden = HIDDEN + row.to(tl.int64)[None, :] * INTERMEDIATE + column[:, None]
    down = DOWN + expert.to(tl.int64) * (HIDDEN_SIZE * INTERMEDIATE) + readable[:, None] * INTERMEDIATE + column
    sums = tl.zeros([WEIGHT_ROWS, BLOCK_ROWS], tl.float32)
    for start in range(0, INTERMEDIATE, DEPTH):
        if INTERMEDIATE % DEPTH == 0:
            states = tl.load(hidden + start)
            weights = tl.load(down + start, eviction_policy="evict_first")
        else:
            inside = start + column < INTERMEDIATE
            states = tl.load(hidden + start, mask=inside[:, None], other=0.0)
            weights = tl.load(down + start, mask=inside[None, :], other=0.0)
        sums = multiply(weights, states, sums, ENCODING)

    stored = pair < pairs
    factor = tl.load(EXPERT_WEIGHTS + pair, mask=stored, other=0.0).to(tl.float32)
    if ENCODING == E4M3_DOT:
        factor *= tl.load(HIDDEN_SCALE + row, mask=stored, other=0.0)
    sums *= factor[None, :]
    if ENCODING != WIDE:
        sums *= tl.load(DOWN_SCALE + expert * HIDDEN_SIZE + readable)[:, None]
    place = PARTS + pair.to(tl.int64)[None, :] * HIDDEN_SIZE + channel[:, None]
    tl.store(place, sums.to(PARTS.dtype.element_ty), mask=stored[None, :] & (channel < HIDDEN_SIZE)[:, None])


@triton.jit
def sum_parts(PARTS, OUTPUT, HIDDEN_SIZE: tl.constexpr, TOP_K: tl.constexpr, WIDTH: tl.constexpr):
    """`OUTPUT[token]` is the sum of its experts' parts, always in the order of its choices."""
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < HIDDEN_SIZE
    token = tl.program_id(0).to(tl.int64)
    total = tl.zeros([WIDTH], tl.float32)
    for choice in tl.static_range(TOP_K):
        place = PARTS + (token * TOP_K + choice) * HIDDEN_SIZE + column
        total += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(OUTPUT + token * HIDDEN_SIZE + column, total.to(OUTPUT.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["pairs"])
def quantize_rows(STATES, CODES, SCALE, ROWS, pairs, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """One row to float8_e4m3fn with its own scale, absmax / 448; rows that pad a dispatch plan stay as they are."""
    row = tl.program_id(0).to(tl.int64)
    if ROWS is not None:  # noqa: SIM102 (known when compiled, the load is not)
        if tl.load(ROWS + row) >= pairs:
            return
    column = tl.arange(0, PADDED)
    states = tl.load(STATES + row * SIZE + column, mask=column < SIZE, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(states), axis=0), 1e-30) / 448.0
    tl.store(CODES + row * SIZE + column, (states / scale).to(CODES.dtype.element_ty), mask=column < SIZE)
    tl.store(SCALE + row, scale)
