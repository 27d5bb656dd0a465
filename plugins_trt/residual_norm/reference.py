"""The meaning of the residual stream's joints in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from plugins_trt.quantized_linear.reference import quantize_rows


def residual_norm(
    residual: Tensor,
    branch: Tensor,
    branch_weight: Tensor,
    beside: Tensor | None,
    beside_weight: Tensor | None,
    joint_weight: Tensor | None,
    scalar: Tensor | None,
    weights: Sequence[Tensor],
    factors: Sequence[float],
    quantized: Sequence[bool],
    eps: float,
) -> list[Tensor]:
    """Add a branch to the residual, and norm the sum once for each of `weights`; `norm` is RMS (Zhang & Sennrich 2019).

    `total = (residual + added) * scalar`, where `added` is `norm(sum of branch) * branch_weight`, or with a second
    branch `norm(norm(sum of branch) * branch_weight + norm(beside) * beside_weight) * joint_weight`; all of it in
    float32 or wider. The norms are those of the total as it is returned.

    Args:
        residual: `[B, S, H]`.
        branch: what is added up before it is normed, in order: `[B * S, K, H]`.
        branch_weight: of the branch's norm, `[H]`.
        beside: a second branch, `[B, S, H]`.
        beside_weight, joint_weight: of the norms that come with it, `[H]`.
        scalar: a factor of the total, of one element.
        weights: of each norm of the total, `[H]`.
        factors: of each of them, applied as well.
        quantized: whether to round each to float8_e4m3fn, row by row (`quantize_rows`).
        eps: added to the mean square.

    Returns:
        The total in the shape and dtype of the residual; then for each weight the norm in the same shape and dtype or,
        where it is quantised, its codes and their scales, float32 `[B, S]`.
    """
    wide = torch.promote_types(residual.dtype, torch.float32)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x.to(wide), x.shape[-1:], weight.to(wide), eps)

    first, *others = branch.to(wide).unbind(1)
    added = norm(sum(others, first).view(residual.shape), branch_weight)
    if beside is not None:
        assert beside_weight is not None, "a second branch has a norm"
        assert joint_weight is not None, "two branches are normed together"
        added = norm(added + norm(beside, beside_weight), joint_weight)
    total = residual.to(wide) + added
    if scalar is not None:
        total = total * scalar.to(wide)
    results = [total.to(residual.dtype)]
    for weight, factor, codes in zip(weights, factors, quantized, strict=True):
        normed = norm(results[0], weight) * factor
        results += quantize_rows(normed) if codes else [normed.to(residual.dtype)]
    return results
