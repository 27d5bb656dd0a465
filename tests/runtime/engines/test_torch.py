"""The torch engine beyond what every engine must do: what it refuses, and that its rewrites change nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from plugins_trt.expert_ffn import reference as reference_experts
from plugins_trt.quantized_linear import reference as reference_linear
from plugins_trt.torch_operations import REGISTERED
from runtime.bundle import MANIFEST, STEP_PROGRAM, WEIGHTS, Bundle, FileRecord, Manifest, TensorRecord, sha256
from runtime.engines.protocol import DenoiseRow, EncodeRow, EngineOutOfMemory, Prefix, Readout
from runtime.engines.torch import weights as torch_weights
from runtime.engines.torch.engine import Model, TorchEngine, read_program
from runtime.engines.torch.options import Options
from runtime.engines.torch.pieces import take_apart
from runtime.engines.torch.program import Rewrites, Steps, bind
from runtime.engines.torch.regions import compile_regions
from runtime.engines.torch.tables import PageTables
from runtime.engines.torch.weights import WeightsFile
from runtime.errors import BundleError

ROOT = Path(__file__).parents[3]
PLAIN = Options(page_size=4, canvas_slots=4, positions=256, rewrites=Rewrites(merge_products=False))


@cache
def program(directory: Path) -> ExportedProgram:
    return read_program(Bundle(directory))


@contextmanager
def engine(bundle: Bundle, options: Options) -> Iterator[TorchEngine]:
    with WeightsFile(bundle.path(WEIGHTS), bundle.manifest.tensors, torch.device("cpu")) as weights:
        made = TorchEngine(Model.of(bundle, program(bundle.directory), weights.fill), options)
    yield made
    made.close()


def copied(bundle: Bundle, directory: Path, **changes: object) -> Bundle:
    """The bundle at another place, its large files linked, with these fields of its manifest replaced."""
    directory.mkdir(exist_ok=True)
    for name in bundle.manifest.files:
        if not (directory / name).exists():
            (directory / name).symlink_to(bundle.path(name).resolve())
    (directory / MANIFEST).write_bytes(msgspec.json.encode(msgspec.structs.replace(bundle.manifest, **changes)))
    return Bundle(directory)


def rows(facts: Any, count: int, first_step: bool = True) -> tuple[list[EncodeRow], list[DenoiseRow]]:
    """Prompts of 5, 12, 19 ... tokens, and a canvas behind each."""
    random = np.random.default_rng(count)
    encode, denoise = [], []
    for index in range(count):
        length = 5 + 7 * index
        pages = tuple(range(16 * index, 16 * (index + 1)))
        sliding = tuple(range(6 * index, 6 * (index + 1)))
        first = max(0, length - (facts.sliding_window - 1)) // 4
        ids = random.integers(0, facts.vocab_size, length)
        # The sliding pages of the whole prompt, as many as the window and the longest row need, in a ring.
        ring = tuple(sliding[page % 6] for page in range(-(-length // 4)))
        encode += [EncodeRow(ids[at : at + 4], at, Prefix(ring[: at // 4 + 1], 0, pages)) for at in range(0, length, 4)]
        denoise.append(
            DenoiseRow(
                canvas=random.integers(0, facts.vocab_size, facts.canvas_length),
                start=length,
                prefix=Prefix(ring[first:], 4 * first, pages),
                slot=index,
                first_step=first_step,
                temperature=0.5 + 0.1 * index,
                uniform=random.random(facts.canvas_length, np.float32),
                guard_first=index % 2 == 0,
            )
        )
    return encode, denoise


def two_steps(made: TorchEngine, count: int) -> list[Readout]:
    """Readouts of two steps of `count` canvases, and with them everything that lies before."""
    made.prepare()
    encode, denoise = rows(made.facts, count)
    for row in encode:
        made.encode([row])
    return made.denoise(denoise) + made.denoise([replace(row, first_step=False) for row in denoise])


def assert_near(got: list[Readout], want: list[Readout]) -> None:
    """Equal but for float32's rounding of sums of at most some hundred products in another order, three layers deep."""
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one.argmax_ids, other.argmax_ids)
        np.testing.assert_array_equal(one.candidate_ids, other.candidate_ids)
        np.testing.assert_allclose(one.entropy, other.entropy, rtol=0, atol=2.0**-23 * 512 * other.entropy.max())


