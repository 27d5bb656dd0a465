"""The meaning of the expert feed-forward in plain PyTorch, for each encoding of the weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

INT4_GROUP = 32
"""Columns of a weight row that share one scale in the 4-bit encoding."""

INT4_MAGNITUDES = (0.0525, 0.16, 0.269, 0.378, 0.4955, 0.626, 0.7865, 1.0)
"""What a code's low three bits choose from, relative to the group's scale: numbers of least squared error for normal
weights, with the scales that the export finds (Lloyd, Least squares quantization in PCM, 1982). They leave an error of
8.1% of the weights, 16 even steps 8.3%; the pocket's experts are much like normal ones."""

INT4_SCALE_BYTES = 4
"""Bytes of a row's float32 scale in the 4-bit encoding."""

_INT4_STATE_GROUP = 64

FP8_STATE_GROUP = 128
"""Channels of an expert's hidden states that share one scale where activations are rounded to float8_e4m3fn."""

_E4M3_LARGEST = 448.0


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
    return _mixture(x, expert_ids, expert_weights, gate_up, down, rounded=lambda states: states)


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
) -> Tensor:
    """`expert_ffn` with weights in float8_e4m3fn and a scale for each of their rows.

    Args:
        x: token states, `[T, H]`.
        expert_ids: `[T, K]` int64, distinct within a token.
        expert_weights: `[T, K]`.
        gate_up: `[E, 2I, H]` float8_e4m3fn.
        gate_up_scale: `[E, 2I]` float32; a weight is its code times its row's scale.
        down: `[E, H, I]` float8_e4m3fn.
        down_scale: `[E, H]` float32.
        dynamic_activations: round `x` to float8_e4m3fn too, with a scale for each row that is its largest magnitude
            / 448, and each expert's hidden states with such a scale for each 128 channels of a row.

    Returns:
        `[T, H]` in the dtype of `x`.
    """
    gate_up, down = _from_fp8(gate_up, gate_up_scale, x.dtype), _from_fp8(down, down_scale, x.dtype)
    if not dynamic_activations:
        return expert_ffn(x, expert_ids, expert_weights, gate_up, down)
    return _mixture(_round_to_fp8(x), expert_ids, expert_weights, gate_up, down, rounded=_round_groups_to_fp8)


def expert_ffn_int4(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    gate_up_packed: Tensor,
    gate_up_scale: Tensor,
    down_packed: Tensor,
    down_scale: Tensor,
    *,
    dynamic_activations: bool = True,
) -> Tensor:
    """`expert_ffn` with 4-bit weights: a sign and one of eight magnitudes, times a scale for each group of 32 columns
    of a row, rounded to float8_e4m3fn, times the row's scale.

    Of a group's 16 bytes, the four from `4 t` on (`t` below 4) are a little-endian word of eight magnitudes of three
    bits, the lowest half byte first, for columns `4 t + i` and then `16 + 4 t + i` (`i` below 4). Sign bits are bit
    `8 i + 7` of the word for column `4 t + i` and bit `8 i + 3` for column `16 + 4 t + i`. A GPU's matrix unit then
    takes what becomes of a word from one thread.

    Scales of N rows are one uint8 tensor `[E, 4 + K / 32, N]`: an expert's first `4 N` bytes are its rows' scales,
    float32; then come its groups' scales, float8_e4m3fn, group by group.

    Args:
        x: token states, `[T, H]`.
        expert_ids: `[T, K]` int64, distinct within a token.
        expert_weights: `[T, K]`.
        gate_up_packed: `[E, 2I, H / 2]` uint8; H a multiple of 32.
        gate_up_scale: `[E, 4 + H / 32, 2I]` uint8.
        down_packed: `[E, H, I / 2]` uint8; I a multiple of 32.
        down_scale: `[E, 4 + I / 32, H]` uint8.
        dynamic_activations: round `x` to float8_e4m3fn, with a scale for each row that is its largest magnitude / 448,
            and each expert's hidden states with such a scale for each 64 channels of a row.

    Returns:
        `[T, H]` in the dtype of `x`.
    """
    gate_up, down = from_int4(gate_up_packed, gate_up_scale, x.dtype), from_int4(down_packed, down_scale, x.dtype)
    if not dynamic_activations:
        return expert_ffn(x, expert_ids, expert_weights, gate_up, down)
    return _mixture(_round_to_fp8(x), expert_ids, expert_weights, gate_up, down, rounded=_round_int4_states)


def expert_parts(x: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """What `expert_ffn` sums up: `weight * down(gelu_tanh(gate(x)) * up(x))` of each token's experts.

    Args:
        x: token states, `[T, H]`.
        expert_ids: `[T, K]` int64, distinct within a token.
        expert_weights: `[T, K]`.
        gate_up: gate rows first, then up rows, `[E, 2I, H]`.
        down: `[E, H, I]`.

    Returns:
        `[T, K, H]` in the dtype of `x`, in the order of a token's choices.
    """
    return _parts(x, expert_ids, expert_weights, gate_up, down, rounded=lambda states: states)


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
) -> Tensor:
    """What `expert_ffn_fp8` with dynamic activations sums up, of states that are float8_e4m3fn already.

    Args:
        codes: token states, `[T, H]` float8_e4m3fn.
        code_scale: `[T]` float32; a state is its code times its token's scale.
        expert_ids: `[T, K]` int64, distinct within a token.
        expert_weights: `[T, K]`.
        gate_up: `[E, 2I, H]` float8_e4m3fn.
        gate_up_scale: `[E, 2I]` float32; a weight is its code times its row's scale.
        down: `[E, H, I]` float8_e4m3fn.
        down_scale: `[E, H]` float32.
        dtype: of the result.

    Returns:
        `[T, K, H]` in `dtype`, in the order of a token's choices.
    """
    x = _from_fp8(codes, code_scale, dtype)
    gate_up, down = _from_fp8(gate_up, gate_up_scale, dtype), _from_fp8(down, down_scale, dtype)
    return _parts(x, expert_ids, expert_weights, gate_up, down, rounded=_round_groups_to_fp8)


