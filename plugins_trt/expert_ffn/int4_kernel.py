"""The experts' products with 4-bit weights on the GPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

from plugins_trt.expert_ffn.dispatch import DispatchPlan, dispatch
from plugins_trt.expert_ffn.encodings import INT4
from plugins_trt.expert_ffn.int4_products import STATE_GROUP, int4_down_product, int4_gate_up_product
from plugins_trt.expert_ffn.reference import int4_table
from plugins_trt.expert_ffn.tiles import Product, Tiles, choose_tiles, weight_tiles
from plugins_trt.gpu import gpu_of


@dataclass(frozen=True)
class Int4Weights:
    """One layer's experts in 4 bits, as `reference.expert_ffn_int4` takes them."""

    gate_up: Tensor
    gate_up_scale: Tensor
    down: Tensor
    down_scale: Tensor

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Experts, hidden size and intermediate size."""
        experts, hidden_size, _ = self.down.shape
        return experts, hidden_size, self.gate_up.shape[1] // 2

    @property
    def encoding(self) -> int:
        """As `encodings.py` names it."""
        return int(INT4.value)


def int4_parts(
    x: tuple[Tensor, Tensor], expert_ids: Tensor, expert_weights: Tensor, weights: Int4Weights, dtype: torch.dtype,
    tiles: Tiles | None,
) -> Tensor:  # fmt: skip
    """`weight * down(gelu_tanh(gate(x)) * up(x))` of each token's experts.

    Args:
        x: codes `[T, H]` float8_e4m3fn and their scales `[T]` float32, contiguous.
        expert_ids: `[T, K]` int64.
        expert_weights: `[T, K]`.
        weights: the experts.
        dtype: of the result.
        tiles: tile sizes in place of the table's.

    Returns:
        `[T, K, H]` in `dtype`, in the order of a token's choices.
    """
    (tokens, top_k), (experts, hidden_size, _) = expert_ids.shape, weights.sizes
    if tokens == 0:
        return torch.empty(0, top_k, hidden_size, dtype=dtype, device=expert_ids.device)
    gpu = gpu_of(expert_ids.device)
    tiles = tiles or choose_tiles(expert_ids.numel() / experts, INT4.value, dtype.itemsize, gpu)
    plan = dispatch(expert_ids.contiguous(), experts, tiles.block_rows)
    hidden = int4_gated_states(x, plan, weights, tiles.gate_up, top_k)
    parts = int4_weighted_parts(hidden, plan, weights, tiles.down, expert_weights.contiguous(), dtype)
    return parts.view(tokens, top_k, hidden_size)


def int4_gated_states(
    x: tuple[Tensor, Tensor], plan: DispatchPlan, weights: Int4Weights, product: Product, top_k: int
) -> tuple[Tensor, Tensor]:
    """`gelu_tanh(gate(x)) * up(x)` of every pair.

    Args:
        x: codes `[T, H]` float8_e4m3fn and their scales `[T]` float32.
        plan: where the pairs go.
        weights: the experts.
        product: its tile.
        top_k: pairs of a token.

    Returns:
        codes `[blocks * block_rows, I]` in the plan's order, and scales `[blocks, groups, block_rows]` float32.
    """
    (codes, code_scale), (experts, hidden_size, intermediate) = x, weights.sizes
    (blocks, block_rows), device = plan.rows.shape, codes.device
    groups = triton.cdiv(intermediate, STATE_GROUP.value)
    hidden = torch.empty(blocks * block_rows, intermediate, dtype=codes.dtype, device=device)
    scale = torch.empty(blocks, groups, block_rows, dtype=torch.float32, device=device)
    overlap = gpu_of(device).overlaps_kernels
    int4_gate_up_product[(blocks * weight_tiles(intermediate, product),)](
        codes, code_scale, plan.rows, plan.block_expert, weights.gate_up, weights.gate_up_scale, entries(device),
        hidden, scale, plan.pairs, experts, hidden_size, intermediate, top_k,
        block_rows, product.weight_rows, product.depth, overlap,
        num_warps=product.warps, num_stages=product.stages, launch_pdl=overlap,
    )  # fmt: skip
    return hidden, scale


def int4_weighted_parts(
    hidden: tuple[Tensor, Tensor], plan: DispatchPlan, weights: Int4Weights, product: Product, expert_weights: Tensor,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`weight * down(hidden)` of every pair, `[pairs, H]` in the order of the pairs.

    Args:
        hidden: what `int4_gated_states` returns.
        plan: where the pairs went.
        weights: the experts.
        product: its tile.
        expert_weights: `[T, K]`, contiguous.
        dtype: of the result.
    """
    _, hidden_size, intermediate = weights.sizes
    device = expert_weights.device
    parts = torch.empty(plan.pairs, hidden_size, dtype=dtype, device=device)
    overlap = gpu_of(device).overlaps_kernels
    int4_down_product[(plan.blocks * weight_tiles(hidden_size, product),)](
        *hidden, plan.rows, plan.block_expert, weights.down, weights.down_scale, entries(device),
        expert_weights, parts, plan.pairs, hidden_size, intermediate,
        plan.rows.shape[1], product.weight_rows, product.depth, overlap,
        num_warps=product.warps, num_stages=product.stages, launch_pdl=overlap,
    )  # fmt: skip
    return parts


@cache
def entries(device: torch.device) -> Tensor:
    """`reference.int4_table`, the eight numbers of a scale as bytes of one int64; kept, for a graph that is captured
    can copy nothing to its device."""
    return int4_table().view(torch.int64).flatten().to(device)
