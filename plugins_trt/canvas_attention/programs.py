"""The GPU programs of canvas attention: one fused, two for wide heads, and the merging of splits.

Where `OVERLAP` is set, a program is launched while the one before it still runs, and waits for that one's results
(`gdc_wait`) before it reads or writes anything.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from plugins_trt.canvas_attention.visible_keys import columns, keys_of, page_of, rows_of, seen_by_all, visible_tiles
from plugins_trt.float8 import encode_e4m3, row_step

LOG2_E = tl.constexpr(1.4426950408889634)
"""Of the natural logarithm's base: exponentials are taken in base 2, which is one instruction."""

MOST_AT_ONCE = tl.constexpr(8)
"""Splits that the merging reads at once."""

LARGEST_WEIGHT = tl.constexpr(8.0)
"""Stored weights are at most 2 to this: a scale that has become too small by less than that is kept."""

HEADROOM = tl.constexpr(40.0)
"""A new scale is 2 to this above what asks for it where the stored weights have float32's exponents, so that the next
larger scores need none: a tile of another scale than the one before it interrupts the product that reads them."""

REACH, NARROW_REACH = tl.constexpr(90.0), tl.constexpr(60.0)
"""How far below the largest scale, as a power of 2, sums may stand: with headroom, and without. Weights of a tile whose
scale is lower still count too much, as if they stood there; 2^18 of them, at most 2 to `LARGEST_WEIGHT` each, are then
2^-64, lost beside the row's largest weight, which is 2 to -`HEADROOM` - 1 at least. And sums of 2^18 such weights times
values of 2^11 at most, brought up so far, are still a float32."""


