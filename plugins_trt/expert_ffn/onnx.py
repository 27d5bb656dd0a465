"""Expert feed-forward as a custom-domain node, and its meaning in standard operators, in several bodies."""

from __future__ import annotations

from enum import Enum

import onnx_ir as ir
from torch import Tensor

from plugins_trt.onnx_function import FunctionBody, Value, custom_node


class ExpertBody(Enum):
    """Ways to write the feed-forward in standard operators; `benchmarks/expert_bodies.py` measures them."""

    UNROLLED = "unrolled"
    """Pairs of token and expert sorted by expert, one product an expert: least work, nodes grow with the experts."""
    LOOP = "loop"
    """The same in a Loop that gathers one expert's weights at a time: few nodes, weights copied at every step."""
    DENSE = "dense"
    """Every expert for every token in two wide products, masked: best where most experts are chosen anyway."""


def expert_ffn(x: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The traced node; arguments and results as in `reference.expert_ffn`."""
    (mixed,) = custom_node("expert_ffn", [x, expert_ids, expert_weights, gate_up, down], [(x.dtype, x.shape)], {})
    return mixed


def function(experts: int, top_k: int) -> ir.Function:
    """The unrolled body for `experts` experts of which each token has `top_k`."""
    body = FunctionBody("expert_ffn", ["x", "expert_ids", "expert_weights", "gate_up", "down"])
    x, expert_ids, expert_weights, gate_up, down = body.inputs
    pairs = body.Reshape(expert_ids, body.integers(-1))
    count = body.Shape(pairs)
    _, order = body.several("TopK", 2, pairs, count, largest=0, sorted=1)
    counts = _counts(body, pairs, experts)
    states = body.Gather(x, body.Div(order, body.integer(top_k)))
    gate, up = body.several("Split", 2, _per_expert(body, states, counts, gate_up, experts), axis=1, num_outputs=2)
    weights = body.Gather(body.Reshape(expert_weights, body.integers(-1, 1)), order)
    hidden = body.Mul(body.Mul(body.Gelu(gate, approximate="tanh"), up), weights)
    outputs = _per_expert(body, hidden, counts, down, experts)
    _, inverse = body.several("TopK", 2, order, count, largest=0, sorted=1)
    by_token = body.Gather(outputs, body.Reshape(inverse, body.integers(-1, top_k)))
    return body.finish(body.ReduceSum(by_token, body.integers(1), keepdims=0))


def _counts(body: FunctionBody, pairs: Value, experts: int) -> Value:
    """How many pairs each expert has, `[experts]` int64."""
    matches = body.Equal(body.Unsqueeze(pairs, body.integers(-1)), body.integers(*range(experts)))
    return body.ReduceSum(body.Cast(matches, to=ir.DataType.INT64), body.integers(0), keepdims=0)


def _per_expert(body: FunctionBody, rows: Value, counts: Value, weights: Value, experts: int) -> Value:
    """`rows`, sorted by expert, each times its expert's transposed matrix."""
    if experts == 1:
        return body.MatMul(rows, body.Transpose(body.Squeeze(weights, body.integers(0)), perm=[1, 0]))
    chunks = body.several("Split", experts, rows, counts, axis=0)
    matrices = body.several("Split", experts, body.Transpose(weights, perm=[0, 2, 1]), axis=0, num_outputs=experts)
    products = [
        body.MatMul(chunk, body.Squeeze(matrix, body.integers(0)))
        for chunk, matrix in zip(chunks, matrices, strict=True)
    ]
    return body.Concat(*products, axis=0)
