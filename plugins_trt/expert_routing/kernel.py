"""Expert routing on the GPU: one warp a token picks its experts one after the other."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


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
    tokens, experts = logits.shape
    expert_ids = torch.empty(tokens, top_k, dtype=torch.int64, device=logits.device)
    expert_weights = torch.empty(tokens, top_k, dtype=logits.dtype, device=logits.device)
    if tokens:
        route[(tokens,)](
            logits.contiguous(), per_expert_scale, expert_ids, expert_weights, experts, top_k,
            triton.next_power_of_2(experts), triton.next_power_of_2(top_k), num_warps=1,
        )  # fmt: skip
    return expert_ids, expert_weights


@triton.jit
def route(
    LOGITS, PER_EXPERT_SCALE, EXPERT_IDS, EXPERT_WEIGHTS,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, EXPERTS_PADDED: tl.constexpr, TOP_K_PADDED: tl.constexpr,
):  # fmt: skip
    """One token: `TOP_K` times the largest key, a logit with its expert's id below it."""
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EXPERTS_PADDED)
    logit = tl.load(LOGITS + token * EXPERTS + expert, mask=expert < EXPERTS, other=0.0).to(tl.float32)
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
