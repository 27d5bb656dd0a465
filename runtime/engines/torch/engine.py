"""The exported program in PyTorch: on the CPU with the operations' references, on a GPU compiled and in CUDA graphs.

Weights, K/V pool, self-conditioning states and readout stay on the device; the host hands over token ids, page tables
and uniform numbers, and reads back two ids and an entropy a position.

What a result depends on: with `Options.batch = 1` rows run one after the other, so never on a row's neighbours. Else
the rows of a call share its matrix products, whose tiling follows from how many rows there are, and attention is split
by the longest prefix of the call: the same rows in a call of the same size give the same bits, and a row alone gives
the same bits whatever ran before; between calls of different sizes results differ by rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx.experimental import _config as symbolic_shapes

from runtime.bundle import STEP_PROGRAM, WEIGHTS, Bundle, LayerFacts, ModelFacts, ProgramRecord
from runtime.engines.protocol import (
    DenoiseRow,
    EncodeRow,
    EngineOutOfMemory,
    PoolGeometry,
    Readout,
)
from runtime.engines.torch.calls import Buffer, Call
from runtime.engines.torch.inputs import denoise_inputs, encode_inputs
from runtime.engines.torch.kv_writes import Target, write_outputs
from runtime.engines.torch.options import Options
from runtime.engines.torch.program import Fill, Steps, bind
from runtime.engines.torch.regions import compile_regions
from runtime.engines.torch.tables import PageTables, full_pages, slots_of
from runtime.engines.torch.weights import WeightsFile
from runtime.errors import BundleError

FULL_PAGES_LEAST, FULL_TOKENS_LEAST = 16, 1024
"""Page tables are padded to a power of two of pages, at least the smaller of these two: a call of a length class is
captured once."""


@dataclass(frozen=True)
class Model:
    """What an engine runs: a program, how to call it, where its weights come from."""

    facts: ModelFacts
    end_token_ids: tuple[int, ...]
    program: ExportedProgram
    record: ProgramRecord
    fill: Fill

    @classmethod
    def of(cls, bundle: Bundle, program: ExportedProgram, fill: Fill) -> Model:
        """The model of a bundle that has a program."""
        manifest = bundle.manifest
        assert manifest.program is not None, "read_program refuses a bundle without one"
        return cls(manifest.model, manifest.generation.end_token_ids, program, manifest.program, fill)


def read_program(bundle: Bundle) -> ExportedProgram:
    """Read a bundle's exported program.

    Raises:
        BundleError: it has none, or one that this PyTorch cannot read.
    """
    path = bundle.path(STEP_PROGRAM)
    if bundle.manifest.program is None:
        raise BundleError(f"{path}: is missing; export the checkpoint again with --program")
    try:
        return torch.export.load(path)
    except Exception as error:  # whatever reading a file of another version or of garbage raises
        raise BundleError(f"{path}: PyTorch {torch.__version__} cannot load it: {error}") from error


class TorchEngine:
    """`runtime.engines.protocol.Engine` over an exported program."""

    def __init__(self, model: Model, options: Options) -> None:
        """Allocate the pool and the weights on the device.

        Raises:
            BundleError: they do not fit.
        """
        self.facts, self.pool = model.facts, options.geometry(model.facts)
        self.options, self._device = options, torch.device(options.device)
        self._cuda = self._device.type == "cuda"
        self.stream = torch.cuda.Stream(self._device) if self._cuda else None  # type: ignore[no-untyped-call]
        """Everything is launched on it."""
        self._graph_pool: torch.cuda.MemPool | None = None
        self._calls: dict[tuple[Any, ...], tuple[Call, PageTables]] = {}
        try:
            with self._on_device(), torch.no_grad():
                # On the device that it will serve: a pool belongs to the current one.
                self._graph_pool = torch.cuda.MemPool() if self._cuda and options.graphs else None
                self._allocate(model)
        except torch.OutOfMemoryError as error:
            raise BundleError(_does_not_fit(model, self.pool, error)) from error

    @classmethod
    def load(cls, bundle: Bundle, options: Options | None = None) -> TorchEngine:
        """Load a bundle's exported program, weights streamed from its file to the device.

        Raises:
            BundleError: the bundle has no program or it cannot be read, the device is absent or too small.
        """
        options = options or Options()
        device, program = _device(options.device), read_program(bundle)
        with WeightsFile(bundle.path(WEIGHTS), bundle.manifest.tensors, device) as weights:
            return cls(Model.of(bundle, program, weights.fill), options)

    @torch.no_grad()
    def prepare(self) -> None:
        """Compile and capture calls of every size for short prefixes, which else the first such call waits for: about
        a minute on an H200. Longer prefixes are captured when they come, in less than a second for each doubling."""
        length = self.options.encode_bucket or self.facts.canvas_length
        with self._on_device():
            while length <= self.options.encode_chunk:
                self._encode_call(length, self._least_pages)
                length *= 2
            for power in range((self.pool.rows_per_call - 1).bit_length() + 1):
                self._denoise_call(1 << power, self._least_pages)

    @torch.no_grad()
    def encode(self, rows: Sequence[EncodeRow]) -> None:
        """Encode the rows and write their K/V into the pool, one row after the other."""
        with self._on_device(), _memory_errors():
            for row in rows:
                self._encode(row)

    @torch.no_grad()
    def denoise(self, rows: Sequence[DenoiseRow]) -> list[Readout]:
        """One denoising step of each canvas; rows share calls on a GPU."""
        most, readouts = self.pool.rows_per_call, []
        with self._on_device(), _memory_errors():
            for first in range(0, len(rows), most):
                readouts += self._denoise(rows[first : first + most])
        return readouts

    def run_call(self, call: Call) -> None:
        """Run a call whose inputs are written, and wait for its outputs; a benchmark may time what it does."""
        call.run()
        if self.stream is not None:
            self.stream.synchronize()

    def close(self) -> None:
        """Free the device's memory."""
        self._calls.clear()
        self._graph_pool = None
        del self._steps, self._derive, self.keys, self.values, self.states
        if self._cuda:
            torch.cuda.empty_cache()

    def _allocate(self, model: Model) -> None:
        facts, pool, device = self.facts, self.pool, self._device
        dtype = _state_dtype(model)
        # A page and a slot more than the scheduler knows: what padding tokens and warming up write goes there.
        self.keys, self.values = ([_empty_pool(layer, pool, dtype, device) for layer in facts.layers] for _ in range(2))
        shape = (pool.canvas_slots + 1, facts.canvas_length, facts.hidden_size)
        self.states = torch.zeros(shape, dtype=dtype, device=device)
        inputs = {f"k_pool_{i}": keys for i, keys in enumerate(self.keys)}
        inputs |= {f"v_pool_{i}": values for i, values in enumerate(self.values)}
        inputs["guarded_ids"] = torch.tensor(model.end_token_ids, dtype=torch.int64, device=device)
        self._compile(bind(model.program, model.record, inputs, model.fill, device, self.options.rewrites))

    def _compile(self, steps: Steps) -> None:
        def compiled(module: Any) -> Any:
            compiler = self.options.compiler
            return module if compiler is None else torch.compile(module, backend=compiler)

        beside = self._cuda and self.options.beside
        aside = torch.cuda.Stream(self._device, priority=-1) if beside else None  # type: ignore[no-untyped-call]
        # Calls of one canvas have compiled code of their own, for their exact sizes; the others share one for any.
        self._steps = {
            (kind, alone): compile_regions(step, compiled, aside)
            for kind, step in (("encode", steps.encode), ("denoise", steps.denoise))
            for alone in (True, False)
        }
        slots = ["sliding_slots" if layer.sliding else "full_slots" for layer in self.facts.layers]
        targets = [Target(*each) for pools in (self.keys, self.values) for each in zip(pools, slots, strict=True)]
        for alone in (True, False):
            write_outputs(self._steps["encode", alone], targets)
        self._derive = {"encode": compiled(encode_inputs), "denoise": compiled(denoise_inputs)}

    def _on_device(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self.stream) if self._cuda else nullcontext()

    def _encode(self, row: EncodeRow) -> None:
        length = len(row.token_ids)
        bucket = self.options.encode_bucket
        padded = length if bucket is None else bucket << (-(-length // bucket) - 1).bit_length()
        call, tables = self._encode_call(padded, self._full_bucket(row.start))
        tables.write(0, row.prefix, row.start)
        host, size = call.inputs.host, self.pool.page_size
        host["token_ids"][0, :length], host["token_ids"][0, length:] = row.token_ids, 0
        sliding_start = row.start - row.prefix.sliding_base
        host["sliding_slots"][:length] = slots_of(row.prefix.sliding_pages, sliding_start, length, size)
        host["full_slots"][:length] = slots_of(row.prefix.full_pages, row.start, length, size)
        host["sliding_slots"][length:] = self.pool.sliding_pages * size
        host["full_slots"][length:] = self.pool.full_pages * size
        self.run_call(call)

    def _denoise(self, rows: Sequence[DenoiseRow]) -> list[Readout]:
        count = len(rows)
        call, tables = self._denoise_call(
            1 << (count - 1).bit_length(), self._full_bucket(max(row.start for row in rows))
        )
        host = call.inputs.host
        for name, values in (
            ("token_ids", [row.canvas for row in rows]),
            ("uniform", [row.uniform for row in rows]),
            ("temperature", [row.temperature for row in rows]),
            ("first_step", [row.first_step for row in rows]),
            ("guard", [row.guard_first for row in rows]),
            ("slots", [row.slot for row in rows]),
        ):
            host[name][:count] = values
            if count < len(host[name]):
                # Rows that only fill up the call repeat the last one, with the spare slot.
                host[name][count:] = host[name][count - 1] if name != "slots" else self.pool.canvas_slots
        for index in range(len(host["start"])):
            row = rows[min(index, count - 1)]
            tables.write(index, row.prefix, row.start)
        self.run_call(call)
        # Copied out of the buffer that the next call writes.
        outputs = (array[:count].copy() for array in call.outputs.host.values())
        return [Readout(*each) for each in zip(*outputs, strict=True)]

    @property
    def _least_pages(self) -> int:
        return max(1, min(FULL_PAGES_LEAST, FULL_TOKENS_LEAST // self.pool.page_size))

    def _full_bucket(self, start: int) -> int:
        """Pages of the tables of a call whose rows begin no later than `start`."""
        pages = full_pages(start, self.pool.page_size)
        return max(self._least_pages, 1 << max(0, pages - 1).bit_length())

    def _encode_call(self, length: int, table_length: int) -> tuple[Call, PageTables]:
        key = ("encode", length, table_length)
        if key not in self._calls:
            fields = self._row_fields(1, length, table_length)
            fields |= {f"{kind}_slots": ((length,), torch.int64) for kind in ("sliding", "full")}
            buffer = Buffer(fields, self._device)
            canvas = length == self.facts.canvas_length
            _mark_dynamic(buffer.device, {"full_table": 1} if canvas else {"full_table": 1, "token_ids": 1})
            for name, pages in (("sliding_slots", self.pool.sliding_pages), ("full_slots", self.pool.full_pages)):
                buffer.host[name][...] = pages * self.pool.page_size
            outputs = Buffer({}, self._device)
            self._calls[key] = self._warm(buffer, outputs, self._run_encode)
        return self._calls[key]

    def _denoise_call(self, batch: int, table_length: int) -> tuple[Call, PageTables]:
        key = ("denoise", batch, table_length)
        if key not in self._calls:
            shape = (batch, self.facts.canvas_length)
            row: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
                "uniform": (shape, torch.float32),
                "temperature": ((batch,), torch.float32),
                "slots": ((batch,), torch.int64),
                "first_step": ((batch,), torch.bool),
                "guard": ((batch,), torch.bool),
            }
            buffer = Buffer(self._row_fields(*shape, table_length) | row, self._device)
            dynamic = dict.fromkeys(buffer.device, 0) if batch > 1 else {}
            _mark_dynamic(buffer.device, dynamic)
            _mark_dynamic(buffer.device, {"full_table": 1})
            buffer.host["slots"][...], buffer.host["temperature"][...] = self.pool.canvas_slots, 1.0
            readout = {"argmax_ids": (shape, torch.int64), "candidate_ids": (shape, torch.int64)}
            outputs = Buffer(readout | {"entropy": (shape, torch.float32)}, self._device)
            self._calls[key] = self._warm(buffer, outputs, self._run_denoise)
        return self._calls[key]

    def _warm(self, inputs: Buffer, outputs: Buffer, body: Callable[[Buffer, Buffer], None]) -> tuple[Call, PageTables]:
        tables = PageTables(inputs.host, self.facts.sliding_window, self.pool.page_size)
        # Batch sizes and page counts are sizes of their own, also where two happen to be equal when traced.
        with symbolic_shapes.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            return Call(inputs, outputs, lambda: body(inputs, outputs), self._graph_pool), tables

    def _row_fields(self, batch: int, length: int, table_length: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        sliding_pages = (self.facts.sliding_window - 3) // self.pool.page_size + 2
        shapes = {
            "token_ids": (batch, length),
            "start": (batch,),
            "sliding_table": (batch, max(1, sliding_pages)),
            "sliding_base": (batch,),
            "full_table": (batch, table_length),
        }
        return {name: (shape, torch.int64) for name, shape in shapes.items()}

    def _run_step(self, kind: str, fields: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Run one kind of step on what its rows' buffer holds."""
        key = (kind, tuple(fields["token_ids"].shape) == (1, self.facts.canvas_length))
        step = self._steps[key]
        slots = {name: fields.pop(name) for name in ("sliding_slots", "full_slots") if name in fields}
        inputs = self._derive[kind](self.facts.sliding_window, **fields) | slots
        names = (node.target for node in step.graph.find_nodes(op="placeholder"))
        results: tuple[Tensor, ...] = step(*(inputs[name] for name in names))
        return results

    def _run_encode(self, inputs: Buffer, outputs: Buffer) -> None:
        self._run_step("encode", dict(inputs.device))

    def _run_denoise(self, inputs: Buffer, outputs: Buffer) -> None:
        *readout, soft_embedding = self._run_step("denoise", {"states": self.states, **inputs.device})
        self.states.index_copy_(0, inputs.device["slots"], soft_embedding)
        for output, value in zip(outputs.device.values(), readout, strict=True):
            output.copy_(value)


@contextmanager
def _memory_errors() -> Iterator[None]:
    """What a call raises where the device's memory is too small for it; states and pool are as before it, but for
    pages that the call was to write. What its graph's pool took stays there, for the next call."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        raise EngineOutOfMemory(str(error)) from error


def _mark_dynamic(tensors: Mapping[str, Tensor], axes: Mapping[str, int]) -> None:
    """Compile for any size of these axes, not one time for each that comes."""
    for name, axis in axes.items():
        torch._dynamo.maybe_mark_dynamic(tensors[name], axis)


def _state_dtype(model: Model) -> torch.dtype:
    """What K/V and states are stored in: the dtype of the program's pools."""
    index = model.record.inputs.index("k_pool_0")
    placeholders = model.program.graph_module.graph.find_nodes(op="placeholder")
    dtype: torch.dtype = list(placeholders)[index].meta["val"].dtype
    return dtype


def _empty_pool(layer: LayerFacts, pool: PoolGeometry, dtype: torch.dtype, device: torch.device) -> Tensor:
    pages = pool.sliding_pages if layer.sliding else pool.full_pages
    return torch.zeros((pages + 1, pool.page_size, layer.kv_heads, layer.head_dim), dtype=dtype, device=device)


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BundleError(f"device {name}: this PyTorch ({torch.__version__}) finds no CUDA GPU; use device cpu")
    return device


def _does_not_fit(model: Model, pool: PoolGeometry, error: Exception) -> str:
    return (
        f"{model.facts.name}: its weights and a pool of {pool.full_pages} full and {pool.sliding_pages} sliding pages "
        f"do not fit into the device's memory; serve fewer requests at a time or fewer positions ({error})"
    )