def expert_parts_int4(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    gate_up_packed: Tensor,
    gate_up_scale: Tensor,
    down_packed: Tensor,
    down_scale: Tensor,
) -> Tensor:
    """What `expert_ffn_int4` sums up; arguments as there.

    Returns:
        `[T, K, H]` in the dtype of `x`, in the order of a token's choices.
    """
    gate_up, down = from_int4(gate_up_packed, gate_up_scale, x.dtype), from_int4(down_packed, down_scale, x.dtype)
    return _parts(_round_to_fp8(x), expert_ids, expert_weights, gate_up, down, rounded=_round_int4_states)


def int4_table() -> Tensor:
    """The eight magnitudes for each scale: float8_e4m3fn `[128, 8]`, the scale's bits first; of no number, zeros."""
    scales = torch.arange(128, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    table = scales.nan_to_num(0.0)[:, None] * torch.tensor(INT4_MAGNITUDES)
    return table.to(torch.float8_e4m3fn)


_Rounding = Callable[[Tensor], Tensor]
"""What becomes of the hidden states before they are multiplied."""


def _mixture(
    x: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: Tensor, down: Tensor, rounded: _Rounding
) -> Tensor:
    token_weights = torch.zeros(x.shape[0], gate_up.shape[0], dtype=x.dtype, device=x.device)
    token_weights = token_weights.scatter(1, expert_ids, expert_weights.to(x.dtype))
    hidden = rounded(_hidden_states(x, gate_up)) * token_weights.unsqueeze(-1)
    output: Tensor = hidden.flatten(1) @ down.transpose(1, 2).flatten(0, 1)
    return output


def _parts(
    x: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: Tensor, down: Tensor, rounded: _Rounding
) -> Tensor:
    outputs = torch.einsum("tei,ehi->teh", rounded(_hidden_states(x, gate_up)), down)
    chosen = outputs.gather(1, expert_ids.unsqueeze(-1).expand(-1, -1, outputs.shape[-1]))
    return chosen * expert_weights.to(x.dtype).unsqueeze(-1)


def _hidden_states(x: Tensor, gate_up: Tensor) -> Tensor:
    """`gelu_tanh(gate(x)) * up(x)` of every expert, `[T, E, I]`."""
    gate, up = (x @ gate_up.flatten(0, 1).T).view(-1, *gate_up.shape[:2]).chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def _from_fp8(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(dtype, torch.float32)
    return (codes.to(wide) * scale.to(wide).unsqueeze(-1)).to(dtype)


def _round_to_fp8(states: Tensor) -> Tensor:
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    scale = wide.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30) / _E4M3_LARGEST
    return ((wide / scale).to(torch.float8_e4m3fn).to(wide.dtype) * scale).to(states.dtype)


def _round_groups_to_fp8(states: Tensor) -> Tensor:
    return torch.cat([_round_to_fp8(group) for group in torch.split(states, FP8_STATE_GROUP, dim=-1)], dim=-1)


def _round_int4_states(states: Tensor) -> Tensor:
    return torch.cat([_round_to_fp8(group) for group in torch.split(states, _INT4_STATE_GROUP, dim=-1)], dim=-1)


def from_int4(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights `[E, N, K]` that codes `[E, N, K / 2]` and scales `[E, 4 + K / 32, N]` stand for."""
    row_scale, group_scale = split_int4_scale(scale)
    words = packed.view(*packed.shape[:2], -1, 4, 4)  # group, t, byte
    # Half, i and its sign: a byte holds the magnitudes of two neighbours, and the signs of one column in either half.
    magnitude = torch.stack([words & 7, words >> 4 & 7], dim=-1).view(*words.shape[:-1], 2, 4)
    sign = 1 - 2 * torch.stack([words >> 7, words >> 3 & 1], dim=-2).to(torch.int8)
    index = group_scale.transpose(1, 2)[..., None, None, None].to(torch.int32) * 8 + magnitude
    numbers = int4_table().float().flatten().to(packed.device)[index] * sign
    weights = numbers.transpose(-3, -2).reshape(*packed.shape[:2], -1)  # columns are 16 half + 4 t + i
    return (weights * row_scale[..., None]).to(dtype)


def split_int4_scale(scale: Tensor) -> tuple[Tensor, Tensor]:
    """Scales of rows `[E, N]` float32 and of groups `[E, K / 32, N]` uint8, of both in one tensor."""
    row_scale, group_scale = scale.tensor_split([INT4_SCALE_BYTES], dim=1)
    return row_scale.flatten(1).view(torch.float32), group_scale
