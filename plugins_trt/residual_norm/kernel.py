"""The residual stream's joints on the GPU: one block of threads a token, each row read once and held in registers.

A compiler reads a row of 2816 again for each of the up to six reductions in a joint, and its kernels neither start
before the one before them ends nor let the next one do so. A layer's two joints took an H200 9.5 and 7.6 us in FP8, and
8.0 and 6.7 here (`python -m benchmarks.gpu.step --precision fp8 --pieces timeline`, `--no-join` for the compiler's).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from plugins_trt.float8 import encode_e4m3, row_step
from plugins_trt.gpu import gpu_of
from plugins_trt.residual_norm import MOST_NORMS


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
    """Add a branch to the residual, and norm the sum once for each of `weights`.

    `total = (residual + added) * scalar`, where `added` is `norm(sum of branch) * branch_weight`, or with a second
    branch `norm(norm(sum of branch) * branch_weight + norm(beside) * beside_weight) * joint_weight`; all of it in
    float32. The norms are those of the total as it is returned.

    Args:
        residual: `[B, S, H]`.
        branch: what is added up before it is normed, in order: `[B * S, K, H]`.
        branch_weight: of the branch's norm, `[H]`, in any dtype, as are the other weights.
        beside: a second branch, `[B, S, H]`.
        beside_weight, joint_weight: of the norms that come with it, `[H]`.
        scalar: a factor of the total, of one element.
        weights: of each norm of the total, `[H]`; three at most.
        factors: of each of them, applied as well.
        quantized: whether to round each to float8_e4m3fn, row by row (`quantize_rows`).
        eps: added to the mean square.

    Returns:
        The total in the shape and dtype of the residual; then for each weight the norm in the same shape and dtype or,
        where it is quantised, its codes and their scales, float32 `[B, S]`.
    """
    assert len(weights) <= MOST_NORMS, f"{len(weights)} norms of one sum, {MOST_NORMS} at most"
    size = residual.shape[-1]
    results = [torch.empty_like(residual)]
    outputs: list[tuple[Tensor, Tensor | None]] = []
    for codes in quantized:
        dtype = torch.float8_e4m3fn if codes else residual.dtype
        normed = torch.empty(residual.shape, dtype=dtype, device=residual.device)
        step = torch.empty(residual.shape[:-1], dtype=torch.float32, device=residual.device) if codes else None
        outputs.append((normed, step))
        results += [normed] if step is None else [normed, step]
    rows = residual.numel() // size
    if rows == 0:
        return results
    norms: list[object] = []
    for index in range(MOST_NORMS):
        absent = index >= len(weights)
        norms += [None, 1.0, None, None] if absent else [weights[index], factors[index], *outputs[index]]
    block = triton.next_power_of_2(size)
    gpu = gpu_of(residual.device)
    join[(rows,)](
        residual, branch, branch_weight, beside, beside_weight, joint_weight, scalar, results[0], *norms, eps,
        SIZE=size, PARTS=branch.shape[1], BLOCK=block, ROUNDS=gpu.rounds_to_e4m3, OVERLAP=gpu.overlaps_kernels,
        num_warps=8 if block > 1024 else 4, launch_pdl=gpu.overlaps_kernels,
    )  # fmt: skip
    return results


@triton.jit
def join(
    RESIDUAL, BRANCH, BRANCH_WEIGHT, BESIDE, BESIDE_WEIGHT, JOINT_WEIGHT, SCALAR, TOTAL,
    WEIGHT_0, factor_0, NORMED_0, STEP_0, WEIGHT_1, factor_1, NORMED_1, STEP_1, WEIGHT_2, factor_2, NORMED_2, STEP_2,
    eps, SIZE: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, ROUNDS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One row. What is None is left out."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    at = row * SIZE + column
    # Everything is asked for before the first reduction waits.
    branch = wide(BRANCH + row * (PARTS * SIZE) + column, inside)
    for part in tl.static_range(1, PARTS):
        branch += wide(BRANCH + (row * PARTS + part) * SIZE + column, inside)
    branch_weight = wide(BRANCH_WEIGHT + column, inside)
    residual = wide(RESIDUAL + at, inside)
    if BESIDE is not None:
        beside = wide(BESIDE + at, inside)
        beside_weight = wide(BESIDE_WEIGHT + column, inside)
        joint_weight = wide(JOINT_WEIGHT + column, inside)
        added = branch * inverse_root(branch, eps, SIZE) * branch_weight
        added += beside * inverse_root(beside, eps, SIZE) * beside_weight
        added = added * inverse_root(added, eps, SIZE) * joint_weight
    else:
        added = branch * inverse_root(branch, eps, SIZE) * branch_weight
    total = residual + added
    if SCALAR is not None:
        total *= tl.load(SCALAR).to(tl.float32)
    stored = total.to(TOTAL.dtype.element_ty)
    tl.store(TOTAL + at, stored, mask=inside)
    total = stored.to(tl.float32)
    total *= inverse_root(total, eps, SIZE)
    if WEIGHT_0 is not None:
        write(total, factor_0, WEIGHT_0, NORMED_0, STEP_0, row, column, inside, SIZE, ROUNDS)
    if WEIGHT_1 is not None:
        write(total, factor_1, WEIGHT_1, NORMED_1, STEP_1, row, column, inside, SIZE, ROUNDS)
    if WEIGHT_2 is not None:
        write(total, factor_2, WEIGHT_2, NORMED_2, STEP_2, row, column, inside, SIZE, ROUNDS)


@triton.jit
def wide(places, inside):
    """What is stored there, in float32; zero where not `inside`."""
    return tl.load(places, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def inverse_root(x, eps, SIZE: tl.constexpr):
    """`1 / sqrt(mean(x^2) + eps)`."""
    return tl.rsqrt(tl.sum(x * x, axis=0) / SIZE + eps)


@triton.jit
def write(normed, factor, WEIGHT, NORMED, STEP, row, column, inside, SIZE: tl.constexpr, ROUNDS: tl.constexpr):
    """Store `normed * weight * factor`, as codes where there are steps."""
    result = normed * wide(WEIGHT + column, inside) * factor
    if STEP is not None:
        step = row_step(tl.max(tl.abs(result), axis=0))
        tl.store(STEP + row, step)
        result = encode_e4m3(result * tl.math.div_rn(1.0, step), NORMED.dtype.element_ty, ROUNDS)
    tl.store(NORMED + row * SIZE + column, result.to(NORMED.dtype.element_ty), mask=inside)
