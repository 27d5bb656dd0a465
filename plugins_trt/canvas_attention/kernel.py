"""Canvas attention on the GPU, split over the keys.

The query heads that read one K/V head form one matrix of rows (a token's heads are neighbours), so that K and V are
read once for all of them. Every block of rows looks up how far its tokens see and works through those keys alone.
Heads up to 256 wide go through one fused kernel (Dao 2023); wider ones do not fit the registers and store their
softmax weights between two products, in a scratch of bounded size. Splits of the keys are merged at the end.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from plugins_trt.canvas_attention.programs import attend, gather, merge, weigh
from plugins_trt.gpu import Gpu, gpu_of

SCRATCH_BYTES = 448 << 20
"""Of softmax weights stored at a time: 56 thousand keys of a canvas; with more, keys are worked through in chunks. 256K
keys took an H200 4.80, 4.65, 4.43 and 4.34 ms a layer with 128, 224, 448 and 1024 MB (before the second product had the
steps that `wide_tiles` gives it)."""

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
        key, value: the row's own, `[B, S, kv_heads, D]`, `D` and the dtype as in the query. Where heads are wide, sums
            of values above 2^11 may overflow.
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
    call = _Call.of(query, key, value, key_pool, value_pool, page_table, page_base, start, kv_start, kv_end)
    if query.numel() == 0:
        return torch.empty_like(call.query)
    splits = _attended(call, gpu_of(query.device), scratch_bytes)
    return splits.results[0] if splits.whole else _merged(call, splits)


def canvas_attention_codes(query: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    """`canvas_attention`, its results rounded to float8_e4m3fn with a scale for each token; in between to the query's
    dtype only where the keys were not split.

    Args:
        query: and all others as there.

    Returns:
        codes: `[B, S, heads * D]` float8_e4m3fn.
        scale: largest magnitude of each token / 448, float32 `[B, S]`.
    """
    call = _Call.of(query, *others)
    B, S, heads, D = query.shape
    codes = torch.empty(B, S, heads * D, dtype=torch.float8_e4m3fn, device=query.device)
    scale = torch.empty(B, S, dtype=torch.float32, device=query.device)
    if query.numel():
        _merge(call, _attended(call, gpu_of(query.device), SCRATCH_BYTES), codes, scale, heads)
    return codes, scale


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


def wide_tiles(gpu: Gpu, query: Tensor, described: bool) -> tuple[Tiles, Tiles]:
    """Blocks of the two products, which share rows and keys; `described` where long prefixes are read by descriptor.

    The second product then waits for memory, and many small steps ask for what is far ahead: an H200 took 3.90 ms in
    place of 4.49 for 256K keys. By address each step costs its pointers (8K keys: 179 us in place of 169, in one run).
    """
    if query.element_size() > 2:
        tiles = Tiles(rows=64, keys=64, step=32, columns=128, warps=4, stages=2)
        return tiles, tiles
    if gpu.is_large:
        tiles = Tiles(rows=128, keys=256, step=64, columns=256, warps=8, stages=4)
        return tiles, replace(tiles, step=32, stages=7) if described else tiles
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

    @classmethod
    def of(cls, *arguments: Tensor) -> _Call:
        return cls(*(each.contiguous() for each in arguments))

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


@dataclass(frozen=True)
class _Splits:
    """Results of parts of the keys."""

    results: Tensor
    """`[splits, B, S, heads, D]`."""
    totals: Tensor
    """Logarithm to base 2 of each one's softmax total, float32 `[splits, B, S, heads]`."""
    whole: bool
    """Whether the only split is the result in the query's dtype."""


def _overlapping(gpu: Gpu) -> dict[str, bool]:
    """Options of a launch that may begin while the one before it ends."""
    return {"OVERLAP": gpu.overlaps_kernels, "launch_pdl": gpu.overlaps_kernels}


