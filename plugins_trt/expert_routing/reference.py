"""The meaning of expert routing in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def expert_routing(logits: Tensor, per_expert_scale: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Choose `top_k` experts for each token.

    Softmax over all experts in float32, the `top_k` largest probabilities, renormalised to sum to one, then scaled
    per expert. Ties go to the lower expert id.

    Args:
        logits: router logits, `[T, E]`.
        per_expert_scale: learned factor of each expert's weight, `[E]`.
        top_k: experts per token, `1 <= top_k <= E`.

    Returns:
        `(expert_ids [T, K] int64, expert_weights [T, K])` by falling probability, the weights in the dtype of `logits`.
    """
    probabilities = torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
    weights, expert_ids = torch.topk(probabilities, top_k, dim=-1)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    return expert_ids, (weights * per_expert_scale[expert_ids]).to(logits.dtype)


def project_and_route(x: Tensor, weight: Tensor, per_expert_scale: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """`expert_routing` of the logits `x @ weight.T`, which are rounded to the dtype of `x`.

    Args:
        x: `[T, H]`.
        weight: `[E, H]`, in the dtype of `x`.
        per_expert_scale: learned factor of each expert's weight, `[E]`.
        top_k: experts per token, `1 <= top_k <= E`.

    Returns:
        `(expert_ids [T, K] int64, expert_weights [T, K])` as `expert_routing` does.
    """
    return expert_routing(F.linear(x, weight), per_expert_scale, top_k)
