"""A scripted engine without weights, for tests of everything above an engine.

Its K/V pool holds the token ids themselves, so it answers from what the caller's page tables really lead to, and every
stale, missing or shared page is an `EngineMisuse` instead of a slightly different answer.
"""

from __future__ import annotations

import random
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import LayerFacts, ModelFacts
from runtime.engines.protocol import DenoiseRow, EncodeRow, EngineOutOfMemory, PoolGeometry, Prefix, Readout

Answer = Callable[[tuple[int, ...]], Sequence[int]]
"""The whole answer to a prompt, as token ids without the end token."""
Call = Literal["encode", "denoise"]
Row = TypeVar("Row", EncodeRow, DenoiseRow)

FACTS = ModelFacts(
    name="fake",
    vocab_size=512,
    hidden_size=8,
    canvas_length=32,
    sliding_window=64,
    max_position=4096,
    layers=(LayerFacts(sliding=True, kv_heads=1, head_dim=4), LayerFacts(sliding=False, kv_heads=1, head_dim=4)),
)
"""A model for tests that care for none in particular."""

POOL = PoolGeometry(page_size=16, sliding_pages=128, full_pages=512, canvas_slots=8)

REMEMBERED_ROWS = 10_000

_NEVER_WRITTEN = -1


class EngineMisuse(AssertionError):
    """The caller broke the engine's protocol: a page or slot does not hold what the row says."""


class InjectedFault(RuntimeError):
    """What a call raises that `Faults` chose to fail."""


@dataclass(frozen=True)
class Faults:
    """What goes wrong, for tests of who survives it; drawn anew for every call."""

    seed: int = 0
    error_rate: float = 0.0
    """Share of the calls that raise `InjectedFault`, with half of their rows' work done."""
    shortage_rate: float = 0.0
    """Share of the calls that raise `EngineOutOfMemory`."""
    most_rows: int | None = None
    """Calls of more rows than this raise `EngineOutOfMemory`."""


class Gate:
    """Holds the engine before one call until it is released; as a context manager it releases on leaving."""

    def __init__(self) -> None:
        self._reached, self._released = threading.Event(), threading.Event()

    def wait_reached(self, timeout: float = 30.0) -> None:
        """Wait until the engine stands at this gate.

        Raises:
            TimeoutError: it did not come within `timeout` seconds.
        """
        if not self._reached.wait(timeout):
            raise TimeoutError(f"the engine did not reach the gate within {timeout} s")

    def release(self) -> None:
        """Let the engine go on."""
        self._released.set()

    def __enter__(self) -> Gate:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __call__(self) -> None:
        self._reached.set()
        self._released.wait()


@dataclass
class _Canvas:
    """What a slot remembers of the canvas that is being denoised in it."""

    full_pages: tuple[int, ...]
    start: int
    step: int


