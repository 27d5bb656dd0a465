"""The experts' two grouped products and the sum over a token's experts, in Triton.

A program owns one tile of an expert's weight rows and one block of its token rows, and walks along the columns. The
weights are the left operand, for the matrix units want 64 rows there and an expert rarely has as many tokens.
Programs of one block follow each other, so that an expert's weights are read in one stream, and blocks of one expert
find them in the L2 cache. There are programs for as many blocks as evenly spread tokens need; if there are more, a
program goes on to the next one that has none.

Where the GPU can (`OVERLAP`, sm_90 on) a kernel starts while the one before it ends: it asks for the weights that its
first programs need, waits for the other's results, and lets the next one start as soon as all its own programs have.

A block's rows are a power of two and, where `TAIL_ROWS` is not zero, a smaller one, with which the program multiplies
the same weights. What limits many tokens is what leaves the L2 cache: an H200 took 1.18 ms for the 7.5 GB that blocks
of 128 rows read for the first product of 8192 tokens. An expert of 150 tokens would read its weights once in a block of
160; `tiles.py` says which blocks are chosen. A block whose tail holds no pair is multiplied without it: that took the
two products of 2048 tokens in blocks of 160 from 569 to 513 us in bf16.

Padding rows of a block are not read, and nothing stores them. Columns of a product never mix, so a token's result does
not depend on what else is in its block.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from plugins_trt.expert_ffn.encodings import E4M3_BITS, E4M3_DOT, GROUP, INT4, decode_e4m3, decode_int4
from plugins_trt.float8 import round_to_e4m3
from plugins_trt.overlap import fetch_ahead

STATE_GROUP = tl.constexpr(128)
"""Channels of the hidden states that share a scale in `E4M3_DOT`, `reference.FP8_STATE_GROUP`."""

FETCHED_AHEAD = tl.constexpr(32768)
"""Bytes of its weights that a program asks for before it waits: 132 multiprocessors of two programs ask for 8 MB, about
what memory delivers while a kernel starts."""

FIRST_PROGRAMS = tl.constexpr(512)
"""Programs that may run before a kernel's first ones end; later ones never wait."""


@triton.jit
def some_columns(states, known, column, SIZE: tl.constexpr, DEPTH: tl.constexpr):
    """`[DEPTH, R]`: the `column` of state rows that `states [R]` point to; zero in rows not `known` and past `SIZE`."""
    inside = known[None, :]
    if SIZE % DEPTH != 0:
        inside &= (column < SIZE)[:, None]
    return tl.load(states[None, :] + column[:, None], mask=inside, other=0.0)


