"""The step as an exported program: the graph that the torch engine compiles, without a weight inside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from export.checkpoint import stored_name
from export.config import LayerConfig, ModelConfig
from export.model import Readouts, Rows, StepModel, derived_constants
from export.quantized_model import quantize_modules
from export.weights import Precision
from plugins_trt.torch_operations import REGISTERED
from runtime.bundle import ProgramRecord

_Shape = dict[int, Dim]
"""The dynamic dimensions of one input, by axis."""


def export_program(config: ModelConfig, precision: Precision) -> tuple[ExportedProgram, ProgramRecord]:
    """Trace the step of a model of this shape; no weight is ever materialised.

    The program's inputs are flat: every tensor of the weights file, the derived constants, then the graph's inputs as
    `step.onnx` names them; its outputs are those of `step.onnx`. Its devices are the CPU's: whoever loads it for
    another one rewrites them.

    Args:
        config: the model's shape.
        precision: of weights and states.
    """
    fake = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    with fake, _default_dtype(precision.torch_dtype):
        model = quantize_modules(StepModel(config, REGISTERED), precision).eval()
        example, shapes = _example(config, precision.torch_dtype)
    # One element each instead of none: a constant that is a number is stored as a list like the others.
    constants = {name: value.flatten() for name, value in derived_constants(config).items()}
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    parameters = weights | {name: fake.from_tensor(value) for name, value in constants.items()}
    arguments = (*parameters.values(), *example.values())
    dynamic = (*({} for _ in parameters), *shapes.values())
    with fake, torch.no_grad():
        program = torch.export.export(
            _Flat(model, tuple(parameters)), arguments, dynamic_shapes=(dynamic,), strict=False
        )
    _strip(program)
    record = ProgramRecord(
        inputs=(*map(stored_name, weights), *constants, *example),
        constants={name: tuple(value.tolist()) for name, value in constants.items()},
    )
    return program, record


def write_program(path: Path, program: ExportedProgram) -> None:
    """Write a program to a file."""
    torch.export.save(program, path)


class _Flat(nn.Module):
    """The step with everything it computes from as one flat list of inputs."""

    _model: StepModel

    def __init__(self, model: StepModel, parameters: tuple[str, ...]) -> None:
        super().__init__()
        # Not registered as a submodule: its own parameters would then be traced beside those handed in.
        object.__setattr__(self, "_model", model)
        self._parameters_by_name, self._layers = parameters, len(model.config.layers)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        flat = iter(tensors)
        parameters = {name: next(flat) for name in self._parameters_by_name}
        rows, readouts = (kind._make(next(flat) for _ in kind._fields) for kind in (Rows, Readouts))
        pools = [[next(flat) for _ in range(self._layers)] for _ in "kv"]
        step = torch.func.functional_call(self._model, parameters, (rows, readouts, *pools))
        return (*step[:4], *step.keys, *step.values)


def _example(config: ModelConfig, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, _Shape]]:
    """Fake inputs by name, whose sizes are all different so that no two dynamic dimensions are taken for one, and the
    names of their dynamic dimensions."""
    sizes = {"B": 2, "S": 13, "R": 3, "G": 5, "sliding_prefix_pages": 9, "full_prefix_pages": 11}
    sizes |= {"sliding_pages": 17, "full_pages": 19, "page_size": 7}
    dims = {name: Dim(name) for name in sizes}
    example, shapes = {}, {}
    for name, axes, kind in _inputs(config, dtype):
        example[name] = torch.zeros([axis if isinstance(axis, int) else sizes[axis] for axis in axes], dtype=kind)
        shapes[name] = {i: dims[axis] for i, axis in enumerate(axes) if isinstance(axis, str)}
    return example, shapes


def _inputs(config: ModelConfig, dtype: torch.dtype) -> Iterator[tuple[str, tuple[str | int, ...], torch.dtype]]:
    """Name, sizes and dtype of each graph input in order; a size is a number or a dynamic dimension's name."""
    ids, single = torch.int64, torch.float32
    for field in Rows._fields:
        match field:
            case "denoise":
                yield field, ("B",), torch.bool
            case "start" | "sliding_page_base" | "full_page_base":
                yield field, ("B",), ids
            case "sliding_page_table" | "full_page_table":
                yield field, ("B", f"{field.partition('_')[0]}_prefix_pages"), ids
            case "self_conditioning":
                yield field, ("B", "S", config.hidden_size), dtype
            case _:
                yield field, ("B", "S"), ids
    yield "readout_rows", ("R",), ids
    yield "temperature", ("R",), single
    yield "uniform", ("R", "S"), single
    yield "guard", ("R",), torch.bool
    yield "guarded_ids", ("G",), ids
    for kind in "kv":
        for i, layer in enumerate(config.layers):
            yield f"{kind}_pool_{i}", _pool_axes(layer), dtype


def _pool_axes(layer: LayerConfig) -> tuple[str | int, ...]:
    return ("sliding_pages" if layer.sliding else "full_pages", "page_size", layer.kv_heads, layer.head_dim)


def _strip(program: ExportedProgram) -> None:
    """Remove what only tracing needs: example inputs, checks of what dtypes fake tensors had, and the file paths of the
    tracing machine."""
    program._example_inputs = None
    graph = program.graph_module.graph
    for node in reversed(graph.nodes):
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
            node.meta.pop(key, None)
        unused = node.op == "call_function" and not node.users
        if unused or node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)
    program.graph_module.recompile()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