def _splits(room: int, blocks: int, key_tiles: int) -> int:
    """Parts into which the keys are cut so that `blocks` blocks fill a GPU with `room`, two tiles a part at least."""
    return max(1, min(room // blocks, key_tiles // 2))


def _attended(call: _Call, gpu: Gpu, scratch_bytes: int) -> _Splits:
    if call.query.shape[3] <= FUSED_HEAD_DIM:
        return _fused(call, fused_tiles(gpu, call.query, call.kv_heads), gpu)
    described = _describes(call, gpu)
    return _in_two_products(call, *wide_tiles(gpu, call.query, described), described, gpu, scratch_bytes)


def _fused(call: _Call, tiles: Tiles, gpu: Gpu) -> _Splits:
    B, blocks = call.query.shape[0], triton.cdiv(call.rows, tiles.rows)
    splits = _splits(gpu.multiprocessors * tiles.resident, B * call.kv_heads * blocks, call.key_tiles(tiles.keys))
    partial = call.partials(splits, call.query.dtype)
    totals = torch.empty(partial.shape[:-1], dtype=torch.float32, device=call.query.device)
    attend[(blocks, call.kv_heads * splits, B)](
        call.query, call.key, call.value, call.key_pool, call.value_pool, call.page_table, *call.visibility,
        partial, totals, splits, **call.sizes, BLOCK_M=tiles.rows, BLOCK_N=tiles.keys, BLOCK_D=tiles.columns,
        num_warps=tiles.warps, num_stages=tiles.stages, **_overlapping(gpu),
    )  # fmt: skip
    return _Splits(partial, totals, splits == 1)


def _in_two_products(
    call: _Call, tiles: Tiles, gather_tiles: Tiles, described: bool, gpu: Gpu, scratch_bytes: int
) -> _Splits:
    B, D = call.query.shape[0], call.query.shape[3]
    blocks, bands = triton.cdiv(call.rows, tiles.rows), triton.cdiv(D, gather_tiles.columns)
    stored_rows = B * call.kv_heads * blocks * tiles.rows
    all_tiles = call.key_tiles(tiles.keys)
    fitting = scratch_bytes // (stored_rows * tiles.keys * call.query.element_size())
    chunks = triton.cdiv(all_tiles, max(1, fitting))
    chunk = triton.cdiv(all_tiles, chunks)
    splits = _splits(gpu.multiprocessors * gather_tiles.resident, B * call.kv_heads * blocks * bands, chunk)
    shares = max(1, min(gpu.multiprocessors * tiles.resident // (B * call.kv_heads * blocks), chunk))
    # Whole shares a split: the tile that a share's scale comes from is then in the split that sums relative to it.
    shares = max(splits, shares // splits * splits)
    # What several chunks add to stays in float32.
    partial = call.partials(splits, call.query.dtype if chunks == 1 else torch.float32)
    # Two, since a chunk's bands of columns all read what the chunk before it left.
    totals = torch.empty(2, *partial.shape[:-1], dtype=torch.float32, device=call.query.device)
    device = call.query.device
    weights = torch.empty(stored_rows, chunk * tiles.keys, dtype=call.query.dtype, device=device)
    statistics = torch.empty(2, B * call.kv_heads, chunk, blocks * tiles.rows, dtype=torch.float32, device=device)
    changes = torch.empty(B * call.kv_heads, chunk, blocks, dtype=torch.int32, device=device)
    rows = _Described.of(call, weights, tiles, gather_tiles) if described else _NONE
    for index in range(chunks):
        weigh[(blocks, shares, B * call.kv_heads)](
            call.query, call.key, call.key_pool, call.page_table, *call.visibility, weights, statistics, changes,
            rows.query, rows.keys, index * chunk, chunk, B, **call.sizes, BLOCK_M=tiles.rows,
            BLOCK_N=tiles.keys, BLOCK_K=tiles.step, STORED_KEYS=gather_tiles.step, num_warps=tiles.warps,
            num_stages=tiles.stages, **_overlapping(gpu),
        )  # fmt: skip
        gather[(blocks * bands, splits, B * call.kv_heads)](
            call.value, call.value_pool, call.page_table, *call.visibility, weights, statistics, changes, partial,
            totals[1 - index % 2], totals[index % 2], rows.weights, rows.values, index * chunk, chunk, B, **call.sizes,
            FIRST=index == 0, BLOCK_M=tiles.rows, BLOCK_N=tiles.keys, BLOCK_K=gather_tiles.step,
            BLOCK_D=gather_tiles.columns, num_warps=gather_tiles.warps, num_stages=gather_tiles.stages,
            **_overlapping(gpu),
        )  # fmt: skip
    return _Splits(partial, totals[(chunks - 1) % 2], splits == 1 and chunks == 1)


@dataclass(frozen=True)
class _Described:
    """Descriptors of what the two products read of a long prefix."""

    query: TensorDescriptor | None
    keys: TensorDescriptor | None
    weights: TensorDescriptor | None
    values: TensorDescriptor | None

    @classmethod
    def of(cls, call: _Call, weights: Tensor, tiles: Tiles, gather_tiles: Tiles) -> _Described:
        B, S, _, D = call.query.shape
        # A K/V head's rows of queries side by side, 2 MB of a canvas.
        query = call.query.view(B, S, call.kv_heads, -1, D).transpose(1, 2).reshape(-1, D)
        keys, values = (pool.view(-1, call.kv_heads * D) for pool in (call.key_pool, call.value_pool))
        return cls(
            TensorDescriptor.from_tensor(query, [tiles.rows, tiles.step]),
            TensorDescriptor.from_tensor(keys, [tiles.keys, tiles.step]),
            TensorDescriptor.from_tensor(weights.view(-1, gather_tiles.step), [gather_tiles.rows, gather_tiles.step]),
            TensorDescriptor.from_tensor(values, [gather_tiles.step, gather_tiles.columns]),
        )


_NONE = _Described(None, None, None, None)


def _describes(call: _Call, gpu: Gpu) -> bool:
    """Whether tiles of keys lie in one page, as descriptors must have them, and are enough to be worth it."""
    tiles, gather_tiles = wide_tiles(gpu, call.query, described=True)
    D, page_size = call.query.shape[3], call.key_pool.shape[1]
    fit = page_size % tiles.keys == 0 and D % tiles.step == 0 and D % gather_tiles.columns == 0
    return (
        gpu.copies_by_descriptor
        and call.query.element_size() == 2
        and fit
        and call.key_tiles(tiles.keys) >= _MANY_TILES
    )


_MANY_TILES = 32
"""Key tiles from which on they are read by descriptor, the queries' copy included: 8192 tokens took an H200 165 us a
layer by descriptor and 173 by address, 4096 103 and 100, in one run."""


def _merged(call: _Call, splits: _Splits) -> Tensor:
    out = torch.empty_like(call.query)
    _merge(call, splits, out, None, max(1, 2048 // triton.next_power_of_2(call.query.shape[3])))
    return out


def _merge(call: _Call, splits: _Splits, out: Tensor, scale: Tensor | None, heads: int) -> None:
    """Merge into `out`, `heads` heads in a block of threads; with a `scale`, which those share, as codes."""
    parts, heads_of_tokens, D = splits.results.shape[0], splits.totals[0].numel(), call.query.shape[3]
    rows, width, gpu = triton.next_power_of_2(heads), triton.next_power_of_2(D), gpu_of(out.device)
    merge[(triton.cdiv(heads_of_tokens, heads),)](
        splits.results, splits.totals, out, scale, heads_of_tokens, parts, D, SPLITS=triton.next_power_of_2(parts),
        HEADS=heads, ROWS=rows, BLOCK_D=width, ROUNDS=gpu.rounds_to_e4m3, num_warps=8 if rows * width > 2048 else 4,
        **_overlapping(gpu),
    )  # fmt: skip
