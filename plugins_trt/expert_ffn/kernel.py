"""Expert feed-forward on the GPU: a dispatch plan, two grouped products, a sum over each token's experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from plugins_trt.expert_ffn.dispatch import DispatchPlan, dispatch
from plugins_trt.expert_ffn.encodings import E4M3_BITS, E4M3_DOT, INT4, WIDE
from plugins_trt.expert_ffn.products import down_product, gate_up_product, quantize_rows, sum_parts
from plugins_trt.expert_ffn.tiles import Product, Tiles, choose_tiles, weight_tiles
from plugins_trt.gpu import gpu_of


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
        x: token states, `[T, H]`.
        expert_ids: `[T, K]` int64.
        expert_weights: `[T, K]`.
        gate_up: gate rows first, then up rows, `[E, 2I, H]`, in the dtype of `x`.
        down: `[E, H, I]`, in the dtype of `x`.
        tiles: tile sizes in place of the table's.

    Returns:
        `[T, H]` in the dtype of `x`.
    """
    return mixture(x, expert_ids, expert_weights, ExpertWeights(gate_up, None, down, None), tiles)


def expert_ffn_fp8(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    *,
    dynamic_activations: bool = True,
    tiles: Tiles | None = None,
) -> Tensor:
    """`expert_ffn` with weights in float8_e4m3fn and a scale for each of their rows.

    Args:
        x: token states, `[T, H]`.
        expert_ids: `[T, K]` int64.
        expert_weights: `[T, K]`.
        gate_up: `[E, 2I, H]` float8_e4m3fn; H even.
        gate_up_scale: `[E, 2I]` float32; a weight is its code times its row's scale.
        down: `[E, H, I]` float8_e4m3fn; I even.
        down_scale: `[E, H]` float32.
        dynamic_activations: round `x` and the hidden states to float8_e4m3fn too, with a scale for each row that is
            its largest magnitude / 448, and multiply 8-bit numbers, for which a GPU must be of sm_89 or later;
            otherwise widen the weights to the dtype of `x`. An H200 took 223 and 355 us a layer of 256 tokens.
        tiles: tile sizes in place of the table's.

    Returns:
        `[T, H]` in the dtype of `x`.
    """
    weights = ExpertWeights(gate_up, gate_up_scale, down, down_scale, dynamic_activations)
    return mixture(x, expert_ids, expert_weights, weights, tiles)


def expert_ffn_int4(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    gate_up_packed: Tensor,
    gate_up_scale: Tensor,
    down_packed: Tensor,
    down_scale: Tensor,
    *,
    tiles: Tiles | None = None,
) -> Tensor:
    """`expert_ffn` with 4-bit weights: codes -8..7 times a scale for each group of 32 columns of a row.

    A code is stored as `code + 8` in four bits. Of a group's 16 bytes, byte `4 t + 2 j + h` (`t` below 4, `j` and `h`
    below 2) holds column `8 h + 2 t + j` in its low half and the column 16 further on in its high half. A weight is
    rounded to the dtype of `x` before it is multiplied.

    Args:
        x: token states, `[T, H]`.
        expert_ids: `[T, K]` int64.
        expert_weights: `[T, K]`.
        gate_up_packed: `[E, 2I, H / 2]` uint8; H a multiple of 32.
        gate_up_scale: `[E, 2I, H / 32]` in the dtype of `x`.
        down_packed: `[E, H, I / 2]` uint8; I a multiple of 32.
        down_scale: `[E, H, I / 32]` in the dtype of `x`.
        tiles: tile sizes in place of the table's.

    Returns:
        `[T, H]` in the dtype of `x`.
    """
    weights = ExpertWeights(gate_up_packed, gate_up_scale, down_packed, down_scale)
    return mixture(x, expert_ids, expert_weights, weights, tiles)


