"""Which keys a block of rows sees, and where they lie: for the GPU programs of canvas attention."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def visible_tiles(PAGE_BASE, START, KV_START, KV_END, b, tokens, pages, S, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
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
def seen_by_all(begin, end, tokens, S):
    """First and last position (exclusive) between which every row sees every key: most tiles need no mask."""
    return tl.max(tl.where(tokens < S, begin, 0), 0), tl.min(tl.where(tokens < S, end, 0x7FFFFFFF), 0)


@triton.jit
def keys_of(tile, base, start, first_cached, cached, first_own, BLOCK_N: tl.constexpr):
    """Whether a tile lies in the pool, the slot or index in the row of its first key, and that key's position."""
    in_pool = tile < cached
    first = tl.where(in_pool, first_cached + tile, first_own + tile - cached) * BLOCK_N
    return in_pool, first, tl.where(in_pool, base, start) + first


@triton.jit
def page_of(PAGE_TABLE, tile, first_cached, cached, pages, PAGE: tl.constexpr, BLOCK: tl.constexpr):
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
def rows_of(POOL, OWN, page, in_pool, first, PAGE: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers to the keys' (or values') first columns; `POOL` and `OWN` stand at the head."""
    within = tl.arange(0, BLOCK)
    if PAGE % BLOCK == 0:
        pooled = POOL + (page * PAGE + first % PAGE) * STRIDE
        return tl.where(in_pool, pooled, OWN + first * STRIDE) + within * STRIDE
    else:  # noqa: RET505
        pooled = POOL + (page * PAGE + (first + within) % PAGE) * STRIDE
        return tl.where(in_pool, pooled, OWN + (first + within) * STRIDE)


@triton.jit
def columns(rows, d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Where both rows and columns exist, `[rows, BLOCK_D]`."""
    if D % BLOCK_D == 0:
        return rows[:, None]
    else:  # noqa: RET505
        return rows[:, None] & (d < D)[None, :]
