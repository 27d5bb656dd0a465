"""Canvas readout as a custom-domain node, and its meaning in standard operators."""

from __future__ import annotations

import math

import onnx_ir as ir
import torch
from onnx_ir import AttributeType
from torch import Tensor

from plugins_trt.onnx_function import FunctionBody, Value, custom_node

BLOCKED = -1e30
"""Stands for a blocked logit: finite, so that its share of the entropy is 0 and not NaN."""


def canvas_readout(
    hidden: Tensor,
    embedding: Tensor,
    temperature: Tensor,
    uniform: Tensor,
    guard: Tensor,
    guarded_ids: Tensor,
    softcap: float,
    embedding_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The traced node; arguments and results as in `reference.canvas_readout`."""
    positions = hidden.shape[:2]
    argmax_ids, candidate_ids, entropy, soft_embedding = custom_node(
        "canvas_readout",
        [hidden, embedding, temperature, uniform, guard, guarded_ids],
        [(torch.int64, positions)] * 2 + [(torch.float32, positions), (hidden.dtype, hidden.shape)],
        {"softcap": softcap, "embedding_scale": embedding_scale},
    )
    return argmax_ids, candidate_ids, entropy, soft_embedding


def function(vocab_size: int) -> ir.Function:
    """The readout of a vocabulary of `vocab_size`, in as few passes over `[R, S, V]` as standard operators allow.

    Softmax weights stay unnormalised, `e = exp(x - max x)`: sums of `e` over blocks of the vocabulary give the total
    and the cumulative distribution at block borders, so that argmax and candidate look closely at one block each.
    """
    parameters = ["hidden", "embedding", "temperature", "uniform", "guard", "guarded_ids"]
    body = FunctionBody("canvas_readout", parameters, ["softcap", "embedding_scale"])
    hidden, embedding, temperature, uniform, guard, guarded_ids = body.inputs
    softcap, last = body.attribute("softcap", AttributeType.FLOAT), body.integers(-1)
    blocks = body.integers(0, 0, vocab_size // block_size(vocab_size), block_size(vocab_size))

    capped = _capped(body, hidden, embedding, softcap)
    capped = _guarded(body, capped, guard, guarded_ids)
    argmax_ids, largest = _argmax(body, body.Reshape(capped, blocks), block_size(vocab_size))
    sharpness = body.Unsqueeze(body.Div(softcap, temperature), body.integers(1, 2))
    shifted = body.Mul(body.Sub(capped, largest), sharpness)
    weights = body.Exp(shifted)
    weight_blocks = body.Reshape(weights, blocks)
    candidate_ids, total = _candidate(body, weight_blocks, uniform, block_size(vocab_size))
    energy = body.ReduceSum(body.Mul(weights, shifted), last, keepdims=1)
    entropy = body.Squeeze(body.Sub(body.Log(total), body.Div(energy, total)), last)
    embedding_scale = body.attribute("embedding_scale", AttributeType.FLOAT)
    expected = body.MatMul(body.CastLike(weights, embedding), embedding)
    soft = body.Mul(body.Cast(expected, to=ir.DataType.FLOAT), body.Div(embedding_scale, total))
    return body.finish(argmax_ids, candidate_ids, entropy, body.CastLike(soft, hidden))


def block_size(vocab_size: int) -> int:
    """Divisor of the vocabulary's size nearest to its square root: block sums and one block cost about the same."""
    root = math.isqrt(vocab_size)
    return next(size for size in range(root, 0, -1) if vocab_size % size == 0)


def _capped(body: FunctionBody, hidden: Value, embedding: Value, softcap: Value) -> Value:
    """`tanh(logits / softcap)` in float32, `[R, S, V]`; the division is done on the states, V / H times fewer."""
    narrowed = body.Div(hidden, body.CastLike(softcap, hidden))
    logits = body.MatMul(narrowed, body.Transpose(embedding, perm=[1, 0]))
    return body.Tanh(body.Cast(logits, to=ir.DataType.FLOAT))


def _guarded(body: FunctionBody, capped: Value, guard: Value, guarded_ids: Value) -> Value:
    """`capped` with the guarded tokens blocked at position 0 of guarded canvases; only those entries are written."""
    last = body.integers(-1)
    rows = body.Range(body.integer(0), body.Squeeze(body.dimension(capped, 0)), body.integer(1))
    shape = body.Concat(body.Shape(rows), body.Shape(guarded_ids), body.integers(1), axis=0)
    row = body.Expand(body.Unsqueeze(rows, body.integers(1, 2)), shape)
    token = body.Expand(body.Unsqueeze(guarded_ids, body.integers(0, 2)), shape)
    entries = body.Concat(row, body.Mul(row, body.integer(0)), token, axis=2)
    kept = body.GatherND(capped, entries)
    return body.ScatterND(capped, entries, body.Where(body.Unsqueeze(guard, last), body.number(BLOCKED), kept))


def _argmax(body: FunctionBody, blocks: Value, size: int) -> tuple[Value, Value]:
    """Index and value of the first maximum of `[R, S, blocks, size]`: `[R, S]` and `[R, S, 1]`."""
    last = body.integers(-1)
    maxima = body.ReduceMax(blocks, last, keepdims=0)
    block = body.ArgMax(maxima, axis=-1, keepdims=1)
    inside = body.ArgMax(body.GatherND(blocks, block, batch_dims=2), axis=-1, keepdims=1)
    index = body.Add(body.Mul(block, body.integer(size)), inside)
    return body.Squeeze(index, last), body.ReduceMax(maxima, last, keepdims=1)


def _candidate(body: FunctionBody, blocks: Value, uniform: Value, size: int) -> tuple[Value, Value]:
    """Inverse CDF over weights `[R, S, blocks, size]`: index `[R, S]` and the weights' total `[R, S, 1]`.

    First the block in which the cumulative sum passes the threshold, then the token in the block.
    """
    last = body.integers(-1)
    sums = body.ReduceSum(blocks, last, keepdims=0)
    cumulative = body.CumSum(sums, body.integer(-1))
    total = body.Gather(cumulative, body.integers(-1), axis=-1)
    threshold = _below(body, body.Mul(body.Unsqueeze(uniform, last), total), total)
    block, before = _first_above(body, cumulative, threshold)
    base = body.ReduceMax(body.Where(before, cumulative, body.number(0.0)), last, keepdims=1)
    chosen = body.CumSum(body.GatherND(blocks, block, batch_dims=2), body.integer(-1))
    end = body.Gather(chosen, body.integers(-1), axis=-1)
    inside, _ = _first_above(body, chosen, _below(body, body.Sub(threshold, base), end))
    return body.Squeeze(body.Add(body.Mul(block, body.integer(size)), inside), last), total


def _below(body: FunctionBody, threshold: Value, total: Value) -> Value:
    """`threshold`, kept below `total` where rounding lifted it there: the chosen token has then a positive weight."""
    return body.Min(threshold, body.Mul(total, body.number(1.0 - 2.0**-23)))


def _first_above(body: FunctionBody, cumulative: Value, threshold: Value) -> tuple[Value, Value]:
    """Index `[R, S, 1]` of the first value above the threshold, and where the values lie before it."""
    before = body.LessOrEqual(cumulative, threshold)
    return body.ReduceSum(body.Cast(before, to=ir.DataType.INT64), body.integers(-1), keepdims=1), before
