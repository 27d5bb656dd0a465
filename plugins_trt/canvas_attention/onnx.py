"""Canvas attention as a custom-domain node, and its meaning in standard operators."""

from __future__ import annotations

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
        # Shapes for Reshape, 0 for a dimension that stays: query heads grouped by the K/V head they read, and a pool's
        # pages laid end to end.
        "grouped_query": [0, 0, kv_heads, heads // kv_heads, head_dim],
        "joined_pages": [0, -1, kv_heads, head_dim],
    }
    (attended,) = custom_node("canvas_attention", inputs, [(query.dtype, query.shape)], attributes)
    return attended


def function() -> ir.Function:
    """Grouped queries against their K/V head in one batched product, an additive mask, softmax, values."""
    parameters = ["query", "key", "value", "key_pool", "value_pool"]
    parameters += ["page_table", "page_base", "start", "kv_start", "kv_end"]
    body = FunctionBody("canvas_attention", parameters, ["grouped_query", "joined_pages"])
    query, key, value, key_pool, value_pool, page_table, page_base, start, kv_start, kv_end = body.inputs
    joined_pages = body.attribute("joined_pages", AttributeType.INTS)
    cached_keys = body.Reshape(body.Gather(key_pool, page_table, axis=0), joined_pages)
    cached_values = body.Reshape(body.Gather(value_pool, page_table, axis=0), joined_pages)
    # [B, kv_heads, 1, T, D]: one group axis for the queries to broadcast over.
    keys = body.Unsqueeze(body.Transpose(body.Concat(cached_keys, key, axis=1), perm=[0, 2, 3, 1]), body.integers(2))
    values = body.Unsqueeze(
        body.Transpose(body.Concat(cached_values, value, axis=1), perm=[0, 2, 1, 3]), body.integers(2)
    )
    grouped = body.Reshape(query, body.attribute("grouped_query", AttributeType.INTS))
    scores = body.MatMul(body.Transpose(grouped, perm=[0, 2, 3, 1, 4]), keys)
    mask = body.CastLike(_mask(body, query, key_pool, page_table, page_base, start, kv_start, kv_end), query)
    shares = body.Softmax(body.Add(scores, mask), axis=-1)
    attended = body.Transpose(body.MatMul(shares, values), perm=[0, 3, 1, 2, 4])
    return body.finish(body.Reshape(attended, body.Shape(query)))


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
    """0 or HIDDEN per token and key, `[B, 1, 1, S, T]` float32; the same nodes in all layers of a type."""
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
    return body.Unsqueeze(body.Where(seen, body.number(0.0), body.number(HIDDEN)), body.integers(1, 2))
