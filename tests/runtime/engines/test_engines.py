"""What every engine that computes must do, against the PyTorch model in float64 without pages, chunks or neighbours."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.export import ExportedProgram

from export.checkpoint import open_checkpoint
from export.model import Readouts, StepModel, StepOutputs
from export.rows import build_rows
from export.verification import load_model
from runtime.bundle import WEIGHTS, Bundle
from runtime.engines.onnxruntime import OnnxRuntimeEngine, Options
from runtime.engines.protocol import DenoiseRow, EncodeRow, Engine, Prefix, Readout
from runtime.engines.torch import engine as torch_engine
from runtime.engines.torch.options import Options as TorchOptions
from runtime.engines.torch.weights import WeightsFile

SLACK = 4.0
"""An engine may be this many times as far from float64 as PyTorch in float32 is: both round the same products, in
another order, and the largest of some hundred roundings scatters."""
BAND = 2.0**-18
"""Besides, relative to the largest value: 64 units in the last place."""
PAGE = 4
"""Tokens a page: neither the window (10) nor most prompts below are multiples of it; a canvas (16) spans several."""


def _onnxruntime(bundle: Bundle) -> Engine:
    return OnnxRuntimeEngine.load(bundle, Options(threads=1, page_size=PAGE, canvas_slots=4, positions=1024))


@cache
def _program(directory: Path) -> ExportedProgram:
    """Reading a program takes seconds, and every test makes an engine."""
    return torch_engine.read_program(Bundle(directory))


def _torch(bundle: Bundle) -> Engine:
    options = TorchOptions("cpu", PAGE, canvas_slots=4, positions=1024)
    with WeightsFile(bundle.path(WEIGHTS), bundle.manifest.tensors, torch.device("cpu")) as weights:
        model = torch_engine.Model.of(bundle, _program(bundle.directory), weights.fill)
        return torch_engine.TorchEngine(model, options)


ENGINES: dict[str, Callable[[Bundle], Engine]] = {"onnxruntime": _onnxruntime, "torch": _torch}


@pytest.fixture(params=ENGINES)
def fresh(request: pytest.FixtureRequest, tiny_bundle: Bundle) -> Callable[[], Engine]:
    """Makes an engine whose memory was never used."""
    return lambda: ENGINES[request.param](tiny_bundle)


@pytest.fixture
def engine(fresh: Callable[[], Engine]) -> Iterator[Engine]:
    engine = fresh()
    yield engine
    engine.close()


@dataclass(frozen=True)
class Step:
    """The inputs of one denoising step."""

    canvas: NDArray[np.int64]
    temperature: float
    uniform: NDArray[np.float32]
    guard_first: bool


@dataclass(frozen=True)
class Script:
    """A request without a loop: what is encoded and denoised, in order, whatever the readouts say."""

    prompt: NDArray[np.int64]
    blocks: list[tuple[list[Step], NDArray[np.int64]]]
    """Each canvas' steps, and the canvas committed after them."""
    chunk: int

    @property
    def tokens(self) -> int:
        return len(self.prompt) + sum(len(committed) for _, committed in self.blocks)


def script(engine: Engine, seed: int, prompt: int, chunk: int, blocks: int = 2, steps: int = 2) -> Script:
    random = np.random.default_rng(seed)

    def ids(count: int) -> NDArray[np.int64]:
        return random.integers(0, engine.facts.vocab_size, count)

    length = engine.facts.canvas_length
    made = [
        [
            Step(
                ids(length),
                float(random.uniform(0.3, 1.2)),
                random.random(length, np.float32),
                bool(random.random() < 0.5),
            )
            for _ in range(steps)
        ]
        for _ in range(blocks)
    ]
    return Script(ids(prompt), [(steps, ids(length)) for steps in made], chunk)


