"""Canvas attention on the GPU, split over the keys.

The query heads that read one K/V head form one matrix of rows (a token's heads are neighbours), so that K and V are
read once for all of them. Every block of rows looks up how far its tokens see and works through those keys alone.
Heads up to 256 wide go through one fused kernel (Dao 2023); wider ones do not fit the registers and store their
softmax weights between two products, in a scratch of bounded size. Splits of the keys are merged at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from plugins_trt.gpu import Gpu, gpu_of

SCRATCH_BYTES = 256 << 20
"""Of softmax weights stored at a time: 32 thousand keys of a canvas; with more, keys are worked through in chunks."""

FUSED_HEAD_DIM = 256
"""Widest head whose accumulator (128 rows of float32 over 256 threads) leaves registers for the scores."""


@dataclass(frozen=True)
class Tiles:
    """Block sizes of a launch."""

    rows: int
    keys: int
    step: int
    """What a product sums over in one step: columns of queries and keys, or keys where weights meet values."""
    columns: int
    """Columns of the output."""
    warps: int
    stages: int
    resident: int = 1
    """Blocks that a multiprocessor holds at a time; the keys are split until all have that many."""


def canvas_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    page_table: Tensor,
    page_base: Tensor,
    start: Tensor,
    kv_start: Tensor,
    kv_end: Tensor,
    *,
    scratch_bytes: int = SCRATCH_BYTES,
) -> Tensor:
    """Grouped-query attention of `B` rows of `S` tokens over their prefix in the pool and over themselves.

    Token `i` of row `b` stands at `start[b] + i` and sees the positions `kv_start[b, i] <= p < kv_end[b, i]`:
    those below `start[b]` in the pool, the others in the row. Scores are not scaled. Slots that no token sees may hold
    anything, NaN too.

    Args:
        query: `[B, S, heads, D]`, normed and rotated.
        key, value: the row's own, `[B, S, kv_heads, D]`, `D` and the dtype as in the query.
        key_pool, value_pool: `[pages, page_size, kv_heads, D]`, contiguous.
        page_table: pages of each row's prefix in order, `[B, P]` int64; entries past the prefix name any page.
        page_base: position of the first slot of each row's table, `[B]` int64.
        start: position of each row's first token, `[B]` int64.
        kv_start, kv_end: half-open interval of each token, `[B, S]` int64; never empty.
        scratch_bytes: most bytes of softmax weights that are stored at a time (for wide heads), at least one tile's.

    Returns:
        `[B, S, heads, D]`, in the query's dtype. Products take the inputs as they are and sum in float32, as does the
        softmax; its weights, and the results of splits that fit one chunk, are rounded to the query's dtype.
    """
    call = _Call(
        *(tensor.contiguous() for tensor in (query, key, value, key_pool, value_pool, page_table)),
        *(tensor.contiguous() for tensor in (page_base, start, kv_start, kv_end)),
    )
    if query.numel() == 0:
        return torch.empty_like(call.query)
    gpu = gpu_of(query.device)
    if query.shape[3] <= FUSED_HEAD_DIM:
        return _fused(call, fused_tiles(gpu, query, key.shape[2]), gpu)
    return _in_two_products(call, *wide_tiles(gpu, query), gpu, scratch_bytes)


def fused_tiles(gpu: Gpu, query: Tensor, kv_heads: int) -> Tiles:
    """Blocks of the fused kernel; K and V of two steps and the queries must fit the shared memory."""
    S, heads, D = query.shape[1:]
    width = max(16, triton.next_power_of_2(D))
    wide = query.element_size() > 2
    rows = 128 if gpu.is_large and not wide else 64
    rows = min(rows, max(16, triton.next_power_of_2(S * heads // kv_heads)))
    keys = 64 if gpu.is_large and not wide else 32
    stages = 1 if wide else 2
    return Tiles(rows, keys, width, width, warps=8 if rows == 128 else 4, stages=stages)


def wide_tiles(gpu: Gpu, query: Tensor) -> tuple[Tiles, Tiles]:
    """Blocks of the two products, which share rows and keys."""
    if query.element_size() > 2:
        tiles = Tiles(rows=64, keys=64, step=32, columns=128, warps=4, stages=2)
        return tiles, tiles
    if gpu.is_large:
        tiles = Tiles(rows=128, keys=256, step=64, columns=256, warps=8, stages=4)
        return tiles, tiles
    tiles = Tiles(rows=64, keys=128, step=32, columns=128, warps=4, stages=3)
    return tiles, tiles


@dataclass(frozen=True)
class _Call:
    """The arguments, contiguous, and what follows from their shapes."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_pool: Tensor
    value_pool: Tensor
    page_table: Tensor
    page_base: Tensor
    start: Tensor
    kv_start: Tensor
    kv_end: Tensor

    @property
    def kv_heads(self) -> int:
        return self.key.shape[2]

    @property
    def rows(self) -> int:
        """Rows of a K/V head's matrix of queries."""
        return self.query.shape[1] * self.query.shape[2] // self.kv_heads

    def key_tiles(self, keys: int) -> int:
        """Most tiles of `keys` keys that a block of rows may see."""
        slots, S = self.page_table.shape[1] * self.key_pool.shape[1], self.key.shape[1]
        return -(-slots // keys) + -(-S // keys)

    def partials(self, splits: int, dtype: torch.dtype) -> Tensor:
        """Scratch for the results of splits of the keys."""
        return torch.empty(splits, *self.query.shape, dtype=dtype, device=self.query.device)

    @property
    def visibility(self) -> tuple[Tensor | int, ...]:
        tables, S = self.page_table.shape[1], self.query.shape[1]
        return self.page_base, self.start, self.kv_start, self.kv_end, tables, S

    @property
    def sizes(self) -> dict[str, int]:
        """What the kernels are specialised to."""
        heads, D = self.query.shape[2:]
        return {"PAGE": self.key_pool.shape[1], "KV_HEADS": self.kv_heads, "GROUP": heads // self.kv_heads, "D": D}


def _splits(room: int, blocks: int, key_tiles: int) -> int:
    """Parts into which the keys are cut so that `blocks` blocks fill a GPU with `room`, two tiles a part at least."""
    return max(1, min(room // blocks, key_tiles // 2))


def _fused(call: _Call, tiles: Tiles, gpu: Gpu) -> Tensor:
    B, blocks = call.query.shape[0], triton.cdiv(call.rows, tiles.rows)
    splits = _splits(gpu.multiprocessors * tiles.resident, B * call.kv_heads * blocks, call.key_tiles(tiles.keys))
    partial = call.partials(splits, call.query.dtype)
    totals = torch.empty(partial.shape[:-1], dtype=torch.float32, device=call.query.device)
    attend[(blocks, call.kv_heads * splits, B)](
        call.query, call.key, call.value, call.key_pool, call.value_pool, call.page_table, *call.visibility,
        partial, totals, splits, **call.sizes, BLOCK_M=tiles.rows, BLOCK_N=tiles.keys, BLOCK_D=tiles.columns,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return partial[0] if splits == 1 else _merged(call, partial, totals)


def _in_two_products(call: _Call, tiles: Tiles, gather_tiles: Tiles, gpu: Gpu, scratch_bytes: int) -> Tensor:
    B, D = call.query.shape[0], call.query.shape[3]
    blocks, bands = triton.cdiv(call.rows, tiles.rows), triton.cdiv(D, gather_tiles.columns)
    stored_rows = B * call.kv_heads * blocks * tiles.rows
    all_tiles = call.key_tiles(tiles.keys)
    fitting = scratch_bytes // (stored_rows * tiles.keys * call.query.element_size())
    chunks = triton.cdiv(all_tiles, max(1, fitting))
    chunk = triton.cdiv(all_tiles, chunks)
    splits = _splits(gpu.multiprocessors * gather_tiles.resident, B * call.kv_heads * blocks * bands, chunk)
    shares = max(1, min(gpu.multiprocessors * tiles.resident // (B * call.kv_heads * blocks), chunk))
    # What several chunks add to stays in float32.
    partial = call.partials(splits, call.query.dtype if chunks == 1 else torch.float32)
    # Two, since a chunk's bands of columns all read what the chunk before it left.
    totals = torch.empty(2, *partial.shape[:-1], dtype=torch.float32, device=call.query.device)
    device = call.query.device
    weights = torch.empty(stored_rows, chunk * tiles.keys, dtype=call.query.dtype, device=device)
    statistics = torch.empty(2, B * call.kv_heads, chunk, blocks * tiles.rows, dtype=torch.float32, device=device)
    for index in range(chunks):
        weigh[(blocks, shares, B * call.kv_heads)](
            call.query, call.key, call.key_pool, call.page_table, *call.visibility, weights, statistics,
            index * chunk, chunk, B, **call.sizes, BLOCK_M=tiles.rows, BLOCK_N=tiles.keys, BLOCK_K=tiles.step,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        gather[(blocks * bands, splits, B * call.kv_heads)](
            call.value, call.value_pool, call.page_table, *call.visibility, weights, statistics, partial,
            totals[1 - index % 2], totals[index % 2], index * chunk, chunk, B, **call.sizes, FIRST=index == 0,
            BLOCK_M=tiles.rows, BLOCK_N=tiles.keys, BLOCK_K=gather_tiles.step, BLOCK_D=gather_tiles.columns,
            num_warps=gather_tiles.warps, num_stages=gather_tiles.stages,
        )  # fmt: skip
    return partial[0] if splits == 1 and chunks == 1 else _merged(call, partial, totals[(chunks - 1) % 2])


def _merged(call: _Call, partial: Tensor, totals: Tensor) -> Tensor:
    out = torch.empty_like(call.query)
    splits, heads_of_tokens, D = partial.shape[0], totals[0].numel(), call.query.shape[3]
    width = triton.next_power_of_2(D)
    rows = max(1, 2048 // width)
    merge[(triton.cdiv(heads_of_tokens, rows),)](
        partial, totals, out, heads_of_tokens, splits, D, SPLITS=triton.next_power_of_2(splits), ROWS=rows,
        BLOCK_D=width, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _visible_tiles(PAGE_BASE, START, KV_START, KV_END, b, tokens, pages, S, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """What a block of rows sees: `base`, `start`, each row's interval, and its tiles of keys.

    Tiles are counted over those of the prefix (`cached` of them from slot tile `first_cached`) and then those of the
    row itself (up to `count`, from `first_own`).
    """
    base = tl.load(PAGE_BASE + b).to(tl.int32)
    start = tl.load(START + b).to(tl.int32)
    inside = tokens < S
    begin = tl.load(KV_START + b * S + tokens, mask=inside, other=0x7FFFFFFF).to(tl.int32)
    end = tl.load(KV_END + b * S + tokens, mask=inside, other=0).to(tl.int32)
    lowest, highest = tl.min(begin, 0), tl.max(end, 0)
    first_cached = tl.maximum(lowest - base, 0) // BLOCK_N
    last_cached = tl.maximum(tl.minimum(tl.minimum(start, highest) - base, pages * PAGE), 0)
    cached = tl.maximum(tl.cdiv(last_cached, BLOCK_N) - first_cached, 0)
    first_own = tl.maximum(lowest - start, 0) // BLOCK_N
    last_own = tl.maximum(tl.minimum(highest - start, S), 0)
    count = cached + tl.maximum(tl.cdiv(last_own, BLOCK_N) - first_own, 0)
    return base, start, begin, end, first_cached, cached, first_own, count


@triton.jit
def _seen_by_all(begin, end, tokens, S):
    """First and last position (exclusive) between which every row sees every key: most tiles need no mask."""
    return tl.max(tl.where(tokens < S, begin, 0), 0), tl.min(tl.where(tokens < S, end, 0x7FFFFFFF), 0)


@triton.jit
def _keys_of(tile, base, start, first_cached, cached, first_own, BLOCK_N: tl.constexpr):
    """Whether a tile lies in the pool, the slot or index in the row of its first key, and that key's position."""
    in_pool = tile < cached
    first = tl.where(in_pool, first_cached + tile, first_own + tile - cached) * BLOCK_N
    return in_pool, first, tl.where(in_pool, base, start) + first


@triton.jit
def _page_of(PAGE_TABLE, tile, first_cached, cached, pages, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    """The page of a tile of keys, or where pages are no multiples of tiles that of each key.

    Loops look it up one tile ahead: a load whose address is loaded in the same step is not fetched ahead of its use.
    """
    in_pool, first = tile < cached, (first_cached + tile) * BLOCK
    if PAGE % BLOCK == 0:
        return tl.load(PAGE_TABLE + first // PAGE, mask=in_pool, other=0)
    else:  # noqa: RET505 (the branch is chosen when compiling, and this one must not be compiled then)
        index = first + tl.arange(0, BLOCK)
        return tl.load(PAGE_TABLE + index // PAGE, mask=tl.where(in_pool, index, pages * PAGE) < pages * PAGE, other=0)


@triton.jit
def _rows_of(POOL, OWN, page, in_pool, first, PAGE: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers to the keys' (or values') first columns; `POOL` and `OWN` stand at the head."""
    within = tl.arange(0, BLOCK)
    if PAGE % BLOCK == 0:
        pooled = POOL + (page * PAGE + first % PAGE) * STRIDE
        return tl.where(in_pool, pooled, OWN + first * STRIDE) + within * STRIDE
    else:  # noqa: RET505
        pooled = POOL + (page * PAGE + (first + within) % PAGE) * STRIDE
        return tl.where(in_pool, pooled, OWN + (first + within) * STRIDE)


@triton.jit
def _columns(rows, d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Where both rows and columns exist, `[rows, BLOCK_D]`."""
    if D % BLOCK_D == 0:
        return rows[:, None]
    else:  # noqa: RET505
        return rows[:, None] & (d < D)[None, :]


@triton.jit(do_not_specialize=["pages", "splits"])
def attend(
    QUERY, KEY, VALUE, KEY_POOL, VALUE_POOL, PAGE_TABLE, PAGE_BASE, START, KV_START, KV_END, pages, S,
    PARTIAL, TOTALS, splits, PAGE: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of rows of one K/V head over one split of its keys, softmax and both products fused."""
    # The last rows see most keys in a causal row: they go first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head, split, b = tl.program_id(1) % KV_HEADS, tl.program_id(1) // KV_HEADS, tl.program_id(2)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    tokens, heads = row // GROUP, kv_head * GROUP + row % GROUP
    # Asked for first: what the rows see takes several dependent reads.
    d = tl.arange(0, BLOCK_D)
    inside = _columns(tokens < S, d, D, BLOCK_D)
    place = (b.to(tl.int64) * S + tokens) * (KV_HEADS * GROUP) + heads
    query = tl.load(QUERY + place[:, None] * D + d[None, :], mask=inside, other=0.0)
    base, start, begin, end, first_cached, cached, first_own, count = _visible_tiles(
        PAGE_BASE, START, KV_START, KV_END, b, tokens, pages, S, PAGE, BLOCK_N
    )
    stride: tl.constexpr = KV_HEADS * D
    own = b.to(tl.int64) * S * stride + kv_head * D
    table = PAGE_TABLE + b.to(tl.int64) * pages
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    seen_from, seen_to = _seen_by_all(begin, end, tokens, S)
    stop = (split + 1) * count // splits
    page = _page_of(table, split * count // splits, first_cached, cached, pages, PAGE, BLOCK_N)
    for tile in range(split * count // splits, stop):
        in_pool, first, position = _keys_of(tile, base, start, first_cached, cached, first_own, BLOCK_N)
        last = tl.where(in_pool, tl.minimum(start, base + pages * PAGE), start + S)
        # Slots that hold no token may hold NaN, which a weight of 0 does not silence.
        exists = _columns(position + tl.arange(0, BLOCK_N) < last, d, D, BLOCK_D)
        rows = _rows_of(KEY_POOL + kv_head * D, KEY + own, page, in_pool, first, PAGE, stride, BLOCK_N)
        keys = tl.load(rows[:, None] + d[None, :], mask=exists, other=0.0)
        scores = tl.dot(query, keys.T, input_precision="ieee")
        if tl.minimum(position - seen_from, tl.minimum(seen_to, last) - BLOCK_N - position) < 0:
            at = (position + tl.arange(0, BLOCK_N))[None, :]
            scores = tl.where((at >= begin[:, None]) & (at < tl.minimum(end, last)[:, None]), scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1) * 1.4426950408889634)
        reference = tl.where(larger == float("-inf"), 0.0, larger)
        weights = tl.exp2(scores * 1.4426950408889634 - reference[:, None])
        fade = tl.exp2(largest - reference)
        total = total * fade + tl.sum(weights, 1)
        rows = _rows_of(VALUE_POOL + kv_head * D, VALUE + own, page, in_pool, first, PAGE, stride, BLOCK_N)
        values = tl.load(rows[:, None] + d[None, :], mask=exists, other=0.0)
        sums = tl.dot(weights.to(values.dtype), values, sums * fade[:, None], input_precision="ieee")
        largest = larger
        page = _page_of(table, tile + 1, first_cached, cached, pages, PAGE, BLOCK_N)
    place += tl.num_programs(2).to(tl.int64) * split * S * (KV_HEADS * GROUP)
    tl.store(TOTALS + place, largest + tl.log2(tl.where(total == 0.0, 1.0, total)), mask=tokens < S)
    result = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(PARTIAL + place[:, None] * D + d[None, :], result.to(PARTIAL.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["pages", "first_tile", "tiles", "B"])
def weigh(
    QUERY, KEY, KEY_POOL, PAGE_TABLE, PAGE_BASE, START, KV_START, KV_END, pages, S, WEIGHTS, STATISTICS,
    first_tile, tiles, B, PAGE: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Softmax weights of one block of rows for every so many tiles of keys, relative to a tile's largest score.

    The largest is rounded up to a whole power of two, so that bringing weights of several tiles to one scale is exact.
    """
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    b, kv_head = tl.program_id(2) // KV_HEADS, tl.program_id(2) % KV_HEADS
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    tokens, heads = row // GROUP, kv_head * GROUP + row % GROUP
    base, start, begin, end, first_cached, cached, first_own, count = _visible_tiles(
        PAGE_BASE, START, KV_START, KV_END, b, tokens, pages, S, PAGE, BLOCK_N
    )
    stride: tl.constexpr = KV_HEADS * D
    own = b.to(tl.int64) * S * stride + kv_head * D
    table = PAGE_TABLE + b.to(tl.int64) * pages
    seen_from, seen_to = _seen_by_all(begin, end, tokens, S)
    queries = QUERY + ((b.to(tl.int64) * S + tokens) * (KV_HEADS * GROUP) + heads) * D
    padded = tl.num_programs(0) * BLOCK_M
    place = (tl.program_id(2).to(tl.int64) * padded + row) * (tiles * BLOCK_N)
    for stored in range(tl.program_id(1), tl.minimum(count - first_tile, tiles), tl.num_programs(1)):
        tile = first_tile + stored
        in_pool, first, position = _keys_of(tile, base, start, first_cached, cached, first_own, BLOCK_N)
        last = tl.where(in_pool, tl.minimum(start, base + pages * PAGE), start + S)
        at = position + tl.arange(0, BLOCK_N)
        page = _page_of(table, tile, first_cached, cached, pages, PAGE, BLOCK_N)
        rows = _rows_of(KEY_POOL + kv_head * D, KEY + own, page, in_pool, first, PAGE, stride, BLOCK_N)
        scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for column in range(0, D, BLOCK_K):
            d = column + tl.arange(0, BLOCK_K)
            query = tl.load(queries[:, None] + d[None, :], mask=_columns(tokens < S, d, D, BLOCK_K), other=0.0)
            keys = tl.load(rows[:, None] + d[None, :], mask=_columns(at < last, d, D, BLOCK_K), other=0.0)
            scores = tl.dot(query, keys.T, scores, input_precision="ieee")
        if tl.minimum(position - seen_from, tl.minimum(seen_to, last) - BLOCK_N - position) < 0:
            seen = (at[None, :] >= begin[:, None]) & (at[None, :] < tl.minimum(end, last)[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        largest = tl.ceil(tl.max(scores, 1) * 1.4426950408889634)
        reference = tl.where(largest == float("-inf"), 0.0, largest)
        weights = tl.exp2(scores * 1.4426950408889634 - reference[:, None])
        statistic = STATISTICS + (tl.program_id(2) * tiles + stored) * padded + row
        tl.store(statistic, largest)
        tl.store(statistic + B * KV_HEADS * tiles * padded, tl.sum(weights, 1))
        out = WEIGHTS + (place + stored * BLOCK_N)[:, None] + tl.arange(0, BLOCK_N)[None, :]
        tl.store(out, weights.to(WEIGHTS.dtype.element_ty))


@triton.jit(do_not_specialize=["pages", "first_tile", "tiles", "B"])
def gather(
    VALUE, VALUE_POOL, PAGE_TABLE, PAGE_BASE, START, KV_START, KV_END, pages, S, WEIGHTS, STATISTICS,
    PARTIAL, BEFORE, TOTALS, first_tile, tiles, B, PAGE: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, FIRST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Stored weights times values: one block of rows, one band of columns, one split of a chunk's tiles.

    All but the first chunk add to what the chunks before them left.
    """
    bands: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    blocks, splits = tl.num_programs(0) // bands, tl.num_programs(1)
    block, band, split = blocks - 1 - tl.program_id(0) // bands, tl.program_id(0) % bands, tl.program_id(1)
    b, kv_head = tl.program_id(2) // KV_HEADS, tl.program_id(2) % KV_HEADS
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    tokens, heads = row // GROUP, kv_head * GROUP + row % GROUP
    base, start, _begin, _end, first_cached, cached, first_own, count = _visible_tiles(
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
    # The sums stand relative to the tile at hand (exactly, by powers of two), though to no less than 2^-60 of the
    # largest weight: what a tile below that adds too much of is lost in rounding all the same.
    least = tl.where(largest == float("-inf"), 0.0, largest - 60.0)
    relative_to = least

    stride: tl.constexpr = KV_HEADS * D
    own = b.to(tl.int64) * S * stride + kv_head * D
    table = PAGE_TABLE + b.to(tl.int64) * pages
    stored = WEIGHTS + (tl.program_id(2).to(tl.int64) * padded + row) * (tiles * BLOCK_N)
    steps: tl.constexpr = BLOCK_N // BLOCK_K
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    first_step = first_tile * steps
    page = _page_of(table, first_step + share_begin * steps, first_cached * steps, cached * steps, pages, PAGE, BLOCK_K)
    # Looked up a tile ahead too.
    upcoming = tl.load(statistics + share_begin * padded, mask=row * 0 + share_begin < share_end, other=0.0)
    for step in range(share_begin * steps, share_end * steps):
        in_pool, first, position = _keys_of(
            first_step + step, base, start, first_cached * steps, cached * steps, first_own * steps, BLOCK_K
        )
        last = tl.where(in_pool, tl.minimum(start, base + pages * PAGE), start + S)
        weights = tl.load(stored[:, None] + (step * BLOCK_K + tl.arange(0, BLOCK_K))[None, :])
        rows = _rows_of(VALUE_POOL + kv_head * D, VALUE + own, page, in_pool, first, PAGE, stride, BLOCK_K)
        exists = _columns(position + tl.arange(0, BLOCK_K) < last, d, D, BLOCK_D)
        values = tl.load(rows[:, None] + d[None, :], mask=exists, other=0.0)
        page = _page_of(table, first_step + step + 1, first_cached * steps, cached * steps, pages, PAGE, BLOCK_K)
        if step % steps == 0:
            reference = tl.maximum(upcoming, least)
            sums *= tl.exp2(relative_to - reference)[:, None]
            relative_to = reference
            following = tl.minimum(step // steps + 1, share_end - 1)
            upcoming = tl.load(statistics + following * padded)
        sums = tl.dot(weights, values, sums, input_precision="ieee")
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


@triton.jit(do_not_specialize=["splits"])
def merge(
    PARTIAL, TOTALS, OUT, rows, splits, D: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Add up the splits' results, each by its share of the softmax total."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (d < D)[None, :]
    every = tl.arange(0, SPLITS)
    exists = (row < rows)[:, None] & (every < splits)[None, :]
    totals = tl.load(TOTALS + every[None, :].to(tl.int64) * rows + row[:, None], mask=exists, other=float("-inf"))
    largest = tl.max(totals, 1)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    # Rows past the last have no total.
    whole = tl.maximum(tl.sum(tl.exp2(totals - largest[:, None]), 1), 1e-30)
    sums = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for split in range(splits):
        place = split * rows.to(tl.int64) + row
        total = tl.load(TOTALS + place, mask=row < rows, other=float("-inf"))
        result = tl.load(PARTIAL + place[:, None] * D + d[None, :], mask=inside, other=0.0)
        sums += result.to(tl.float32) * (tl.exp2(total - largest) / whole)[:, None]
    tl.store(OUT + row[:, None] * D + d[None, :], sums.to(OUT.dtype.element_ty), mask=inside)
