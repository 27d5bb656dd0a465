"""The dispatch plan: pairs of token and expert sorted by expert, in blocks of rows that each have one expert."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from plugins_trt.gpu import gpu_of


@dataclass(frozen=True)
class DispatchPlan:
    """Which pairs each block of rows holds, and whose block it is; on the device, of sizes known from shapes alone.

    Pair `p` is the choice `p % K` of token `p // K`.
    """

    block_expert: Tensor
    """`[blocks]` int32: expert of a block, -1 for the surplus blocks at the end."""
    used: Tensor
    """`[1]` int32: blocks that are no surplus."""
    rows: Tensor
    """`[blocks, block_rows]` int32: an expert's pairs in rising order, then `pairs` as padding; surplus: undefined."""
    pairs: int
    """`T * K`."""

    launched: int
    """Blocks that a product starts programs for: those that all experts need when they share the pairs evenly."""

    @property
    def blocks(self) -> int:
        """The most blocks that these pairs can need."""
        return self.rows.shape[0]


def block_bound(pairs: int, experts: int, block_rows: int) -> int:
    """The most blocks that `pairs` can need: all experts but one row over a full block."""
    return (pairs + min(pairs, experts) * (block_rows - 1)) // block_rows


def dispatch(expert_ids: Tensor, experts: int, block_rows: int) -> DispatchPlan:
    """Sort the pairs by expert, stably: the plan depends on nothing but its arguments.

    Args:
        expert_ids: `[T, K]` int64, contiguous, each below `experts`; `T * K` at least one.
        experts: number of experts, E.
        block_rows: rows of a block.
    """
    pairs = expert_ids.numel()
    blocks = block_bound(pairs, experts, block_rows)
    even = min(pairs, experts) * triton.cdiv(triton.cdiv(pairs, experts), block_rows)
    block_expert = torch.empty(blocks, dtype=torch.int32, device=expert_ids.device)
    used = torch.empty(1, dtype=torch.int32, device=expert_ids.device)
    rows = torch.empty(blocks, block_rows, dtype=torch.int32, device=expert_ids.device)
    chunk = min(triton.next_power_of_2(pairs), 2048)
    # Histograms of fewer bins than a warp has lanes are refused by some targets.
    bins = max(triton.next_power_of_2(experts), 32)
    overlap = gpu_of(expert_ids.device).overlaps_kernels
    sort_pairs[(experts,)](
        expert_ids, block_expert, used, rows, pairs, blocks, experts, bins, block_rows,
        triton.next_power_of_2(block_rows), chunk, overlap, num_warps=8, launch_pdl=overlap,
    )  # fmt: skip
    return DispatchPlan(block_expert, used, rows, pairs, min(blocks, even))


@triton.jit(do_not_specialize=["pairs", "blocks"])
def sort_pairs(
    EXPERT_IDS, BLOCK_EXPERT, USED, ROWS, pairs, blocks,
    EXPERTS: tl.constexpr, BINS: tl.constexpr, BLOCK_ROWS: tl.constexpr, PADDED_ROWS: tl.constexpr,
    CHUNK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One expert's blocks. Every program counts all pairs for itself: cheaper than a second launch."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    own = tl.program_id(0)
    lane = tl.arange(0, CHUNK)
    counts = tl.zeros([BINS], tl.int32)
    for start in range(0, pairs, CHUNK):
        inside = start + lane < pairs
        ids = tl.load(EXPERT_IDS + start + lane, mask=inside, other=0).to(tl.int32)
        counts += tl.histogram(ids, BINS, mask=inside)
    expert = tl.arange(0, BINS)
    blocks_of = (counts + BLOCK_ROWS - 1) // BLOCK_ROWS
    first = tl.sum(tl.where(expert < own, blocks_of, 0), axis=0)
    count = tl.sum(tl.where(expert == own, counts, 0), axis=0)
    end = first + tl.sum(tl.where(expert == own, blocks_of, 0), axis=0)

    place = ROWS + first * BLOCK_ROWS
    found = 0
    for start in range(0, pairs, CHUNK):
        inside = start + lane < pairs
        mine = inside & (tl.load(EXPERT_IDS + start + lane, mask=inside, other=-1).to(tl.int32) == own)
        rank = found + tl.cumsum(mine.to(tl.int32), axis=0) - 1
        tl.store(place + rank, start + lane, mask=mine)
        found += tl.sum(mine.to(tl.int32), axis=0)
    pad = count + tl.arange(0, PADDED_ROWS)
    tl.store(place + pad, tl.zeros([PADDED_ROWS], tl.int32) + pairs, mask=pad < (end - first) * BLOCK_ROWS)

    for block in range(first, end):
        tl.store(BLOCK_EXPERT + block, own)
    if own == EXPERTS - 1:
        tl.store(USED, end)
        for start in range(end, blocks, BINS):
            surplus = start + tl.arange(0, BINS)
            tl.store(BLOCK_EXPERT + surplus, tl.full([BINS], -1, tl.int32), mask=surplus < blocks)