class Pages:
    """Pages at random places, other ones in sliding than in full layers; every sequence of a test gets its own."""

    def __init__(self, engine: Engine, seed: int) -> None:
        random, self._window = np.random.default_rng(seed), engine.facts.sliding_window
        self._sliding = iter(random.permutation(engine.pool.sliding_pages).tolist())
        self._full = iter(random.permutation(engine.pool.full_pages).tolist())

    def sequence(self, tokens: int) -> Callable[[int], Prefix]:
        """Where a sequence of so many tokens lies, for a row at `start`: of the sliding pages those in its window."""
        count = -(-tokens // PAGE)
        sliding, full = (tuple(itertools.islice(group, count)) for group in (self._sliding, self._full))

        def prefix(start: int) -> Prefix:
            first = max(0, start - self._window + 1) // PAGE
            return Prefix(sliding[first:], first * PAGE, full)

        return prefix


def calls(engine: Engine, script: Script, prefix: Callable[[int], Prefix], slot: int) -> Iterator[Readout | None]:
    """Run a script, one engine call at each `next`; yields a denoise call's readout."""

    def encode(token_ids: NDArray[np.int64], start: int) -> Iterator[None]:
        for at in range(0, len(token_ids), script.chunk):
            engine.encode([EncodeRow(token_ids[at : at + script.chunk], start + at, prefix(start + at))])
            yield

    yield from encode(script.prompt, 0)
    start = len(script.prompt)
    for steps, committed in script.blocks:
        for index, step in enumerate(steps):
            yield engine.denoise([denoise_row(step, start, prefix, slot, first_step=index == 0)])[0]
        yield from encode(committed, start)
        start += len(committed)


def denoise_row(
    step: Step, start: int, prefix: Callable[[int], Prefix], slot: int, first_step: bool = True
) -> DenoiseRow:
    return DenoiseRow(
        step.canvas, start, prefix(start), slot, first_step, step.temperature, step.uniform, step.guard_first
    )


def alone(engine: Engine, script: Script, slot: int = 0) -> list[Readout]:
    """Run a script with nothing beside it."""
    prefix = Pages(engine, seed=0).sequence(script.tokens)
    return [readout for readout in calls(engine, script, prefix, slot) if readout is not None]


class Oracle:
    """The same steps in PyTorch: the whole prefix in one encode row, one page that holds all of it."""

    def __init__(self, model: StepModel, end_token_ids: tuple[int, ...]) -> None:
        self._model, self._ends = model, torch.tensor(end_token_ids)
        self._dtype = model.embed_tokens.weight.dtype

    @torch.no_grad()
    def run(self, script: Script) -> list[StepOutputs]:
        outputs, prefix = [], script.prompt
        for steps, committed in script.blocks:
            pools, soft_embedding = self._encode(prefix), None
            for step in steps:
                outputs.append(self._step(step.canvas, len(prefix), True, pools, soft_embedding, self._readouts(step)))
                soft_embedding = outputs[-1].soft_embedding[0]
            prefix = np.concatenate((prefix, committed))
        return outputs

    def _encode(self, prefix: NDArray[np.int64]) -> tuple[list[Tensor], list[Tensor]]:
        nothing = [
            torch.zeros(1, len(prefix), layer.kv_heads, layer.head_dim, dtype=self._dtype)
            for layer in self._model.config.layers
        ]
        outputs = self._step(prefix, 0, False, (nothing, nothing), None, self._readouts(None, len(prefix)))
        return outputs.keys, outputs.values

    def _step(
        self,
        token_ids: NDArray[np.int64],
        start: int,
        denoise: bool,
        pools: tuple[list[Tensor], list[Tensor]],
        soft_embedding: Tensor | None,
        readouts: Readouts,
    ) -> StepOutputs:
        config = self._model.config
        rows = build_rows(config, torch.from_numpy(token_ids), start, denoise, torch.tensor([0]), soft_embedding)
        rows = rows._replace(self_conditioning=rows.self_conditioning.to(self._dtype))
        outputs: StepOutputs = self._model(rows, readouts, *pools)
        return outputs

    def _readouts(self, step: Step | None, length: int = 0) -> Readouts:
        if step is None:
            empty = torch.zeros(0, dtype=self._dtype)
            no_rows, no_guard = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool)
            return Readouts(no_rows, empty, torch.zeros(0, length, dtype=self._dtype), no_guard, self._ends)
        return Readouts(
            torch.tensor([0]),
            torch.tensor([step.temperature]),
            torch.from_numpy(step.uniform)[None],
            torch.tensor([step.guard_first]),
            self._ends,
        )


