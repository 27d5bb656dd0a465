"""Expert feed-forward on the GPU: a dispatch plan, two grouped products, a sum over each token's experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from plugins_trt.expert_ffn.dispatch import DispatchPlan, dispatch
from plugins_trt.expert_ffn.products import (
    E4M3_BITS,
    E4M3_DOT,
    WIDE,
    down_product,
    gate_up_product,
    quantize_rows,
    sum_partials,
)
from plugins_trt.expert_ffn.tiles import Tiles, choose_tiles, shared_memory_of, weight_tiles


def expert_ffn(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    tiles: Tiles | None = None,
) -> Tensor:
    """Sum over each token's experts of `weight * down(gelu_tanh(gate(x)) * up(x))`.

    Products sum in float32; hidden states and each expert's part are rounded to the dtype of `x`. The same token gives
    the same bits whatever the other tokens are, as long as their number chooses the same tiles.

    Args:
        x: token states, `[T, H]`, contiguous like all tensors here.
        expert_ids: `[T, K]` int64.
        expert_weights: `[T, K]`.
        gate_up: gate rows first, then up rows, `[E, 2I, H]`, in the dtype of `x`.
        down: `[E, H, I]`, in the dtype of `x`.
        tiles: tile sizes in place of the table's.

    Returns:
        `[T, H]` in the dtype of `x`.
    """
    return _mixture(x, expert_ids, expert_weights, _Weights(gate_up, None, down, None), tiles, dynamic=False)


def expert_ffn_fp8(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    *,
    dynamic_activations: bool = False,
    tiles: Tiles | None = None,
) -> Tensor:
    """`expert_ffn` with weights in float8_e4m3fn and a scale for each of their rows.

    Args:
        x: token states, `[T, H]`, contiguous like all tensors here.
        expert_ids: `[T, K]` int64.
        expert_weights: `[T, K]`.
        gate_up: `[E, 2I, H]` float8_e4m3fn.
        gate_up_scale: `[E, 2I]` float32; a weight is its code times its row's scale.
        down: `[E, H, I]` float8_e4m3fn.
        down_scale: `[E, H]` float32.
        dynamic_activations: round `x` and the hidden states to float8_e4m3fn too, with a scale for each row that is
            its largest magnitude / 448; otherwise the weights are widened to the dtype of `x`.
        tiles: tile sizes in place of the table's.

    Returns:
        `[T, H]` in the dtype of `x`.
    """
    weights = _Weights(gate_up, gate_up_scale, down, down_scale)
    return _mixture(x, expert_ids, expert_weights, weights, tiles, dynamic=dynamic_activations)


@dataclass(frozen=True)
class _Weights:
    gate_up: Tensor
    gate_up_scale: Tensor | None
    down: Tensor
    down_scale: Tensor | None

    def encoding(self, dynamic: bool) -> int:
        if self.gate_up_scale is None:
            return int(WIDE.value)
        return int((E4M3_DOT if dynamic else E4M3_BITS).value)


def _mixture(
    x: Tensor, expert_ids: Tensor, expert_weights: Tensor, weights: _Weights, tiles: Tiles | None, *, dynamic: bool
) -> Tensor:
    if x.shape[0] == 0:
        return torch.empty_like(x)
    experts = weights.down.shape[0]
    tiles = tiles or choose_tiles(expert_ids.numel() / experts, x.element_size(), shared_memory_of(x.device))
    plan = dispatch(expert_ids, experts, tiles.block_rows)
    hidden = _gate_up(x, plan, weights, tiles, expert_ids.shape[1], dynamic)
    partial = _down(hidden, plan, weights, tiles, expert_weights, dynamic)
    return _sum(partial, expert_ids.shape[1])


def _gate_up(x: Tensor, plan: DispatchPlan, weights: _Weights, tiles: Tiles, top_k: int, dynamic: bool) -> Tensor:
    """Hidden states in the plan's order, `[blocks * block_rows, I]`."""
    hidden_size, intermediate = weights.down.shape[1:]
    product, encoding = tiles.gate_up, weights.encoding(dynamic)
    states, scale = _quantized(x, None) if dynamic else (x, None)
    hidden = torch.empty(plan.rows.numel(), intermediate, dtype=x.dtype, device=x.device)
    gate_up_product[(plan.blocks * weight_tiles(intermediate, product),)](
        states, scale, plan.rows, plan.block_expert, _stored(weights.gate_up, encoding), weights.gate_up_scale, hidden,
        plan.pairs, hidden_size, intermediate, top_k, encoding,
        tiles.block_rows, product.weight_rows, product.depth, num_warps=product.warps, num_stages=product.stages,
    )  # fmt: skip
    return hidden


def _down(
    hidden: Tensor, plan: DispatchPlan, weights: _Weights, tiles: Tiles, expert_weights: Tensor, dynamic: bool
) -> Tensor:
    """Each pair's weighted part of the result, `[pairs, H]`."""
    hidden_size, intermediate = weights.down.shape[1:]
    product, encoding = tiles.down, weights.encoding(dynamic)
    states, scale = _quantized(hidden, plan) if dynamic else (hidden, None)
    partial = torch.empty(plan.pairs, hidden_size, dtype=hidden.dtype, device=hidden.device)
    down_product[(plan.blocks * weight_tiles(hidden_size, product),)](
        states, scale, plan.rows, plan.block_expert, _stored(weights.down, encoding), weights.down_scale,
        expert_weights, partial, plan.pairs, hidden_size, intermediate, encoding,
        tiles.block_rows, product.weight_rows, product.depth, num_warps=product.warps, num_stages=product.stages,
    )  # fmt: skip
    return partial


def _sum(partial: Tensor, top_k: int) -> Tensor:
    tokens, hidden_size = partial.shape[0] // top_k, partial.shape[1]
    output = torch.empty(tokens, hidden_size, dtype=partial.dtype, device=partial.device)
    width = min(triton.next_power_of_2(hidden_size), 1024)
    sum_partials[(tokens, triton.cdiv(hidden_size, width))](partial, output, hidden_size, top_k, width, num_warps=4)
    return output


def _stored(weights: Tensor, encoding: int) -> Tensor:
    return weights.view(torch.uint8) if encoding == E4M3_BITS.value else weights


def _quantized(states: Tensor, plan: DispatchPlan | None) -> tuple[Tensor, Tensor]:
    """Codes and scales of each row of `states`, of a plan's rows only those that hold a pair."""
    rows, size = states.shape
    codes = torch.empty(rows, size, dtype=torch.float8_e4m3fn, device=states.device)
    scale = torch.empty(rows, dtype=torch.float32, device=states.device)
    quantize_rows[(rows,)](
        states, codes, scale, plan.rows if plan else None, plan.pairs if plan else 0,
        size, triton.next_power_of_2(size), num_warps=4,
    )  # fmt: skip
    return codes, scale
