"""The quantised linear layer on the GPU, in Triton.

The weight is the left operand of the tile product: `out.T = weight @ x.T`. Hopper's matrix instruction takes its left
operand from registers, so the codes can be widened on their way, and its right operand from shared memory. Widening
costs more than it saves all the same: for one canvas the weight-only product takes 2 to 3 times as long on an H200 as
the one with 8-bit activations, which is therefore the default; it serves GPUs that have no 8-bit products.

Where the GPU can, a kernel is launched while the one before it still runs, and waits for that one's results
(`gdc_wait`) before it reads or writes anything; where its blocks are few it asks for its weights before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from plugins_trt.float8 import encode_e4m3, row_step
from plugins_trt.gpu import Gpu, gpu_of, has_fp8
from plugins_trt.overlap import fetch_ahead

_ROW_BLOCK = 8192
"""Columns that `quantize_rows` holds at a time; a row of no more is read once."""


@dataclass(frozen=True)
class Tile:
    """How a product is cut up; a block of threads computes `weights` by `tokens` numbers."""

    weights: int
    tokens: int
    depth: int
    """Columns of K a turn."""
    splits: int
    """Parts of K that different blocks sum, added up afterwards in a fixed order."""
    warps: int
    stages: int
    """Turns whose loads are under way at a time."""
    exact: bool = True
    """Add up each turn's products of 8-bit floats in float32. Hopper's matrix units sum them in fewer bits; left to
    themselves over all of K they save registers and additions."""
    ahead: bool = False
    """Ask for the weights while the kernel before this one still runs: with the deeper stages 3 us less a layer for
    2816 channels in an H200's step, but 2 us more for 8192, whose blocks cannot all wait at once (`python -m
    benchmarks.gpu.step --precision fp8 --pieces timeline`)."""


def linear_fp8(x: Tensor, weight: Tensor, scale: Tensor, dynamic_activations: bool | None = None) -> Tensor:
    """`x @ (weight * scale[:, None]).T`, summed in float32, scaled, and rounded once to the dtype of `x`.

    Products of 8-bit floats are summed as the matrix unit does, on Hopper in fewer bits than float32. A row's result
    depends on the number of rows by the tile it leads to, never on the other rows' values.

    Args:
        x: `[..., K]`.
        weight: float8_e4m3fn `[N, K]`, contiguous.
        scale: of each output channel, float32 `[N]`.
        dynamic_activations: quantise the activations too, each row by its own scale (`quantize_rows`); else they stay
            as they are and the codes are widened to their dtype. None: where the GPU multiplies 8-bit floats.

    Returns:
        `[..., N]` in the dtype of `x`.
    """
    if dynamic_activations is None:
        dynamic_activations = has_fp8(x.device)
    if dynamic_activations:
        codes, row_scale = quantize_rows(x.reshape(-1, x.shape[-1]))
        return product_fp8(codes.view(x.shape), row_scale, weight, scale, x.dtype)
    return _multiplied(x, None, weight, scale, x.dtype)


def product_fp8(codes: Tensor, code_scale: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`(codes * code_scale[..., None]) @ (weight * scale[:, None]).T`: `linear_fp8` of rows that are quantised.

    Args:
        codes: float8_e4m3fn `[..., K]`.
        code_scale: of each row, float32, contiguous, as many as there are rows.
        weight: float8_e4m3fn `[N, K]`, contiguous.
        scale: of each output channel, float32 `[N]`.
        dtype: of the result.

    Returns:
        `[..., N]`.
    """
    return _multiplied(codes, code_scale.view(-1), weight, scale, dtype)


def _multiplied(x: Tensor, row_scale: Tensor | None, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    channels, depth = weight.shape
    rows = x.reshape(-1, depth)
    tile = choose_tile(rows.shape[0], channels, depth, row_scale is not None, gpu_of(x.device))
    return multiply(rows, row_scale, weight, scale, dtype, tile).view(*x.shape[:-1], channels)


def choose_tile(rows: int, channels: int, depth: int, dynamic_activations: bool, gpu: Gpu) -> Tile:
    """The tile for `rows` by `channels` numbers, each a sum over `depth` products.

    From `python -m benchmarks.gpu.linear` on one H200 (torch 2.11, Triton 3.6): with 8-bit activations 64 by 128 is the
    fastest or within 10% of it for all products of one canvas, and larger tiles from 256 blocks on; leaving the sums to
    the matrix unit saves a tenth to a half of the time. Where a block has 99 KB of shared memory the largest are not to
    be had; that those choices are fast there too was not measured.
    """
    if rows <= 32:
        weights, tokens, warps = 64, 32, 4
    elif gpu.is_large and triton.cdiv(rows, 256) * triton.cdiv(channels, 128) >= _MANY_BLOCKS:
        weights, tokens, warps = 128, 256, 8
    elif triton.cdiv(rows, 128) * triton.cdiv(channels, 128) >= _MANY_BLOCKS:
        weights, tokens, warps = 128, 128, 8
    else:
        weights, tokens, warps = 64, 128, 4
    blocks = triton.cdiv(rows, tokens) * triton.cdiv(channels, weights)
    splits = max(1, min(gpu.multiprocessors // blocks, depth // _SHORTEST_PART, _MOST_SPLITS))
    if dynamic_activations:
        bytes_a_turn, columns = 128 * (weights + tokens), 128
    else:
        bytes_a_turn, columns = 64 * (weights + 2 * tokens), 64
    memory = _LARGE_MEMORY if gpu.is_large else _SMALL_MEMORY
    # A block that has a multiprocessor to itself reads further ahead: 9.9 against 11.6 us for 2816 channels.
    alone = blocks * splits <= gpu.multiprocessors
    stages = min(6 if alone else 4, memory // bytes_a_turn)
    return Tile(weights, tokens, columns, splits, warps, stages, exact=not dynamic_activations, ahead=alone)


_MANY_BLOCKS = 256
"""Twice what a large GPU runs at a time (an H200 has 132 multiprocessors)."""
_SHORTEST_PART, _MOST_SPLITS = 512, 4
"""A part of K shorter than this does not pay for the second pass over the partial sums."""
_SMALL_MEMORY, _LARGE_MEMORY = 96 << 10, 160 << 10
"""Bytes of shared memory that the loads under way may take."""


def multiply(
    x: Tensor, row_scale: Tensor | None, weight: Tensor, scale: Tensor, dtype: torch.dtype, tile: Tile
) -> Tensor:
    """`(x * row_scale[:, None]) @ (weight * scale[:, None]).T` in `dtype`.

    Args:
        x: `[M, K]`; float8_e4m3fn with a `row_scale`, else a wider float, which the weight is widened to.
        row_scale: float32 `[M]`.
        weight: float8_e4m3fn `[N, K]`.
        scale: float32 `[N]`.
        dtype: of the result.
        tile: how to cut it up.

    Returns:
        `[M, N]`.
    """
    (rows, depth), channels = x.shape, weight.shape[0]
    out = torch.empty(rows, channels, dtype=dtype, device=x.device)
    partial = out if tile.splits == 1 else x.new_empty(tile.splits, rows, channels, dtype=torch.float32)
    grid = (triton.cdiv(rows, tile.tokens), triton.cdiv(channels, tile.weights), tile.splits)
    native, overlap = has_fp8(x.device), gpu_of(x.device).overlaps_kernels
    _product[grid](
        x.contiguous(),
        row_scale,
        weight if native else weight.view(torch.uint8),
        scale,
        partial,
        rows,
        channels,
        depth,
        NATIVE=native,
        TOKENS=tile.tokens,
        WEIGHTS=tile.weights,
        DEPTH=tile.depth,
        WHOLE=depth % tile.depth == 0,
        SPLITS=tile.splits,
        NARROW=tile.depth if tile.exact else None,
        AHEAD=overlap and tile.ahead,
        OVERLAP=overlap,
        num_warps=tile.warps,
        num_stages=tile.stages,
        launch_pdl=overlap,
    )
    if tile.splits > 1:
        parts = (triton.cdiv(out.numel(), _ADDED),)
        _add_up[parts](partial, out, out.numel(), tile.splits, _ADDED, overlap, launch_pdl=overlap)
    return out


_ADDED = 1024
"""Numbers that one block of `_add_up` makes."""


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric quantisation of each row to 8-bit floating point: `x ~ codes * scale[:, None]`.

    Args:
        x: `[M, K]`.

    Returns:
        codes: float8_e4m3fn `[M, K]`, rounded to nearest, ties to even.
        scale: `absmax / 448`, float32 `[M]`.
    """
    rows, depth = x.shape
    codes = torch.empty(rows, depth, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    block = min(triton.next_power_of_2(depth), _ROW_BLOCK)
    warps = 8 if block > 4096 else 4
    gpu = gpu_of(x.device)
    _quantize[(rows,)](
        x.contiguous(), codes, scale, depth, block, depth <= block, gpu.rounds_to_e4m3, gpu.overlaps_kernels,
        num_warps=warps, launch_pdl=gpu.overlaps_kernels,
    )  # fmt: skip
    return codes, scale


@triton.jit
def _product(
    x,
    row_scale,
    weight,
    scale,
    out,
    rows,
    channels,
    depth,
    NATIVE: tl.constexpr,
    TOKENS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    DEPTH: tl.constexpr,
    WHOLE: tl.constexpr,
    SPLITS: tl.constexpr,
    NARROW: tl.constexpr,
    AHEAD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    # Blocks of one stretch of the weight run side by side, so that it is read from memory once.
    row = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.program_id(1) * WEIGHTS + tl.arange(0, WEIGHTS)
    column = tl.arange(0, DEPTH)
    turns = tl.cdiv(tl.cdiv(depth, DEPTH), SPLITS)
    start = tl.program_id(2) * turns * DEPTH
    if AHEAD and tl.program_id(0) == 0:
        # The weights are older than the kernel before this one.
        first = tl.program_id(1) * WEIGHTS
        part = tl.minimum(WEIGHTS, channels - first) * depth // SPLITS
        fetch_ahead(weight + first.to(tl.int64) * depth + tl.program_id(2) * part, part)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    # Rows and channels past the end read the first ones again; they are not stored.
    x_at = x + (row % rows).to(tl.int64)[None, :] * depth + (start + column)[:, None]
    weight_at = weight + (channel % channels).to(tl.int64)[:, None] * depth + (start + column)[None, :]
    total = tl.zeros((WEIGHTS, TOKENS), dtype=tl.float32)
    for turn in range(turns):
        left = depth - start - turn * DEPTH
        if WHOLE and SPLITS == 1:
            tokens = tl.load(x_at)
            codes = tl.load(weight_at)
        else:
            tokens = tl.load(x_at, mask=column[:, None] < left, other=0.0)
            codes = tl.load(weight_at, mask=column[None, :] < left, other=0.0)
        if row_scale is None:
            codes = (codes if NATIVE else _widen(codes)).to(tokens.dtype)
        total = tl.dot(codes, tokens, total, input_precision="ieee", max_num_imprecise_acc=NARROW)
        x_at += DEPTH
        weight_at += DEPTH
    total *= tl.load(scale + channel, mask=channel < channels, other=0.0)[:, None]
    if row_scale is not None:
        total *= tl.load(row_scale + row, mask=row < rows, other=0.0)[None, :]
    part = tl.program_id(2).to(tl.int64) * rows * channels
    at = out + part + row.to(tl.int64)[None, :] * channels + channel[:, None]
    tl.store(at, total.to(out.dtype.element_ty), mask=(row < rows)[None, :] & (channel < channels)[:, None])


@triton.jit
def _widen(codes):
    # Sign, exponent and mantissa moved to where float32 has them; the factor makes up for the exponents' biases.
    bits = ((codes.to(tl.uint32) & 0x80) << 24) | ((codes.to(tl.uint32) & 0x7F) << 20)
    return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^(127 - 7)


@triton.jit
def _add_up(partial, out, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    stride = tl.full((), size, dtype=tl.int64)
    total = tl.load(partial + at, mask=at < size)
    for part in tl.static_range(1, SPLITS):
        total += tl.load(partial + part * stride + at, mask=at < size)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < size)


@triton.jit
def _quantize(
    x, codes, scale, depth, BLOCK: tl.constexpr, ONCE: tl.constexpr, ROUNDS: tl.constexpr, OVERLAP: tl.constexpr
):
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0)
    x += row.to(tl.int64) * depth
    codes += row.to(tl.int64) * depth
    column = tl.arange(0, BLOCK)
    values = tl.load(x + column, mask=column < depth, other=0.0).to(tl.float32)
    largest = tl.abs(values)
    for start in range(BLOCK, depth, BLOCK):
        more = tl.load(x + start + column, mask=start + column < depth, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(more))
    step = row_step(tl.max(largest, axis=0))
    tl.store(scale + row, step)
    inverse = tl.math.div_rn(1.0, step)
    if ONCE:
        tl.store(codes + column, encode_e4m3(values * inverse, codes.dtype.element_ty, ROUNDS), mask=column < depth)
    else:
        for start in range(0, depth, BLOCK):
            inside = start + column < depth
            values = tl.load(x + start + column, mask=inside, other=0.0).to(tl.float32)
            tl.store(codes + start + column, encode_e4m3(values * inverse, codes.dtype.element_ty, ROUNDS), mask=inside)
