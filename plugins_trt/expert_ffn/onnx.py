"""Expert feed-forward as a custom-domain node, and its meaning in standard operators, in several bodies."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from functools import partial

import onnx_ir as ir
from torch import Tensor

from plugins_trt.onnx_function import FunctionBody, Value, custom_node


class ExpertBody(Enum):
    """Ways to write the feed-forward in standard operators; `python -m benchmarks.expert_bodies` measures them."""

    UNROLLED = "unrolled"
    """Pairs of token and expert sorted by expert, one product an expert: least work, nodes grow with the experts."""
    LOOP = "loop"
    """The same in a Loop that gathers one expert's weights at a time: few nodes, weights copied at every step."""
    DENSE = "dense"
    """Every expert for every token in two wide products, masked: the only one without data-dependent shapes."""


_LARGEST_COPY = 1 << 29
"""Expert parameters in the whole model up to which a second, transposed copy in memory is worth its speed."""


def choose_body(experts: int, top_k: int, parameters: int) -> ExpertBody:
    """The fastest body on a CPU, by `python -m benchmarks.expert_bodies`, that memory allows.

    On 2 busy cores, 256 tokens, hidden 256, in ms unrolled / loop / dense: 2.2 / 25 / 25 at 16 experts and top-4,
    32 / 140 / 247 at 128 and top-8, 55 / 120 / 34 at 16 and top-16.

    Args:
        experts: experts of a layer.
        top_k: experts of a token.
        parameters: expert parameters of all layers together.
    """
    if 2 * top_k > experts:
        return ExpertBody.DENSE
    return ExpertBody.UNROLLED if parameters <= _LARGEST_COPY else ExpertBody.LOOP


