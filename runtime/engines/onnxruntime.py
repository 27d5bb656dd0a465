"""The step graph in ONNX Runtime, with the K/V pool in numpy arrays that it reads without a copy.

Made for and tested on the CPU provider. Other providers (CUDA, TensorRT and the like) can be named and are untested:
the pool stays in host memory, so they would copy it at every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from runtime.bundle import STEP_GRAPH, Bundle, LayerFacts, ModelFacts
from runtime.engines.protocol import ENCODE_CHUNK, DenoiseRow, EncodeRow, PoolGeometry, Prefix, Readout
from runtime.errors import BundleError

Array = NDArray[Any]

READOUT = ("argmax_ids", "candidate_ids", "entropy", "soft_embedding")
DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass(frozen=True)
class Options:
    """How to run the graph and how much memory to give it."""

    threads: int = 0
    """0: one a physical core."""
    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    """Execution providers by ONNX Runtime's names, the preferred one first."""
    page_size: int = 64
    """Tokens."""
    canvas_slots: int = 8
    """Requests that can be denoised in turn."""
    positions: int | None = None
    """Positions that the full layers hold over all requests; as many as one sequence may span where that is more than
    4096 a slot. The arrays take memory only where they were written."""
    profile_prefix: str | None = None
    """Write ONNX Runtime's profile to files that start so."""

    def geometry(self, facts: ModelFacts) -> PoolGeometry:
        """The pool of a model's engine: full pages for `positions`; sliding ones for twice every slot's window.

        The second half is there for the windows of prefixes that later requests share. A call has one row: rows are run
        one after the other anyway, and so are told of one by one.
        """
        positions = self.positions or max(facts.max_position, 4096 * self.canvas_slots)
        window = facts.sliding_window - 1 + max(facts.canvas_length, ENCODE_CHUNK)
        sliding_pages = 2 * self.canvas_slots * ((window - 2) // self.page_size + 2)
        full_pages = -(-positions // self.page_size)
        return PoolGeometry(self.page_size, sliding_pages, full_pages, self.canvas_slots, rows_per_call=1)


class OnnxRuntimeEngine:
    """Runs the rows of a call one after the other.

    A row's result thus cannot depend on its neighbours, and on a CPU nothing is lost: a canvas alone is bound by
    arithmetic.
    """

    def __init__(self, session: ort.InferenceSession, bundle: Bundle, pool: PoolGeometry) -> None:
        self.facts, self.pool = bundle.manifest.model, pool
        self._session = session
        self._end_token_ids = np.array(bundle.manifest.generation.end_token_ids, np.int64)
        # Nothing is run that the asked outputs do not need: an encode row ends with the last layer's K and V.
        self._run_options = ort.RunOptions()
        self._run_options.only_execute_path_to_fetches = True
        # No captured graph is replayed: each run asks, and unanswered it would cost an exception, some 60 microseconds.
        self._run_options.add_run_config_entry("gpu_graph_id", "-1")
        self._dtype = DTYPES[{value.name: value.type for value in session.get_inputs()}["k_pool_0"]]
        self._pools = {f"{kind}_pool_{i}": self._empty_pool(layer) for kind in "kv" for i, layer in self._layers()}
        self._slots = np.zeros((pool.canvas_slots, 1, self.facts.canvas_length, self.facts.hidden_size), self._dtype)
        self._encode_binding, self._denoise_binding = self._bound_pools(), self._bound_pools()

    @classmethod
    def load(cls, bundle: Bundle, options: Options | None = None) -> OnnxRuntimeEngine:
        """Load a bundle's step graph.

        Raises:
            BundleError: ONNX Runtime refuses the graph or has not the providers, or the graph is not the manifest's.
        """
        options = options or Options()
        session = _session(bundle, options)
        _check_names(session, bundle)
        return cls(session, bundle, options.geometry(bundle.manifest.model))

    def encode(self, rows: Sequence[EncodeRow]) -> None:
        """Encode the rows and write their K/V into the pool, one row after the other."""
        for row in rows:
            self._encode(row)

    def denoise(self, rows: Sequence[DenoiseRow]) -> list[Readout]:
        """One denoising step of each canvas."""
        return [self._denoise(row) for row in rows]

    def close(self) -> None:
        """Drop the session and the pool."""
        if self._session.get_session_options().enable_profiling:
            self._session.end_profiling()
        del self._encode_binding, self._denoise_binding, self._session
        self._pools.clear()

    def _encode(self, row: EncodeRow) -> None:
        length = len(row.token_ids)
        unconditioned = np.zeros((1, length, self.facts.hidden_size), self._dtype)
        feed = self._row(row.token_ids, row.start, row.prefix, denoise=False) | self._no_readout(length)
        new = {
            f"{kind}_new_{i}": np.empty((1, length, layer.kv_heads, layer.head_dim), self._dtype)
            for kind in "kv"
            for i, layer in self._layers()
        }
        self._run(self._encode_binding, feed | {"self_conditioning": unconditioned}, new)
        [sliding] = self._slots_of(row.prefix.sliding_pages, row.start - row.prefix.sliding_base, length)
        [full] = self._slots_of(row.prefix.full_pages, row.start, length)
        for kind in "kv":
            for i, layer in self._layers():
                slots = sliding if layer.sliding else full
                self._pools[f"{kind}_pool_{i}"][slots, 0] = new[f"{kind}_new_{i}"][0]

    def _denoise(self, row: DenoiseRow) -> Readout:
        state = self._slots[row.slot]
        if row.first_step:
            state[...] = 0
        length = len(row.canvas)
        readout: dict[str, Array] = {
            "readout_rows": np.zeros(1, np.int64),
            "temperature": np.array([row.temperature], np.float32),
            "uniform": row.uniform.astype(np.float32, copy=False)[np.newaxis],
            "guard": np.array([row.guard_first]),
            "guarded_ids": self._end_token_ids,
        }
        outputs: dict[str, Array] = {name: np.empty((1, length), np.int64) for name in READOUT[:2]}
        outputs |= {"entropy": np.empty((1, length), np.float32), "soft_embedding": np.empty_like(state)}
        feed = self._row(row.canvas, row.start, row.prefix, denoise=True) | readout | {"self_conditioning": state}
        self._run(self._denoise_binding, feed, outputs)
        state[...] = outputs["soft_embedding"]
        return Readout(outputs["argmax_ids"][0], outputs["candidate_ids"][0], outputs["entropy"][0])

    def _row(self, token_ids: Array, start: int, prefix: Prefix, denoise: bool) -> dict[str, Array]:
        """The inputs that say what a row is and what it sees."""
        positions = np.arange(start, start + len(token_ids))
        ends = np.full_like(positions, start + len(token_ids)) if denoise else positions + 1
        # Every token of a canvas sees the same window: the last w - 1 positions before the canvas, and the canvas.
        newest = np.full_like(positions, start) if denoise else positions
        return self._tables(prefix, start) | {
            "token_ids": np.ascontiguousarray(token_ids, np.int64)[np.newaxis],
            "start": np.array([start]),
            "denoise": np.array([denoise]),
            "sliding_kv_start": np.maximum(newest - (self.facts.sliding_window - 1), 0)[np.newaxis],
            "sliding_kv_end": ends[np.newaxis],
            "full_kv_start": np.zeros_like(positions)[np.newaxis],
            "full_kv_end": ends[np.newaxis],
        }

    def _tables(self, prefix: Prefix, start: int) -> dict[str, Array]:
        """Tables of exactly the slots that the row can see, whatever else the sequence holds.

        To the graph the pool is pages of one token: it copies what a table names anyway, and so no product is spent on
        the rest of a page. The attention's work, and its rounding, then follow from the row's position alone.
        """
        oldest = max(0, start - (self.facts.sliding_window - 1))
        return {
            "sliding_page_table": self._slots_of(prefix.sliding_pages, oldest - prefix.sliding_base, start - oldest),
            "sliding_page_base": np.array([oldest]),
            "full_page_table": self._slots_of(prefix.full_pages, 0, start),
            "full_page_base": np.zeros(1, np.int64),
        }

    def _slots_of(self, pages: Sequence[int], first: int, count: int) -> Array:
        """Slots in the pool of `count` tokens from the `first` of these pages on: `[1, count]`.

        A table is never empty, so that no dimension of the graph is 0: at position 0 it names a slot that is not seen.
        """
        if count == 0:
            return np.zeros((1, 1), np.int64)
        page, slot = np.divmod(np.arange(first, first + count), self.pool.page_size)
        slots: Array = np.asarray(pages, np.int64)[page] * self.pool.page_size + slot
        return slots[np.newaxis]

    def _no_readout(self, length: int) -> dict[str, Array]:
        """What the graph wants of the one row that asks for a readout; unread where none of its outputs is asked."""
        return {
            "readout_rows": np.zeros(1, np.int64),
            "temperature": np.ones(1, np.float32),
            "uniform": np.zeros((1, length), np.float32),
            "guard": np.zeros(1, np.bool_),
            "guarded_ids": self._end_token_ids,
        }

    def _run(self, binding: ort.IOBinding, feed: dict[str, Array], outputs: dict[str, Array]) -> None:
        for name, array in feed.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        for name, array in outputs.items():
            binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(array))
        self._session.run_with_iobinding(binding, self._run_options)

    def _layers(self) -> list[tuple[int, LayerFacts]]:
        return list(enumerate(self.facts.layers))

    def _empty_pool(self, layer: LayerFacts) -> Array:
        pages = self.pool.sliding_pages if layer.sliding else self.pool.full_pages
        return np.zeros((pages * self.pool.page_size, 1, layer.kv_heads, layer.head_dim), self._dtype)

    def _bound_pools(self) -> ort.IOBinding:
        binding = self._session.io_binding()
        for name, array in self._pools.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        return binding


def _session(bundle: Bundle, options: Options) -> ort.InferenceSession:
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.inter_op_num_threads = 1
    # Every prompt length has shapes of its own: a pattern each would be kept for ever (and 20 MB of the pocket's first)
    # for no gain in time.
    settings.enable_mem_pattern = False
    if options.profile_prefix is not None:
        settings.enable_profiling, settings.profile_file_prefix = True, options.profile_prefix
    # Told the pool's shape, ONNX Runtime sees that all layers of a type ask the same of their rows and asks it once.
    pool = options.geometry(bundle.manifest.model)
    for name, size in (("sliding_pages", pool.sliding_pages), ("full_pages", pool.full_pages)):
        settings.add_free_dimension_override_by_name(name, size * pool.page_size)
    # And what is always one, one row a call among them, need not be computed with at every step.
    for name in ("page_size", "B", "R"):
        settings.add_free_dimension_override_by_name(name, 1)
    path = bundle.path(STEP_GRAPH)
    if STEP_GRAPH not in bundle.manifest.files:
        raise BundleError(
            f"{path}: is missing, for ONNX Runtime does not compute {bundle.manifest.precision}; "
            "choose the torch engine, or export the checkpoint again in float32"
        )
    absent = set(options.providers) - set(ort.get_available_providers())
    if absent:
        available = ", ".join(ort.get_available_providers())
        raise BundleError(f"{path}: this ONNX Runtime has no {', '.join(sorted(absent))}; it has {available}")
    try:
        return ort.InferenceSession(path, settings, providers=list(options.providers))
    except Exception as error:  # ONNX Runtime's own exceptions have no common base.
        raise BundleError(f"{path}: ONNX Runtime {ort.__version__} cannot load it: {error}") from error


def _check_names(session: ort.InferenceSession, bundle: Bundle) -> None:
    manifest = bundle.manifest
    for kind, recorded, present in (
        ("inputs", manifest.graph_inputs, session.get_inputs()),
        ("outputs", manifest.graph_outputs, session.get_outputs()),
    ):
        differing = set(recorded) ^ {value.name for value in present}
        if differing:
            raise BundleError(
                f"{bundle.path(STEP_GRAPH)}: its {kind} and the manifest's differ in {', '.join(sorted(differing))}; "
                "export again"
            )
