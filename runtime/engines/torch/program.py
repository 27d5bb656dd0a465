"""The exported program as the torch engine runs it: weights bound, one module for each kind of row.

The program computes both kinds of row and takes every weight as an input. Here the graph is rewritten for one device,
products of one operand are merged, and it is split into an encode and a denoise step that keep only what they need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from plugins_trt import torch_operations
from runtime.bundle import ProgramRecord
from runtime.engines.torch.pieces import take_apart
from runtime.engines.torch.residuals import join_residuals

Fill = Callable[[str, Tensor], None]
"""Writes the tensor of that name into a contiguous tensor of its shape and dtype."""

_READOUT_OUTPUTS = 4
_LINEAR = torch.ops.aten.linear.default
_QUANTIZED_LINEAR = torch.ops.dgemma.linear_fp8.default


@dataclass(frozen=True)
class Rewrites:
    """What may be changed of the graph without changing what it means."""

    merge_products: bool = True
    """Multiply with q, k and v, and with gate and up, at once."""
    take_apart: bool = False
    """Leave to the compiler what it can fuse of an operation with its neighbours; without one it only costs time."""
    join_residuals: bool = False
    """Run what stands between two branches, additions and norms, as one operation; with `take_apart` also the sum of
    a token's experts before and the quantising behind them."""
    reference: bool = False
    """Run the operations' references on any device: slow, for comparing."""


@dataclass(frozen=True)
class Steps:
    """The step for either kind of row; both hold the same tensors. Inputs are named as the graph's."""

    encode: fx.GraphModule
    """Returns the rows' keys of all layers, then the values."""
    denoise: fx.GraphModule
    """Returns argmax ids, candidate ids, entropy and soft embedding of all rows."""


def bind(
    program: ExportedProgram,
    record: ProgramRecord,
    inputs: dict[str, Tensor],
    fill: Fill,
    device: torch.device,
    rewrites: Rewrites,
) -> Steps:
    """Allocate and fill a program's weights on a device.

    Args:
        program: what an export wrote.
        record: how the program is called.
        inputs: graph inputs that never change and are bound like weights: pools, end tokens.
        fill: where weights come from, one tensor at a time.
        device: of weights and computation.
        rewrites: of the graph.
    """
    graph = _Graph.of(program, record)
    graph.move_to(device)
    if rewrites.reference:
        graph.call_references()
    if rewrites.merge_products:
        graph.merge(_LINEAR)
        graph.merge(_QUANTIZED_LINEAR)
    if rewrites.take_apart:
        take_apart(graph.graph, device)
    if rewrites.join_residuals and not rewrites.reference:
        join_residuals(graph.graph)
    constants = {name: torch.tensor(values, device=device) for name, values in record.constants.items()}
    root = nn.Module()
    for parameter in graph.parameters():
        root.register_buffer(parameter.attribute, _filled(parameter, device, fill))
    graph.bind_casts(root)
    for name, tensor in (constants | inputs).items():
        root.register_buffer(name, tensor)
    graph.bind(root, {*constants, *inputs})
    return Steps(graph.specialised(root, denoise=False), graph.specialised(root, denoise=True))


@dataclass(frozen=True)
class _Parameter:
    """A tensor of the weights file, or several along their first axis."""

    node: fx.Node
    parts: tuple[str, ...]
    attribute: str

    @property
    def value(self) -> Tensor:
        """A tensor of its shape and dtype, without memory."""
        fake: Tensor = self.node.meta["val"]
        return fake


def _filled(parameter: _Parameter, device: torch.device, fill: Fill) -> Tensor:
    value = parameter.value
    tensor = torch.empty(tuple(value.shape), dtype=value.dtype, device=device)
    rows = parameter.node.meta["rows"]
    start = 0
    for part, count in zip(parameter.parts, rows, strict=True):
        fill(part, tensor if len(rows) == 1 else tensor[start : start + count])
        start += count
    return tensor


