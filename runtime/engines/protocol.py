"""What the runtime asks of an engine: encode rows into the K/V pool, denoise canvases against it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import ModelFacts

ENCODE_CHUNK = 256
"""Tokens: a canvas' worth, so that a chunk of a long prompt delays open canvases by about one step."""


class EngineOutOfMemory(Exception):
    """A call did not fit; the canvas slots are as they were before it, so it can be repeated in smaller parts."""


@dataclass(frozen=True)
class PoolGeometry:
    """Sizes of the engine's memory and of its calls; pages of sliding and of full layers are counted apart."""

    page_size: int
    """Tokens a page."""
    sliding_pages: int
    full_pages: int
    canvas_slots: int
    """Canvases whose self-conditioning state the engine can hold at a time."""
    rows_per_call: int = 8
    """Most rows of one call."""
    encode_chunk: int = ENCODE_CHUNK
    """Most tokens of an encode row; prompts are cut at its multiples."""
    prefix_step: int | None = None
    """Prefixes are shared at multiples of this many tokens, itself one of the page size.

    None: the least that both chunk and page divide. A shared prefix' K/V are then, bit for bit, those that a request
    would have computed itself. An engine whose results depend on a call's other rows anyway may take the page size.
    """


@dataclass(frozen=True)
class Prefix:
    """Where a row's prefix lies in the pool."""

    sliding_pages: tuple[int, ...]
    sliding_base: int
    """Absolute position of the first slot of `sliding_pages[0]`, a multiple of the page size."""
    full_pages: tuple[int, ...]
    """From position 0."""


@dataclass(frozen=True)
class EncodeRow:
    """A prompt chunk or a committed canvas: its K/V are written to the pool at positions `start ...`."""

    token_ids: NDArray[np.int64]
    """`[S]`."""
    start: int
    """Absolute position of the first token; everything before it is in the pool already."""
    prefix: Prefix
    """Pages of the prefix and of the row itself."""


@dataclass(frozen=True)
class DenoiseRow:
    """One canvas at one denoising step."""

    canvas: NDArray[np.int64]
    """`[canvas_length]`."""
    start: int
    prefix: Prefix
    slot: int
    """Which self-conditioning state belongs to the canvas."""
    first_step: bool
    """True where there is no previous step to condition on."""
    temperature: float
    uniform: NDArray[np.float32]
    """`[canvas_length]` in `[0, 1)`, for the candidates."""
    guard_first: bool = False
    """Position 0 must not hold an end token."""
    block_index: int = 0
    """Which canvas of its answer this is, from 0."""


@dataclass(frozen=True)
class Readout:
    """What a denoising step says of each canvas position, `[canvas_length]` each."""

    argmax_ids: NDArray[np.int64]
    candidate_ids: NDArray[np.int64]
    entropy: NDArray[np.float32]
    """Nats."""


class Engine(Protocol):
    """Runs the step graph; not thread-safe: one thread calls it.

    The rows of a call belong to different requests: they read nothing that another one writes, and each has its own
    slot. A call that does not fit raises `EngineOutOfMemory`; any other exception ends the requests of its rows.
    """

    facts: ModelFacts
    pool: PoolGeometry

    def encode(self, rows: Sequence[EncodeRow]) -> None:
        """Encode the rows and write their K/V into the pool."""

    def denoise(self, rows: Sequence[DenoiseRow]) -> list[Readout]:
        """Run one denoising step of each canvas; keeps each canvas' next self-conditioning in its slot."""

    def close(self) -> None:
        """Free all memory; the engine is not used afterwards."""
