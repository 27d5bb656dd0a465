"""The meaning of the expert feed-forward in plain PyTorch, for each encoding of the weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

INT4_GROUP = 32
"""Columns of a weight row that share one scale in the 4-bit encoding."""

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
) -> Tensor:
    """`expert_ffn` with 4-bit weights: codes -8..7 times a scale for each group of 32 columns of a row.

    A code is stored as `code + 8` in four bits. Of a group's 16 bytes, byte `4 t + 2 j + h` (`t` below 4, `j` and `h`
    below 2) holds column `8 h + 2 t + j` in its low half and the column 16 further on in its high half: what a thread
    of a GPU's matrix unit multiplies is then one word of four bytes.

    Args:
        x: token states, `[T, H]`.
        expert_ids: `[T, K]` int64, distinct within a token.
        expert_weights: `[T, K]`.
        gate_up_packed: `[E, 2I, H / 2]` uint8; H a multiple of 32.
        gate_up_scale: `[E, 2I, H / 32]`.
        down_packed: `[E, H, I / 2]` uint8; I a multiple of 32.
        down_scale: `[E, H, I / 32]`.

    Returns:
        `[T, H]` in the dtype of `x`.
    """
    gate_up = _from_int4(gate_up_packed, gate_up_scale, x.dtype)
    return expert_ffn(x, expert_ids, expert_weights, gate_up, _from_int4(down_packed, down_scale, x.dtype))


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
    gate_up = _from_int4(gate_up_packed, gate_up_scale, x.dtype)
    return expert_parts(x, expert_ids, expert_weights, gate_up, _from_int4(down_packed, down_scale, x.dtype))


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


def _from_int4(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    # Axes: group, t, j, h.
    places = packed.view(*packed.shape[:-1], -1, 4, 2, 2)
    codes = torch.stack([places & 0x0F, places >> 4], dim=-4).movedim(-1, -3).flatten(-4).to(dtype) - 8
    return (codes * scale.to(dtype).unsqueeze(-1)).flatten(-2)