@dataclass
class _Graph:
    """The program's graph while it is rewritten."""

    graph: fx.Graph
    weights: dict[fx.Node, _Parameter]
    named: dict[str, fx.Node]
    """The graph's inputs and the constants."""

    @classmethod
    def of(cls, program: ExportedProgram, record: ProgramRecord) -> _Graph:
        graph = fx.Graph()
        output = graph.graph_copy(program.graph_module.graph, {})
        graph.output(output)
        inputs = dict(zip(record.inputs, graph.find_nodes(op="placeholder"), strict=True))
        names = set(_graph_inputs(record))
        weights = {}
        for name, node in inputs.items():
            if name not in names:
                node.meta["rows"] = (node.meta["val"].shape[0],)
                weights[node] = _Parameter(node, (name,), name.replace(".", "_"))
        return cls(graph, weights, {name: node for name, node in inputs.items() if name in names})

    def move_to(self, device: torch.device) -> None:
        """Make tensors that the graph creates there."""
        for node in self.graph.nodes:
            if "device" in node.kwargs:
                node.update_kwarg("device", device)

    def call_references(self) -> None:
        """Call the operations' references in place of what the dispatcher would choose."""
        for node in self.graph.nodes:
            if getattr(node.target, "namespace", None) == torch_operations.NAMESPACE:
                node.target = torch_operations.reference(node.target._opname)

    def merge(self, product: Callable[..., Tensor]) -> None:
        """Merge products of one operand with several weights into one product with all of their rows."""
        groups: dict[fx.Node, list[fx.Node]] = {}
        for node in self.graph.nodes:
            if node.target is product and all(weight in self.weights for weight in node.args[1:]):
                groups.setdefault(node.args[0], []).append(node)
        for nodes in groups.values():
            if len(nodes) > 1:
                self._merge_group(nodes)

    def parameters(self) -> Iterator[_Parameter]:
        """The tensors to allocate, in the order of the weights file."""
        return iter(self.weights.values())

    def bind_casts(self, root: nn.Module) -> None:
        """Cast vectors once and for all where every step would: 1.3 microseconds each on an H200, four a layer."""
        for parameter in list(self.weights.values()):
            for node in list(parameter.node.users) if parameter.value.dim() == 1 else ():
                if node.target is torch.ops.aten.to.dtype:
                    dtype = cast(torch.dtype, node.args[1])
                    attribute = f"{parameter.attribute}_{dtype}".replace("torch.", "")
                    root.register_buffer(attribute, root.get_buffer(parameter.attribute).to(dtype))
                    with self.graph.inserting_before(self._first_computation()):
                        node.replace_all_uses_with(self.graph.get_attr(attribute))
                    self.graph.erase_node(node)

    def bind(self, root: nn.Module, names: set[str]) -> None:
        """Replace the inputs that never change by attributes of `root`."""
        bound = {node: parameter.attribute for node, parameter in self.weights.items()}
        bound |= {self.named.pop(name): name for name in names}
        for node, attribute in bound.items():
            with self.graph.inserting_before(self._first_computation()):
                node.replace_all_uses_with(self.graph.get_attr(attribute))
            self.graph.erase_node(node)
        for name, node in self.named.items():
            node.target = name

    def specialised(self, root: nn.Module, denoise: bool) -> fx.GraphModule:
        """The step for one kind of row."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.graph, {}))
        _choose_kind(graph, denoise)
        output = graph.output_node()
        results = cast(tuple[fx.Node, ...], output.args[0])
        output.args = ((results[:_READOUT_OUTPUTS] if denoise else results[_READOUT_OUTPUTS:]),)
        graph.eliminate_dead_code()
        for node in graph.find_nodes(op="placeholder"):
            if not node.users:
                graph.erase_node(node)
        graph.lint()
        return fx.GraphModule(root, graph, "DenoiseStep" if denoise else "EncodeStep")

    def _first_computation(self) -> fx.Node:
        node: fx.Node = next(node for node in self.graph.nodes if node.op != "placeholder")
        return node

    def _merge_group(self, nodes: list[fx.Node]) -> None:
        first, rows = nodes[0], [node.args[1].meta["val"].shape[0] for node in nodes]  # type: ignore[union-attr]
        merged = [
            self._merge_weights([self.weights[node.args[i]] for node in nodes])  # type: ignore[index]
            for i in range(1, len(first.args))
        ]
        with self.graph.inserting_before(first):
            product = self.graph.call_function(first.target, (first.args[0], *merged))  # type: ignore[arg-type]
            parts = self.graph.call_function(torch.ops.aten.split_with_sizes.default, (product, rows, -1))
            for index, node in enumerate(nodes):
                node.replace_all_uses_with(self.graph.call_function(_getitem, (parts, index)))
        for node in nodes:
            self.graph.erase_node(node)

    def _merge_weights(self, parameters: list[_Parameter]) -> fx.Node:
        values = [parameter.value for parameter in parameters]
        with self.graph.inserting_before(parameters[0].node):
            node = self.graph.placeholder(f"{parameters[0].attribute}_merged")
        rows = [value.shape[0] for value in values]
        node.meta = {"val": values[0].new_empty((sum(rows), *values[0].shape[1:])), "rows": tuple(rows)}
        merged = replace(
            parameters[0],
            node=node,
            parts=tuple(part for parameter in parameters for part in parameter.parts),
            attribute=f"{parameters[0].attribute}_merged",
        )
        # In the place of the first part, so that weights are read in the file's order.
        kept = [(node, merged) if each is parameters[0] else (each.node, each) for each in self.weights.values()]
        gone = {parameter.node for parameter in parameters}
        self.weights = {key: value for key, value in kept if key not in gone}
        return node


def _getitem(parts: list[Tensor], index: int) -> Tensor:
    return parts[index]


def _graph_inputs(record: ProgramRecord) -> Iterator[str]:
    """The constants and what follows them."""
    first = min(record.inputs.index(name) for name in record.constants)
    return iter(record.inputs[first:])


def _choose_kind(graph: fx.Graph, denoise: bool) -> None:
    """Every row is of this kind, and every denoise row asks for a readout."""
    kind = {node for node in graph.find_nodes(op="placeholder") if node.target == "denoise"}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is torch.ops.aten.where.self and node.args[0] in kind:
            node.replace_all_uses_with(node.args[1] if denoise else node.args[2])
        elif node.args and node.args[0] in kind:
            kind.add(node)
        elif node.target is torch.ops.aten.index_select.default and node.args[2].target == "readout_rows":
            node.replace_all_uses_with(node.args[0])
