"""Engine calls: rows that do not fit together are tried in halves, and an engine that keeps failing is noticed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from runtime.engines.protocol import DenoiseRow, EncodeRow, Engine, EngineOutOfMemory, Readout

Row = TypeVar("Row")
Result = TypeVar("Result")

SUSPECT_AFTER = 2
"""Failed calls in a row after which the engine is taken to be broken, not its rows: one row can be at fault once, then
it is gone."""
RECOVERY = 256
"""Calls without a shortage of memory after which twice as many rows are tried again."""


@dataclass(frozen=True)
class Answer(Generic[Result]):
    """What became of one row: a result, or the error that its call ended with."""

    seconds: float
    """How long the row's call took."""
    result: Result | None = None
    error: Exception | None = None


class EngineCalls:
    """Calls one engine, and knows how it is."""

    def __init__(self, engine: Engine, clock: Callable[[], float], most_rows: int) -> None:
        """Never more than `most_rows` rows a call."""
        self._engine, self._clock, self._most_rows = engine, clock, most_rows
        self.rows = most_rows
        """Rows that a call may have now: fewer while memory is short."""
        self._failures = self._calls_without_shortage = 0
        self._began: float | None = None
        self._closed = False

    @property
    def suspect(self) -> bool:
        """Whether the engine itself seems to be broken."""
        return self._failures >= SUSPECT_AFTER

    @property
    def seconds_in_call(self) -> float:
        """How long the call in progress, or the engine's replacement, has taken; else 0. Read from any thread."""
        began = self._began
        return 0.0 if began is None else max(0.0, self._clock() - began)

    def replace(self, build: Callable[[], Engine]) -> None:
        """Close the engine and go on with the one that `build` makes, of the same sizes."""
        self._began = self._clock()
        self.close()
        self._engine, self._closed, self._failures = build(), False, 0
        self._began = None

    def close(self) -> None:
        """Close the engine, once."""
        if not self._closed:
            self._closed = True
            self._engine.close()

    def encode(self, rows: Sequence[EncodeRow]) -> list[Answer[None]]:
        """Encode the rows; one answer a row."""

        def encode(part: Sequence[EncodeRow]) -> Sequence[None]:
            self._engine.encode(part)
            return [None] * len(part)

        return self._run(encode, rows)

    def denoise(self, rows: Sequence[DenoiseRow]) -> list[Answer[Readout]]:
        """One denoising step of each canvas; one answer a row."""
        return self._run(self._engine.denoise, rows)

    def _run(self, call: Callable[[Sequence[Row]], Sequence[Result]], rows: Sequence[Row]) -> list[Answer[Result]]:
        self._began = began = self._clock()
        try:
            results = call(rows)
        except EngineOutOfMemory as error:
            self._calls_without_shortage = 0
            if len(rows) == 1:
                # An engine's memory is laid out for one row of any length: where none fits, some of it has been lost.
                self._failures += 1
                return [Answer(self._clock() - began, error=error)]
        except Exception as error:
            self._failures += 1
            return [Answer(self._clock() - began, error=error) for _ in rows]
        else:
            self._went_well()
            return [Answer(self._clock() - began, result) for result in results]
        finally:
            self._began = None
        half = len(rows) // 2
        self.rows = min(self.rows, max(half, len(rows) - half))
        return self._run(call, rows[:half]) + self._run(call, rows[half:])

    def _went_well(self) -> None:
        self._failures = 0
        self._calls_without_shortage += 1
        if self._calls_without_shortage >= RECOVERY and self.rows < self._most_rows:
            self.rows = min(self._most_rows, 2 * self.rows)
            self._calls_without_shortage = 0
