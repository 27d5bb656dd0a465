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
CERTAIN = 40.0
"""Nats by which the most probable token leads every other one where a position is called certain. The others have then
a joint probability below `V e^-40`, 1e-12 for 262,144 of them, and the entropy is below `41 V e^-40` nats."""
SMALLEST_UNIFORM = 2.0**-30
"""Uniform numbers up to this draw other tokens even at certain positions: 0 draws the first one that is possible."""


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

    A trained model is certain of most positions at most steps: there the candidate is the argmax, the entropy 0 and
    the soft embedding the argmax' own. Only the other positions, the open ones, go through softmax and product.
    """
    parameters = ["hidden", "embedding", "temperature", "uniform", "guard", "guarded_ids"]
    body = FunctionBody("canvas_readout", parameters, ["softcap", "embedding_scale"])
    hidden, embedding, temperature, uniform, guard, guarded_ids = body.inputs
    softcap, last = body.attribute("softcap", AttributeType.FLOAT), body.integers(-1)
    capped = _guarded(body, _logits(body, hidden, embedding, softcap), guard, guarded_ids)
    argmax_ids, largest, second = _two_largest(body, capped, vocab_size)
    sharpness = body.Expand(body.Unsqueeze(body.Div(softcap, temperature), body.integers(1, 2)), body.Shape(largest))
    uniform = body.Unsqueeze(uniform, last)
    places = _open(body, body.Mul(body.Sub(largest, second), sharpness), uniform)
    shifted = body.Sub(_picked(body, capped, places), _picked(body, largest, places))
    shifted = body.Mul(shifted, _picked(body, sharpness, places))
    candidates, entropies, expected = _drawn(body, shifted, _picked(body, uniform, places), embedding, vocab_size)
    candidate_ids = _replaced(body, argmax_ids, places, candidates)
    entropy = _replaced(body, body.Expand(body.number(0.0), body.Shape(largest)), places, entropies)
    argmax_ids = body.Squeeze(argmax_ids, last)
    soft = _replaced(body, body.Gather(embedding, argmax_ids), places, expected)
    # Last the product, so that nothing is left of the casts where all is float32.
    soft = body.Mul(
        body.CastLike(soft, hidden), body.CastLike(body.attribute("embedding_scale", AttributeType.FLOAT), hidden)
    )
    return body.finish(argmax_ids, body.Squeeze(candidate_ids, last), body.Squeeze(entropy, last), soft)


def block_size(vocab_size: int) -> int:
    """Divisor of the vocabulary's size nearest to its square root: block sums and one block cost about the same."""
    root = math.isqrt(vocab_size)
    return next(size for size in range(root, 0, -1) if vocab_size % size == 0)


def _logits(body: FunctionBody, hidden: Value, embedding: Value, softcap: Value) -> Value:
    """`logits / softcap` in float32, `[R, S, V]`; the division is done on the states, V / H times fewer."""
    narrowed = body.Div(hidden, body.CastLike(softcap, hidden))
    logits = body.MatMul(narrowed, body.Transpose(embedding, perm=[1, 0]))
    return body.Cast(logits, to=ir.DataType.FLOAT)


def _guarded(body: FunctionBody, logits: Value, guard: Value, guarded_ids: Value) -> Value:
    """`tanh(logits)` with the guarded tokens blocked at position 0 of guarded canvases; only those entries are written.

    What an entry holds is read from `logits`: read from what is written to, it would cost a copy of all of them.
    """
    shape = body.Concat(body.dimension(logits, 0), body.integers(1), body.Shape(guarded_ids), axis=0)
    entries = body.Expand(guarded_ids, shape)
    kept = body.Tanh(body.GatherElements(logits, entries, axis=2))
    blocked = body.Where(body.Unsqueeze(guard, body.integers(1, 2)), body.number(BLOCKED), kept)
    # Not ScatterND, for which ONNX Runtime copies all of them too.
    return body.ScatterElements(body.Tanh(logits), entries, blocked, axis=2)


