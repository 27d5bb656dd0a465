"""Expert routing on the GPU: one warp a token picks its experts one after the other.

The router's own product is small and wide: 256 tokens, 128 experts, 2816 columns. A library splits the columns, then
adds up the parts in a kernel of its own and rounds; here the kernel that chooses adds them up, and the weights are
asked for while the kernel before still runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from plugins_trt.gpu import gpu_of
from plugins_trt.overlap import fetch_lines

MOST_TOKENS = 1024
"""Tokens up to which the router's product is this project's own; with more of them a library's is as fast."""


@dataclass(frozen=True)
class Tile:
    """How the router's product is cut up: a block of threads multiplies `tokens` with all experts over `columns`."""

    tokens: int
    columns: int
    depth: int
    """Columns a turn."""
    warps: int
    stages: int
    """Turns whose loads are under way at a time."""


TILE = Tile(tokens=32, columns=256, depth=64, warps=4, stages=4)


def expert_routing(logits: Tensor, per_expert_scale: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Choose `top_k` experts for each token.

    Experts are ordered by their float32 logits, ties by their id, which is the order of their probabilities. The
    softmax is taken over the chosen logits alone: its shares are those of a softmax over all experts, renormalised.

    Args:
        logits: router logits, `[T, E]`.
        per_expert_scale: learned factor of each expert's weight, `[E]`.
        top_k: experts per token, `1 <= top_k <= E`.

    Returns:
        `(expert_ids [T, K] int64, expert_weights [T, K])` by falling probability, the weights in the dtype of `logits`.
    """
    return choose(logits.contiguous()[None], per_expert_scale, top_k, logits.dtype)


def project_and_route(
    x: Tensor, weight: Tensor, per_expert_scale: Tensor, top_k: int, *, tile: Tile = TILE
) -> tuple[Tensor, Tensor]:
    """`expert_routing` of the logits `x @ weight.T`, summed in float32 and rounded to the dtype of `x`.

    A token's result does not depend on the other tokens, nor on their number up to `MOST_TOKENS`.

    Args:
        x: `[T, H]`, contiguous.
        weight: `[E, H]`, contiguous, in the dtype of `x`.
        per_expert_scale: learned factor of each expert's weight, `[E]`.
        top_k: experts per token, `1 <= top_k <= E`.
        tile: in place of the usual one.

    Returns:
        `(expert_ids [T, K] int64, expert_weights [T, K])` as `expert_routing` does.
    """
    if x.shape[0] > MOST_TOKENS:
        return expert_routing(F.linear(x, weight), per_expert_scale, top_k)
    return choose(partial_logits(x, weight, tile), per_expert_scale, top_k, x.dtype)


def partial_logits(x: Tensor, weight: Tensor, tile: Tile) -> Tensor:
    """What each stretch of `tile.columns` columns adds to the logits, float32 `[parts, T, E]`."""
    (tokens, size), experts = x.shape, weight.shape[0]
    parts = triton.cdiv(size, tile.columns)
    partial = torch.empty(parts, tokens, experts, dtype=torch.float32, device=x.device)
    overlap = gpu_of(x.device).overlaps_kernels
    if tokens:
        project[(triton.cdiv(tokens, tile.tokens), parts)](
            x, weight, partial, tokens, experts, size, max(16, triton.next_power_of_2(experts)),
            tile.tokens, tile.columns, tile.depth, size % tile.columns == 0, overlap,
            num_warps=tile.warps, num_stages=tile.stages, launch_pdl=overlap,
        )  # fmt: skip
    return partial


def choose(parts: Tensor, per_expert_scale: Tensor, top_k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`expert_routing` of the sum of `parts [parts, T, E]`, rounded to `dtype` like the weights."""
    count, tokens, experts = parts.shape
    expert_ids = torch.empty(tokens, top_k, dtype=torch.int64, device=parts.device)
    expert_weights = torch.empty(tokens, top_k, dtype=dtype, device=parts.device)
    overlap = gpu_of(parts.device).overlaps_kernels
    if tokens:
        route[(tokens,)](
            parts, per_expert_scale, expert_ids, expert_weights, tokens, count, experts, top_k,
            triton.next_power_of_2(experts), triton.next_power_of_2(top_k), overlap, num_warps=1, launch_pdl=overlap,
        )  # fmt: skip
    return expert_ids, expert_weights


@triton.jit(do_not_specialize=["tokens"])
def project(
    X, WEIGHT, PARTIAL, tokens, EXPERTS: tl.constexpr, SIZE: tl.constexpr, EXPERTS_PADDED: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WHOLE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Products of some tokens with all experts over one stretch of columns; the experts are the left operand, for
    matrix units want 64 rows there."""
    first = tl.program_id(1) * COLUMNS
    # Experts and tokens past the end read the first ones again; they are not stored.
    expert = tl.arange(0, EXPERTS_PADDED)
    weights = WEIGHT + (expert % EXPERTS) * SIZE + first
    if OVERLAP:
        line: tl.constexpr = 128 // (X.dtype.element_ty.primitive_bitwidth // 8)
        ahead = weights[:, None] + (tl.arange(0, COLUMNS // line) * line)[None, :]
        if WHOLE:
            fetch_lines(ahead.to(tl.int64))
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    states = X + (token % tokens).to(tl.int64) * SIZE + first
    column = tl.arange(0, DEPTH)
    sums = tl.zeros([EXPERTS_PADDED, TOKENS], tl.float32)
    for start in range(0, COLUMNS, DEPTH):
        if WHOLE:
            left = tl.load(weights[:, None] + (start + column)[None, :])
            right = tl.load(states[None, :] + (start + column)[:, None])
        else:
            inside = first + start + column < SIZE
            left = tl.load(weights[:, None] + (start + column)[None, :], mask=inside[None, :], other=0.0)
            right = tl.load(states[None, :] + (start + column)[:, None], mask=inside[:, None], other=0.0)
        sums = tl.dot(left, right, sums, input_precision="ieee")
    row = tl.program_id(1).to(tl.int64) * tokens + token
    place = PARTIAL + row[None, :] * EXPERTS + expert[:, None]
    tl.store(place, sums, mask=(token < tokens)[None, :] & (expert < EXPERTS)[:, None])


@triton.jit(do_not_specialize=["tokens"])
def route(
    LOGITS, PER_EXPERT_SCALE, EXPERT_IDS, EXPERT_WEIGHTS, tokens, PARTS: tl.constexpr, EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr, EXPERTS_PADDED: tl.constexpr, TOP_K_PADDED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One token: `TOP_K` times the largest key, a logit with its expert's id below it."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EXPERTS_PADDED)
    place = LOGITS + token * EXPERTS + expert
    logit = tl.load(place, mask=expert < EXPERTS, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        logit += tl.load(place + tl.cast(tokens, tl.int64) * (part * EXPERTS), mask=expert < EXPERTS, other=0.0)
    if PARTS > 1:
        logit = logit.to(EXPERT_WEIGHTS.dtype.element_ty).to(tl.float32)
    # The bits of a float32, read as an integer, order as the floats do once those of negative ones are flipped.
    bits = tl.where(logit == 0.0, 0.0, logit).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    # Above the expert's id from behind, so that the larger key of two equal logits is the lower id's.
    key = ordered * 0x100000000 + (EXPERTS_PADDED - expert)
    least = -0x7FFFFFFFFFFFFFFF
    key = tl.where(expert < EXPERTS, key, least)
    slot = tl.arange(0, TOP_K_PADDED)
    chosen = tl.full([TOP_K_PADDED], least, tl.int64)
    for turn in tl.static_range(TOP_K):
        best = tl.max(key, axis=0)
        chosen = tl.where(slot == turn, best, chosen)
        key = tl.where(key == best, least, key)
    expert_id = EXPERTS_PADDED - (chosen & 0xFFFFFFFF)
    ordered = (chosen >> 32).to(tl.int32)
    logit = tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(tl.float32, bitcast=True)
    logit = tl.where(slot < TOP_K, logit, float("-inf"))
    share = tl.exp(logit - tl.max(logit, axis=0))
    scale = tl.load(PER_EXPERT_SCALE + expert_id, mask=slot < TOP_K, other=0.0).to(tl.float32)
    weight = share / tl.sum(share, axis=0) * scale
    place = token * TOP_K + slot
    tl.store(EXPERT_IDS + place, expert_id, mask=slot < TOP_K)
    tl.store(EXPERT_WEIGHTS + place, weight.to(EXPERT_WEIGHTS.dtype.element_ty), mask=slot < TOP_K)