def expert_ffn(x: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The traced node; arguments and results as in `reference.expert_ffn`."""
    (mixed,) = custom_node("expert_ffn", [x, expert_ids, expert_weights, gate_up, down], [(x.dtype, x.shape)], {})
    return mixed


def function(experts: int, top_k: int, kind: ExpertBody, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Function:
    """The local function for `experts` experts of which each token has `top_k`, states and weights in `dtype`."""
    body = FunctionBody("expert_ffn", ["x", "expert_ids", "expert_weights", "gate_up", "down"])
    if kind is ExpertBody.DENSE:
        return body.finish(_dense(body, experts))
    per_expert = partial(_loop, dtype=dtype) if kind is ExpertBody.LOOP else _unrolled
    return body.finish(_sorted(body, experts, top_k, per_expert))


def _dense(body: FunctionBody, experts: int) -> Value:
    x, expert_ids, expert_weights, gate_up, down = body.inputs
    tokens, each = body.dimension(x, 0), body.integers(experts)
    unchosen = body.CastLike(body.Expand(body.number(0.0), body.Concat(tokens, each, axis=0)), x)
    token_weights = body.ScatterElements(unchosen, expert_ids, expert_weights, axis=1)
    # The experts' matrices end to end: [E * 2I, H] and [E * I, H].
    wide = body.Reshape(gate_up, body.Concat(body.integers(-1), body.dimension(gate_up, 2), axis=0))
    transposed = body.Transpose(down, perm=[0, 2, 1])
    tall = body.Reshape(transposed, body.Concat(body.integers(-1), body.dimension(down, 1), axis=0))
    products = body.MatMul(x, body.Transpose(wide, perm=[1, 0]))
    products = body.Reshape(products, body.Concat(tokens, each, body.dimension(gate_up, 1), axis=0))
    hidden = body.Mul(_gated(body, products, axis=2), body.Unsqueeze(token_weights, body.integers(-1)))
    return body.MatMul(body.Reshape(hidden, body.Concat(tokens, body.dimension(tall, 0), axis=0)), tall)


def _gated(body: FunctionBody, products: Value, axis: int) -> Value:
    gate, up = body.several("Split", 2, products, axis=axis, num_outputs=2)
    return body.Mul(body.Gelu(gate, approximate="tanh"), up)


def _sorted(body: FunctionBody, experts: int, top_k: int, per_expert: _PerExpert) -> Value:
    """Sort the pairs of token and expert by expert, multiply each run with its expert's matrices, sort back, add up."""
    x, expert_ids, expert_weights, gate_up, down = body.inputs
    pairs = body.Reshape(expert_ids, body.integers(-1))
    count = body.Shape(pairs)
    _, order = body.several("TopK", 2, pairs, count, largest=0, sorted=1)
    counts = _counts(body, pairs, experts)
    states = body.Gather(x, body.Div(order, body.integer(top_k)))
    weights = body.Gather(body.Reshape(expert_weights, body.integers(-1, 1)), order)
    hidden = body.Mul(_gated(body, per_expert(body, states, counts, gate_up, experts), axis=1), weights)
    outputs = per_expert(body, hidden, counts, down, experts)
    ranks = body.Range(body.integer(0), body.Squeeze(count), body.integer(1))
    inverse = body.Reshape(body.ScatterElements(order, order, ranks), body.integers(-1, top_k))
    return body.ReduceSum(body.Gather(outputs, inverse), body.integers(1), keepdims=0)


def _counts(body: FunctionBody, pairs: Value, experts: int) -> Value:
    """How many pairs each expert has, `[experts]` int64."""
    matches = body.Equal(body.Unsqueeze(pairs, body.integers(-1)), body.integers(*range(experts)))
    return body.ReduceSum(body.Cast(matches, to=ir.DataType.INT64), body.integers(0), keepdims=0)


_PerExpert = Callable[[FunctionBody, Value, Value, Value, int], Value]
"""`rows`, sorted by expert and `counts` of them each, times their expert's transposed matrix."""


def _unrolled(body: FunctionBody, rows: Value, counts: Value, weights: Value, experts: int) -> Value:
    if experts == 1:
        return body.MatMul(rows, body.Squeeze(body.Transpose(weights, perm=[0, 2, 1]), body.integers(0)))
    chunks = body.several("Split", experts, rows, counts, axis=0)
    transposed = body.Transpose(weights, perm=[0, 2, 1])
    matrices = body.several("Split", experts, transposed, axis=0, num_outputs=experts)
    products = [
        body.MatMul(chunk, body.Squeeze(matrix, body.integers(0)))
        for chunk, matrix in zip(chunks, matrices, strict=True)
    ]
    return body.Concat(*products, axis=0)


def _loop(body: FunctionBody, rows: Value, counts: Value, weights: Value, experts: int, dtype: ir.DataType) -> Value:
    """Each turn overwrites its expert's run of rows in the result."""
    ends = body.CumSum(counts, body.integer(0))
    starts = body.Sub(ends, counts)
    shape = body.Concat(body.dimension(rows, 0), body.dimension(weights, 1), axis=0)
    empty = body.CastLike(body.Expand(body.number(0.0), shape), rows)
    turn = FunctionBody(f"{body.name}_turn_{weights.name}", ["index", "going", "result"])
    index, going, result = turn.inputs
    # The one place where a body has to name its types: ONNX Runtime wants them of a Loop's inputs.
    for value, kind, sizes in (
        (index, ir.DataType.INT64, []),
        (going, ir.DataType.BOOL, []),
        (result, dtype, ["N", "W"]),
    ):
        value.dtype, value.shape = kind, ir.Shape(sizes)
    begin, end = (turn.Gather(border, turn.Unsqueeze(index, turn.integers(0))) for border in (starts, ends))
    product = turn.MatMul(
        turn.Slice(rows, begin, end, turn.integers(0)), turn.Transpose(turn.Gather(weights, index), perm=[1, 0])
    )
    places = turn.Range(turn.Squeeze(begin), turn.Squeeze(end), turn.integer(1))
    written = turn.ScatterND(result, turn.Unsqueeze(places, turn.integers(-1)), product)
    graph = turn.graph(turn.Identity(going), written)
    return body.Loop(body.integer(experts), body.Constant(value=ir.tensor(True)), empty, body=graph)
