"""The exported program: the step model in every size, without weights or anything else of the exporting machine."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.export import ExportedProgram

from export.checkpoint import Checkpoint, open_checkpoint, stored_name
from export.model import Readouts, Rows, StepModel
from export.program import export_program
from export.verification import load_model
from export.weights import Precision
from plugins_trt.torch_operations import REGISTERED
from runtime.bundle import STEP_PROGRAM, WEIGHTS, Bundle
from tests import tiny


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return open_checkpoint(tiny_checkpoint)


@pytest.fixture(scope="module")
def program(tiny_bundle: Bundle) -> ExportedProgram:
    return torch.export.load(tiny_bundle.path(STEP_PROGRAM))


@dataclass(frozen=True)
class Sizes:
    """Of a call."""

    rows: int
    tokens: int
    readouts: int
    sliding_pages: int
    full_pages: int
    page_size: int


def arguments(model: StepModel, sizes: Sizes) -> tuple[Rows, Readouts, list[Tensor], list[Tensor]]:
    """Random rows of both kinds somewhere in a random pool."""
    random = torch.Generator().manual_seed(sum(vars(sizes).values()))
    B, S, config = sizes.rows, sizes.tokens, model.config
    start = torch.randint(1, sizes.sliding_pages * sizes.page_size + 1, (B,), generator=random)
    positions = start[:, None] + torch.arange(S)
    tables = [torch.randint(7, (B, count), generator=random) for count in (sizes.sliding_pages, sizes.full_pages)]
    base = torch.zeros(B, dtype=torch.int64)
    rows = Rows(
        token_ids=torch.randint(config.vocab_size, (B, S), generator=random),
        start=start,
        denoise=torch.arange(B) % 2 == 0,
        sliding_kv_start=(positions - 9).clamp(min=0),
        sliding_kv_end=positions + 1,
        full_kv_start=torch.zeros_like(positions),
        full_kv_end=positions + 1,
        sliding_page_table=tables[0],
        sliding_page_base=base,
        full_page_table=tables[1],
        full_page_base=base,
        self_conditioning=torch.randn(B, S, config.hidden_size, generator=random),
    )
    R = sizes.readouts
    readouts = Readouts(
        rows=torch.arange(R),
        temperature=torch.rand(R, generator=random) + 0.3,
        uniform=torch.rand(R, S, generator=random),
        guard=torch.arange(R) % 2 == 0,
        guarded_ids=torch.tensor([1, 5]),
    )
    shapes = [(7, sizes.page_size, layer.kv_heads, layer.head_dim) for layer in config.layers]
    keys, values = ([torch.randn(shape, generator=random) for shape in shapes] for _ in range(2))
    return rows, readouts, keys, values


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param(Sizes(1, 16, 1, 3, 5, 4), id="one canvas: a dimension of 1 that was traced as 2"),
        pytest.param(Sizes(4, 5, 2, 2, 2, 8), id="equal sizes of tables that were traced as different"),
        pytest.param(Sizes(3, 33, 0, 6, 1, 2), id="no readout, as in a prefill"),
    ],
)
def test_a_program_computes_the_step_in_every_size(
    program: ExportedProgram, tiny_bundle: Bundle, checkpoint: Checkpoint, sizes: Sizes
) -> None:
    """Catches a size that tracing fixed, inputs in another order, and a constant of the wrong value."""
    model = StepModel(checkpoint.config, REGISTERED).eval()
    model.load_state_dict(load_model(checkpoint, torch.float32).state_dict())
    rows, readouts, keys, values = arguments(model, sizes)
    record = tiny_bundle.manifest.program
    assert record is not None
    state = {stored_name(name): tensor for name, tensor in model.state_dict().items()}
    state |= {name: torch.tensor(numbers) for name, numbers in record.constants.items()}
    state |= {**rows._asdict(), **readouts._asdict(), "readout_rows": readouts.rows}
    state |= {f"{kind}_pool_{i}": pool for kind, pools in (("k", keys), ("v", values)) for i, pool in enumerate(pools)}
    with torch.no_grad():
        got = program.graph_module(*(state[name] for name in record.inputs))
        want = model(rows, readouts, keys, values)
    for one, other in zip(got, (*want[:4], *want.keys, *want.values), strict=True):
        assert torch.equal(one, other), "the same operations on the same numbers"


def test_a_program_holds_no_weights(program: ExportedProgram, tiny_bundle: Bundle) -> None:
    """Catches a weight that tracing baked in: the file is a graph, and each tensor is an input of the weights file."""
    manifest = tiny_bundle.manifest
    assert manifest.program is not None
    assert not program.state_dict
    assert not program.constants
    named = set(manifest.tensors) | set(manifest.program.constants)
    assert named < set(manifest.program.inputs)
    assert len(manifest.program.inputs) == len(set(manifest.program.inputs))
    with zipfile.ZipFile(tiny_bundle.path(STEP_PROGRAM)) as archive:
        stored = {Path(each.filename).name: each.file_size for each in archive.infolist()}
    assert stored.pop("model.json") < 1 << 20
    assert sum(stored.values()) < 4096, stored


def test_nothing_of_the_exporting_machine_is_in_a_program(tiny_bundle: Bundle) -> None:
    with zipfile.ZipFile(tiny_bundle.path(STEP_PROGRAM)) as archive:
        content = b"".join(archive.read(name) for name in archive.namelist())
    assert str(Path(tiny.__file__).parents[1]).encode() not in content
    assert b"stack_trace" not in content


def test_the_manifest_says_where_each_tensor_lies(tiny_bundle: Bundle, checkpoint: Checkpoint) -> None:
    """Catches an offset, shape or dtype that is not the weights file's."""
    stored = tiny_bundle.path(WEIGHTS).read_bytes()
    assert tiny_bundle.manifest.tensors.keys() == checkpoint.tensors.keys()
    for name, record in tiny_bundle.manifest.tensors.items():
        tensor = torch.frombuffer(
            bytearray(stored), dtype=getattr(torch, record.dtype), count=torch.Size(record.shape).numel(),
            offset=record.offset,
        ).view(record.shape)  # fmt: skip
        assert torch.equal(tensor, checkpoint.tensors[name].load(torch.float32)), name


@pytest.mark.parametrize("precision", [Precision.BFLOAT16, Precision.FP8])
def test_precisions_keep_their_dtypes(checkpoint: Checkpoint, precision: Precision) -> None:
    """Catches a program whose states or codes are of another dtype than the weights file's."""
    program, record = export_program(checkpoint.config, precision)
    inputs = dict(zip(record.inputs, program.graph_module.graph.find_nodes(op="placeholder"), strict=True))
    assert inputs["k_pool_0"].meta["val"].dtype == torch.bfloat16
    experts = inputs["model.decoder.layers.0.experts.gate_up_proj"].meta["val"]
    assert experts.dtype == (torch.float8_e4m3fn if precision is Precision.FP8 else torch.bfloat16)
    targets = {str(node.target) for node in program.graph_module.graph.nodes}
    assert ("dgemma.expert_ffn_fp8.default" in targets) == (precision is Precision.FP8)
    assert json.dumps(record.constants)