@triton.jit
def row_products(
    states, known, tail_states, tail_known, weights, weights_known, scales,
    MAIN_ROWS: tl.constexpr, TAIL_ROWS: tl.constexpr, WEIGHT_ROWS: tl.constexpr, SIZE: tl.constexpr,
    DEPTH: tl.constexpr, ENCODING: tl.constexpr,
):  # fmt: skip
    """Products of every weight row with every state row, float32 `[WEIGHT_ROWS, MAIN_ROWS]` and those of the tail.

    `states` and `weights` point to the first of `SIZE` columns of each row, encoded weights in words, `scales`
    to each row's first group scale where the weights have 4 bits. Rows not `known`, of weights that have more than 4
    bits too (None: they all are), are zeros. Without a tail the first result comes twice.
    """
    sums = tl.zeros([WEIGHT_ROWS, MAIN_ROWS], tl.float32)
    if TAIL_ROWS != 0:
        tail_sums = tl.zeros([WEIGHT_ROWS, TAIL_ROWS], tl.float32)
    # The loops count in the largest unit, for Triton tells alignment from products but not from quotients.
    if ENCODING == INT4:
        tl.static_assert(TAIL_ROWS == 0, "blocks of 4-bit weights have no tail")
        column = tl.arange(0, DEPTH)
        word = tl.arange(0, DEPTH // 8)
        group = tl.arange(0, DEPTH // GROUP)
        for start in range(0, SIZE // GROUP, DEPTH // GROUP):
            state_places = states[None, :] + (column + start * GROUP)[:, None]
            word_places = weights[:, None] + (word + start * (GROUP // 8))[None, :]
            scale_places = scales[:, None] + (group + start)[None, :]
            if SIZE % DEPTH == 0:
                some_states = tl.load(state_places)
                words = tl.load(word_places, eviction_policy="evict_first")
                scale = tl.load(scale_places)
            else:
                some_states = tl.load(state_places, mask=(column + start * GROUP < SIZE)[:, None], other=0.0)
                known_words = (word + start * (GROUP // 8) < SIZE // 8)[None, :]
                words = tl.load(word_places, mask=known_words, other=0, eviction_policy="evict_first")
                scale = tl.load(scale_places, mask=(group + start < SIZE // GROUP)[None, :], other=0.0)
            sums = tl.dot(decode_int4(words, scale, some_states), some_states, sums, input_precision="ieee")
    else:
        # Columns in one word of the weights.
        packed: tl.constexpr = 2 if ENCODING == E4M3_BITS else 1
        column = tl.arange(0, DEPTH)
        word = tl.arange(0, DEPTH // packed)
        for start in range(0, SIZE // packed, DEPTH // packed):
            word_places = weights[:, None] + (word + start)[None, :]
            some_states = some_columns(states, known, column + start * packed, SIZE, DEPTH)
            if SIZE % DEPTH != 0:
                inside = (word + start < SIZE // packed)[None, :]
                if weights_known is not None:
                    inside &= weights_known[:, None]
                words = tl.load(word_places, mask=inside, other=0.0, eviction_policy="evict_first")
            elif weights_known is not None:
                words = tl.load(word_places, mask=weights_known[:, None], other=0.0, eviction_policy="evict_first")
            else:
                words = tl.load(word_places, eviction_policy="evict_first")
            if ENCODING == E4M3_BITS:
                words = decode_e4m3(words, some_states)
            sums = tl.dot(words, some_states, sums, input_precision="ieee")
            if TAIL_ROWS != 0:
                some_states = some_columns(tail_states, tail_known, column + start * packed, SIZE, DEPTH)
                tail_sums = tl.dot(words, some_states, tail_sums, input_precision="ieee")
    if TAIL_ROWS == 0:
        tail_sums = sums
    return sums, tail_sums


@triton.jit
def grouped_products(
    states, state_scales, known, tail_states, tail_scales, tail_known, weights, BLOCK_ROWS: tl.constexpr,
    MAIN_ROWS: tl.constexpr, TAIL_ROWS: tl.constexpr, WEIGHT_ROWS: tl.constexpr, SIZE: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """`row_products` of float8 codes whose rows have a scale for each `STATE_GROUP` columns.

    `state_scales` point to each row's first scale; those of the next group lie `BLOCK_ROWS` further on.
    """
    tl.static_assert(STATE_GROUP % DEPTH == 0, "a turn has columns of one group")
    sums = tl.zeros([WEIGHT_ROWS, MAIN_ROWS], tl.float32)
    if TAIL_ROWS != 0:
        tail_sums = tl.zeros([WEIGHT_ROWS, TAIL_ROWS], tl.float32)
    column = tl.arange(0, DEPTH)
    # No mask: whatever the scales of padding rows are, nothing stores what they lead to. Asked for a turn before they
    # are needed, since Triton does so for a product's operands alone: 38 % of an H200's stalls were that wait.
    scale = tl.load(state_scales)
    if TAIL_ROWS != 0:
        tail_scale = tl.load(tail_scales)
    for start in range(0, SIZE, DEPTH):
        group = tl.minimum(start + DEPTH, SIZE - 1) // STATE_GROUP * BLOCK_ROWS
        next_scale = tl.load(state_scales + group)
        if TAIL_ROWS != 0:
            next_tail_scale = tl.load(tail_scales + group)
        word_places = weights[:, None] + (column + start)[None, :]
        if SIZE % DEPTH == 0:
            words = tl.load(word_places, eviction_policy="evict_first")
        else:
            inside = (column + start < SIZE)[None, :]
            words = tl.load(word_places, mask=inside, other=0.0, eviction_policy="evict_first")
        products = tl.dot(words, some_columns(states, known, column + start, SIZE, DEPTH))
        if TAIL_ROWS != 0:
            tail_products = tl.dot(words, some_columns(tail_states, tail_known, column + start, SIZE, DEPTH))
            tail_sums += tail_products * tail_scale[None, :]
            tail_scale = next_tail_scale
        sums += products * scale[None, :]
        scale = next_scale
    if TAIL_ROWS == 0:
        tail_sums = sums
    return sums, tail_sums


@triton.jit
def encoded_rows(WEIGHTS, SCALE, row, SIZE: tl.constexpr, ENCODING: tl.constexpr):
    """Where the weights and the scales of each of `row` begin; the second means nothing where no group has a scale."""
    packed: tl.constexpr = 8 if ENCODING == INT4 else 2 if ENCODING == E4M3_BITS else 1
    weights = WEIGHTS + row * (SIZE // packed)
    scales = weights
    if ENCODING == INT4:
        scales = SCALE + row * (SIZE // GROUP)
    return weights, scales


@triton.jit(do_not_specialize=["pairs"])
def gate_up_product(
    X, X_SCALE, ROWS, BLOCK_EXPERT, USED, GATE_UP, GATE_UP_SCALE, HIDDEN, HIDDEN_SCALE, pairs, EXPERTS: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr, INTERMEDIATE: tl.constexpr, TOP_K: tl.constexpr, ENCODING: tl.constexpr,
    MAIN_ROWS: tl.constexpr, TAIL_ROWS: tl.constexpr, WEIGHT_ROWS: tl.constexpr, DEPTH: tl.constexpr,
    ROUNDS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """`HIDDEN[row] = gelu_tanh(gate @ x) * (up @ x)` for a block of rows, in the order of the dispatch plan.

    With `E4M3_DOT` as codes and `HIDDEN_SCALE [blocks, groups, block_rows]`; `ROUNDS` where a cast rounds to e4m3.
    """
    tiles: tl.constexpr = (INTERMEDIATE + WEIGHT_ROWS - 1) // WEIGHT_ROWS
    first = (tl.program_id(0) % tiles) * WEIGHT_ROWS
    if OVERLAP:
        if tl.program_id(0) < FIRST_PROGRAMS:
            # The plan is not there yet; where every expert has a block, its number is the expert's.
            row = tl.minimum(tl.program_id(0) // tiles, EXPERTS - 1).to(tl.int64) * (2 * INTERMEDIATE)
            row += first
            gate, _ = encoded_rows(GATE_UP, GATE_UP_SCALE, row, HIDDEN_SIZE, ENCODING)
            up, _ = encoded_rows(GATE_UP, GATE_UP_SCALE, row + INTERMEDIATE, HIDDEN_SIZE, ENCODING)
            fetch_ahead(gate, FETCHED_AHEAD // 2)
            fetch_ahead(up, FETCHED_AHEAD // 2)
        gdc_wait()
        gdc_launch_dependents()
    for tile in range(tl.program_id(0), tl.load(USED) * tiles, tl.num_programs(0)):
        rows = ROWS + tile // tiles * (MAIN_ROWS + TAIL_ROWS)
        no_tail = True
        if TAIL_ROWS != 0:
            no_tail = tl.load(rows + MAIN_ROWS) >= pairs
        if no_tail:
            gate_up_tile(
                X, X_SCALE, rows, BLOCK_EXPERT, GATE_UP, GATE_UP_SCALE, HIDDEN, HIDDEN_SCALE, pairs,
                tile // tiles, tile % tiles * WEIGHT_ROWS, HIDDEN_SIZE, INTERMEDIATE, TOP_K, ENCODING,
                MAIN_ROWS + TAIL_ROWS, MAIN_ROWS, 0, WEIGHT_ROWS, DEPTH, ROUNDS,
            )  # fmt: skip
        else:
            gate_up_tile(
                X, X_SCALE, rows, BLOCK_EXPERT, GATE_UP, GATE_UP_SCALE, HIDDEN, HIDDEN_SCALE, pairs,
                tile // tiles, tile % tiles * WEIGHT_ROWS, HIDDEN_SIZE, INTERMEDIATE, TOP_K, ENCODING,
                MAIN_ROWS + TAIL_ROWS, MAIN_ROWS, TAIL_ROWS, WEIGHT_ROWS, DEPTH, ROUNDS,
            )  # fmt: skip


@triton.jit
def gate_up_tile(
    X, X_SCALE, rows, BLOCK_EXPERT, GATE_UP, GATE_UP_SCALE, HIDDEN, HIDDEN_SCALE, pairs, block, first,
    HIDDEN_SIZE: tl.constexpr, INTERMEDIATE: tl.constexpr, TOP_K: tl.constexpr, ENCODING: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, MAIN_ROWS: tl.constexpr, TAIL_ROWS: tl.constexpr, WEIGHT_ROWS: tl.constexpr,
    DEPTH: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """`gate_up_product` for the channels from `first` on and those of a block's `rows` that hold any."""
    expert = tl.load(BLOCK_EXPERT + block).to(tl.int64)
    row = block * BLOCK_ROWS + tl.arange(0, MAIN_ROWS)
    pair = tl.load(rows + tl.arange(0, MAIN_ROWS))
    token = tl.minimum(pair, pairs - 1) // TOP_K
    tail_row, tail_pair, tail_token = row, pair, token
    if TAIL_ROWS != 0:
        tail_row = block * BLOCK_ROWS + MAIN_ROWS + tl.arange(0, TAIL_ROWS)
        tail_pair = tl.load(rows + MAIN_ROWS + tl.arange(0, TAIL_ROWS))
        tail_token = tl.minimum(tail_pair, pairs - 1) // TOP_K

    # Gate rows and their up rows in one tile. Rows past the last one lead to hidden states of zero.
    lane = tl.arange(0, 2 * WEIGHT_ROWS)
    channel = first + lane % WEIGHT_ROWS
    channel_known = None
    if INTERMEDIATE % WEIGHT_ROWS != 0:
        channel_known = channel < INTERMEDIATE
        channel = tl.minimum(channel, INTERMEDIATE - 1)
    weight_row = expert * (2 * INTERMEDIATE) + channel + lane // WEIGHT_ROWS * INTERMEDIATE
    weights, scales = encoded_rows(GATE_UP, GATE_UP_SCALE, weight_row, HIDDEN_SIZE, ENCODING)
    sums, tail_sums = row_products(
        X + token.to(tl.int64) * HIDDEN_SIZE, pair < pairs, X + tail_token.to(tl.int64) * HIDDEN_SIZE,
        tail_pair < pairs, weights, channel_known, scales,
        MAIN_ROWS, TAIL_ROWS, 2 * WEIGHT_ROWS, HIDDEN_SIZE, DEPTH, ENCODING,
    )  # fmt: skip

    scale = GATE_UP_SCALE + weight_row if ENCODING >= E4M3_BITS else GATE_UP_SCALE
    scale_block = block * (((INTERMEDIATE + STATE_GROUP - 1) // STATE_GROUP - 1) * BLOCK_ROWS)
    write_hidden(
        sums, scale, X_SCALE, token, HIDDEN, HIDDEN_SCALE, row, row + scale_block, pair < pairs, first,
        INTERMEDIATE, WEIGHT_ROWS, MAIN_ROWS, BLOCK_ROWS, ENCODING, ROUNDS,
    )  # fmt: skip
    if TAIL_ROWS != 0:
        write_hidden(
            tail_sums, scale, X_SCALE, tail_token, HIDDEN, HIDDEN_SCALE, tail_row, tail_row + scale_block,
            tail_pair < pairs, first, INTERMEDIATE, WEIGHT_ROWS, TAIL_ROWS, BLOCK_ROWS, ENCODING, ROUNDS,
        )  # fmt: skip


@triton.jit
def write_hidden(
    sums, weight_scale, X_SCALE, token, HIDDEN, HIDDEN_SCALE, row, scale_place, known, first,
    INTERMEDIATE: tl.constexpr, WEIGHT_ROWS: tl.constexpr, COUNT: tl.constexpr, SCALE_STRIDE: tl.constexpr,
    ENCODING: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """Gate `sums [2 * WEIGHT_ROWS, COUNT]` and store channels from `first` on of the rows that are `known`."""
    if ENCODING >= E4M3_BITS:
        sums *= tl.load(weight_scale)[:, None]
    if ENCODING == E4M3_DOT:
        sums *= tl.load(X_SCALE + token)[None, :]
    gate, up = tl.split(tl.permute(tl.reshape(sums, [2, WEIGHT_ROWS, COUNT]), [1, 2, 0]))
    # gelu_tanh(g) = g * (1 + tanh(z)) / 2 = g * sigmoid(2z), z = sqrt(2 / pi) * (g + 0.044715 g^3) (Hendrycks and
    # Gimpel, Gaussian Error Linear Units, 2016).
    twice = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    hidden = gate / (1.0 + tl.exp(-twice)) * up
    channel = first + tl.arange(0, WEIGHT_ROWS)
    if ENCODING == E4M3_DOT:
        groups: tl.constexpr = WEIGHT_ROWS // STATE_GROUP
        tl.static_assert(groups * STATE_GROUP == WEIGHT_ROWS, "a tile of hidden states has whole groups of channels")
        cells = tl.reshape(hidden, [groups, STATE_GROUP, COUNT])
        largest = tl.maximum(tl.max(tl.abs(cells), axis=1), 1e-30)
        hidden = tl.reshape(cells * (448.0 / largest)[:, None, :], [WEIGHT_ROWS, COUNT])
        if not ROUNDS:
            hidden = round_to_e4m3(hidden)
        group = first // STATE_GROUP + tl.arange(0, groups)
        places = HIDDEN_SCALE + scale_place[None, :] + group[:, None] * SCALE_STRIDE
        tl.store(places, largest * (1.0 / 448.0), mask=known[None, :] & (group * STATE_GROUP < INTERMEDIATE)[:, None])
    place = HIDDEN + row.to(tl.int64)[None, :] * INTERMEDIATE + channel[:, None]
    tl.store(place, hidden.to(HIDDEN.dtype.element_ty), mask=known[None, :] & (channel < INTERMEDIATE)[:, None])


@triton.jit(do_not_specialize=["pairs"])
def down_product(
    HIDDEN, HIDDEN_SCALE, ROWS, BLOCK_EXPERT, USED, DOWN, DOWN_SCALE, EXPERT_WEIGHTS, PARTS, pairs,
    HIDDEN_SIZE: tl.constexpr, INTERMEDIATE: tl.constexpr, ENCODING: tl.constexpr, MAIN_ROWS: tl.constexpr,
    TAIL_ROWS: tl.constexpr, WEIGHT_ROWS: tl.constexpr, DEPTH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """`PARTS[pair] = expert_weight * (down @ HIDDEN[row])` for a block of rows, in the order of the pairs."""
    tiles: tl.constexpr = (HIDDEN_SIZE + WEIGHT_ROWS - 1) // WEIGHT_ROWS
    first = (tl.program_id(0) % tiles) * WEIGHT_ROWS
    used = tl.load(USED)
    if OVERLAP:
        # The plan is older than the kernel before this one, which waited for it before it let this one start.
        if tl.program_id(0) < tl.minimum(FIRST_PROGRAMS, used * tiles):
            row = tl.load(BLOCK_EXPERT + tl.program_id(0) // tiles).to(tl.int64) * HIDDEN_SIZE + first
            start, _ = encoded_rows(DOWN, DOWN_SCALE, row, INTERMEDIATE, ENCODING)
            fetch_ahead(start, FETCHED_AHEAD)
        gdc_wait()
        gdc_launch_dependents()
    for tile in range(tl.program_id(0), used * tiles, tl.num_programs(0)):
        rows = ROWS + tile // tiles * (MAIN_ROWS + TAIL_ROWS)
        no_tail = True
        if TAIL_ROWS != 0:
            no_tail = tl.load(rows + MAIN_ROWS) >= pairs
        if no_tail:
            down_tile(
                HIDDEN, HIDDEN_SCALE, rows, BLOCK_EXPERT, DOWN, DOWN_SCALE, EXPERT_WEIGHTS, PARTS, pairs,
                tile // tiles, tile % tiles * WEIGHT_ROWS, HIDDEN_SIZE, INTERMEDIATE, ENCODING,
                MAIN_ROWS + TAIL_ROWS, MAIN_ROWS, 0, WEIGHT_ROWS, DEPTH,
            )  # fmt: skip
        else:
            down_tile(
                HIDDEN, HIDDEN_SCALE, rows, BLOCK_EXPERT, DOWN, DOWN_SCALE, EXPERT_WEIGHTS, PARTS, pairs,
                tile // tiles, tile % tiles * WEIGHT_ROWS, HIDDEN_SIZE, INTERMEDIATE, ENCODING,
                MAIN_ROWS + TAIL_ROWS, MAIN_ROWS, TAIL_ROWS, WEIGHT_ROWS, DEPTH,
            )  # fmt: skip


@triton.jit
def down_tile(
    HIDDEN, HIDDEN_SCALE, rows, BLOCK_EXPERT, DOWN, DOWN_SCALE, EXPERT_WEIGHTS, PARTS, pairs, block, first,
    HIDDEN_SIZE: tl.constexpr, INTERMEDIATE: tl.constexpr, ENCODING: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    MAIN_ROWS: tl.constexpr, TAIL_ROWS: tl.constexpr, WEIGHT_ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """`down_product` for the channels from `first` on and those of a block's `rows` that hold any."""
    expert = tl.load(BLOCK_EXPERT + block).to(tl.int64)
    row = block * BLOCK_ROWS + tl.arange(0, MAIN_ROWS)
    pair = tl.load(rows + tl.arange(0, MAIN_ROWS))
    tail_row, tail_pair = row, pair
    if TAIL_ROWS != 0:
        tail_row = block * BLOCK_ROWS + MAIN_ROWS + tl.arange(0, TAIL_ROWS)
        tail_pair = tl.load(rows + MAIN_ROWS + tl.arange(0, TAIL_ROWS))

    channel = first + tl.arange(0, WEIGHT_ROWS)
    weight_row = expert * HIDDEN_SIZE + channel
    if HIDDEN_SIZE % WEIGHT_ROWS != 0:
        weight_row = expert * HIDDEN_SIZE + tl.minimum(channel, HIDDEN_SIZE - 1)
    states = HIDDEN + row.to(tl.int64) * INTERMEDIATE
    tail_states = HIDDEN + tail_row.to(tl.int64) * INTERMEDIATE
    weights, scales = encoded_rows(DOWN, DOWN_SCALE, weight_row, INTERMEDIATE, ENCODING)
    # What the end needs is asked for before the loop, which hides the wait.
    row_scale = tl.load(DOWN_SCALE + weight_row) if ENCODING >= E4M3_BITS else None
    weight = tl.load(EXPERT_WEIGHTS + pair, mask=pair < pairs, other=0.0).to(tl.float32)
    if TAIL_ROWS != 0:
        tail_weight = tl.load(EXPERT_WEIGHTS + tail_pair, mask=tail_pair < pairs, other=0.0).to(tl.float32)
    if ENCODING == E4M3_DOT:
        groups: tl.constexpr = (INTERMEDIATE + STATE_GROUP - 1) // STATE_GROUP
        state_scales = HIDDEN_SCALE + block * ((groups - 1) * BLOCK_ROWS)
        sums, tail_sums = grouped_products(
            states, state_scales + row, pair < pairs, tail_states, state_scales + tail_row, tail_pair < pairs, weights,
            BLOCK_ROWS, MAIN_ROWS, TAIL_ROWS, WEIGHT_ROWS, INTERMEDIATE, DEPTH,
        )  # fmt: skip
    else:
        sums, tail_sums = row_products(
            states, pair < pairs, tail_states, tail_pair < pairs, weights, None, scales,
            MAIN_ROWS, TAIL_ROWS, WEIGHT_ROWS, INTERMEDIATE, DEPTH, ENCODING,
        )  # fmt: skip
    write_parts(sums, row_scale, weight, PARTS, channel, pair, pairs, HIDDEN_SIZE)
    if TAIL_ROWS != 0:
        write_parts(tail_sums, row_scale, tail_weight, PARTS, channel, tail_pair, pairs, HIDDEN_SIZE)


@triton.jit
def write_parts(sums, row_scale, weight, PARTS, channel, pair, pairs, HIDDEN_SIZE: tl.constexpr):
    """Weigh `sums` and store them as the parts of each `pair` below `pairs`; `row_scale` may be None."""
    if row_scale is not None:
        sums *= row_scale[:, None]
    sums *= weight[None, :]
    place = PARTS + pair.to(tl.int64)[None, :] * HIDDEN_SIZE + channel[:, None]
    tl.store(place, sums.to(PARTS.dtype.element_ty), mask=(pair < pairs)[None, :] & (channel < HIDDEN_SIZE)[:, None])


@triton.jit
def sum_parts(
    PARTS, OUTPUT, HIDDEN_SIZE: tl.constexpr, TOP_K: tl.constexpr, WIDTH: tl.constexpr, OVERLAP: tl.constexpr
):
    """`OUTPUT[token]` is the sum of its experts' parts, always in the order of its choices."""
    if OVERLAP:
        gdc_wait()
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < HIDDEN_SIZE
    token = tl.program_id(0).to(tl.int64)
    total = tl.zeros([WIDTH], tl.float32)
    for choice in tl.static_range(TOP_K):
        place = PARTS + (token * TOP_K + choice) * HIDDEN_SIZE + column
        total += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(OUTPUT + token * HIDDEN_SIZE + column, total.to(OUTPUT.dtype.element_ty), mask=inside)
