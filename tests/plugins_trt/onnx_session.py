"""Runs one operation's ONNX face: its custom-domain node with its local function, in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor

from plugins_trt.onnx_function import DOMAIN, DOMAIN_VERSION, OPSET


class OperationSession:
    """A graph of the one node; every dimension is dynamic, outputs are told by dtype and rank."""

    def __init__(
        self,
        function: ir.Function,
        inputs: Mapping[str, Tensor],
        outputs: Sequence[tuple[torch.dtype, int]],
        attributes: Mapping[str, Any],
    ) -> None:
        values = [_value(name, tensor.dtype, tensor.dim()) for name, tensor in inputs.items()]
        node = ir.Node(
            DOMAIN, function.name, values, ir.convenience.convert_attributes(attributes), num_outputs=len(outputs)
        )
        for index, (value, (dtype, rank)) in enumerate(zip(node.outputs, outputs, strict=True)):
            value.name, value.dtype = f"output_{index}", _dtype(dtype)
            value.shape = ir.Shape([f"output_{index}_{axis}" for axis in range(rank)])
        graph = ir.Graph(
            values, node.outputs, nodes=[node], opset_imports={"": OPSET, DOMAIN: DOMAIN_VERSION}, name="operation"
        )
        model = ir.to_proto(ir.Model(graph, ir_version=10, functions=[function]))
        onnx.checker.check_model(model, full_check=True)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, *arguments: Tensor) -> list[Tensor]:
        names = [value.name for value in self._session.get_inputs()]
        feeds = {name: tensor.numpy() for name, tensor in zip(names, arguments, strict=True)}
        return [torch.from_numpy(np.asarray(output)) for output in self._session.run(None, feeds)]


def _value(name: str, dtype: torch.dtype, rank: int) -> ir.Value:
    shape = ir.Shape([f"{name}_{axis}" for axis in range(rank)])
    return ir.Value(name=name, type=ir.TensorType(_dtype(dtype)), shape=shape)


def _dtype(dtype: torch.dtype) -> ir.DataType:
    return ir.DataType.from_numpy(torch.zeros(0, dtype=dtype).numpy().dtype)
