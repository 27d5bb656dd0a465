"""Expert routing as a custom-domain node, and its meaning in standard operators."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor

from plugins_trt.onnx_function import FunctionBody, custom_node


def expert_routing(logits: Tensor, per_expert_scale: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The traced node; arguments and results as in `reference.expert_routing`."""
    shape = (logits.shape[0], top_k)
    ids, weights = custom_node(
        "expert_routing", [logits, per_expert_scale], [(torch.int64, shape), (logits.dtype, shape)], {"top_k": top_k}
    )
    return ids, weights


def function() -> ir.Function:
    """Softmax over the chosen logits alone: equal to the renormalised shares of a softmax over all of them."""
    body = FunctionBody("expert_routing", ["logits", "per_expert_scale"], ["top_k"])
    logits, per_expert_scale = body.inputs
    wide = body.Cast(logits, to=ir.DataType.FLOAT)
    top_k = body.Unsqueeze(body.attribute("top_k", ir.AttributeType.INT), body.integers(0))
    chosen, ids = body.several("TopK", 2, wide, top_k, axis=-1, largest=1, sorted=1)
    scale = body.Cast(body.Gather(per_expert_scale, ids), to=ir.DataType.FLOAT)
    weights = body.CastLike(body.Mul(body.Softmax(chosen, axis=-1), scale), logits)
    return body.finish(ids, weights)
