"""The operations as training wants them: the same meaning, with the prefix in place and a balancing gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from plugins_trt.expert_routing.reference import expert_routing
from plugins_trt.operations import REFERENCE, Operations

BALANCE = 0.01
"""Factor of the load-balancing loss (Fedus et al. 2022, section 2.2)."""


def prefix_attention(
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
) -> Tensor:
    """`canvas_attention` where page `b` is row `b`'s whole prefix: nothing is gathered, K/V heads are repeated.

    Repeated because PyTorch's memory-efficient attention takes a mask, but not together with grouped queries.
    """
    slots = torch.arange(key_pool.shape[1], device=query.device)
    cached = torch.where(slots < start[:, None], slots, -1)
    own = start[:, None] + torch.arange(query.shape[1], device=query.device)
    positions = torch.cat((cached, own), dim=1)
    visible = (positions[:, None] >= kv_start[..., None]) & (positions[:, None] < kv_end[..., None])
    groups = query.shape[2] // key.shape[2]
    keys = torch.cat((key_pool, key), dim=1).repeat_interleave(groups, dim=2)
    values = torch.cat((value_pool, value), dim=1).repeat_interleave(groups, dim=2)
    attended = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        keys.transpose(1, 2).to(query.dtype),
        values.transpose(1, 2).to(query.dtype),
        attn_mask=visible[:, None],
        scale=1.0,
    )
    return attended.transpose(1, 2)


class _AddGradient(torch.autograd.Function):
    """Passes `x` on and gives `penalty` a gradient of one, as though it were added to the loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, penalty: Tensor) -> Tensor:
        ctx.like = penalty.shape
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.new_ones(ctx.like, dtype=torch.float32)


def balanced_routing(logits: Tensor, per_expert_scale: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """`expert_routing` that pulls the router towards even use of the experts while gradients are recorded."""
    expert_ids, weights = expert_routing(logits, per_expert_scale, top_k)
    if not torch.is_grad_enabled():
        return expert_ids, weights
    experts = logits.shape[1]
    share = F.one_hot(expert_ids, experts).float().mean((0, 1))
    penalty = experts * (share * torch.softmax(logits.float(), dim=-1).mean(0)).sum()
    weighted: Tensor = _AddGradient.apply(weights, BALANCE * penalty)  # type: ignore[no-untyped-call]
    return expert_ids, weighted


TRAINING: Operations = replace(REFERENCE, expert_routing=balanced_routing, canvas_attention=prefix_attention)
