"""Weights as codes with scales, made from a checkpoint's tensors a chunk at a time.

Which tensors become codes is the published FP8 layout's choice: the experts and the linears of attention and dense
feed-forward. Embeddings (tied to the output head), router, norms and self-conditioning stay wide: they are 3% of the
parameters, and the router's choices and the head's logits suffer most from rounding.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from export.compressed_tensors import Fp8Tensor
from export.tensor_file import WeightTensor, whole_rows
from export.weights import Precision, Source
from runtime.errors import CheckpointError

GROUP = 32
"""Columns that share one scale in the 4-bit encoding."""
FP8 = torch.float8_e4m3fn
SCALE_SUFFIX = "_scale"
"""A scale's name is its weight's with this behind it."""

_LARGEST = torch.finfo(FP8).max
_SMALLEST_ABSMAX = 2.0**-100
"""A channel's largest magnitude counts as at least this, so that a channel of zeros gets a scale to divide by."""
_DIVISORS = (8.0, 8.5, 7.5)
"""Candidates for a 4-bit scale: the group's largest number, negated, over each of these. Over 8 it gets the code -8
exactly; more than 8 cuts it off for finer steps below, which costs less than it brings in many groups. On the pocket's
experts the error of one expert tensor is 8.60% with 8 alone, 8.28% with these three, 8.23% with six."""
_BLOCK = 1 << 18
"""Weights quantised at a time: so many stay in the processor's cache from one operation to the next."""
_LINEAR = re.compile(r"(^|\.)layers\.\d+\.(self_attn|mlp)\.\w+_proj(\.weight)?$")
_EXPERTS = re.compile(r"(^|\.)layers\.\d+\.experts(\.(gate_up|down)_proj)?$")


def is_linear(name: str) -> bool:
    """Whether a module or its weight, by its name, is a linear that quantised precisions store in 8-bit floats."""
    return _LINEAR.search(name) is not None


def is_experts(name: str) -> bool:
    """Whether a module or one of its weights, by its name, holds a layer's experts."""
    return _EXPERTS.search(name) is not None


def quantize_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric 8-bit floats with a scale a channel: `weight ~ codes * scale[..., None]`.

    Args:
        weight: `[..., K]`, any float.

    Returns:
        codes: float8_e4m3fn `[..., K]`, rounded to nearest, ties to even.
        scale: `absmax / 448`, float32 `[...]`.
    """
    wide = weight.float()
    scale = wide.abs().amax(-1).clamp(min=_SMALLEST_ABSMAX) / _LARGEST
    return (wide / scale.unsqueeze(-1)).clamp(-_LARGEST, _LARGEST).to(FP8), scale


def quantize_int4(weight: Tensor, scale_dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """4-bit codes -8..7 with a scale for each group of 32 columns: `weight ~ codes * scale`.

    Of a few scales each group takes the one with the least sum of squared errors; its sign is that which gives the
    group's largest magnitude the code -8, for which there is no positive counterpart.

    Args:
        weight: `[..., K]`, any float; K a multiple of 32.
        scale_dtype: what scales are stored in, and rounded to before codes are chosen.

    Returns:
        packed: `code + 8` in four bits, uint8 `[..., K / 2]`; of a group's 16 bytes, byte `4 t + 2 j + h` holds column
            `8 h + 2 t + j` in its low half and the column 16 further on in its high half.
        scale: `[..., K / 32]`.
    """
    *channels, depth = weight.shape
    groups = weight.float().reshape(-1, GROUP).T.contiguous()  # one instruction works on many groups: 3 times as fast
    low, high = groups.amin(0), groups.amax(0)
    extreme = torch.where(high > -low, high, low)
    scale, codes, error = _round(groups, extreme / -_DIVISORS[0], scale_dtype)
    for divisor in _DIVISORS[1:]:
        other_scale, other_codes, other_error = _round(groups, extreme / -divisor, scale_dtype)
        better = other_error < error
        scale, codes = torch.where(better, other_scale, scale), torch.where(better, other_codes, codes)
        error = torch.where(better, other_error, error)
    first, second = (codes + 8).to(torch.uint8).chunk(2)
    pairs = (first | second << 4).view(2, 4, 2, -1)  # h, t, j
    packed = pairs.permute(3, 1, 2, 0).reshape(*channels, depth // 2)
    return packed, scale.to(scale_dtype).view(*channels, depth // GROUP)


def _round(groups: Tensor, scale: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Scales as they are stored, the nearest codes `[32, n]` of groups `[32, n]`, and their sums of squared errors."""
    scale = scale.to(scale_dtype).float()
    codes = (groups * torch.where(scale == 0, 0.0, 1.0 / scale)).round_().clamp_(-8, 7)
    return scale, codes, (codes * scale).sub_(groups).square_().sum(0)


def store(tensors: Mapping[str, WeightTensor], precision: Precision) -> dict[str, Source]:
    """What the weights file holds: each tensor converted or, in a quantised precision, its codes and then its scales.

    Args:
        tensors: the checkpoint's tensors by name.
        precision: what to convert to.
    """
    sources: dict[str, Source] = {}
    for name, tensor in tensors.items():
        if precision is Precision.INT4 and is_experts(name):
            sources |= _int4_sources(name, tensor)
        elif precision.is_quantized and (is_linear(name) or is_experts(name)):
            sources |= _fp8_sources(name, tensor)
        else:
            sources[name] = _converted(tensor, precision.torch_dtype)
    return sources


def _converted(tensor: WeightTensor, dtype: torch.dtype) -> Source:
    return Source(dtype, tensor.shape, lambda: (chunk.to(dtype) for chunk in tensor.chunks()))


def _fp8_sources(name: str, tensor: WeightTensor) -> dict[str, Source]:
    if isinstance(tensor, Fp8Tensor):
        codes, scales = tensor.codes, tensor.scales
    else:
        passes = _Pass(tensor, quantize_fp8)
        codes, scales = passes.codes, passes.scales
    return {
        name: Source(FP8, tensor.shape, codes),
        name + SCALE_SUFFIX: Source(torch.float32, tensor.shape[:-1], scales),
    }


def _int4_sources(name: str, tensor: WeightTensor) -> dict[str, Source]:
    dtype, (*channels, depth) = Precision.INT4.torch_dtype, tensor.shape
    if depth % GROUP:
        raise CheckpointError(
            f"{name}: has rows of {depth} numbers; int4 takes multiples of {GROUP}, so export to fp8 instead"
        )
    passes = _Pass(tensor, partial(quantize_int4, scale_dtype=dtype))
    return {
        name: Source(torch.uint8, (*channels, depth // 2), passes.codes),
        name + SCALE_SUFFIX: Source(dtype, (*channels, depth // GROUP), passes.scales),
    }


class _Pass:
    """One tensor's quantisation; the pass over its codes leaves its scales, a thirtieth of it or less."""

    def __init__(self, tensor: WeightTensor, quantize: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        self._tensor, self._quantize = tensor, quantize
        self._scales: list[Tensor] | None = None

    def codes(self) -> Iterator[Tensor]:
        """The codes, flat, some rows at a time."""
        scales = []
        for rows in whole_rows(self._tensor):
            for block in torch.split(rows, max(1, _BLOCK // rows.shape[1])):
                codes, scale = self._quantize(block)
                scales.append(scale.flatten())
                yield codes.flatten()
        self._scales = scales

    def scales(self) -> Iterator[Tensor]:
        """The scales, flat; they are forgotten then, or found anew where the codes were not asked for before."""
        if self._scales is None:
            for _ in self.codes():
                pass
        scales, self._scales = self._scales, None
        assert scales is not None
        yield from scales
