"""Expert feed-forward on the GPU: a dispatch plan, two grouped products, a sum over each token's experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from plugins_trt.expert_ffn.dispatch import DispatchPlan, dispatch
from plugins_trt.expert_ffn.encodings import E4M3_BITS, E4M3_DOT, INT4, WIDE
from plugins_trt.expert_ffn.products import STATE_GROUP, down_product, gate_up_product, sum_parts
from plugins_trt.expert_ffn.tiles import Product, Tiles, choose_tiles, row_parts, weight_tiles
from plugins_trt.gpu import gpu_of
from plugins_trt.quantized_linear.kernel import quantize_rows


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
    return sum_of_parts(expert_parts(x, expert_ids, expert_weights, gate_up, down, tiles=tiles))


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
        dynamic_activations: round `x` to float8_e4m3fn too, with a scale for each row that is its largest magnitude
            / 448, and the hidden states with such a scale for each 128 channels of a row, and multiply 8-bit numbers,
            for which a GPU must be of sm_89 or later; otherwise widen the weights to the dtype of `x`. An H200 took
            223 and 355 us a layer of 256 tokens.
        tiles: tile sizes in place of the table's.

    Returns:
        `[T, H]` in the dtype of `x`.
    """
    if not dynamic_activations:
        weights = ExpertWeights(gate_up, gate_up_scale, down, down_scale)
        return sum_of_parts(parts(States(x), expert_ids, expert_weights, weights, x.dtype, tiles))
    codes, scale = quantize_rows(x)
    matrices = gate_up, gate_up_scale, down, down_scale
    return sum_of_parts(expert_parts_fp8(codes, scale, expert_ids, expert_weights, *matrices, x.dtype, tiles=tiles))


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
    matrices = gate_up_packed, gate_up_scale, down_packed, down_scale
    return sum_of_parts(expert_parts_int4(x, expert_ids, expert_weights, *matrices, tiles=tiles))


def expert_parts(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    tiles: Tiles | None = None,
) -> Tensor:
    """What `expert_ffn` sums up: `weight * down(gelu_tanh(gate(x)) * up(x))` of each token's experts.

    Args:
        x: token states, `[T, H]`.
        expert_ids: `[T, K]` int64.
        expert_weights: `[T, K]`.
        gate_up: gate rows first, then up rows, `[E, 2I, H]`, in the dtype of `x`.
        down: `[E, H, I]`, in the dtype of `x`.
        tiles: tile sizes in place of the table's.

    Returns:
        `[T, K, H]` in the dtype of `x`, in the order of a token's choices.
    """
    return parts(States(x), expert_ids, expert_weights, ExpertWeights(gate_up, None, down, None), x.dtype, tiles)


def expert_parts_fp8(
    codes: Tensor,
    code_scale: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    dtype: torch.dtype,
    *,
    tiles: Tiles | None = None,
) -> Tensor:
    """What `expert_ffn_fp8` with dynamic activations sums up, of states that are float8_e4m3fn already.

    Args:
        codes: token states, `[T, H]` float8_e4m3fn; H even.
        code_scale: `[T]` float32; a state is its code times its token's scale.
        expert_ids: `[T, K]` int64.
        expert_weights: `[T, K]`.
        gate_up: `[E, 2I, H]` float8_e4m3fn.
        gate_up_scale: `[E, 2I]` float32; a weight is its code times its row's scale.
        down: `[E, H, I]` float8_e4m3fn; I even.
        down_scale: `[E, H]` float32.
        dtype: of the result.
        tiles: tile sizes in place of the table's.

    Returns:
        `[T, K, H]` in `dtype`, in the order of a token's choices.
    """
    weights = ExpertWeights(gate_up, gate_up_scale, down, down_scale, dynamic_activations=True)
    return parts(States(codes, code_scale), expert_ids, expert_weights, weights, dtype, tiles)