def assert_same(got: list[Readout], want: list[Readout]) -> None:
    for one, other in zip(got, want, strict=True):
        for name in ("argmax_ids", "candidate_ids", "entropy"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@pytest.fixture(scope="module")
def plain(tiny_bundle: Bundle) -> list[Readout]:
    """Three canvases one after the other, no rewrite."""
    with engine(tiny_bundle, PLAIN) as made:
        return two_steps(made, 3)


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        pytest.param(
            replace(PLAIN, rewrites=Rewrites()), False, id="merged products: rows of weights in another order"
        ),
        pytest.param(
            replace(PLAIN, rewrites=Rewrites(merge_products=False, reference=True)), True, id="references by name"
        ),
        pytest.param(
            replace(PLAIN, rewrites=Rewrites(merge_products=False, take_apart=True)),
            False,
            id="operations taken apart: parts summed over the wrong axis, another operand routed",
        ),
        pytest.param(
            replace(PLAIN, rewrites=Rewrites(merge_products=False, take_apart=True, join_residuals=True)),
            False,
            id="residuals joined: another branch's norm, a sum from before the scalar",
        ),
        pytest.param(
            replace(PLAIN, batch=4), False, id="three rows in a call of four: rows mixed up, filling rows seen"
        ),
        pytest.param(replace(PLAIN, batch=2), False, id="three rows in calls of two and one"),
        pytest.param(replace(PLAIN, encode_bucket=8), False, id="encode rows filled up: padding written into the pool"),
        pytest.param(replace(PLAIN, compiler="eager"), True, id="traced by the compiler: a region called for another"),
    ],
)
def test_rewrites_change_nothing(tiny_bundle: Bundle, plain: list[Readout], options: Options, bits: bool) -> None:
    with engine(tiny_bundle, options) as made:
        got = two_steps(made, 3)
    (assert_same if bits else assert_near)(got, plain)


class Quantised(nn.Module):
    """A product and experts of 8-bit weights, which quantise their operand for themselves."""

    def forward(self, x: Tensor, weight: Tensor, scale: Tensor, ids: Tensor, *experts: Tensor) -> tuple[Tensor, Tensor]:
        return REGISTERED.linear_fp8(x, weight, scale), REGISTERED.expert_ffn_fp8(x, ids, *experts)


def test_quantising_is_taken_out_of_the_operations() -> None:
    """Catches codes or scales of other rows, a result in another dtype, and parts summed in less than float32."""
    random = torch.Generator().manual_seed(0)

    def codes(*shape: int) -> Tensor:
        return (50 * torch.randn(shape, generator=random)).to(torch.float8_e4m3fn)

    x = torch.randn(7, 64, generator=random).bfloat16()
    ids = torch.rand(7, 4, generator=random).topk(2).indices
    linear = codes(48, 64), torch.rand(48, generator=random)
    experts = (
        codes(4, 64, 64),
        torch.rand(4, 64, generator=random),
        codes(4, 64, 32),
        torch.rand(4, 64, generator=random),
    )
    arguments = x, *linear, ids, torch.rand(7, 2, generator=random).bfloat16(), *experts
    graph = torch.export.export(Quantised(), arguments, strict=False).graph_module
    take_apart(graph.graph, torch.device("cpu"))
    graph.recompile()
    assert "linear_fp8" not in graph.code
    assert "expert_ffn_fp8" not in graph.code
    product, mixture = graph(*arguments)
    assert torch.equal(product, reference_linear.linear_fp8(x, *linear))
    parts = reference_experts.expert_parts_fp8(*reference_linear.quantize_rows(x), *arguments[3:], x.dtype)
    assert torch.equal(mixture, parts.double().sum(1).bfloat16())


class Noted(nn.Module):
    """A region that tells when it is called."""

    def __init__(self, module: nn.Module, log: list[str], name: str) -> None:
        super().__init__()
        self._module, self._log, self._name = module, log, name

    def forward(self, *inputs: Tensor) -> Any:
        self._log.append(self._name)
        return self._module(*inputs)


