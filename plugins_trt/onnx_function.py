"""Building the ONNX faces of the operations: custom-domain nodes while tracing, local functions beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tape import Tape
from torch import Tensor

DOMAIN = "dgemma"
DOMAIN_VERSION = 1
OPSET = 23
"""First operator set with RMSNormalization; TensorRT for RTX and ONNX Runtime read it."""

Value = ir.Value


def custom_node(
    name: str,
    inputs: Sequence[Tensor],
    outputs: Sequence[tuple[torch.dtype, Sequence[int | torch.SymInt]]],
    attributes: dict[str, Any],
) -> Sequence[Tensor]:
    """Put a node of the custom domain into the graph that is being traced.

    Args:
        name: the operation.
        inputs: its tensors.
        outputs: dtype and shape of each output.
        attributes: integers, floats and lists of integers.

    Returns:
        The outputs, without values: only for tracing.
    """
    dtypes, shapes = zip(*outputs, strict=True)
    # TensorRT's parser takes the plugin where one of this namespace is registered, the local function elsewhere.
    named = attributes | {"plugin_namespace": DOMAIN}
    return torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{name}", inputs, named, dtypes=dtypes, shapes=shapes, version=DOMAIN_VERSION
    )


class FunctionBody:
    """Records the standard operators of one local function.

    Every value gets a name of its own, `_dg_<function>_<n>`: TensorRT's parser binds the wrong tensor where a
    function's parameter is named as a tensor of the calling graph.
    """

    def __init__(self, name: str, parameters: Sequence[str], attributes: Sequence[str] = ()) -> None:
        self.name = name
        self.inputs = [ir.Value(name=f"_dg_{name}_{parameter}") for parameter in parameters]
        self._attributes = attributes
        self._tape = Tape()

    def __getattr__(self, operator: str) -> Callable[..., Value]:
        """`body.Add(x, y)` records that operator, with attributes by keyword, and returns its output."""
        if not operator[0].isupper():
            raise AttributeError(operator)
        return lambda *inputs, **attributes: self.several(operator, 1, *inputs, **attributes)[0]

    def several(self, operator: str, outputs: int, *inputs: Value, **attributes: Any) -> Sequence[Value]:
        """Records an operator of `outputs` outputs."""
        return self._tape.op_multi_out(operator, inputs, attributes, num_outputs=outputs)

    def integers(self, *values: int) -> Value:
        """A constant int64 vector."""
        return self.Constant(value=ir.tensor(list(values), dtype=ir.DataType.INT64))

    def integer(self, value: int) -> Value:
        """A constant int64 scalar."""
        return self.Constant(value=ir.tensor(value, dtype=ir.DataType.INT64))

    def number(self, value: float) -> Value:
        """A constant float32 scalar."""
        return self.Constant(value=ir.tensor(value, dtype=ir.DataType.FLOAT))

    def attribute(self, name: str, kind: ir.AttributeType) -> Value:
        """The calling node's attribute as a constant: a scalar, or a vector for a list."""
        field = f"value_{kind.name.lower()}"
        node = ir.Node("", "Constant", [], [ir.RefAttr(field, name, kind)])
        self._tape._nodes.append(node)
        return node.outputs[0]

    def dimension(self, x: Value, axis: int) -> Value:
        """Length of one axis as an int64 vector of one."""
        return self.Shape(x, start=axis, end=axis + 1)

    def graph(self, *outputs: Value) -> ir.Graph:
        """What was recorded as a graph with these outputs: the body of a Loop."""
        nodes = self._tape.nodes
        for index, value in enumerate(value for node in nodes for value in node.outputs):
            value.name = f"_dg_{self.name}_{index}"
        return ir.Graph(self.inputs, outputs, nodes=nodes, opset_imports={"": OPSET}, name=self.name)

    def finish(self, *outputs: Value) -> ir.Function:
        """What was recorded as a function with these outputs."""
        declared = [ir.Attr(name, ir.AttributeType.UNDEFINED, None) for name in self._attributes]
        return ir.Function(DOMAIN, self.name, graph=self.graph(*outputs), attributes=declared)