def expert_parts_int4(
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
    """What `expert_ffn_int4` sums up; arguments as there.

    Returns:
        `[T, K, H]` in the dtype of `x`, in the order of a token's choices.
    """
    weights = ExpertWeights(gate_up_packed, gate_up_scale, down_packed, down_scale)
    return parts(States(x), expert_ids, expert_weights, weights, x.dtype, tiles)


@dataclass(frozen=True)
class States:
    """Rows of activations."""

    values: Tensor
    """In the dtype of the model, or float8_e4m3fn codes."""
    scale: Tensor | None = None
    """Of codes: float32, one a token of `[T]`, or `[blocks, groups, block_rows]` of a plan's rows."""


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


def parts(
    x: States, expert_ids: Tensor, expert_weights: Tensor, weights: ExpertWeights, dtype: torch.dtype,
    tiles: Tiles | None,
) -> Tensor:  # fmt: skip
    """`expert_parts` in `dtype` for states and weights of any encoding."""
    (tokens, top_k), (experts, hidden_size, _) = expert_ids.shape, weights.sizes
    if tokens == 0:
        return torch.empty(0, top_k, hidden_size, dtype=dtype, device=x.values.device)
    gpu = gpu_of(x.values.device)
    tiles = tiles or choose_tiles(expert_ids.numel() / experts, weights.encoding, dtype.itemsize, gpu)
    plan = dispatch(expert_ids.contiguous(), experts, tiles.block_rows)
    states = States(x.values.contiguous(), x.scale)
    hidden = gated_states(states, plan, weights, tiles.gate_up, top_k)
    weighted = weighted_parts(hidden, plan, weights, tiles.down, expert_weights.contiguous(), dtype)
    return weighted.view(tokens, top_k, hidden_size)


def gated_states(x: States, plan: DispatchPlan, weights: ExpertWeights, product: Product, top_k: int) -> States:
    """`gelu_tanh(gate(x)) * up(x)` of every pair, `[blocks * block_rows, I]` in the plan's order, encoded as `x` is."""
    experts, hidden_size, intermediate = weights.sizes
    hidden = hidden_buffer(plan, intermediate, x)
    gpu = gpu_of(x.values.device)
    overlap = gpu.overlaps_kernels
    gate_up_product[(plan.launched * weight_tiles(intermediate, product),)](
        x.values, x.scale, plan.rows, plan.block_expert, plan.used, _stored(weights.gate_up, weights),
        weights.gate_up_scale, hidden.values, hidden.scale, plan.pairs, experts, hidden_size, intermediate, top_k,
        weights.encoding, *row_parts(plan.rows.shape[1]), product.weight_rows, product.depth, gpu.rounds_to_e4m3,
        overlap, **product.options, launch_pdl=overlap,
    )  # fmt: skip
    return hidden


def hidden_buffer(plan: DispatchPlan, intermediate: int, x: States) -> States:
    """Room for the hidden states of a plan's rows, encoded as `x` is."""
    values = torch.empty(plan.rows.numel(), intermediate, dtype=x.values.dtype, device=x.values.device)
    if x.scale is None:
        return States(values)
    blocks, block_rows = plan.rows.shape
    groups = triton.cdiv(intermediate, STATE_GROUP.value)
    return States(values, torch.empty(blocks, groups, block_rows, dtype=torch.float32, device=values.device))


def weighted_parts(
    hidden: States, plan: DispatchPlan, weights: ExpertWeights, product: Product, expert_weights: Tensor,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`weight * down(hidden)` of every pair, `[pairs, H]` in the order of the pairs."""
    _, hidden_size, intermediate = weights.sizes
    weighted = torch.empty(plan.pairs, hidden_size, dtype=dtype, device=expert_weights.device)
    overlap = gpu_of(expert_weights.device).overlaps_kernels
    down_product[(plan.launched * weight_tiles(hidden_size, product),)](
        hidden.values, hidden.scale, plan.rows, plan.block_expert, plan.used, _stored(weights.down, weights),
        weights.down_scale, expert_weights, weighted, plan.pairs, hidden_size, intermediate, weights.encoding,
        *row_parts(plan.rows.shape[1]), product.weight_rows, product.depth, overlap,
        **product.options, launch_pdl=overlap,
    )  # fmt: skip
    return weighted


def sum_of_parts(parts: Tensor) -> Tensor:
    """Sum of `parts [T, K, H]` over each token's experts, `[T, H]`."""
    tokens, top_k, hidden_size = parts.shape
    output = torch.empty(tokens, hidden_size, dtype=parts.dtype, device=parts.device)
    if tokens == 0:
        return output
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