@pytest.fixture(scope="module")
def oracles(tiny_checkpoint: Path, tiny_bundle: Bundle) -> dict[torch.dtype, Oracle]:
    checkpoint, ends = open_checkpoint(tiny_checkpoint), tiny_bundle.manifest.generation.end_token_ids
    return {dtype: Oracle(load_model(checkpoint, dtype), ends) for dtype in (torch.float32, torch.float64)}


def assert_near(readouts: list[Readout], oracles: dict[torch.dtype, Oracle], script: Script) -> None:
    """Integers as in float64, entropies as near to it as rounding allows."""
    single, double = (oracles[dtype].run(script) for dtype in (torch.float32, torch.float64))
    assert len(readouts) == len(double)
    for got, near, true in zip(readouts, single, double, strict=True):
        np.testing.assert_array_equal(got.argmax_ids, true.argmax_ids[0])
        np.testing.assert_array_equal(got.candidate_ids, true.candidate_ids[0])
        rounding = (near.entropy.double() - true.entropy.double()).abs().max().item()
        bound = SLACK * rounding + BAND * true.entropy.abs().max().item()
        np.testing.assert_allclose(got.entropy, true.entropy[0], rtol=0, atol=bound)


def assert_same(readouts: list[Readout], others: list[Readout]) -> None:
    """Bit for bit."""
    for one, other in zip(readouts, others, strict=True):
        np.testing.assert_array_equal(one.argmax_ids, other.argmax_ids)
        np.testing.assert_array_equal(one.candidate_ids, other.candidate_ids)
        np.testing.assert_array_equal(one.entropy, other.entropy)


@pytest.mark.parametrize(
    ("prompt", "chunk"),
    [
        pytest.param(1, 64, id="one token: the smallest prefix, a canvas longer than it"),
        pytest.param(9, 64, id="as many tokens as a canvas sees of sliding layers"),
        pytest.param(10, 64, id="one more: the first falls out of the window"),
        pytest.param(37, 64, id="a prompt of several windows in one chunk"),
        pytest.param(37, 1, id="token by token: every chunk begins inside a window"),
        pytest.param(37, 4, id="chunks of a page"),
        pytest.param(37, 7, id="chunks that begin inside a page and are shorter than the window"),
        pytest.param(37, 12, id="chunks longer than the window"),
        pytest.param(64, 16, id="a prompt that ends with a page"),
    ],
)
def test_prefill_in_chunks_and_committed_canvases(
    engine: Engine, oracles: dict[torch.dtype, Oracle], prompt: int, chunk: int
) -> None:
    """Three canvases of two steps: chunks, pages and windows must not show in any of them."""
    work = script(engine, seed=prompt * 100 + chunk, prompt=prompt, chunk=chunk, blocks=3)
    assert_near(alone(engine, work), oracles, work)


def test_self_conditioning_reaches_the_next_step(engine: Engine, oracles: dict[torch.dtype, Oracle]) -> None:
    """Catches a slot that is not read or not written: the second step must depend on the first."""
    work = script(engine, seed=5, prompt=6, chunk=64, blocks=1)
    conditioned = alone(engine, work)
    steps, committed = work.blocks[0]
    [unconditioned] = alone(engine, Script(work.prompt, [(steps[1:], committed)], 64))
    assert_near(conditioned, oracles, work)
    assert not np.array_equal(conditioned[1].entropy, unconditioned.entropy)


