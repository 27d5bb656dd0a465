"""What a generation tells its caller: `started (draft* committed)* finished`.

A draft replaces the open block's earlier drafts, a commit appends; the commits' texts concatenated are the answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from runtime.request import SamplingParameters


class FinishReason(Enum):
    """Why a generation ended well."""

    END_TOKEN = "end_token"
    STOP_STRING = "stop_string"
    LENGTH = "length"
    OTHER = "other"
    """One that this version does not know: only a client of a newer server meets it."""


@dataclass(frozen=True)
class Started:
    """The request was admitted; echoes what is in force, so that a run can be repeated."""

    model: str
    sampling: SamplingParameters
    canvas_length: int
    prompt_token_count: int


@dataclass(frozen=True)
class Draft:
    """The open block after a denoising step."""

    block_index: int
    step: int
    """Of this block, from 1."""
    token_ids: NDArray[np.int64]
    """The argmax canvas up to its first end token, `[n <= canvas_length]`."""
    text: str
    """These tokens' text for display, cut at a stop string; an incomplete UTF-8 sequence shows as U+FFFD."""
    token_text_lengths: tuple[int, ...]
    """Characters that each of the tokens adds to `text`, `n` of them."""
    accepted: NDArray[np.bool_]
    """Positions accepted at this step, `[canvas_length]`."""
    entropy: NDArray[np.float32]
    """Nats, `[canvas_length]`."""
    temperature: float


@dataclass(frozen=True)
class Committed:
    """A block is final."""

    block_index: int
    token_ids: NDArray[np.int64]
    """Committed tokens, without padding and without the end token, `[n <= canvas_length]`."""
    text: str
    """What the block adds to the answer; incomplete UTF-8 and the possible head of a stop string are held back."""
    step_count: int
    converged: bool
    """False where the block ran to the most steps allowed."""


@dataclass(frozen=True)
class Usage:
    """Totals of a generation."""

    prompt_tokens: int
    output_tokens: int
    blocks: int
    denoising_steps: int
    queue_seconds: float
    prefill_seconds: float
    denoise_seconds: float
    shared_tokens: int = 0
    """Prompt tokens that were in the pool already, encoded for another request."""


@dataclass(frozen=True)
class Finished:
    """The generation ended well."""

    reason: FinishReason
    stop_string: str | None
    usage: Usage


Event = Started | Draft | Committed | Finished
