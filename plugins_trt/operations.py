"""The operations a model definition is written against, so that tracing and training can each bring their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from plugins_trt.canvas_attention.reference import canvas_attention
from plugins_trt.canvas_readout.reference import canvas_readout
from plugins_trt.expert_ffn.reference import expert_ffn, expert_ffn_fp8, expert_ffn_int4
from plugins_trt.expert_routing.reference import expert_routing
from plugins_trt.quantized_linear.reference import linear_fp8
from plugins_trt.rotation import rotate


@dataclass(frozen=True)
class Operations:
    """One implementation of each operation; the signatures are those of the `reference` modules."""

    expert_routing: Callable[..., tuple[Tensor, Tensor]]
    expert_ffn: Callable[..., Tensor]
    canvas_attention: Callable[..., Tensor]
    canvas_readout: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor] = rotate
    linear_fp8: Callable[..., Tensor] = linear_fp8
    expert_ffn_fp8: Callable[..., Tensor] = expert_ffn_fp8
    expert_ffn_int4: Callable[..., Tensor] = expert_ffn_int4
    head_norm: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None
    """None leaves the norms of the heads to the model and their rotation to `rotate`."""


REFERENCE = Operations(expert_routing, expert_ffn, canvas_attention, canvas_readout)
"""Plain PyTorch: runs on any machine and carries gradients."""