@triton.jit(do_not_specialize=["pages", "splits"])
def attend(
    QUERY, KEY, VALUE, KEY_POOL, VALUE_POOL, PAGE_TABLE, PAGE_BASE, START, KV_START, KV_END, pages, S,
    PARTIAL, TOTALS, splits, PAGE: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One block of rows of one K/V head over one split of its keys, softmax and both products fused."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    # The last rows see most keys in a causal row: they go first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head, split, b = tl.program_id(1) % KV_HEADS, tl.program_id(1) // KV_HEADS, tl.program_id(2)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    tokens, heads = row // GROUP, kv_head * GROUP + row % GROUP
    # Asked for first: what the rows see takes several dependent reads.
    d = tl.arange(0, BLOCK_D)
    inside = columns(tokens < S, d, D, BLOCK_D)
    place = (b.to(tl.int64) * S + tokens) * (KV_HEADS * GROUP) + heads
    query = tl.load(QUERY + place[:, None] * D + d[None, :], mask=inside, other=0.0)
    base, start, begin, end, first_cached, cached, first_own, count = visible_tiles(
        PAGE_BASE, START, KV_START, KV_END, b, tokens, pages, S, PAGE, BLOCK_N
    )
    stride: tl.constexpr = KV_HEADS * D
    own = b.to(tl.int64) * S * stride + kv_head * D
    table = PAGE_TABLE + b.to(tl.int64) * pages
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    seen_from, seen_to = seen_by_all(begin, end, tokens, S)
    share = split * count // splits
    page = page_of(table, share, first_cached, cached, pages, PAGE, BLOCK_N)
    for tile in range(share, (split + 1) * count // splits):
        in_pool, first, position = keys_of(tile, base, start, first_cached, cached, first_own, BLOCK_N)
        last = tl.where(in_pool, tl.minimum(start, base + pages * PAGE), start + S)
        # Slots that hold no token may hold NaN, which a weight of 0 does not silence.
        exists = columns(position + tl.arange(0, BLOCK_N) < last, d, D, BLOCK_D)
        rows = rows_of(KEY_POOL + kv_head * D, KEY + own, page, in_pool, first, PAGE, stride, BLOCK_N)
        keys = tl.load(rows[:, None] + d[None, :], mask=exists, other=0.0)
        scores = tl.dot(query, keys.T, input_precision="ieee")
        if tl.minimum(position - seen_from, tl.minimum(seen_to, last) - BLOCK_N - position) < 0:
            at = (position + tl.arange(0, BLOCK_N))[None, :]
            scores = tl.where((at >= begin[:, None]) & (at < tl.minimum(end, last)[:, None]), scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1) * LOG2_E)
        reference = tl.where(larger == float("-inf"), 0.0, larger)
        weights = tl.exp2(scores * LOG2_E - reference[:, None])
        fade = tl.exp2(largest - reference)
        total = total * fade + tl.sum(weights, 1)
        rows = rows_of(VALUE_POOL + kv_head * D, VALUE + own, page, in_pool, first, PAGE, stride, BLOCK_N)
        values = tl.load(rows[:, None] + d[None, :], mask=exists, other=0.0)
        sums = tl.dot(weights.to(values.dtype), values, sums * fade[:, None], input_precision="ieee")
        largest = larger
        page = page_of(table, tile + 1, first_cached, cached, pages, PAGE, BLOCK_N)
    place += tl.num_programs(2).to(tl.int64) * split * S * (KV_HEADS * GROUP)
    tl.store(TOTALS + place, largest + tl.log2(tl.where(total == 0.0, 1.0, total)), mask=tokens < S)
    result = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(PARTIAL + place[:, None] * D + d[None, :], result.to(PARTIAL.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["pages", "first_tile", "tiles", "B"])
def weigh(
    QUERY, KEY, KEY_POOL, PAGE_TABLE, PAGE_BASE, START, KV_START, KV_END, pages, S, WEIGHTS, STATISTICS, CHANGES,
    QUERY_ROWS, POOL_ROWS, first_tile, tiles, B, PAGE: tl.constexpr, KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STORED_KEYS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Softmax weights of one block of rows for a share of a chunk's tiles, each row's relative to a scale of its own.

    `WEIGHTS [B * KV_HEADS, blocks, tiles * BLOCK_N / STORED_KEYS, BLOCK_M, STORED_KEYS]`: what `gather` reads at a time
    lies in one stretch. Rows of a whole chunk would be read 128 bytes here and 128 there.

    Scales are whole powers of two, so that bringing weights of several tiles to one is exact, and stay the same from
    tile to tile where they can: `CHANGES` marks tiles at which some row's scale differs from that of the tile before.

    The descriptors `QUERY_ROWS [B * KV_HEADS * S * GROUP, D]` and `POOL_ROWS [slots, KV_HEADS * D]`, where they are
    given, serve tiles that lie in the pool and that all rows see: all but a few of a long prefix. Copies by descriptor
    cost a thread no addresses, which took a third of the time, and go on over the borders of tiles.
    """
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    b, kv_head = tl.program_id(2) // KV_HEADS, tl.program_id(2) % KV_HEADS
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    tokens, heads = row // GROUP, kv_head * GROUP + row % GROUP
    base, start, begin, end, first_cached, cached, first_own, count = visible_tiles(
        PAGE_BASE, START, KV_START, KV_END, b, tokens, pages, S, PAGE, BLOCK_N
    )
    stride: tl.constexpr = KV_HEADS * D
    own = b.to(tl.int64) * S * stride + kv_head * D
    table = PAGE_TABLE + b.to(tl.int64) * pages
    seen_from, seen_to = seen_by_all(begin, end, tokens, S)
    queries = QUERY + ((b.to(tl.int64) * S + tokens) * (KV_HEADS * GROUP) + heads) * D
    padded = tl.num_programs(0) * BLOCK_M
    key = tl.arange(0, BLOCK_N)
    places = tl.arange(0, BLOCK_M)[:, None] * STORED_KEYS
    places += (key // STORED_KEYS * (BLOCK_M * STORED_KEYS) + key % STORED_KEYS)[None, :]
    rows_before = tl.program_id(2).to(tl.int64) * padded + block * BLOCK_M
    weights_at = WEIGHTS + rows_before * (tiles * BLOCK_N)
    held = tl.maximum(tl.minimum(count - first_tile, tiles), 0)
    share, shares = tl.program_id(1), tl.num_programs(1)
    share_begin, share_end = share * held // shares, (share + 1) * held // shares
    rest = share_begin
    scale = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if POOL_ROWS is not None:
        slots = tl.minimum(tl.minimum(start, base + pages * PAGE), seen_to) - base
        whole = tl.where(seen_from <= base + (first_cached + first_tile + share_begin) * BLOCK_N, slots // BLOCK_N, 0)
        rest = tl.minimum(tl.maximum(whole - first_cached - first_tile, share_begin), share_end)
        for stored in tl.range(share_begin, rest, flatten=True):
            first = (first_cached + first_tile + stored) * BLOCK_N
            slot = tl.load(table + first // PAGE).to(tl.int32) * PAGE + first % PAGE
            scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for column in range(0, D, BLOCK_K):
                query = QUERY_ROWS.load([tl.program_id(2) * (S * GROUP) + block * BLOCK_M, column])
                keys = POOL_ROWS.load([slot, kv_head * D + column])
                scores = tl.dot(query, keys.T, scores, input_precision="ieee")
            scale = store_weights(
                scores, scale, stored, stored == share_begin, block, weights_at + stored * (BLOCK_M * BLOCK_N), places,
                padded, row, tiles, B, STATISTICS, CHANGES, KV_HEADS,
            )  # fmt: skip
    page = page_of(table, first_tile + rest, first_cached, cached, pages, PAGE, BLOCK_N)
    for stored in range(rest, share_end):
        tile = first_tile + stored
        in_pool, first, position = keys_of(tile, base, start, first_cached, cached, first_own, BLOCK_N)
        last = tl.where(in_pool, tl.minimum(start, base + pages * PAGE), start + S)
        at = position + tl.arange(0, BLOCK_N)
        rows = rows_of(KEY_POOL + kv_head * D, KEY + own, page, in_pool, first, PAGE, stride, BLOCK_N)
        page = page_of(table, tile + 1, first_cached, cached, pages, PAGE, BLOCK_N)
        scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for column in range(0, D, BLOCK_K):
            d = column + tl.arange(0, BLOCK_K)
            query = tl.load(queries[:, None] + d[None, :], mask=columns(tokens < S, d, D, BLOCK_K), other=0.0)
            keys = tl.load(rows[:, None] + d[None, :], mask=columns(at < last, d, D, BLOCK_K), other=0.0)
            scores = tl.dot(query, keys.T, scores, input_precision="ieee")
        if tl.minimum(position - seen_from, tl.minimum(seen_to, last) - BLOCK_N - position) < 0:
            seen = (at[None, :] >= begin[:, None]) & (at[None, :] < tl.minimum(end, last)[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        scale = store_weights(
            scores, scale, stored, stored == share_begin, block, weights_at + stored * (BLOCK_M * BLOCK_N), places,
            padded, row, tiles, B, STATISTICS, CHANGES, KV_HEADS,
        )  # fmt: skip


@triton.jit
def store_weights(
    scores, scale, stored, begins, block, TILE, places, padded, row, tiles, B, STATISTICS, CHANGES,
    KV_HEADS: tl.constexpr,
):  # fmt: skip
    """Store one tile's weights, their sums and their scale, and return the scale; `begins` at a share's first tile."""
    headroom: tl.constexpr = 0.0 if TILE.dtype.element_ty == tl.float16 else HEADROOM
    largest = tl.ceil(tl.max(scores, 1) * LOG2_E)
    larger = tl.where(largest > scale + LARGEST_WEIGHT, largest + headroom, scale)
    changes = (larger != scale).to(tl.int32)
    tl.store(
        CHANGES + (tl.program_id(2) * tiles + stored) * tl.num_programs(0) + block,
        tl.maximum(tl.max(changes, 0), begins.to(tl.int32)),
    )
    reference = tl.where(larger == float("-inf"), 0.0, larger)
    weights = tl.exp2(scores * LOG2_E - reference[:, None])
    statistic = STATISTICS + (tl.program_id(2) * tiles + stored) * padded + row
    tl.store(statistic, larger)
    tl.store(statistic + B * KV_HEADS * tiles * padded, tl.sum(weights, 1))
    tl.store(TILE + places, weights.to(TILE.dtype.element_ty))
    return larger


@triton.jit(do_not_specialize=["pages", "first_tile", "tiles", "B"])
def gather(
    VALUE, VALUE_POOL, PAGE_TABLE, PAGE_BASE, START, KV_START, KV_END, pages, S, WEIGHTS, STATISTICS, CHANGES,
    PARTIAL, BEFORE, TOTALS, WEIGHT_ROWS, POOL_ROWS, first_tile, tiles, B, PAGE: tl.constexpr,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, FIRST: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Stored weights times values: one block of rows, one band of columns, one split of a chunk's tiles.

    All but the first chunk add to what the chunks before them left. The descriptors `WEIGHT_ROWS [rows, BLOCK_K]`
    of the stored weights and `POOL_ROWS [slots, KV_HEADS * D]`, where they are given, serve steps that lie in the pool.
    """
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    bands: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    blocks, splits = tl.num_programs(0) // bands, tl.num_programs(1)
    block, band, split = blocks - 1 - tl.program_id(0) // bands, tl.program_id(0) % bands, tl.program_id(1)
    b, kv_head = tl.program_id(2) // KV_HEADS, tl.program_id(2) % KV_HEADS
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    tokens, heads = row // GROUP, kv_head * GROUP + row % GROUP
    base, start, _begin, _end, first_cached, cached, first_own, count = visible_tiles(
        PAGE_BASE, START, KV_START, KV_END, b, tokens, pages, S, PAGE, BLOCK_N
    )
    d = band * BLOCK_D + tl.arange(0, BLOCK_D)
    place = ((split.to(tl.int64) * B + b) * S + tokens) * (KV_HEADS * GROUP) + heads
    results = PARTIAL + place[:, None] * D + d[None, :]
    inside = (tokens < S)[:, None] & (d < D)[None, :]
    # This split's share of the tiles that the block sees in this chunk.
    held = tl.maximum(tl.minimum(count - first_tile, tiles), 0)
    share_begin, share_end = split * held // splits, (split + 1) * held // splits
    padded = blocks * BLOCK_M
    statistics = STATISTICS + tl.program_id(2) * tiles * padded + row
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for tile in range(share_begin, share_end, 16):
        many = tile + tl.arange(0, 16)
        exists = (many < share_end)[None, :]
        at = statistics[:, None] + many[None, :] * padded
        each = tl.load(at, mask=exists, other=float("-inf"))
        totals = tl.load(at + B * KV_HEADS * tiles * padded, mask=exists, other=0.0)
        larger = tl.maximum(largest, tl.max(each, 1))
        reference = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp2(largest - reference) + tl.sum(totals * tl.exp2(each - reference[:, None]), 1)
        largest = larger
    # The sums stand relative to the tile at hand (exactly, by powers of two), but within reach of the largest scale:
    # what a tile below that adds too much of is lost in rounding all the same.
    reach: tl.constexpr = NARROW_REACH if WEIGHTS.dtype.element_ty == tl.float16 else REACH
    least = tl.where(largest == float("-inf"), 0.0, largest - reach)
    relative_to = least

    stride: tl.constexpr = KV_HEADS * D
    own = b.to(tl.int64) * S * stride + kv_head * D
    table = PAGE_TABLE + b.to(tl.int64) * pages
    steps: tl.constexpr = BLOCK_N // BLOCK_K
    steps_before = (tl.program_id(2) * blocks + block) * (tiles * steps)
    within = tl.arange(0, BLOCK_M)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    first_step = first_tile * steps
    tile = share_begin
    while tile < share_end:
        # Tiles of one scale in a row: their sum is one plain product, which nothing but loads interrupts.
        many = tile + 1 + tl.arange(0, 128)
        changes = tl.load(CHANGES + (tl.program_id(2) * tiles + many) * blocks + block, mask=many < share_end, other=1)
        one_scale_to = tl.min(tl.where(changes != 0, many, tile + 129), 0)
        reference = tl.maximum(tl.load(statistics + tile * padded), least)
        sums *= tl.exp2(relative_to - reference)[:, None]
        relative_to = reference
        rest = tile * steps
        if POOL_ROWS is not None:
            slots = tl.minimum(tl.minimum(start - base, pages * PAGE), (first_cached + cached) * BLOCK_N)
            whole = slots // BLOCK_K - first_cached * steps - first_step
            rest = tl.minimum(tl.maximum(whole, rest), one_scale_to * steps)
            for step in range(tile * steps, rest):
                first = (first_cached * steps + first_step + step) * BLOCK_K
                slot = tl.load(table + first // PAGE).to(tl.int32) * PAGE + first % PAGE
                weights = WEIGHT_ROWS.load([(steps_before + step) * BLOCK_M, 0])
                values = POOL_ROWS.load([slot, kv_head * D + band * BLOCK_D])
                sums = tl.dot(weights, values, sums, input_precision="ieee")
        page = page_of(table, first_step + rest, first_cached * steps, cached * steps, pages, PAGE, BLOCK_K)
        for step in range(rest, one_scale_to * steps):
            in_pool, first, position = keys_of(
                first_step + step, base, start, first_cached * steps, cached * steps, first_own * steps, BLOCK_K
            )
            last = tl.where(in_pool, tl.minimum(start, base + pages * PAGE), start + S)
            weights = tl.load(WEIGHTS + (steps_before + step).to(tl.int64) * (BLOCK_M * BLOCK_K) + within)
            rows = rows_of(VALUE_POOL + kv_head * D, VALUE + own, page, in_pool, first, PAGE, stride, BLOCK_K)
            exists = columns(position + tl.arange(0, BLOCK_K) < last, d, D, BLOCK_D)
            values = tl.load(rows[:, None] + d[None, :], mask=exists, other=0.0)
            page = page_of(table, first_step + step + 1, first_cached * steps, cached * steps, pages, PAGE, BLOCK_K)
            sums = tl.dot(weights, values, sums, input_precision="ieee")
        tile = one_scale_to
    to_largest = tl.exp2(relative_to - tl.where(largest == float("-inf"), 0.0, largest))
    result = sums * (to_largest / tl.where(total == 0.0, 1.0, total))[:, None]
    logarithm = largest + tl.log2(tl.where(total == 0.0, 1.0, total))
    if not FIRST:
        before = tl.load(BEFORE + place, mask=tokens < S, other=float("-inf"))
        larger = tl.maximum(before, logarithm)
        reference = tl.where(larger == float("-inf"), 0.0, larger)
        old, new = tl.exp2(before - reference), tl.exp2(logarithm - reference)
        sum_of_both = tl.where(old + new == 0.0, 1.0, old + new)
        earlier = tl.load(results, mask=inside, other=0.0)
        result = result * (new / sum_of_both)[:, None] + earlier * (old / sum_of_both)[:, None]
        logarithm = larger + tl.log2(sum_of_both)
    tl.store(TOTALS + place, logarithm, mask=tokens < S)
    tl.store(results, result.to(PARTIAL.dtype.element_ty), mask=inside)


@triton.jit
def share_of(PARTIAL, TOTALS, split, rows, row, known, d, largest, whole, D: tl.constexpr):
    """What one split adds to the rows that are `known`."""
    place = split * tl.cast(rows, tl.int64) + row
    total = tl.load(TOTALS + place, mask=known, other=float("-inf"))
    result = tl.load(PARTIAL + place[:, None] * D + d[None, :], mask=known[:, None] & (d < D)[None, :], other=0.0)
    return result.to(tl.float32) * (tl.exp2(total - largest) / whole)[:, None]


@triton.jit(do_not_specialize=["splits"])
def merge(
    PARTIAL, TOTALS, OUT, STEP, rows, splits, D: tl.constexpr, SPLITS: tl.constexpr, HEADS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, ROUNDS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Add up the splits' results, each by its share of the softmax total.

    A program merges `HEADS` rows, in a block of `ROWS`; with `STEP` it rounds them to codes of one scale.
    """
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    head = tl.arange(0, ROWS)
    row = tl.program_id(0).to(tl.int64) * HEADS + head
    known = (row < rows) & (head < HEADS)
    d = tl.arange(0, BLOCK_D)
    inside = known[:, None] & (d < D)[None, :]
    every = tl.arange(0, SPLITS)
    exists = known[:, None] & (every < splits)[None, :]
    totals = tl.load(TOTALS + every[None, :].to(tl.int64) * rows + row[:, None], mask=exists, other=float("-inf"))
    largest = tl.max(totals, 1)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    # Rows past the last have no total.
    whole = tl.maximum(tl.sum(tl.exp2(totals - largest[:, None]), 1), 1e-30)
    sums = tl.zeros([ROWS, BLOCK_D], tl.float32)
    if SPLITS <= MOST_AT_ONCE:
        # All are asked for before the first is waited for.
        for split in tl.static_range(SPLITS):
            there = known & (tl.full([ROWS], split, tl.int32) < splits)
            sums += share_of(PARTIAL, TOTALS, split, rows, row, there, d, largest, whole, D)
    else:
        for split in range(splits):
            sums += share_of(PARTIAL, TOTALS, split, rows, row, known, d, largest, whole, D)
    if STEP is not None:
        step = row_step(tl.max(tl.max(tl.abs(sums), 1), 0))
        tl.store(STEP + tl.program_id(0), step)
        sums = encode_e4m3(sums * tl.math.div_rn(1.0, step), OUT.dtype.element_ty, ROUNDS)
    tl.store(OUT + row[:, None] * D + d[None, :], sums.to(OUT.dtype.element_ty), mask=inside)
