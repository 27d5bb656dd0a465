"""The step graph in ONNX: traced without weights, its initializers pointing into the bundle's weights file."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_flatten

from export.checkpoint import stored_name
from export.config import LayerConfig, ModelConfig
from export.model import Readouts, Rows, StepModel, derived_constants
from plugins_trt.expert_ffn.onnx import ExpertBody
from plugins_trt.onnx_function import DOMAIN, DOMAIN_VERSION, OPSET
from plugins_trt.onnx_operations import TRACED, functions


class _Traced(nn.Module):
    """The step with flat, named inputs and outputs."""

    def __init__(self, model: StepModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, rows: Rows, readouts: Readouts, key_pools: list[Tensor], value_pools: list[Tensor]
    ) -> tuple[Tensor, ...]:
        step = self.model(rows, readouts, key_pools, value_pools)
        return (*step[:4], *step.keys, *step.values)


def input_names(config: ModelConfig) -> tuple[str, ...]:
    """Names of the graph's inputs in order."""
    layers = range(len(config.layers))
    readouts = ("readout_rows", *Readouts._fields[1:])
    return (*Rows._fields, *readouts, *(f"k_pool_{i}" for i in layers), *(f"v_pool_{i}" for i in layers))


def output_names(config: ModelConfig) -> tuple[str, ...]:
    """Names of the graph's outputs in order."""
    layers = range(len(config.layers))
    readout = ("argmax_ids", "candidate_ids", "entropy", "soft_embedding")
    return (*readout, *(f"k_new_{i}" for i in layers), *(f"v_new_{i}" for i in layers))


def trace_step(config: ModelConfig, expert_body: ExpertBody, dtype: torch.dtype = torch.float32) -> ir.Model:
    """Trace the step of a model of this shape; no weight is ever materialised.

    Args:
        config: the model's shape.
        expert_body: how the expert feed-forward is written in standard operators.
        dtype: of weights and states.

    Returns:
        The graph with its local functions. Initializers that a checkpoint fills are named as it names them and have no
        value yet.
    """
    fake = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    with fake, _default_dtype(dtype):
        model = _Traced(StepModel(config, TRACED)).eval()
        arguments = _example(config, dtype)
    with fake, torch.no_grad():
        program = torch.export.export(model, arguments, dynamic_shapes=_dynamic_shapes(config), strict=False)
    with _quiet():
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            optimize=False,
            opset_version=OPSET,
            input_names=input_names(config),
            output_names=output_names(config),
            verbose=False,
        )
    assert onnx_program is not None, "torch.onnx.export returns a program when it is given no file"
    graph = onnx_program.model
    for node in graph.graph.all_nodes():
        node.metadata_props.clear()  # stack traces of the tracing machine
    _fill_constants(graph, config)
    _name_dimensions(graph, config)
    # torch.onnx.export inlines every function it meets, so the local functions join after it.
    element = ir.tensor(torch.zeros(0, dtype=dtype)).dtype
    for function in functions(config.vocab_size, config.experts, expert_body, element):
        graph.functions[function.identifier()] = function
    graph.opset_imports[DOMAIN] = DOMAIN_VERSION
    return graph


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's remarks about its own deprecated calls and about packages that this model does not need."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _example(config: ModelConfig, dtype: torch.dtype) -> tuple[Rows, Readouts, list[Tensor], list[Tensor]]:
    """Fake inputs whose sizes are all different, so that no two dynamic dimensions are taken for one."""
    B, S, R, G, sliding_prefix, full_prefix = 2, 13, 3, 5, 9, 11
    tokens, row, integers = (B, S), (B,), torch.int64
    rows = Rows(
        token_ids=torch.zeros(tokens, dtype=integers),
        start=torch.zeros(row, dtype=integers),
        denoise=torch.zeros(row, dtype=torch.bool),
        sliding_kv_start=torch.zeros(tokens, dtype=integers),
        sliding_kv_end=torch.zeros(tokens, dtype=integers),
        full_kv_start=torch.zeros(tokens, dtype=integers),
        full_kv_end=torch.zeros(tokens, dtype=integers),
        sliding_page_table=torch.zeros(B, sliding_prefix, dtype=integers),
        sliding_page_base=torch.zeros(row, dtype=integers),
        full_page_table=torch.zeros(B, full_prefix, dtype=integers),
        full_page_base=torch.zeros(row, dtype=integers),
        self_conditioning=torch.zeros(B, S, config.hidden_size, dtype=dtype),
    )
    readouts = Readouts(
        rows=torch.zeros(R, dtype=integers),
        temperature=torch.ones(R, dtype=torch.float32),
        uniform=torch.zeros(R, S, dtype=torch.float32),
        guard=torch.zeros(R, dtype=torch.bool),
        guarded_ids=torch.zeros(G, dtype=integers),
    )
    keys, values = ([_example_pool(layer, dtype) for layer in config.layers] for _ in range(2))
    return rows, readouts, keys, values


def _example_pool(layer: LayerConfig, dtype: torch.dtype) -> Tensor:
    return torch.zeros(17 if layer.sliding else 19, 7, layer.kv_heads, layer.head_dim, dtype=dtype)


def _dynamic_shapes(config: ModelConfig) -> Any:
    """Names of the dynamic dimensions, in the structure of the step's arguments."""
    B, S, R, G, page_size = (Dim(name) for name in ("B", "S", "R", "G", "page_size"))
    sliding_prefix, full_prefix = Dim("sliding_prefix_pages"), Dim("full_prefix_pages")
    sliding_pages, full_pages = Dim("sliding_pages"), Dim("full_pages")
    tokens, row = {0: B, 1: S}, {0: B}
    intervals = (tokens,) * 4
    tables = ({0: B, 1: sliding_prefix}, row, {0: B, 1: full_prefix}, row)
    rows = (tokens, row, row, *intervals, *tables, tokens)
    readouts = ({0: R}, {0: R}, {0: R, 1: S}, {0: R}, {0: G})
    pools = [{0: sliding_pages if layer.sliding else full_pages, 1: page_size} for layer in config.layers]
    return Rows._make(rows), Readouts._make(readouts), pools, pools


def _fill_constants(model: ir.Model, config: ModelConfig) -> None:
    """Give the derived constants their values, and the other initializers their names in the checkpoint."""
    constants = derived_constants(config)
    initializers = model.graph.initializers
    for traced_name, value in list(initializers.items()):
        name = traced_name.removeprefix("model.")
        if name in constants:
            value.const_value = ir.tensor(constants[name].numpy(), name=traced_name)
        else:
            value.const_value = None
            value.name = stored_name(name)


def _name_dimensions(model: ir.Model, config: ModelConfig) -> None:
    """Torch numbers dynamic dimensions; give them their names."""
    names: dict[str, str] = {}
    shapes, _ = tree_flatten(_dynamic_shapes(config), is_leaf=lambda node: isinstance(node, dict))
    for value, dimensions in zip(model.graph.inputs, shapes, strict=True):
        assert value.shape is not None
        names |= {str(value.shape[axis]): dimension.__name__ for axis, dimension in dimensions.items()}
    graph_values = [value for node in model.graph for value in node.outputs]
    for value in (*model.graph.inputs, *graph_values):
        if value.shape is not None:
            value.shape = ir.Shape(
                [size if isinstance(size, int) else names.get(str(size), str(size)) for size in value.shape]
            )
