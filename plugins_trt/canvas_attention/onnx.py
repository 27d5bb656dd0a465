"""Canvas attention as a custom-domain node, and its meaning in standard operators."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir import AttributeType
from torch import Tensor

from plugins_trt.onnx_function import FunctionBody, Value, custom_node

HIDDEN = -1e30
"""Added to the score of a key that a token does not see."""


def canvas_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    page_table: Tensor,
    page_base: Tensor,
    start: Tensor,
    kv_start: Tensor,
    kv_end: Tensor,
) -> Tensor:
    """The traced node; arguments and results as in `reference.canvas_attention`."""
    inputs = [query, key, value, key_pool, value_pool, page_table, page_base, start, kv_start, kv_end]
    heads, kv_heads, head_dim = query.shape[2], key.shape[2], query.shape[3]
    attributes = {
        "heads": heads,
        "kv_heads": kv_heads,
        # A shape for Reshape, 0 for a dimension that stays: a pool's pages laid end to end.
        "joined_pages": [0, -1, kv_heads * head_dim],
    }
    (attended,) = custom_node("canvas_attention", inputs, [(query.dtype, query.shape)], attributes)
    return attended


def function() -> ir.Function:
    """ONNX's own grouped-query attention over prefix and row laid end to end, under an additive mask."""
    parameters = ["query", "key", "value", "key_pool", "value_pool"]
    parameters += ["page_table", "page_base", "start", "kv_start", "kv_end"]
    body = FunctionBody("canvas_attention", parameters, ["heads", "kv_heads", "joined_pages"])
    query, key, value, key_pool, value_pool, page_table, page_base, start, kv_start, kv_end = body.inputs
    joined_pages = body.attribute("joined_pages", AttributeType.INTS)
    merged = body.integers(0, 0, -1)
    cached_keys = body.Reshape(body.Gather(key_pool, page_table, axis=0), joined_pages)
    cached_values = body.Reshape(body.Gather(value_pool, page_table, axis=0), joined_pages)
    keys = body.Concat(cached_keys, body.Reshape(key, merged), axis=1)
    values = body.Concat(cached_values, body.Reshape(value, merged), axis=1)
    states = [body.Reshape(query, merged), keys, values]
    rows = [query, key_pool, page_table, page_base, start, kv_start, kv_end]
    # A canvas mostly sees all that is there: no mask is then made, nor added to the scores.
    plain, masked = FunctionBody(f"{body.name}_plain", []), FunctionBody(f"{body.name}_masked", [])
    attended = body.If(
        _all_seen(body, *rows[1:]),
        then_branch=plain.graph(_attention(plain, states)),
        else_branch=masked.graph(_attention(masked, [*states, _mask(masked, *rows)])),
    )
    return body.finish(body.Reshape(attended, body.Shape(query)))


def _attention(body: FunctionBody, inputs: Sequence[Value]) -> Value:
    return body.Attention(
        *inputs,
        q_num_heads=ir.RefAttr("q_num_heads", "heads", AttributeType.INT),
        kv_num_heads=ir.RefAttr("kv_num_heads", "kv_heads", AttributeType.INT),
        scale=1.0,
    )


def _all_seen(
    body: FunctionBody,
    key_pool: Value,
    page_table: Value,
    page_base: Value,
    start: Value,
    kv_start: Value,
    kv_end: Value,
) -> Value:
    """Whether every token sees every slot of its row's table and every token of the row, a bool scalar."""
    along, slots = body.integers(1), body.Mul(body.dimension(page_table, 1), body.dimension(key_pool, 1))
    from_first = body.LessOrEqual(body.ReduceMax(kv_start, along, keepdims=0), page_base)
    to_last = body.GreaterOrEqual(
        body.ReduceMin(kv_end, along, keepdims=0), body.Add(start, body.dimension(kv_start, 1))
    )
    # The last slot of the table, too, holds a token of the prefix.
    filled = body.LessOrEqual(body.Add(page_base, slots), start)
    rows = body.And(body.And(from_first, to_last), filled)
    return body.Cast(body.ReduceMin(body.Cast(rows, to=ir.DataType.INT32), keepdims=0), to=ir.DataType.BOOL)


def _mask(
    body: FunctionBody,
    query: Value,
    key_pool: Value,
    page_table: Value,
    page_base: Value,
    start: Value,
    kv_start: Value,
    kv_end: Value,
) -> Value:
    """0 or HIDDEN per token and key, `[B, 1, S, T]` in the query's dtype."""
    zero, one, last = body.integer(0), body.integer(1), body.integers(-1)
    slots = body.Squeeze(body.Mul(body.dimension(page_table, 1), body.dimension(key_pool, 1)))
    tokens = body.Squeeze(body.dimension(kv_start, 1))
    row_start = body.Unsqueeze(start, last)
    cached = body.Add(body.Unsqueeze(page_base, last), body.Range(zero, slots, one))
    # A slot at or past `start` holds no token of this prefix yet: position -1 is in no interval.
    cached = body.Where(body.Less(cached, row_start), cached, body.integer(-1))
    own = body.Add(row_start, body.Range(zero, tokens, one))
    positions = body.Unsqueeze(body.Concat(cached, own, axis=1), body.integers(1))
    seen = body.And(
        body.GreaterOrEqual(positions, body.Unsqueeze(kv_start, last)),
        body.Less(positions, body.Unsqueeze(kv_end, last)),
    )
    mask = body.Unsqueeze(body.Where(seen, body.number(0.0), body.number(HIDDEN)), body.integers(1))
    return body.CastLike(mask, query)