class FakeStream:
    """A stream that notes who waits."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self._log = name, log

    def wait_stream(self, other: FakeStream) -> None:
        self._log.append(f"{self.name} waits for {other.name}")


@pytest.fixture(
    scope="module",
    params=[Rewrites(), Rewrites(take_apart=True), Rewrites(take_apart=True, join_residuals=True)],
    ids=["whole operations", "taken apart", "residuals joined"],
)
def steps(tiny_bundle: Bundle, request: pytest.FixtureRequest) -> Steps:
    """Both steps as they are before they are cut into regions."""
    facts, manifest, random = tiny_bundle.manifest.model, tiny_bundle.manifest, torch.Generator().manual_seed(0)
    inputs = {
        f"{kind}_pool_{i}": torch.randn(9, 4, layer.kv_heads, layer.head_dim, generator=random)
        for kind in "kv"
        for i, layer in enumerate(facts.layers)
    }
    inputs["guarded_ids"] = torch.tensor([1])
    assert manifest.program is not None
    with WeightsFile(tiny_bundle.path(WEIGHTS), manifest.tensors, torch.device("cpu")) as weights:
        made = program(tiny_bundle.directory)
        return bind(made, manifest.program, inputs, weights.fill, torch.device("cpu"), request.param)


def arguments(step: fx.GraphModule, hidden_size: int) -> list[Tensor]:
    """Two rows of 16 tokens at position 20."""
    random = torch.Generator().manual_seed(1)
    ids, end = torch.randint(60, (2, 16), generator=random), torch.full((2, 16), 36)
    pages = torch.randint(9, (2, 5), generator=random)
    values = {"token_ids": ids, "start": torch.tensor([20, 20]), "sliding_kv_start": end - 25, "sliding_kv_end": end}
    values |= {"full_kv_start": torch.zeros_like(end), "full_kv_end": end, "temperature": torch.ones(2)}
    values |= {"sliding_page_table": pages, "full_page_table": pages, "guard": torch.tensor([True, False])}
    values |= dict.fromkeys(("sliding_page_base", "full_page_base"), torch.zeros(2, dtype=torch.int64))
    values["uniform"] = torch.rand(2, 16, generator=random)
    values["self_conditioning"] = torch.randn(2, 16, hidden_size, generator=random)
    return [values[str(node.target)] for node in step.graph.find_nodes(op="placeholder")]


@pytest.mark.parametrize("kind", ["encode", "denoise"])
def test_the_dense_products_run_beside_the_experts(
    steps: Steps, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Catches a cut that loses or mixes up a value, experts outside of fork and join, and layers compiled apart."""
    log: list[str] = []
    main, second = FakeStream("main", log), FakeStream("second", log)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    compiled: list[nn.Module] = []

    def noted(module: nn.Module) -> nn.Module:
        compiled.append(module)
        has_experts = any("dgemma.expert_" in str(node.target) for node in module.graph.nodes)  # type: ignore[union-attr]
        return Noted(module, log, "experts" if has_experts else "region")

    step = getattr(steps, kind)
    cut = compile_regions(step, noted, second)  # type: ignore[arg-type]
    inputs = arguments(step, tiny_bundle.manifest.model.hidden_size)
    with torch.no_grad():
        for got, want in zip(cut(*inputs), step(*inputs), strict=True):
            assert torch.equal(got, want)
    # The last layer of a prefill ends with its keys and values.
    layers = len(tiny_bundle.manifest.model.layers) - (kind == "encode")
    order = [entry for entry in log if entry != "region"]
    assert order == ["second waits for main", "experts", "main waits for second"] * layers
    assert sum("dgemma.expert_" in module.code for module in compiled) == 1  # type: ignore[operator]