@dataclass(frozen=True)
class ExpertWeights:
    """One layer's experts: both matrices in one encoding, with scales where it has any."""

    gate_up: Tensor
    gate_up_scale: Tensor | None
    down: Tensor
    down_scale: Tensor | None
    dynamic_activations: bool = False

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Experts, hidden size and intermediate size."""
        experts, hidden_size, _ = self.down.shape
        return experts, hidden_size, self.gate_up.shape[1] // 2

    @property
    def encoding(self) -> int:
        """How the products read the weights, as `products.py` names it."""
        if self.gate_up_scale is None:
            return int(WIDE.value)
        if self.gate_up.dtype == torch.uint8:
            return int(INT4.value)
        return int((E4M3_DOT if self.dynamic_activations else E4M3_BITS).value)


def mixture(
    x: Tensor, expert_ids: Tensor, expert_weights: Tensor, weights: ExpertWeights, tiles: Tiles | None
) -> Tensor:
    """`expert_ffn` for weights of any encoding."""
    if x.shape[0] == 0:
        return torch.empty_like(x)
    experts, top_k = weights.sizes[0], expert_ids.shape[1]
    gpu = gpu_of(x.device)
    tiles = tiles or choose_tiles(expert_ids.numel() / experts, weights.encoding, x.element_size(), gpu)
    plan = dispatch(expert_ids.contiguous(), experts, tiles.block_rows)
    hidden = gated_states(x.contiguous(), plan, weights, tiles.gate_up, top_k)
    parts = weighted_parts(hidden, plan, weights, tiles.down, expert_weights.contiguous())
    return sum_of_parts(parts, top_k)


def gated_states(x: Tensor, plan: DispatchPlan, weights: ExpertWeights, product: Product, top_k: int) -> Tensor:
    """`gelu_tanh(gate(x)) * up(x)` of every pair, `[blocks * block_rows, I]` in the plan's order."""
    experts, hidden_size, intermediate = weights.sizes
    states, scale = _quantized(x, None) if weights.dynamic_activations else (x, None)
    hidden = torch.empty(plan.rows.numel(), intermediate, dtype=x.dtype, device=x.device)
    overlap = gpu_of(x.device).overlaps_kernels
    gate_up_product[(plan.blocks * weight_tiles(intermediate, product),)](
        states, scale, plan.rows, plan.block_expert, _stored(weights.gate_up, weights), weights.gate_up_scale, hidden,
        plan.pairs, experts, hidden_size, intermediate, top_k, weights.encoding,
        plan.rows.shape[1], product.weight_rows, product.depth, overlap,
        num_warps=product.warps, num_stages=product.stages, launch_pdl=overlap,
    )  # fmt: skip
    return hidden


def weighted_parts(
    hidden: Tensor, plan: DispatchPlan, weights: ExpertWeights, product: Product, expert_weights: Tensor
) -> Tensor:
    """`weight * down(hidden)` of every pair, `[pairs, H]` in the order of the pairs."""
    _, hidden_size, intermediate = weights.sizes
    states, scale = _quantized(hidden, plan) if weights.dynamic_activations else (hidden, None)
    parts = torch.empty(plan.pairs, hidden_size, dtype=hidden.dtype, device=hidden.device)
    overlap = gpu_of(hidden.device).overlaps_kernels
    down_product[(plan.blocks * weight_tiles(hidden_size, product),)](
        states, scale, plan.rows, plan.block_expert, _stored(weights.down, weights), weights.down_scale,
        expert_weights, parts, plan.pairs, hidden_size, intermediate, weights.encoding,
        plan.rows.shape[1], product.weight_rows, product.depth, overlap,
        num_warps=product.warps, num_stages=product.stages, launch_pdl=overlap,
    )  # fmt: skip
    return parts


def sum_of_parts(parts: Tensor, top_k: int) -> Tensor:
    """Sum over each token's pairs, `[T, H]`."""
    tokens, hidden_size = parts.shape[0] // top_k, parts.shape[1]
    output = torch.empty(tokens, hidden_size, dtype=parts.dtype, device=parts.device)
    width = min(triton.next_power_of_2(hidden_size), 1024)
    overlap = gpu_of(parts.device).overlaps_kernels
    sum_parts[(tokens, triton.cdiv(hidden_size, width))](
        parts, output, hidden_size, top_k, width, overlap, num_warps=4, launch_pdl=overlap
    )
    return output


def _stored(matrices: Tensor, weights: ExpertWeights) -> Tensor:
    """Codes in the words that they are widened from."""
    words = {E4M3_BITS.value: torch.uint16, INT4.value: torch.uint32}
    return matrices.view(words.get(weights.encoding, matrices.dtype))


def _quantized(states: Tensor, plan: DispatchPlan | None) -> tuple[Tensor, Tensor]:
    """Codes and scales of each row of `states`, of a plan's rows only those that hold a pair."""
    rows, size = states.shape
    codes = torch.empty(rows, size, dtype=torch.float8_e4m3fn, device=states.device)
    scale = torch.empty(rows, dtype=torch.float32, device=states.device)
    overlap = gpu_of(states.device).overlaps_kernels
    quantize_rows[(rows,)](
        states, codes, scale, plan.rows if plan else None, plan.pairs if plan else 0,
        size, triton.next_power_of_2(size), overlap, num_warps=4, launch_pdl=overlap,
    )  # fmt: skip
    return codes, scale
