"""Expert feed-forward as a custom-domain node, and its meaning in standard operators, in several bodies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from functools import partial

import onnx_ir as ir
from torch import Tensor

from plugins_trt.onnx_function import FunctionBody, Value, custom_node


class ExpertBody(Enum):
    """Ways to write the feed-forward in standard operators; `python -m benchmarks.expert_bodies` measures them."""

    UNROLLED = "unrolled"
    """One product an expert, of the tokens that chose it: least work, nodes grow with the experts."""
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


def function(experts: int, kind: ExpertBody, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Function:
    """The local function for `experts` experts, states and weights in `dtype`."""
    body = FunctionBody("expert_ffn", ["x", "expert_ids", "expert_weights", "gate_up", "down"])
    if kind is ExpertBody.DENSE:
        return body.finish(_dense(body, experts))
    grouped = partial(_looped, dtype=dtype) if kind is ExpertBody.LOOP else _unrolled
    return body.finish(_sparse(body, experts, grouped))


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


def _sparse(body: FunctionBody, experts: int, grouped: _Grouped) -> Value:
    """Multiply each expert's tokens with its matrices, lay the results end to end, and add up those of each token."""
    x, expert_ids, expert_weights, _, _ = body.inputs
    chosen = _chosen(body, x, expert_ids, experts)
    tokens = body.Gather(body.NonZero(chosen), body.integer(1), axis=0)
    outputs = grouped(body, tokens, body.ReduceSum(chosen, body.integers(1), keepdims=0), experts)
    # Where a token's result lies among its expert's follows from how many pairs come before it.
    ranks = body.CumSum(body.Reshape(chosen, body.integers(-1)), body.integer(0), exclusive=1)
    length = body.Squeeze(body.dimension(x, 0))
    column = body.Unsqueeze(body.Range(body.integer(0), length, body.integer(1)), body.integers(1))
    places = body.Gather(ranks, body.Add(body.Mul(expert_ids, length), column))
    mixed = body.MatMul(body.Unsqueeze(expert_weights, body.integers(1)), body.Gather(outputs, places))
    return body.Squeeze(mixed, body.integers(1))


def _chosen(body: FunctionBody, x: Value, expert_ids: Value, experts: int) -> Value:
    """1 where an expert has a token and 0 elsewhere, `[experts, T]` int64."""
    shape = body.Concat(body.dimension(x, 0), body.integers(experts), axis=0)
    none = body.Expand(body.integer(0), shape)
    ones = body.Expand(body.integer(1), body.Shape(expert_ids))
    return body.Transpose(body.ScatterElements(none, expert_ids, ones, axis=1), perm=[1, 0])


_Grouped = Callable[[FunctionBody, Value, Value, int], Value]
"""The feed-forward of every chosen pair, `[T * K, H]`, the first expert's tokens first, given the tokens in that order
and how many of them each expert has."""


def _unrolled(body: FunctionBody, tokens: Value, counts: Value, experts: int) -> Value:
    x, _, _, gate_up, down = body.inputs
    # Indices are split and not the states: `[T * K, H]` is never laid out just to be taken apart.
    rows = [body.Gather(x, each) for each in body.several("Split", experts, tokens, counts, axis=0)]
    hidden = _gated(body, _products(body, rows, gate_up), axis=1)
    return _products(body, body.several("Split", experts, hidden, counts, axis=0), down)


def _products(body: FunctionBody, rows: Sequence[Value], weights: Value) -> Value:
    """Each expert's rows times its transposed matrix, end to end."""
    transposed = body.Transpose(weights, perm=[0, 2, 1])
    matrices = body.several("Split", len(rows), transposed, axis=0, num_outputs=len(rows))
    products = [
        body.MatMul(each, body.Squeeze(matrix, body.integers(0))) for each, matrix in zip(rows, matrices, strict=True)
    ]
    return body.Concat(*products, axis=0)


def _looped(body: FunctionBody, tokens: Value, counts: Value, experts: int, dtype: ir.DataType) -> Value:
    x, _, _, gate_up, down = body.inputs
    hidden = _gated(body, _loop(body, body.Gather(x, tokens), counts, gate_up, experts, dtype), axis=1)
    return _loop(body, hidden, counts, down, experts, dtype)


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
