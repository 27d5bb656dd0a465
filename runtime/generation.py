"""One request from prompt to answer: which call of the engine it needs next, and what each result means.

No threads, clocks, pages or slots: whoever runs the engine hands in its results and how long they took.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import GenerationDefaults, ModelFacts
from runtime.diffusion import CanvasDiffusion, DenoisingStep
from runtime.engines.protocol import ENCODE_CHUNK, Readout
from runtime.errors import InvalidRequest, Violation
from runtime.events import Committed, Draft, Event, Finished, FinishReason, Started, Usage
from runtime.random import CanvasStream
from runtime.request import GenerationRequest
from runtime.text import AnswerText
from runtime.vocabulary import Vocabulary


@dataclass(frozen=True)
class Encode:
    """Tokens whose K/V must be in the pool before anything else: a prompt chunk or a committed canvas."""

    token_ids: NDArray[np.int64]
    """`[S <= chunk]`."""
    start: int
    """Absolute position of the first of them."""


@dataclass(frozen=True)
class Denoise:
    """One denoising step of the open canvas; the fields are those of `DenoiseRow`, less prefix and slot."""

    canvas: NDArray[np.int64]
    start: int
    first_step: bool
    temperature: float
    uniform: NDArray[np.float32]
    guard_first: bool
    block_index: int


class Generation:
    """The state of one request.

    `start` once, then until `finished`: run `next_call` on the engine and hand the result to `encoded` or `denoised`.
    The prompt is encoded in chunks; then canvas after canvas is denoised, committed and, unless it was the last one,
    encoded as it was committed: whole, with what stands behind a cut. What was committed for an earlier stream of the
    same request is encoded behind the prompt in the same pieces, so that the answer goes on as that stream would have.
    """

    def __init__(
        self,
        request: GenerationRequest,
        facts: ModelFacts,
        defaults: GenerationDefaults,
        vocabulary: Vocabulary,
        chunk: int = ENCODE_CHUNK,
    ) -> None:
        self.request, self._facts, self._chunk = request, facts, chunk
        self._end_token_ids = np.array(defaults.end_token_ids, dtype=np.int64)
        self._answer = AnswerText(vocabulary, request.sampling.stop_strings)
        self._pieces = [request.prompt_ids]
        """Prompt and committed canvases: no encode call spans two of them."""
        self._piece = self._done = self._position = 0
        """Which piece is being encoded, how many of its tokens are, and how many tokens are in all."""
        self._blocks = self._output_tokens = self._denoising_steps = 0
        self._shared_tokens = 0
        self.made_tokens = 0
        """Tokens made for this stream so far: those committed, and those of the open block as it stands."""
        self._queue_seconds = self._prefill_seconds = self._denoise_seconds = 0.0
        self._take_over(request.committed_ids)
        self._resumed_tokens = self._output_tokens
        self._canvas = self._new_canvas()
        self.finished = False
        """True once a Finished event was handed out."""

    @property
    def total_positions(self) -> int:
        """Positions that prompt and answer may come to occupy: an answer is whole canvases."""
        length = self._facts.canvas_length
        return len(self.request.prompt_ids) + -(-self.request.sampling.max_output_tokens // length) * length

    def start(self, queue_seconds: float) -> list[Event]:
        """The request was admitted, `queue_seconds` after it had come."""
        self._queue_seconds = queue_seconds
        facts, request = self._facts, self.request
        return [Started(request.model, request.sampling, facts.canvas_length, len(request.prompt_ids))]

    @property
    def encode_tokens(self) -> int:
        """Tokens of the `Encode` call that this request needs now; 0 where it needs a `Denoise` call."""
        return min(self._chunk, len(self._rest())) if self._piece < len(self._pieces) else 0

    @property
    def prompt_position(self) -> int | None:
        """How many of the prompt's tokens are encoded; None once all are."""
        return self._position if self._piece == 0 else None

    def next_call(self) -> Encode | Denoise:
        """The call of the engine that this request needs now; the same until its result is handed in."""
        assert not self.finished
        if self.encode_tokens:
            return Encode(self._rest()[: self._chunk], self._position)
        canvas = self._canvas
        guard = self.request.sampling.end_token_guard and self._blocks == 0
        return Denoise(
            canvas.canvas,
            self._position,
            canvas.steps_made == 0,
            canvas.temperature,
            canvas.uniform,
            guard,
            self._blocks,
        )

    def encoded(self, seconds: float) -> list[Event]:
        """The `Encode` call is done; `seconds` is how long it took."""
        if self._piece:
            self._denoise_seconds += seconds
        else:
            self._prefill_seconds += seconds
        self._pass(self.encode_tokens)
        return []

    def skip_to(self, position: int) -> None:
        """The prompt's first `position` tokens are in the pool already; not less than are encoded."""
        assert self._piece == 0
        assert self._position <= position <= len(self.request.prompt_ids)
        self._shared_tokens += position - self._position
        self._pass(position - self._position)

    def rewind(self) -> None:
        """What was encoded is lost: begin again with the prompt, keep what is committed, denoise the open canvas anew.

        The answer stays the same, since the same pieces are encoded and the canvas draws the same numbers again.
        """
        self._piece = self._done = self._position = self._shared_tokens = 0
        self._denoising_steps -= self._canvas.steps_made
        self._canvas = self._new_canvas()
        self.made_tokens = self._output_tokens - self._resumed_tokens

    def denoised(self, readout: Readout, seconds: float, draft: bool) -> list[Event]:
        """The `Denoise` call is done; `seconds` is how long it took, `draft` asks for a Draft among the events."""
        self._denoise_seconds += seconds
        self._denoising_steps += 1
        step = self._canvas.advance(readout)
        open_ids, _ = self._cut(readout.argmax_ids)
        events: list[Event] = [self._draft(step, readout, open_ids)] if draft else []
        if self._canvas.finished:
            events, open_ids = events + self._commit(), open_ids[:0]
        self.made_tokens = self._output_tokens - self._resumed_tokens + len(open_ids)
        return events

    def _rest(self) -> NDArray[np.int64]:
        return self._pieces[self._piece][self._done :]

    def _pass(self, count: int) -> None:
        """Count tokens as encoded."""
        self._position += count
        self._done += count
        if self._done == len(self._pieces[self._piece]):
            self._piece, self._done = self._piece + 1, 0

    def _take_over(self, committed_ids: NDArray[np.int64]) -> None:
        """Go on behind the canvases that an earlier stream of this request has told."""
        length = self._facts.canvas_length
        if len(committed_ids) % length:
            description = f"holds {len(committed_ids)} tokens; give whole blocks of {length}"
            raise InvalidRequest(Violation("committed_ids", description))
        for canvas in committed_ids.reshape(-1, length):
            _, reason = self._cut(canvas)
            if reason is not None or self._answer.append(canvas, last=False).stop_string is not None:
                description = f"ends the answer in block {self._blocks}; nothing is left to generate"
                raise InvalidRequest(Violation("committed_ids", description))
            self._pieces.append(canvas)
            self._blocks += 1
            self._output_tokens += length

    def _draft(self, step: DenoisingStep, readout: Readout, token_ids: NDArray[np.int64]) -> Draft:
        preview = self._answer.preview(token_ids)
        return Draft(
            block_index=self._blocks,
            step=step.number,
            token_ids=token_ids,
            text=preview.text,
            token_text_lengths=preview.token_lengths,
            accepted=step.accepted,
            entropy=readout.entropy,
            temperature=step.temperature,
        )

    def _commit(self) -> list[Event]:
        canvas = self._canvas
        token_ids, reason = self._cut(canvas.argmax)
        added = self._answer.append(token_ids, last=reason is not None)
        if added.stop_string is not None:
            token_ids, reason = token_ids[: added.token_count], FinishReason.STOP_STRING
        committed = Committed(self._blocks, token_ids, added.text, canvas.steps_made, canvas.converged)
        self._blocks += 1
        self._output_tokens += len(token_ids)
        if reason is not None:
            self.finished = True
            return [committed, Finished(reason, added.stop_string, self._usage())]
        self._pieces.append(canvas.argmax)
        self._canvas = self._new_canvas()
        return [committed]

    def _cut(self, canvas: NDArray[np.int64]) -> tuple[NDArray[np.int64], FinishReason | None]:
        """The canvas up to its first end token and to the most tokens allowed, and which of the two ends the answer."""
        # Not `isin`, which takes 14 us where this takes 3.
        [ends] = (canvas == self._end_token_ids[:, None]).any(axis=0).nonzero()
        room = self.request.sampling.max_output_tokens - self._output_tokens
        if len(ends) and ends[0] <= room:
            return canvas[: ends[0]], FinishReason.END_TOKEN
        return canvas[:room], FinishReason.LENGTH if room <= len(canvas) else None

    def _new_canvas(self) -> CanvasDiffusion:
        sampling, facts = self.request.sampling, self._facts
        return CanvasDiffusion(
            sampling, CanvasStream(sampling.seed, self._blocks, facts.canvas_length), facts.vocab_size
        )

    def _usage(self) -> Usage:
        return Usage(
            prompt_tokens=len(self.request.prompt_ids),
            output_tokens=self._output_tokens,
            blocks=self._blocks,
            denoising_steps=self._denoising_steps,
            queue_seconds=self._queue_seconds,
            prefill_seconds=self._prefill_seconds,
            denoise_seconds=self._denoise_seconds,
            shared_tokens=self._shared_tokens,
        )