class FakeEngine:
    """Denoises every canvas to the scripted answer in `steps` steps.

    At step `k` of `steps` the first `k / steps` of the positions show the answer with entropy 0, the others noise with
    entropy 1 nat; from step `steps` on, all of them show it. With a stability threshold of 1 the loop thus stops at
    step `steps + 1`. Past the answer a canvas holds one end token and then padding (id 0).
    """

    def __init__(
        self,
        facts: ModelFacts = FACTS,
        pool: PoolGeometry = POOL,
        *,
        answer: Answer | None = None,
        answers: Mapping[tuple[int, ...], Sequence[int]] | None = None,
        steps: int = 3,
        end_token_id: int = 1,
        faults: Faults | None = None,
    ) -> None:
        """Make an engine for `facts`.

        Args:
            facts: the model to pretend to be.
            pool: sizes of its memory.
            answer: the answer to any prompt that `answers` does not hold; `None` repeats the prompt's ordinary tokens.
            answers: answers by prompt.
            steps: steps to convergence, at least 1.
            end_token_id: ends an answer.
            faults: what goes wrong; nothing by default.
        """
        self.facts, self.pool = facts, pool
        self.calls: Counter[Call] = Counter()
        """Calls begun, by kind."""
        self.rows: list[EncodeRow | DenoiseRow] = []
        """The newest rows of all calls, in order."""
        self.closed = False
        self._answer, self._answers = answer or self._echo, dict(answers or {})
        self._steps, self._end_token_id = steps, end_token_id
        self._faults = faults or Faults()
        self._chance = random.Random(self._faults.seed)
        self._before: dict[tuple[Call, int], list[Callable[[], None]]] = defaultdict(list)
        self._sliding, self._full = _TokenPool(pool.sliding_pages, pool), _TokenPool(pool.full_pages, pool)
        self._canvases: dict[int, _Canvas] = {}

    def hold(self, kind: Call, call: int) -> Gate:
        """A gate before the `call`-th encode or denoise call of this engine, counted from 1."""
        gate = Gate()
        self.before(kind, call, gate)
        return gate

    def fail(self, kind: Call, call: int, error: Exception) -> None:
        """Raise `error` at the `call`-th encode or denoise call, counted from 1."""

        def fail() -> None:
            raise error

        self.before(kind, call, fail)

    def before(self, kind: Call, call: int, action: Callable[[], None]) -> None:
        """Run `action` on the engine's thread before the `call`-th encode or denoise call, counted from 1."""
        self._before[kind, call].append(action)

    def encode(self, rows: Sequence[EncodeRow]) -> None:
        """Write the rows' tokens into the pool."""
        for row in self._begin("encode", rows):
            self._prefix_tokens(row.prefix, row.start)
            self._full.write(row.prefix.full_pages, 0, row.start, row.token_ids)
            self._sliding.write(row.prefix.sliding_pages, row.prefix.sliding_base, row.start, row.token_ids)

    def denoise(self, rows: Sequence[DenoiseRow]) -> list[Readout]:
        """One step towards the scripted answer for each canvas."""
        return [self._readout(row) for row in self._begin("denoise", rows)]

    def close(self) -> None:
        """Refuse further calls."""
        self.closed = True

    def _begin(self, kind: Call, rows: Sequence[Row]) -> Iterator[Row]:
        """The rows one by one, as far as nothing goes wrong."""
        if self.closed:
            raise EngineMisuse(f"{kind} after close")
        self.calls[kind] += 1
        self.rows.extend(rows)
        del self.rows[:-REMEMBERED_ROWS]
        for action in self._before.pop((kind, self.calls[kind]), ()):
            action()
        faults = self._faults
        if self._chance.random() < faults.shortage_rate or len(rows) > (faults.most_rows or len(rows)):
            raise EngineOutOfMemory(f"{len(rows)} rows do not fit")
        fails = self._chance.random() < faults.error_rate
        yield from rows[: len(rows) // 2 if fails else len(rows)]
        if fails:
            raise InjectedFault(f"{kind} call {self.calls[kind]}")

    def _readout(self, row: DenoiseRow) -> Readout:
        prefix = self._prefix_tokens(row.prefix, row.start)
        step = self._step_of(row)
        prompt_length = row.start - row.block_index * self.facts.canvas_length
        block = self._block(tuple(prefix[:prompt_length].tolist()), row.start - prompt_length)
        noise = np.floor(row.uniform * self.facts.vocab_size).astype(np.int64)
        shown = np.arange(len(block)) * self._steps < step * len(block)
        ids = np.where(shown, block, noise)
        return Readout(ids, ids.copy(), np.where(shown, 0.0, 1.0).astype(np.float32))

    def _step_of(self, row: DenoiseRow) -> int:
        if not 0 <= row.slot < self.pool.canvas_slots:
            raise EngineMisuse(f"slot {row.slot} of {self.pool.canvas_slots}")
        if len(row.canvas) != self.facts.canvas_length or len(row.uniform) != self.facts.canvas_length:
            raise EngineMisuse(f"canvas of {len(row.canvas)} with {len(row.uniform)} uniform numbers")
        if row.first_step:
            self._canvases[row.slot] = _Canvas(row.prefix.full_pages, row.start, 0)
        canvas = self._canvases.get(row.slot)
        if canvas is None or (canvas.full_pages, canvas.start) != (row.prefix.full_pages, row.start):
            raise EngineMisuse(f"slot {row.slot} holds {canvas}, not the canvas at {row.start}")
        canvas.step += 1
        return canvas.step

    def _block(self, prompt: tuple[int, ...], offset: int) -> NDArray[np.int64]:
        answer = self._answers.get(prompt)
        answer = list(self._answer(prompt) if answer is None else answer)
        rest = [*answer, self._end_token_id][offset : offset + self.facts.canvas_length]
        block = np.zeros(self.facts.canvas_length, np.int64)
        block[: len(rest)] = rest
        return block

    def _echo(self, prompt: tuple[int, ...]) -> Sequence[int]:
        return [token for token in prompt if token > max(2, self._end_token_id)]

    def _prefix_tokens(self, prefix: Prefix, start: int) -> NDArray[np.int64]:
        """The prefix' tokens `[start]`, after checking that both page groups hold them."""
        tokens = self._full.read(prefix.full_pages, 0, 0, start)
        visible = max(0, start - (self.facts.sliding_window - 1))
        windowed = self._sliding.read(prefix.sliding_pages, prefix.sliding_base, visible, start)
        if not np.array_equal(windowed, tokens[visible:]):
            raise EngineMisuse(f"sliding and full pages differ over positions {visible} to {start}")
        return tokens


class _TokenPool:
    """Pages that hold, instead of K/V, each token's id and position."""

    def __init__(self, pages: int, geometry: PoolGeometry) -> None:
        self._page_size = geometry.page_size
        self._ids = np.full((pages, geometry.page_size), _NEVER_WRITTEN, np.int64)
        self._positions = np.full((pages, geometry.page_size), _NEVER_WRITTEN, np.int64)

    def write(self, pages: Sequence[int], base: int, start: int, token_ids: NDArray[np.int64]) -> None:
        where = self._where(pages, base, start, start + len(token_ids))
        self._ids[where] = token_ids
        self._positions[where] = np.arange(start, start + len(token_ids))

    def read(self, pages: Sequence[int], base: int, start: int, end: int) -> NDArray[np.int64]:
        where = self._where(pages, base, start, end)
        if not np.array_equal(self._positions[where], np.arange(start, end)):
            raise EngineMisuse(f"pages {tuple(pages)} hold other positions than {start} to {end}")
        ids: NDArray[np.int64] = self._ids[where]
        return ids

    def _where(self, pages: Sequence[int], base: int, start: int, end: int) -> tuple[NDArray[np.int64], ...]:
        slots = np.arange(start - base, end - base)
        if base % self._page_size or (len(slots) and (slots[0] < 0 or slots[-1] >= len(pages) * self._page_size)):
            raise EngineMisuse(f"{len(pages)} pages from position {base} do not cover {start} to {end}")
        table = np.asarray(pages, np.int64)
        if len(table) and not (table.min() >= 0 and table.max() < len(self._ids)):
            raise EngineMisuse(f"pages {tuple(pages)} of a pool of {len(self._ids)}")
        return table[slots // self._page_size], slots % self._page_size
