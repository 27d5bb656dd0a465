"""The experts' feed-forward in torch's own operations with its grouped product, as a contender of the kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.expert_layers import EXPERTS, Layer


def library_ffn(x: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """`expert_ffn` in bfloat16; nothing of it waits for the GPU, so that it can be captured.

    Arguments and result as those of `plugins_trt.expert_ffn.reference.expert_ffn`.
    """
    order, ends = sorted_pairs(expert_ids)
    rows = x[order // expert_ids.shape[1]]
    gate, up = torch._grouped_mm(rows, gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    hidden = F.gelu(gate, approximate="tanh") * up
    parts = torch._grouped_mm(hidden, down.transpose(1, 2), offs=ends) * expert_weights.flatten()[order].unsqueeze(-1)
    output: Tensor = torch.empty_like(parts).index_copy_(0, order, parts).view(*expert_ids.shape, -1).sum(dim=1)
    return output


def library_products(rows: Tensor, hidden: Tensor, ends: Tensor, gate_up: Tensor, down: Tensor) -> tuple[Tensor, ...]:
    """Its two products alone, of rows that are sorted and gathered: the least that fusing all else could leave."""
    products = torch._grouped_mm(rows, gate_up.transpose(1, 2), offs=ends)
    return products, torch._grouped_mm(hidden, down.transpose(1, 2), offs=ends)


def sorted_pairs(expert_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs in the order of their experts, and where each expert's end."""
    experts, order = torch.sort(expert_ids.flatten(), stable=True)
    every = torch.arange(1, EXPERTS + 1, device=expert_ids.device)
    return order, torch.searchsorted(experts, every).to(torch.int32)


def library_error(layer: Layer, x: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> float:
    """How far it is from the kernels, relative in the Euclidean norm."""
    expected = layer.operation(x, expert_ids, expert_weights, *layer.tensors).float()
    output = library_ffn(x, expert_ids, expert_weights, *layer.tensors).float()
    return float((output - expected).norm() / expected.norm())
