"""Norms and rotation of the heads on the GPU, one launch for query, key and value.

A compiler keeps norm and rotation apart, since the rotation reads a head at other columns than the norm writes it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from plugins_trt.gpu import gpu_of


def head_norm(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    cosine: Tensor,
    sine: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """RMS norm over each head, then for query and key the rotation of its halves; all in float32, rounded once.

    Args:
        query: projected, `[B, S, heads, D]`; like key and value, tokens may stand apart (a slice of one projection), a
            token's heads may not.
        key, value: projected, `[B, S, kv_heads, D]`; the same tensor in layers that take V from the K projection.
        query_weight, key_weight: of the norms, `[D]`; values are normed without one.
        cosine, sine: of each position's angles, `[B, S, D / 2]`, contiguous.
        eps: added to the mean square.

    Returns:
        The three tensors that attention reads, contiguous, in the shapes and dtypes of the projections.
    """
    B, S, heads, D = query.shape
    query, key, value = (_evenly_spaced(x) for x in (query, key, value))
    out = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)]
    if B * S:
        overlap = gpu_of(query.device).overlaps_kernels
        norm_and_rotate[(B * S, 3)](
            query, key, value, query_weight, key_weight, cosine.contiguous(), sine.contiguous(), *out,
            *(x.stride(1) for x in (query, key, value)), eps, HEADS=heads, KV_HEADS=key.shape[2], D=D,
            BLOCK_HEADS=triton.next_power_of_2(heads), BLOCK_D=triton.next_power_of_2(D // 2),
            OVERLAP=overlap, num_warps=8, launch_pdl=overlap,
        )  # fmt: skip
    return out[0], out[1], out[2]


def _evenly_spaced(x: Tensor) -> Tensor:
    """`x`, copied where its tokens do not follow each other at one distance or its heads are not contiguous."""
    _, S, _, D = x.shape
    evenly = x.stride(3) == 1 and x.stride(2) == D and (x.shape[0] == 1 or x.stride(0) == S * x.stride(1))
    return x if evenly else x.contiguous()


@triton.jit
def _halves(X, weight, eps, heads, first, second, HEADS: tl.constexpr, D: tl.constexpr, WEIGHTED: tl.constexpr):
    """The two halves of each head, normed, in float32; `first` and `second` are their columns."""
    half: tl.constexpr = D // 2
    inside = (heads < HEADS)[:, None] & (first < half)[None, :]
    low = tl.load(X + heads[:, None] * D + first[None, :], mask=inside, other=0.0).to(tl.float32)
    high = tl.load(X + heads[:, None] * D + second[None, :], mask=inside, other=0.0).to(tl.float32)
    factor = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / D + eps)[:, None]
    low, high = low * factor, high * factor
    if WEIGHTED:
        low *= tl.load(weight + first, mask=first < half, other=0.0).to(tl.float32)[None, :]
        high *= tl.load(weight + second, mask=first < half, other=0.0).to(tl.float32)[None, :]
    return low, high


@triton.jit
def _store(OUT, low, high, heads, first, second, HEADS: tl.constexpr, D: tl.constexpr):
    half: tl.constexpr = D // 2
    inside = (heads < HEADS)[:, None] & (first < half)[None, :]
    tl.store(OUT + heads[:, None] * D + first[None, :], low.to(OUT.dtype.element_ty), mask=inside)
    tl.store(OUT + heads[:, None] * D + second[None, :], high.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def norm_and_rotate(
    QUERY, KEY, VALUE, QUERY_WEIGHT, KEY_WEIGHT, COSINE, SINE, QUERY_OUT, KEY_OUT, VALUE_OUT,
    query_stride, key_stride, value_stride, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One token's heads of the query, the key or the value, by the second program index."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    half: tl.constexpr = D // 2
    token, kind = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heads, first = tl.arange(0, BLOCK_HEADS), tl.arange(0, BLOCK_D)
    second = first + half
    if kind == 2:
        low, high = _halves(VALUE + token * value_stride, VALUE, eps, heads, first, second, KV_HEADS, D, False)
        _store(VALUE_OUT + token * KV_HEADS * D, low, high, heads, first, second, KV_HEADS, D)
    else:
        cosine = tl.load(COSINE + token * half + first, mask=first < half, other=0.0).to(tl.float32)[None, :]
        sine = tl.load(SINE + token * half + first, mask=first < half, other=0.0).to(tl.float32)[None, :]
        if kind == 0:
            low, high = _halves(QUERY + token * query_stride, QUERY_WEIGHT, eps, heads, first, second, HEADS, D, True)
            low, high = low * cosine - high * sine, high * cosine + low * sine
            _store(QUERY_OUT + token * HEADS * D, low, high, heads, first, second, HEADS, D)
        else:
            low, high = _halves(KEY + token * key_stride, KEY_WEIGHT, eps, heads, first, second, KV_HEADS, D, True)
            low, high = low * cosine - high * sine, high * cosine + low * sine
            _store(KEY_OUT + token * KV_HEADS * D, low, high, heads, first, second, KV_HEADS, D)
