"""A step cut into regions that repeat from layer to layer, so that each kind is compiled once.

Compiled as a whole, thirty layers take minutes at every start; layers of one type are the same computation on other
weights. A region runs from a layer's first product to the next layer's, so that the residual, the norms around it and
the layer's scalar still become one kernel.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

Compile = Callable[[nn.Module], nn.Module]

_PRODUCTS = (torch.ops.aten.linear.default, torch.ops.dgemma.linear_fp8.default)
_READOUT = torch.ops.dgemma.canvas_readout.default
_LAYER = re.compile(r"_layers_(\d+)_")


def compile_regions(step: fx.GraphModule, compile_region: Compile) -> fx.GraphModule:
    """The same step as calls of compiled regions, equal ones compiled once."""
    graph, root = fx.Graph(), nn.Module()
    root.__dict__.update(_buffers=dict(step.named_buffers()))
    moved = {node: graph.node_copy(node) for node in step.graph.nodes if node.op in ("placeholder", "get_attr")}
    names: dict[str, str] = {}
    for region in _regions(step.graph):
        module = region.module()
        if module.code not in names:
            names[module.code] = f"region_{len(names)}"
            root.add_module(names[module.code], compile_region(module))
        call = graph.call_module(names[module.code], tuple(moved[node] for node in region.inputs))
        for index, node in enumerate(region.outputs):
            moved[node] = graph.call_function(operator.getitem, (call, index))
    [results] = step.graph.output_node().args
    graph.output(fx.map_arg(results, moved.__getitem__))
    graph.lint()
    return fx.GraphModule(root, graph, step.__class__.__name__)


@dataclass(frozen=True)
class _Region:
    """Consecutive computations, what they read from outside and what is read of them outside."""

    nodes: Sequence[fx.Node]
    inputs: Sequence[fx.Node]
    outputs: Sequence[fx.Node]

    def module(self) -> fx.GraphModule:
        """The region with its inputs as arguments; regions that compute the same have the same code."""
        graph = fx.Graph()
        inside = {node: graph.placeholder(f"input_{index}") for index, node in enumerate(self.inputs)}
        for node in self.nodes:
            arguments = fx.map_arg(node.args, inside.__getitem__)
            keywords = fx.map_arg(node.kwargs, inside.__getitem__)
            # Created and not copied: named after its place in the region, not in the step.
            inside[node] = graph.create_node(node.op, node.target, arguments, keywords)
        graph.output(tuple(inside[node] for node in self.outputs))
        return fx.GraphModule(nn.Module(), graph, "Region")


def _regions(graph: fx.Graph) -> Iterator[_Region]:
    for nodes in _cut(graph):
        within = set(nodes)
        inputs = dict.fromkeys(each for node in nodes for each in node.all_input_nodes if each not in within)
        outputs = [node for node in nodes if any(user not in within for user in node.users)]
        yield _Region(nodes, tuple(inputs), outputs)


def _cut(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """The computations in order, cut before each layer's first product and before the readout."""
    region: list[fx.Node] = []
    layer = -1
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        began = _layer_of(node)
        if began > layer or node.target is _READOUT:
            layer = max(layer, began)
            yield region
            region = []
        region.append(node)
    yield region


def _layer_of(node: fx.Node) -> int:
    """Which layer's product this is, -1 where it is none."""
    if node.target not in _PRODUCTS:
        return -1
    found = _LAYER.search(str(node.args[1].target))  # type: ignore[union-attr]
    return int(found[1]) if found else -1
