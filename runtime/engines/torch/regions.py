"""A step cut into regions that repeat from layer to layer, so that each kind is compiled once.

Compiled as a whole, thirty layers take minutes at every start; layers of one type are the same computation on other
weights. A layer's span runs from its first product to the next layer's, so that the residual, the norms around it and
the layer's scalar still become one kernel, the compiler's or that of the operation that joins them. Inside a span the
dense feed-forward is a region of its own, which can run beside the experts on a second stream: both wait for memory,
and each hides the other's launches.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

Compile = Callable[[nn.Module], nn.Module]

_PRODUCTS: dict[object, int] = {
    torch.ops.aten.linear.default: 1,
    torch.ops.dgemma.linear_fp8.default: 1,
    torch.ops.dgemma.product_fp8.default: 2,
    torch.ops.dgemma.project_and_route.default: 1,
}
"""Which argument of each is its weight."""
_READOUT = torch.ops.dgemma.canvas_readout.default
_EXPERTS = tuple(
    getattr(torch.ops.dgemma, f"expert_{kind}{encoding}").default
    for kind in ("ffn", "parts")
    for encoding in ("", "_fp8", "_int4")
)
_LAYER = re.compile(r"_layers_(\d+)_")


def compile_regions(step: fx.GraphModule, compile_region: Compile, aside: torch.cuda.Stream | None) -> fx.GraphModule:
    """The same step as calls of compiled regions, equal ones compiled once.

    Args:
        step: the step with its weights as attributes.
        compile_region: compiles a module.
        aside: a stream for what can run beside something else; None runs all in order.
    """
    top = _Top(step, compile_region)
    for span in _spans(step.graph):
        before, beside, main, after = _parts(span)
        top.call(before)
        if beside and aside is not None:
            top.call_beside(beside, main, aside)
        else:
            top.call(beside)
            top.call(main)
        top.call(after)
    return top.finished()


class _Top:
    """The graph that calls the regions, while it is made."""

    def __init__(self, step: fx.GraphModule, compile_region: Compile) -> None:
        self._step, self._compile_region = step, compile_region
        self._graph, self._root = fx.Graph(), nn.Module()
        for name, tensor in step.named_buffers():
            self._root.register_buffer(name, tensor)
        self._names: dict[str, str] = {}
        self._moved = {
            node: self._graph.node_copy(node) for node in step.graph.nodes if node.op in ("placeholder", "get_attr")
        }

    def call(self, nodes: Sequence[fx.Node]) -> None:
        """Call the region of these nodes."""
        if nodes:
            region = _Region.of(nodes)
            self._take(region.outputs, self._call(region, lambda module: module, "region"))

    def call_beside(self, beside: Sequence[fx.Node], main: Sequence[fx.Node], stream: torch.cuda.Stream) -> None:
        """Call a region on the second stream while another one runs."""
        region = _Region.of(beside)
        call = self._call(region, lambda module: _Beside(module, stream), "beside")
        self.call(main)
        # What the second stream reads must live until the first one has waited for it: its memory is used anew after.
        results = [self._graph.call_function(operator.getitem, (call, i)) for i in range(len(region.outputs))]
        inputs = [self._moved[node] for node in region.inputs]
        if not hasattr(self._root, "join"):
            self._root.join = _Join(stream)
        self._take(region.outputs, self._graph.call_module("join", (tuple(results), *inputs)))

    def finished(self) -> fx.GraphModule:
        """The module."""
        [results] = self._step.graph.output_node().args
        self._graph.output(fx.map_arg(results, self._moved.__getitem__))
        self._graph.lint()
        return fx.GraphModule(self._root, self._graph, type(self._step).__name__)

    def _call(self, region: _Region, wrap: Callable[[nn.Module], nn.Module], kind: str) -> fx.Node:
        module = region.module()
        key = f"{kind}: {module.code}"
        if key not in self._names:
            self._names[key] = f"{kind}_{len(self._names)}"
            self._root.add_module(self._names[key], wrap(self._compile_region(module)))
        return self._graph.call_module(self._names[key], tuple(self._moved[node] for node in region.inputs))

    def _take(self, outputs: Sequence[fx.Node], call: fx.Node) -> None:
        for index, node in enumerate(outputs):
            self._moved[node] = self._graph.call_function(operator.getitem, (call, index))


class _Beside(nn.Module):
    """A module that runs on a second stream, from the point that the current one has reached."""

    def __init__(self, module: nn.Module, stream: torch.cuda.Stream) -> None:
        super().__init__()
        self._module, self._stream = module, stream

    def forward(self, *inputs: Tensor) -> Any:
        """Results that only the second stream may read until the streams are joined."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            return self._module(*inputs)


class _Join(nn.Module):
    """Lets the current stream wait for the second one."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        super().__init__()
        self._stream = stream

    def forward(self, results: tuple[Tensor, ...], *held: Tensor) -> tuple[Tensor, ...]:
        """The results, for the current stream; `held` lived so long."""
        torch.cuda.current_stream().wait_stream(self._stream)
        return results


@dataclass(frozen=True)
class _Region:
    """Computations in order, what they read from outside and what is read of them outside."""

    nodes: Sequence[fx.Node]
    inputs: Sequence[fx.Node]
    outputs: Sequence[fx.Node]

    @classmethod
    def of(cls, nodes: Sequence[fx.Node]) -> _Region:
        within = set(nodes)
        inputs = dict.fromkeys(each for node in nodes for each in node.all_input_nodes if each not in within)
        return cls(nodes, tuple(inputs), [node for node in nodes if any(user not in within for user in node.users)])

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


def _spans(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """The computations in order, cut before each layer's first product and before the readout."""
    span: list[fx.Node] = []
    layer = -1
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        found = _LAYER.search(_weight_of(node))
        began = int(found[1]) if found else -1
        if began > layer or node.target is _READOUT:
            layer = max(layer, began)
            yield span
            span = []
        span.append(node)
    yield span


def _parts(span: Sequence[fx.Node]) -> tuple[list[fx.Node], list[fx.Node], list[fx.Node], list[fx.Node]]:
    """A layer's span as what comes first, the dense products, routing and experts, and what needs both of them."""
    dense = _between([node for node in span if "_mlp_" in _weight_of(node)], span)
    ends = [node for node in span if node.target in _EXPERTS]
    sparse = _between([node for node in span if "_router_proj_" in _weight_of(node)] + ends, span) if ends else set()
    if not dense or not sparse:
        return list(span), [], [], []
    after = _descendants(dense | sparse, span) - dense - sparse
    before = set(span) - dense - sparse - after
    first, beside, main, last = ([node for node in span if node in part] for part in (before, dense, sparse, after))
    return first, beside, main, last


def _weight_of(node: fx.Node) -> str:
    """Name of a product's weight, empty where the node is none."""
    place = _PRODUCTS.get(node.target)
    return "" if place is None else str(node.args[place].target)  # type: ignore[union-attr]


def _between(marked: Iterable[fx.Node], span: Sequence[fx.Node]) -> set[fx.Node]:
    """The marked computations and those on the way from one of them to another."""
    behind, ahead = _descendants(marked, span), set(marked)
    for node in reversed(span):
        if any(user in ahead for user in node.users):
            ahead.add(node)
    return behind & ahead


def _descendants(marked: Iterable[fx.Node], span: Sequence[fx.Node]) -> set[fx.Node]:
    found = set(marked)
    for node in span:
        if any(each in found for each in node.all_input_nodes):
            found.add(node)
    return found
