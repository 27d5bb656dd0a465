"""The meaning of the expert feed-forward in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def expert_ffn(x: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Sum over each token's experts of `weight * down(gelu_tanh(gate(x)) * up(x))`.

    Every expert is computed for every token and masked by its weight: static shapes and gradients for all, at E / K
    times the needed work. The backends' faces do only the needed work.

    Args:
        x: token states, `[T, H]`.
        expert_ids: `[T, K]` int64, distinct within a token.
        expert_weights: `[T, K]`.
        gate_up: gate rows first, then up rows, `[E, 2I, H]`.
        down: `[E, H, I]`.

    Returns:
        `[T, H]` in the dtype of `x`.
    """
    experts, intermediate = gate_up.shape[0], down.shape[2]
    token_weights = torch.zeros(x.shape[0], experts, dtype=x.dtype, device=x.device)
    token_weights = token_weights.scatter(1, expert_ids, expert_weights.to(x.dtype))
    gate, up = (x @ gate_up.flatten(0, 1).T).view(-1, experts, 2 * intermediate).chunk(2, dim=-1)
    hidden = F.gelu(gate, approximate="tanh") * up * token_weights.unsqueeze(-1)
    output: Tensor = hidden.flatten(1) @ down.transpose(1, 2).flatten(0, 1)
    return output
