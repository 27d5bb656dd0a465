"""The operations' ONNX faces together: what to trace a model with, and the local functions its file then needs."""

from __future__ import annotations

import onnx_ir as ir

from plugins_trt.canvas_attention import onnx as canvas_attention
from plugins_trt.canvas_readout import onnx as canvas_readout
from plugins_trt.expert_ffn import onnx as expert_ffn
from plugins_trt.expert_ffn.onnx import ExpertBody
from plugins_trt.expert_routing import onnx as expert_routing
from plugins_trt.operations import Operations
from plugins_trt.rotation import rotate_as_one_node

TRACED = Operations(
    expert_routing.expert_routing,
    expert_ffn.expert_ffn,
    canvas_attention.canvas_attention,
    canvas_readout.canvas_readout,
    rotate_as_one_node,
)
"""Leaves a custom-domain node where the model calls an operation."""


def functions(vocab_size: int, experts: int, expert_body: ExpertBody, dtype: ir.DataType) -> list[ir.Function]:
    """The local functions that give a traced model's custom-domain nodes their meaning."""
    return [
        expert_routing.function(),
        expert_ffn.function(experts, expert_body, dtype),
        canvas_attention.function(),
        canvas_readout.function(vocab_size),
    ]