def _two_largest(body: FunctionBody, capped: Value, vocab_size: int) -> tuple[Value, Value, Value]:
    """Index of the first maximum, its value, and the largest value elsewhere, `[R, S, 1]` each.

    Of the maxima of blocks the largest tells where to look closely; the second largest value is among the other blocks'
    maxima and the rest of that block.
    """
    size = block_size(vocab_size)
    blocks = body.Reshape(capped, body.integers(0, 0, vocab_size // size, size))
    maxima = body.ReduceMax(blocks, body.integers(-1), keepdims=0)
    block = body.ArgMax(maxima, axis=-1, keepdims=1)
    candidates = body.GatherND(blocks, block, batch_dims=2)
    inside = body.ArgMax(candidates, axis=-1, keepdims=1)
    nothing = body.Expand(body.number(BLOCKED), body.Shape(block))
    others = body.Concat(
        body.ScatterElements(maxima, block, nothing, axis=2),
        body.ScatterElements(candidates, inside, nothing, axis=2),
        axis=2,
    )
    index = body.Add(body.Mul(block, body.integer(size)), inside)
    largest, second = (body.ReduceMax(values, body.integers(-1), keepdims=1) for values in (maxima, others))
    return index, largest, second


def _open(body: FunctionBody, lead: Value, uniform: Value) -> Value:
    """Places of the open positions among all `R * S`, `[n, 1]`, by the largest logit's lead `[R, S, 1]`."""
    close = body.LessOrEqual(lead, body.number(CERTAIN))
    lowest = body.LessOrEqual(uniform, body.number(SMALLEST_UNIFORM))
    return body.Transpose(body.NonZero(body.Reshape(body.Or(close, lowest), body.integers(-1))), perm=[1, 0])


def _flat(body: FunctionBody, x: Value) -> Value:
    """`[R, S, W]` as `[R * S, W]`."""
    return body.Reshape(x, body.Concat(body.integers(-1), body.dimension(x, 2), axis=0))


def _picked(body: FunctionBody, x: Value, places: Value) -> Value:
    """The rows of `[R, S, W]` at `places`, `[n, W]`."""
    return body.GatherND(_flat(body, x), places)


def _replaced(body: FunctionBody, x: Value, places: Value, rows: Value) -> Value:
    """`x`, `[R, S, W]`, with `rows`, `[n, W]`, at `places`."""
    return body.Reshape(body.ScatterND(_flat(body, x), places, rows), body.Shape(x))


def _drawn(
    body: FunctionBody, shifted: Value, uniform: Value, embedding: Value, vocab_size: int
) -> tuple[Value, Value, Value]:
    """Candidate `[n, 1]`, entropy `[n, 1]` and expected embedding `[n, H]` of logits less their largest, `[n, V]`.

    Softmax weights stay unnormalised: sums of `exp(shifted)` over blocks of the vocabulary give their total and the
    cumulative distribution at block borders, so that the candidate's draw looks closely at one block.
    """
    weights = body.Exp(shifted)
    candidates, total = _candidate(body, weights, uniform, vocab_size)
    energy = body.ReduceSum(body.Mul(weights, shifted), body.integers(-1), keepdims=1)
    entropies = body.Sub(body.Log(total), body.Div(energy, total))
    expected = body.MatMul(body.CastLike(weights, embedding), embedding)
    return candidates, entropies, body.CastLike(body.Div(body.Cast(expected, to=ir.DataType.FLOAT), total), embedding)


def _candidate(body: FunctionBody, weights: Value, uniform: Value, vocab_size: int) -> tuple[Value, Value]:
    """Inverse CDF over weights `[n, V]` at `uniform`, `[n, 1]`: index and the weights' total, `[n, 1]` each.

    First the block in which the cumulative sum passes the threshold, then the token in the block.
    """
    last, size = body.integers(-1), block_size(vocab_size)
    blocks = body.Reshape(weights, body.integers(-1, vocab_size // size, size))
    cumulative = body.CumSum(body.ReduceSum(blocks, last, keepdims=0), body.integer(-1))
    total = body.Gather(cumulative, last, axis=-1)
    threshold = _below(body, body.Mul(uniform, total), total)
    block, before = _first_above(body, cumulative, threshold)
    base = body.ReduceMax(body.Where(before, cumulative, body.number(0.0)), last, keepdims=1)
    chosen = body.CumSum(body.GatherND(blocks, block, batch_dims=1), body.integer(-1))
    end = body.Gather(chosen, last, axis=-1)
    inside, _ = _first_above(body, chosen, _below(body, body.Sub(threshold, base), end))
    return body.Add(body.Mul(block, body.integer(size)), inside), total


def _below(body: FunctionBody, threshold: Value, total: Value) -> Value:
    """`threshold`, kept below `total` where rounding lifted it there: the chosen token has then a positive weight."""
    return body.Min(threshold, body.Mul(total, body.number(1.0 - 2.0**-23)))


def _first_above(body: FunctionBody, cumulative: Value, threshold: Value) -> tuple[Value, Value]:
    """Index `[n, 1]` of the first value above the threshold, and where the values lie before it."""
    before = body.LessOrEqual(cumulative, threshold)
    return body.ReduceSum(body.Cast(before, to=ir.DataType.INT64), body.integers(-1), keepdims=1), before