def test_an_engine_needs_no_model_definition(tiny_bundle: Bundle) -> None:
    """Catches an import of the exporter: the program is all that the engine has of the model."""
    check = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('export', 'onnx', 'onnxruntime', 'triton')))\n"
        "from pathlib import Path\n"
        "from runtime.bundle import Bundle\n"
        "from runtime.engines.torch.engine import TorchEngine\n"
        "TorchEngine.load(Bundle(Path(sys.argv[1]))).close()\n"
    )
    command = [sys.executable, "-c", check, str(tiny_bundle.directory)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr


def test_a_bundle_without_a_program_is_refused(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=f"{STEP_PROGRAM}: is missing; export the checkpoint again with --program"):
        TorchEngine.load(copied(tiny_bundle, tmp_path, program=None))


def test_a_program_that_is_none_is_refused(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """A file of the recorded size that PyTorch cannot read: its complaint is passed on with the path."""
    spoilt = tmp_path / STEP_PROGRAM
    spoilt.write_bytes(b"\xff" * 1000)
    files = tiny_bundle.manifest.files | {STEP_PROGRAM: FileRecord(bytes=1000, sha256=sha256(spoilt))}
    with pytest.raises(
        BundleError, match=rf"{STEP_PROGRAM}: PyTorch {torch.__version__.replace('+', '.')} cannot load"
    ):
        TorchEngine.load(copied(tiny_bundle, tmp_path, files=files))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
def test_a_gpu_that_is_not_there_is_named(tiny_bundle: Bundle) -> None:
    with pytest.raises(BundleError, match=r"device cuda: .* finds no CUDA GPU; use device cpu"):
        TorchEngine.load(tiny_bundle, Options.serving("cuda", 1))


def manifest_with(bundle: Bundle, name: str, record: TensorRecord | None) -> Manifest:
    tensors = {key: value for key, value in bundle.manifest.tensors.items() if key != name}
    return msgspec.structs.replace(bundle.manifest, tensors=tensors | ({} if record is None else {name: record}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(None, "holds no tensor model.decoder.norm.weight", id="a tensor that is not there"),
        pytest.param(TensorRecord(0, "float32", (35,)), r"is float32 \[35\], not float32 \[36\]", id="another shape"),
        pytest.param(TensorRecord(0, "float16", (36,)), r"is float16 \[36\], not float32", id="another dtype"),
        pytest.param(TensorRecord(1 << 40, "float32", (36,)), "ends inside a tensor", id="an offset past the end"),
    ],
)
def test_weights_that_are_not_the_programs_are_refused(
    tiny_bundle: Bundle, change: TensorRecord | None, message: str
) -> None:
    """Catches weights bound to the wrong place without a word."""
    manifest = manifest_with(tiny_bundle, "model.decoder.norm.weight", change)
    with (
        WeightsFile(tiny_bundle.path(WEIGHTS), manifest.tensors, torch.device("cpu")) as weights,
        pytest.raises(BundleError, match=message),
    ):
        weights.fill("model.decoder.norm.weight", torch.empty(36))


@pytest.mark.parametrize("chunk", [4, 52, 1 << 20])
def test_weights_are_read_in_chunks(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Catches a chunk that is lost, doubled or put elsewhere; 52 bytes divide no tensor."""
    monkeypatch.setattr(torch_weights, "CHUNK_BYTES", chunk)
    tensors, path = tiny_bundle.manifest.tensors, tiny_bundle.path(WEIGHTS)
    names = ["model.decoder.norm.weight", "model.decoder.layers.0.router.proj.weight"]
    with WeightsFile(path, tensors, torch.device("cpu")) as weights:
        for name in names:
            read = torch.empty(tensors[name].shape)
            weights.fill(name, read)
            stored = np.fromfile(path, np.float32, read.numel(), offset=tensors[name].offset)
            np.testing.assert_array_equal(read.flatten().numpy(), stored)


def test_memory_that_runs_out_is_told_apart(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner repeats such a call in smaller parts; any other exception fails its requests."""

    def exhausted(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with engine(tiny_bundle, PLAIN) as made:
        encode, denoise = rows(made.facts, 1)
        monkeypatch.setattr(made, "run_call", exhausted)
        with pytest.raises(EngineOutOfMemory, match="out of memory"):
            made.encode(encode[:1])
        with pytest.raises(EngineOutOfMemory, match="out of memory"):
            made.denoise(denoise)


def test_tables_show_what_was_written_last() -> None:
    """Catches a row that keeps another one's pages: exchanged rows, other pages at the same position, one page more."""
    base = Prefix((3, 4, 5), 0, (7, 8, 9))
    writes = [(0, base, 9), (1, replace(base, full_pages=(1, 2, 3)), 9), (1, base, 9), (0, base, 12), (1, base, 0)]
    writes += [(0, replace(base, sliding_base=4), 12), (1, replace(base, sliding_pages=(6, 4, 5)), 9)]

    def fields() -> dict[str, Any]:
        made = {name: np.full(2, -1) for name in ("start", "sliding_base")}
        return made | {name: np.full((2, 4), -1) for name in ("sliding_table", "full_table")}

    kept = fields()
    tables = PageTables(kept, window=7, page_size=4)
    for index, prefix, start in writes * 2:
        tables.write(index, prefix, start)
        fresh = fields()
        PageTables(fresh, window=7, page_size=4).write(index, prefix, start)
        for name, field in kept.items():
            np.testing.assert_array_equal(field[index], fresh[name][index])
    assert kept["full_table"].tolist() == [[7, 8, 9, 0], [7, 8, 9, 0]]
    assert kept["sliding_table"].tolist() == [[3, 4, 0, 0], [6, 4, 5, 0]]
