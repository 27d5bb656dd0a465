"""A submitted request as the engine's thread works on it: its state machine and where its outcomes go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from runtime.calls import Answer, EngineCalls
from runtime.engines.protocol import DenoiseRow, EncodeRow, Readout
from runtime.errors import DgemmaError
from runtime.events import Event
from runtime.generation import Denoise, Encode, Generation
from runtime.ticket import Ticket

Outcome = Event | DgemmaError
"""What a request's sink is given: events, and at most one error, which is then the last thing it gets."""


class Sink(Protocol):
    """Where a request's outcomes go. Called on the engine's thread: must neither block nor raise."""

    def put(self, outcome: Outcome) -> None:
        """Take the next outcome; `Finished` or an error is the last."""

    def wants_draft(self) -> bool:
        """Whether the step about to run should make a draft; asked only of requests with drafts."""

    def ready(self) -> bool:
        """False parks the request between two steps while others go on; see `Handle.wake`.

        It keeps its pages for `Limits.park_seconds`, unless others need them. Then it gives them back, and is encoded
        anew once its sink has caught up and its turn has come: nothing that was committed is lost, and its answer stays
        the same.
        """

    def caught_up(self) -> bool:
        """Whether a request that has given its pages back should be encoded anew: not for the next step alone."""


@dataclass(frozen=True)
class Prepared:
    """A request that can be queued, once, without more ado; see `Runner.prepare`."""

    generation: Generation
    digests: tuple[bytes, ...]
    """Of the prompt's pages; see `PagePool.digests`."""


@dataclass
class Job:
    """One request."""

    generation: Generation
    sink: Sink
    started: bool = False
    """Whether it has been told so."""

    def need(self) -> int | None:
        """Tokens to encode, 0 for a denoising step, None where its reader is not ready; see `Turns.choose`."""
        return self.generation.encode_tokens if self.sink.ready() else None


def share_prefix(ticket: Ticket[Job]) -> None:
    """Skip what others have encoded of the prompt."""
    generation = ticket.work.generation
    position = generation.prompt_position
    if position is not None:
        generation.skip_to(ticket.pages.share(position))


def run(tickets: list[Ticket[Job]], calls: EngineCalls) -> list[list[Event] | Exception]:
    """Make the one call that all these requests need next; of each the events, or what ended it."""
    wanted = [(ticket, ticket.work.generation.next_call()) for ticket in tickets]
    encodes = [_encode_row(ticket, call) for ticket, call in wanted if isinstance(call, Encode)]
    if encodes:
        assert len(encodes) == len(tickets), "a call is of one kind"
        done = calls.encode(encodes)
        return [_encoded(*each) for each in zip(tickets, encodes, done, strict=True)]
    steps = [_denoise_row(ticket, call) for ticket, call in wanted if isinstance(call, Denoise)]
    return [_denoised(*each) for each in zip(tickets, calls.denoise(steps), strict=True)]


def _encode_row(ticket: Ticket[Job], call: Encode) -> EncodeRow:
    prefix = ticket.pages.cover(call.start, call.start + len(call.token_ids))
    return EncodeRow(call.token_ids, call.start, prefix)


def _denoise_row(ticket: Ticket[Job], call: Denoise) -> DenoiseRow:
    return DenoiseRow(
        canvas=call.canvas,
        start=call.start,
        prefix=ticket.pages.cover(call.start, call.start),
        slot=ticket.slot,
        first_step=call.first_step,
        temperature=call.temperature,
        uniform=call.uniform,
        guard_first=call.guard_first,
        block_index=call.block_index,
    )


def _encoded(ticket: Ticket[Job], row: EncodeRow, answer: Answer[None]) -> list[Event] | Exception:
    if answer.error is not None:
        return answer.error
    # Only now: what a failed call wrote must not be found by others.
    ticket.pages.record(row.start + len(row.token_ids))
    return ticket.work.generation.encoded(answer.seconds)


def _denoised(ticket: Ticket[Job], answer: Answer[Readout]) -> list[Event] | Exception:
    if answer.result is None:
        assert answer.error is not None
        return answer.error
    job = ticket.work
    try:
        draft = job.generation.request.drafts and job.sink.wants_draft()
        return job.generation.denoised(answer.result, answer.seconds, draft)
    except Exception as error:
        return error