@pytest.mark.parametrize("seed", range(4))
def test_a_row_does_not_depend_on_what_ran_before_or_beside_it(fresh: Callable[[], Engine], seed: int) -> None:
    """Requests interleaved at random, in shuffled pages and slots full of others' K/V: bit for bit as alone."""
    random = np.random.default_rng(seed)
    engine = fresh()
    works = [script(engine, seed * 10 + i, prompt=int(random.integers(1, 50)), chunk=7) for i in range(3)]
    litter = Pages(engine, seed=100 + seed)
    for slot in range(engine.pool.canvas_slots):
        list(calls(engine, script(engine, 1000 + slot, 170, chunk=16), litter.sequence(202), slot))
    slots, pages = random.permutation(engine.pool.canvas_slots), Pages(engine, seed)
    running = {i: calls(engine, work, pages.sequence(work.tokens), int(slots[i])) for i, work in enumerate(works)}
    beside: list[list[Readout]] = [[] for _ in works]
    while running:
        index = int(random.choice(list(running)))
        try:
            readout = next(running[index])
        except StopIteration:
            del running[index]
        else:
            beside[index] += [] if readout is None else [readout]
    for work, readouts in zip(works, beside, strict=True):
        untouched = fresh()
        assert_same(readouts, alone(untouched, work))
        untouched.close()
    engine.close()


def test_rows_of_one_call_are_independent(fresh: Callable[[], Engine]) -> None:
    """Two canvases with different prefixes, temperatures and steps in one call: bit for bit as one by one."""
    engine, rows = fresh(), []
    pages = Pages(engine, seed=1)
    for slot, prompt in enumerate((3, 29)):
        work = script(engine, slot, prompt=prompt, chunk=64)
        prefix = pages.sequence(work.tokens)
        engine.encode([EncodeRow(work.prompt, 0, prefix(0))])
        rows.append(denoise_row(work.blocks[0][0][0], prompt, prefix, slot))
    assert_same(engine.denoise(rows), [engine.denoise([row])[0] for row in rows])
    engine.close()


def test_the_guard_blocks_end_tokens_at_position_0_alone(
    engine: Engine, oracles: dict[torch.dtype, Oracle], tiny_bundle: Bundle
) -> None:
    """Where all uniform numbers draw an end token, the guard moves position 0 and leaves the others, bit for bit."""
    end = tiny_bundle.manifest.generation.end_token_ids[0]
    work = script(engine, seed=3, prompt=5, chunk=64, blocks=1, steps=1)
    canvas, committed = work.blocks[0][0][0].canvas, work.blocks[0][1]

    def readout(guard: bool, uniform: NDArray[np.float32]) -> Readout:
        step = Step(canvas, 1.0, uniform, guard)
        return alone(engine, Script(work.prompt, [([step], committed)], 64))[0]

    uniform = _uniform_that_draws(end, lambda u: readout(False, u).candidate_ids, len(canvas))
    unguarded, guarded = readout(False, uniform), readout(True, uniform)
    assert set(unguarded.candidate_ids) == {end}
    assert guarded.candidate_ids[0] not in tiny_bundle.manifest.generation.end_token_ids
    np.testing.assert_array_equal(guarded.candidate_ids[1:], unguarded.candidate_ids[1:])
    np.testing.assert_array_equal(guarded.entropy[1:], unguarded.entropy[1:])
    assert guarded.entropy[0] != unguarded.entropy[0]
    step = Step(canvas, 1.0, uniform, True)
    assert_near([guarded], oracles, Script(work.prompt, [([step], committed)], 64))


def _uniform_that_draws(
    token: int, candidates: Callable[[NDArray[np.float32]], NDArray[np.int64]], length: int
) -> NDArray[np.float32]:
    """Bisect each position's number until its candidate is `token`."""
    low, high = np.zeros(length, np.float32), np.ones(length, np.float32)
    for _ in range(24):
        middle = (low + high) / 2
        drawn = candidates(middle)
        low, high = np.where(drawn < token, middle, low), np.where(drawn > token, middle, high)
    return np.asarray((low + high) / 2, np.float32)
