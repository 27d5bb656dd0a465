"""The experts' two grouped products with 4-bit weights and 8-bit activations, in Triton.

Programs, blocks and overlap are as in `products.py`. A code picks one of the eight magnitudes of its group's entry in a
table of float8_e4m3fn numbers, and gives it a sign: 7 instructions for eight weights and 15 in all of the loop, for
tiles of 128 weight rows and columns (counted in sm_90 code of Triton 3.6), against 26 with codes that were widened to
bfloat16 and scaled. A group's scale is in its entry, so nothing is left to do for it once weights are multiplied.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from plugins_trt.expert_ffn.encodings import round_to_e4m3
from plugins_trt.expert_ffn.products import FETCHED_AHEAD, FIRST_PROGRAMS, fetch_ahead

GROUP = tl.constexpr(32)
"""Columns of a weight row that share a scale."""

SCALE_BYTES = tl.constexpr(4)
"""Bytes a row of its float32 scale, which come before an expert's groups' scales."""

STATE_GROUP = tl.constexpr(64)
"""Channels of the hidden states that share a scale."""

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# Four bytes of two codes each to two times four numbers: the low three bits of a half choose one of the eight bytes of
# $3, which comes once for each byte; signs lie where the first four numbers want them, and four bits lower for the
# other four. The four bytes must be neighbours in a row, as a matrix unit's operand has them: the tests look whether
# Triton lays them out so.
_LOOK_UP = tl.constexpr("""{
    .reg .b32 chosen, signs, low, high;
    mov.b64 {low, high}, $3;
    and.b32 chosen, $2, 0x77777777;
    prmt.b32 $0, low, high, chosen;
    shr.u32 chosen, chosen, 16;
    prmt.b32 $1, low, high, chosen;
    shl.b32 signs, $2, 4;
    lop3.b32 $0, $0, $2, 0x80808080, 0xF8;
    lop3.b32 $1, $1, signs, 0x80808080, 0xF8;
}""")


@triton.jit(do_not_specialize=["pairs"])
def int4_gate_up_product(
    X, X_SCALE, ROWS, BLOCK_EXPERT, CODES, SCALES, TABLE, HIDDEN, HIDDEN_SCALE, pairs, EXPERTS: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr, INTERMEDIATE: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, WEIGHT_ROWS: tl.constexpr, DEPTH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """`HIDDEN[row] = gelu_tanh(gate @ x) * (up @ x)` for a block of rows, as codes in the order of the dispatch plan,
    with `HIDDEN_SCALE [blocks, groups of channels, block_rows]`."""
    tiles: tl.constexpr = (INTERMEDIATE + WEIGHT_ROWS - 1) // WEIGHT_ROWS
    block = tl.program_id(0) // tiles
    if OVERLAP:
        if tl.program_id(0) < FIRST_PROGRAMS:
            # The plan is not there yet; where every expert has a block, its number is the expert's.
            row = tl.minimum(block, EXPERTS - 1).to(tl.int64) * (2 * INTERMEDIATE)
            row += (tl.program_id(0) % tiles) * WEIGHT_ROWS
            fetch_ahead(CODES + row * (HIDDEN_SIZE // 2), FETCHED_AHEAD // 2)
            fetch_ahead(CODES + (row + INTERMEDIATE) * (HIDDEN_SIZE // 2), FETCHED_AHEAD // 2)
        gdc_wait()
        gdc_launch_dependents()
    expert = tl.load(BLOCK_EXPERT + block).to(tl.int64)
    if expert < 0:
        return
    row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    pair = tl.load(ROWS + row)
    token = tl.minimum(pair, pairs - 1) // TOP_K

    # Gate rows and their up rows in one tile. Rows past the last one read it again, which is cheaper than a mask.
    first = (tl.program_id(0) % tiles) * WEIGHT_ROWS
    lane = tl.arange(0, 2 * WEIGHT_ROWS)
    channel = first + lane % WEIGHT_ROWS
    if INTERMEDIATE % WEIGHT_ROWS != 0:
        channel = tl.minimum(channel, INTERMEDIATE - 1)
    weight_row = channel + lane // WEIGHT_ROWS * INTERMEDIATE
    codes, scales, row_scale = stored_rows(CODES, SCALES, expert, weight_row, 2 * INTERMEDIATE, HIDDEN_SIZE)
    sums = int4_products(
        X + token.to(tl.int64) * HIDDEN_SIZE, codes, scales, TABLE,
        BLOCK_ROWS, 2 * WEIGHT_ROWS, 2 * INTERMEDIATE, HIDDEN_SIZE, DEPTH,
    )  # fmt: skip
    sums *= tl.load(row_scale)[:, None] * tl.load(X_SCALE + token)[None, :]

    gate, up = tl.split(tl.permute(tl.reshape(sums, [2, WEIGHT_ROWS, BLOCK_ROWS]), [1, 2, 0]))
    # gelu_tanh(g) = g * (1 + tanh(z)) / 2 = g * sigmoid(2z), z = sqrt(2 / pi) * (g + 0.044715 g^3) (Hendrycks and
    # Gimpel, Gaussian Error Linear Units, 2016).
    twice = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    hidden = gate / (1.0 + tl.exp(-twice)) * up
    store_codes(hidden, HIDDEN, HIDDEN_SCALE, block, row, first, pair < pairs, INTERMEDIATE, BLOCK_ROWS, WEIGHT_ROWS)


@triton.jit
def store_codes(
    hidden, HIDDEN, HIDDEN_SCALE, block, row, first, known,
    INTERMEDIATE: tl.constexpr, BLOCK_ROWS: tl.constexpr, WEIGHT_ROWS: tl.constexpr,
):  # fmt: skip
    """Round `hidden [WEIGHT_ROWS, BLOCK_ROWS]`, channels from `first` on, with a scale for each group of them."""
    groups: tl.constexpr = (INTERMEDIATE + STATE_GROUP - 1) // STATE_GROUP
    own: tl.constexpr = (WEIGHT_ROWS + STATE_GROUP - 1) // STATE_GROUP
    tl.static_assert(own * STATE_GROUP == WEIGHT_ROWS, "a tile of hidden states has whole groups of channels")
    channel = first + tl.arange(0, WEIGHT_ROWS)
    if INTERMEDIATE % WEIGHT_ROWS != 0:
        hidden = tl.where((channel < INTERMEDIATE)[:, None], hidden, 0.0)
    hidden = tl.reshape(hidden, [own, STATE_GROUP, BLOCK_ROWS])
    largest = tl.maximum(tl.max(tl.abs(hidden), axis=1), 1e-30)
    codes = tl.reshape(round_to_e4m3(hidden * (448.0 / largest)[:, None, :]), [WEIGHT_ROWS, BLOCK_ROWS])
    place = HIDDEN + row.to(tl.int64)[None, :] * INTERMEDIATE + channel[:, None]
    tl.store(place, codes.to(HIDDEN.dtype.element_ty), mask=known[None, :] & (channel < INTERMEDIATE)[:, None])
    group = first // STATE_GROUP + tl.arange(0, own)
    place = HIDDEN_SCALE + (block * groups + group[:, None]) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[None, :]
    tl.store(place, largest * (1.0 / 448.0), mask=(group < groups)[:, None] & known[None, :])


@triton.jit(do_not_specialize=["pairs"])
def int4_down_product(
    HIDDEN, HIDDEN_SCALE, ROWS, BLOCK_EXPERT, CODES, SCALES, TABLE, EXPERT_WEIGHTS, PARTS, pairs,
    HIDDEN_SIZE: tl.constexpr, INTERMEDIATE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, WEIGHT_ROWS: tl.constexpr, DEPTH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """`PARTS[pair] = expert_weight * (down @ HIDDEN[row])` for a block of rows, in the order of the pairs."""
    tiles: tl.constexpr = (HIDDEN_SIZE + WEIGHT_ROWS - 1) // WEIGHT_ROWS
    groups: tl.constexpr = (INTERMEDIATE + STATE_GROUP - 1) // STATE_GROUP
    block = tl.program_id(0) // tiles
    expert = tl.load(BLOCK_EXPERT + block).to(tl.int64)
    if expert < 0:
        return
    row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    pair = tl.load(ROWS + row)
    if OVERLAP:
        # The plan is older than the kernel before this one, which waited for it before it let this one start.
        if tl.program_id(0) < FIRST_PROGRAMS:
            first = expert * HIDDEN_SIZE + (tl.program_id(0) % tiles) * WEIGHT_ROWS
            fetch_ahead(CODES + first * (INTERMEDIATE // 2), FETCHED_AHEAD)
        gdc_wait()
        gdc_launch_dependents()

    channel = (tl.program_id(0) % tiles) * WEIGHT_ROWS + tl.arange(0, WEIGHT_ROWS)
    weight_row = channel
    if HIDDEN_SIZE % WEIGHT_ROWS != 0:
        weight_row = tl.minimum(channel, HIDDEN_SIZE - 1)
    codes, scales, row_scale = stored_rows(CODES, SCALES, expert, weight_row, HIDDEN_SIZE, INTERMEDIATE)
    sums = int4_grouped_products(
        HIDDEN + row.to(tl.int64) * INTERMEDIATE, HIDDEN_SCALE + block * (groups * BLOCK_ROWS), codes, scales, TABLE,
        BLOCK_ROWS, WEIGHT_ROWS, HIDDEN_SIZE, INTERMEDIATE, DEPTH,
    )  # fmt: skip

    stored = pair < pairs
    factor = tl.load(EXPERT_WEIGHTS + pair, mask=stored, other=0.0).to(tl.float32)
    sums *= tl.load(row_scale)[:, None] * factor[None, :]
    place = PARTS + pair.to(tl.int64)[None, :] * HIDDEN_SIZE + channel[:, None]
    tl.store(place, sums.to(PARTS.dtype.element_ty), mask=stored[None, :] & (channel < HIDDEN_SIZE)[:, None])


@triton.jit
def stored_rows(CODES, SCALES, expert, row, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """Where the codes, the first group's scale and the own scale of each `row` of an expert's matrix are.

    The own scales lie before those of the groups, which lie group by group: a tile of rows then reads runs of them.
    """
    scales = SCALES + expert * ((SCALE_BYTES + SIZE // GROUP) * ROWS)
    row_scale = scales.to(tl.pointer_type(tl.float32)) + row
    return CODES + (expert * ROWS + row) * (SIZE // 2), scales + SCALE_BYTES * ROWS + row, row_scale


@triton.jit
def int4_products(
    states, codes, scales, table, BLOCK_ROWS: tl.constexpr, WEIGHT_ROWS: tl.constexpr,
    ROWS: tl.constexpr, SIZE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Products of every weight row, less its own scale, with every state row, float32 `[WEIGHT_ROWS, BLOCK_ROWS]`."""
    sums = tl.zeros([WEIGHT_ROWS, BLOCK_ROWS], tl.float32)
    # Counts in groups, for Triton tells alignment from products but not from quotients.
    for group in range(0, SIZE // GROUP, DEPTH // GROUP):
        entries = tl.load(table + tl.trans(group_scales(scales, group, ROWS, SIZE, DEPTH)))
        weights = numbers(some_codes(codes, group, SIZE, DEPTH), entries)
        sums = tl.dot(weights, some_states(states, group, SIZE, DEPTH), sums)
    return sums


@triton.jit
def int4_grouped_products(
    states, state_scales, codes, scales, table, BLOCK_ROWS: tl.constexpr, WEIGHT_ROWS: tl.constexpr,
    ROWS: tl.constexpr, SIZE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """`int4_products` of states with scales, those of each next group of them `BLOCK_ROWS` on from `state_scales`.

    A turn has two groups of states, for the weights' scales of one would be too few to be copied asynchronously.
    """
    half: tl.constexpr = DEPTH // GROUP // 2
    tl.static_assert(half * GROUP == STATE_GROUP, "a turn has columns of two groups of states")
    sums = tl.zeros([WEIGHT_ROWS, BLOCK_ROWS], tl.float32)
    # Asked for a turn ahead, as only what is multiplied by matrix units is pipelined.
    next_even = next_state_scales(state_scales, 0, BLOCK_ROWS, SIZE)
    next_odd = next_state_scales(state_scales, half, BLOCK_ROWS, SIZE)
    for group in range(0, SIZE // GROUP, 2 * half):
        even, odd = next_even, next_odd
        next_even = next_state_scales(state_scales, group + 2 * half, BLOCK_ROWS, SIZE)
        next_odd = next_state_scales(state_scales, group + 3 * half, BLOCK_ROWS, SIZE)
        some_scales = tl.trans(group_scales(scales, group, ROWS, SIZE, DEPTH))
        first, second = tl.split(tl.permute(tl.reshape(some_scales, [WEIGHT_ROWS, 2, half]), [0, 2, 1]))
        first = numbers(some_codes(codes, group, SIZE, DEPTH // 2), tl.load(table + first))
        sums += tl.dot(first, some_states(states, group, SIZE, DEPTH // 2)) * even[None, :]
        second = numbers(some_codes(codes, group + half, SIZE, DEPTH // 2), tl.load(table + second))
        sums += tl.dot(second, some_states(states, group + half, SIZE, DEPTH // 2)) * odd[None, :]
    return sums


@triton.jit
def next_state_scales(state_scales, group, BLOCK_ROWS: tl.constexpr, SIZE: tl.constexpr):
    """Each row's scale of the states' group that begins with `group`, or 0 past the last one."""
    lane = tl.arange(0, BLOCK_ROWS)
    place = state_scales + group // (STATE_GROUP // GROUP) * BLOCK_ROWS + lane
    return tl.load(place, mask=lane < (SIZE // GROUP - group) * BLOCK_ROWS, other=0.0)


@triton.jit
def some_states(states, group, SIZE: tl.constexpr, DEPTH: tl.constexpr):
    """`DEPTH` columns of each row from that of `group` on."""
    column = tl.arange(0, DEPTH)
    places = states[None, :] + (column + group * GROUP)[:, None]
    if SIZE % DEPTH == 0:
        some = tl.load(places)
    else:
        some = tl.load(places, mask=(column + group * GROUP < SIZE)[:, None], other=0.0)
    return some


@triton.jit
def some_codes(codes, group, SIZE: tl.constexpr, DEPTH: tl.constexpr):
    """Codes of `DEPTH` columns of each row from that of `group` on, two in a byte."""
    byte = tl.arange(0, DEPTH // 2)
    places = codes[:, None] + (byte + group * (GROUP // 2))[None, :]
    if SIZE % DEPTH == 0:
        some = tl.load(places, eviction_policy="evict_first")
    else:
        known = (byte + group * (GROUP // 2) < SIZE // 2)[None, :]
        some = tl.load(places, mask=known, other=0, eviction_policy="evict_first")
    return some


@triton.jit
def group_scales(scales, group, ROWS: tl.constexpr, SIZE: tl.constexpr, DEPTH: tl.constexpr):
    """Scales of the groups of `DEPTH` columns from `group` on, `[groups, rows]`."""
    own = tl.arange(0, DEPTH // GROUP)
    places = scales[None, :] + ((own + group) * ROWS)[:, None]
    if SIZE % DEPTH == 0:
        some = tl.load(places, eviction_policy="evict_first")
    else:
        known = (own + group < SIZE // GROUP)[:, None]
        some = tl.load(places, mask=known, other=0, eviction_policy="evict_first")
    return some


@triton.jit
def numbers(codes, entries):
    """float8_e4m3fn numbers `[R, 2 B]` of uint8 `codes [R, B]`, two in each, with each group's eight numbers, bytes of
    int64 `entries [R, B / 16]`."""
    rows: tl.constexpr = codes.shape[0]
    groups: tl.constexpr = entries.shape[1]
    if _INTERPRETED:
        first, second = interpreted_look_up(codes, entries)
    else:
        each = tl.broadcast_to(entries[:, :, None], [rows, groups, GROUP // 2])
        first, second = tl.inline_asm_elementwise(
            _LOOK_UP, "=&r,=&r,r,l,l,l,l", [codes, tl.reshape(each, [rows, groups * (GROUP // 2)])],
            (tl.uint8, tl.uint8), is_pure=True, pack=4,
        )  # fmt: skip
    # From group, word, byte and first or second to columns: 16 for the last, 4 for the word, 1 for the byte.
    bits = tl.permute(tl.reshape(tl.join(first, second), [rows, groups, 4, 4, 2]), [0, 1, 4, 2, 3])
    return tl.reshape(bits, [rows, groups * GROUP]).to(tl.float8e4nv, bitcast=True)


@triton.jit
def interpreted_look_up(codes, entries):
    """What `_LOOK_UP` does, for the interpreter, which reads no assembly."""
    rows: tl.constexpr = codes.shape[0]
    groups: tl.constexpr = entries.shape[1]
    place = tl.arange(0, 4)[None, None, None, :]
    word = tl.sum(tl.reshape(codes, [rows, groups, 4, 4]).to(tl.int64) << (8 * place), axis=3)[:, :, :, None]
    each = tl.broadcast_to(entries[:, :, None, None], [rows, groups, 4, 4])
    first = (each >> ((word >> (4 * place)) & 7) * 8 & 0x7F) | ((word >> (8 * place)) & 0x80)
    second = (each >> ((word >> (4 * place + 16)) & 7) * 8 & 0x7F) | ((word << 4 >> (8 * place)) & 0x80)
    shape: tl.constexpr = [rows, groups * (GROUP // 2)]
    return tl.reshape(first, shape).to(tl.uint8), tl.reshape(second, shape).to(tl.uint8)
