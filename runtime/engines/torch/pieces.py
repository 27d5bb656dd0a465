"""Operations taken apart, so that a compiler fuses what is elementwise in them with what comes before and after.

A kernel of ours is a wall to the compiler. What an operation does to single rows, beside its matrix products, is
therefore left to plain PyTorch: quantising rows becomes the end of the norm or of the gated activation that makes
them, the sum over a token's experts the begin of the norm that follows. The router's product and choice, which no
compiler joins, become one operation. What stands between two branches may then be joined again (`residuals.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from operator import getitem

import torch
from torch import Tensor, fx

from plugins_trt import torch_operations  # noqa: F401 (registers the operations)
from plugins_trt.gpu import has_fp8
from plugins_trt.quantized_linear.reference import quantize_rows

_OPERATIONS = torch.ops.dgemma


def take_apart(graph: fx.Graph, device: torch.device) -> None:
    """Replace what can be taken apart, in place; the graph means the same.

    Args:
        graph: of registered operations.
        device: that it will run on; quantised rows are for devices that multiply 8-bit floats.
    """
    pieces = dict(_PIECES)
    if has_fp8(device):
        pieces |= _FP8_PIECES
    for node in list(graph.nodes):
        if node.target in pieces:
            with graph.inserting_before(node):
                result = pieces[node.target](graph, node)
            if result is not None:
                node.replace_all_uses_with(result)
                graph.erase_node(node)
    graph.eliminate_dead_code()


def sum_of_parts(parts: Tensor) -> Tensor:
    """Sum over a token's experts in the order of its choices, in float32 or wider, rounded once.

    Args:
        parts: `[T, K, H]`.

    Returns:
        `[T, H]`.
    """
    # Not `sum`: the compiler keeps a reduction over 8 numbers apart from the norm's reduction over each row.
    wide = torch.promote_types(parts.dtype, torch.float32)
    first, *others = parts.unbind(1)
    total = first.to(wide)
    for part in others:
        total = total + part.to(wide)
    return total.to(parts.dtype)


def _linear(graph: fx.Graph, node: fx.Node) -> fx.Node:
    x, weight, scale = node.args
    product = (*_quantized(graph, x), weight, scale, _dtype(x))
    return graph.call_function(_OPERATIONS.product_fp8.default, product)


def _experts(graph: fx.Graph, node: fx.Node) -> fx.Node:
    parts = getattr(_OPERATIONS, node.target._opname.replace("ffn", "parts")).default  # type: ignore[union-attr]
    return graph.call_function(sum_of_parts, (graph.call_function(parts, node.args),))


def _quantized_experts(graph: fx.Graph, node: fx.Node) -> fx.Node:
    x, *others = node.args
    arguments = (*_quantized(graph, x), *others, _dtype(x))
    parts = graph.call_function(_OPERATIONS.expert_parts_fp8.default, arguments)
    return graph.call_function(sum_of_parts, (parts,))


def _router(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    logits, scale, top_k = node.args
    if logits.target is not torch.ops.aten.linear.default or len(logits.args) > 2:  # type: ignore[union-attr]
        return None
    arguments = (*logits.args, scale, top_k)  # type: ignore[union-attr]
    return graph.call_function(_OPERATIONS.project_and_route.default, arguments)


def _quantized(graph: fx.Graph, x: object) -> tuple[fx.Node, fx.Node]:
    """Codes and scales of the rows of `x`; attention makes them itself where it ends."""
    attention = _attention_of(x)
    if attention is None:
        rows = graph.call_function(quantize_rows, (x,))  # type: ignore[arg-type]
    else:
        rows = graph.call_function(_OPERATIONS.canvas_attention_codes.default, attention.args)
    return graph.call_function(getitem, (rows, 0)), graph.call_function(getitem, (rows, 1))


def _attention_of(x: object) -> fx.Node | None:
    """The attention that nobody but `x` reads, which puts a token's heads side by side."""
    if not (isinstance(x, fx.Node) and x.target is torch.ops.aten.flatten.using_ints and x.args[1:] == (2,)):
        return None
    attention = x.args[0]
    assert isinstance(attention, fx.Node), "only a tensor is flattened"
    found = attention.target is _OPERATIONS.canvas_attention.default and len(attention.users) == 1
    return attention if found else None


def _dtype(x: object) -> torch.dtype:
    dtype: torch.dtype = x.meta["val"].dtype  # type: ignore[attr-defined]
    return dtype


_Piece = Callable[[fx.Graph, fx.Node], "fx.Node | None"]
_PIECES: dict[object, _Piece] = {
    _OPERATIONS.expert_ffn.default: _experts,
    _OPERATIONS.expert_ffn_int4.default: _experts,
    _OPERATIONS.expert_routing.default: _router,
}
_FP8_PIECES: dict[object, _Piece] = {
    _OPERATIONS.linear_fp8.default: _linear,
    _OPERATIONS.expert_ffn_fp8.default: _quantized_experts,
}
