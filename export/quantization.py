"""Weights as codes with scales, made from a checkpoint's tensors a chunk at a time.

Which tensors become codes is the published FP8 layout's choice: the experts and the linears of attention and dense
feed-forward. Embeddings (tied to the output head), router, norms and self-conditioning stay wide: they are 3% of the
parameters, and the router's choices and the head's logits suffer most from rounding.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise

import torch
from torch import Tensor

from export.compressed_tensors import Fp8Tensor
from export.tensor_file import WeightTensor, whole_rows
from export.weights import Precision, Source
from plugins_trt.expert_ffn.reference import INT4_GROUP, INT4_SCALE_BYTES, int4_table
from runtime.errors import CheckpointError

FP8 = torch.float8_e4m3fn
SCALE_SUFFIX = "_scale"
"""A scale's name is its weight's with this behind it."""

_LARGEST = torch.finfo(FP8).max
_SMALLEST_ABSMAX = 2.0**-100
"""A channel's largest magnitude counts as at least this, so that a channel of zeros gets a scale to divide by."""
_STEPS = (0, 1, -1)
"""Candidates for a group's 4-bit scale: the float8 number nearest to its largest magnitude, and its neighbours. For
normal weights, and for the pocket's experts, the error of a tensor is 8.5% with the nearest alone, 8.1% with these
three and with five."""
_LARGEST_CODE = 126
"""Of float8_e4m3fn, as an integer: 448."""
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


def quantize_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """4-bit codes with scales for rows and groups of columns, as `plugins_trt.expert_ffn.reference` explains them.

    Of a few scales each group takes the one with the least sum of squared errors.

    Args:
        weight: `[N, K]`, any float; K a multiple of 32.

    Returns:
        packed: uint8 `[N, K / 2]`.
        scale: uint8 `[N, 4 + K / 32]`: each row's own scale, float32, and those of its groups.
    """
    rows, depth = weight.shape
    wide = weight.float()
    row_scale = wide.abs().amax(-1).clamp(min=_SMALLEST_ABSMAX) / _LARGEST
    # One instruction works on many groups: 3 times as fast as on many columns.
    groups = (wide / row_scale[:, None]).view(-1, INT4_GROUP).T.contiguous()
    magnitudes = groups.abs()
    scale = _best_scale(magnitudes)
    packed = _pack(_codes(magnitudes, scale), groups < 0).reshape(rows, depth // 2)
    return packed, torch.cat([row_scale[:, None].view(torch.uint8), scale.view(rows, depth // INT4_GROUP)], dim=1)


def int4_scale(scales: Tensor) -> Tensor:
    """Scales as `quantize_int4` makes them, `[E, N, 4 + K / 32]`, in the operation's order, `[E, 4 + K / 32, N]`."""
    experts, rows, width = scales.shape
    own, groups = scales.tensor_split([INT4_SCALE_BYTES], dim=2)
    return torch.cat([own.flatten(1), groups.transpose(1, 2).flatten(1)], dim=1).view(experts, width, rows)


def _best_scale(magnitudes: Tensor) -> Tensor:
    """Scales as float8 codes, uint8 `[n]`, for groups of `magnitudes [32, n]`."""
    nearest = magnitudes.amax(0).clamp_(max=_LARGEST).to(FP8).view(torch.uint8).to(torch.int16)
    best, least = nearest, torch.full_like(magnitudes[0], torch.inf)
    for step in _STEPS:
        scale = (nearest + step).clamp_(0, _LARGEST_CODE)
        error = _distance(magnitudes, scale).square_().sum(0)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best.to(torch.uint8)


def _distance(magnitudes: Tensor, scale: Tensor) -> Tensor:
    """From each of `magnitudes [32, n]` to the nearest of its scale's numbers."""
    first, *others = _numbers(scale)
    least: Tensor = (magnitudes - first).abs_()
    for number in others:
        torch.minimum(least, (magnitudes - number).abs_(), out=least)
    return least


def _codes(magnitudes: Tensor, scale: Tensor) -> Tensor:
    """Which of its scale's numbers is nearest to each of `magnitudes [32, n]`, uint8."""
    codes = torch.zeros_like(magnitudes, dtype=torch.uint8)
    for below, above in pairwise(_numbers(scale)):
        codes += magnitudes > (below + above) / 2
    return codes


def _numbers(scale: Tensor) -> Tensor:
    """The eight numbers of each of `scale [n]`, rising, float32 `[8, n]`."""
    return int4_table().float().to(scale.device)[scale.long()].T.contiguous()


def _pack(codes: Tensor, negative: Tensor) -> Tensor:
    """Bytes of groups, uint8 `[n, 16]`, from magnitudes' codes and signs `[32, n]`."""
    low, high = codes.view(2, 4, 2, 2, -1).unbind(3)  # half, t, pair of neighbours
    bytes_ = (low | high << 4).transpose(0, 1).reshape(4, 4, -1)
    first, second = negative.to(torch.uint8).view(2, 4, 4, -1)  # t, i
    packed: Tensor = bytes_ | first << 7 | second << 3
    return packed.permute(2, 0, 1).reshape(-1, INT4_GROUP // 2)


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
    experts, rows, depth = tensor.shape
    if depth % INT4_GROUP:
        raise CheckpointError(
            f"{name}: has rows of {depth} numbers; int4 takes multiples of {INT4_GROUP}, so export to fp8 instead"
        )
    passes, width = _Pass(tensor, quantize_int4), INT4_SCALE_BYTES + depth // INT4_GROUP

    def scales() -> Iterator[Tensor]:
        yield int4_scale(torch.cat(list(passes.scales())).view(experts, rows, width)).flatten()

    return {
        name: Source(torch.uint8, (experts, rows, depth // 2), passes.codes),
        name + SCALE_SUFFIX: Source(torch.uint8, (experts, width, rows), scales),
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
