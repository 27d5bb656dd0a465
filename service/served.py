"""What a server serves: the model's facts, its prompts, and the runner of its engine."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from diffusiongemma.v1 import generation_pb2, options_pb2
from runtime.bundle import GenerationDefaults, ModelFacts
from runtime.errors import DeadlineTooShort, InvalidRequest, ModelNotFound, UnsupportedRequest, Violation
from runtime.prompt import Message
from runtime.request import GenerationRequest, output_room
from runtime.runner import Handle, Runner
from service.mailbox import Mailbox
from service.mapping import draft_interval_of, messages_of, overrides_of


class Prompts(Protocol):
    """Renders and checks prompts; `runtime.prompt.PromptBuilder` is the one that serves."""

    def conversation(self, messages: Sequence[Message], field: str = ...) -> NDArray[np.int64]:
        """Token ids of a conversation, up to where the answer begins; errors name `field`."""

    def token_ids(self, ids: Sequence[int], field: str = ...) -> NDArray[np.int64]:
        """The ids, checked; errors name `field`."""


@dataclass(frozen=True)
class Order:
    """A request that was found good, as the runner takes it, and how often its drafts are wanted."""

    request: GenerationRequest
    draft_interval: float | None
    """Least seconds between two drafts; None: no drafts."""


@dataclass(frozen=True)
class Served:
    """The one model that a server serves."""

    facts: ModelFacts
    defaults: GenerationDefaults
    precision: str
    engine: str
    """What runs the graph, as clients are told."""
    prompts: Prompts
    runner: Runner
    min_draft_interval: float
    """Seconds; the floor of what a request may ask for."""
    max_message_bytes: int

    def check_model(self, name: str) -> None:
        """Raise `ModelNotFound` unless `name` is empty or the served model's."""
        if name not in ("", self.facts.name):
            raise ModelNotFound(name, self.facts.name)

    def prompt_ids(
        self, request: generation_pb2.GenerateRequest | generation_pb2.CountTokensRequest
    ) -> NDArray[np.int64]:
        """Token ids of a request's prompt.

        Raises:
            InvalidRequest, UnsupportedRequest: what is wrong with it.
        """
        match request.WhichOneof("prompt"):
            case "conversation":
                messages = messages_of(request.conversation.messages, "conversation.messages")
                return self.prompts.conversation(messages, field="conversation.messages")
            case "token_ids":
                return self.prompts.token_ids(request.token_ids.ids, field="token_ids.ids")
        raise InvalidRequest(Violation("prompt", "is missing; give conversation or token_ids"))

    def order(
        self, prompt_ids: NDArray[np.int64], options: options_pb2.GenerationOptions, field: str, options_field: str
    ) -> Order:
        """What to run for a prompt with these options.

        Raises:
            InvalidRequest: the prompt is too long (named `field`), or a setting is wrong (named below `options_field`).
        """
        room = output_room(self.facts, len(prompt_ids), field)
        with below(options_field):
            interval = draft_interval_of(options, self.min_draft_interval)
            sampling = overrides_of(options).resolve(self.defaults, room)
        return Order(GenerationRequest(self.facts.name, prompt_ids, sampling, interval is not None), interval)

    @asynccontextmanager
    async def running(self, order: Order, time_remaining: float | None) -> AsyncIterator[tuple[Mailbox, Handle]]:
        """Submits the order for the time of the block; however the block is left, the engine is free a step later.

        Args:
            order: what to run.
            time_remaining: seconds until the call's deadline; None where it has none.

        Raises:
            QueueFull, Draining, DeadlineTooShort, InvalidRequest: it cannot be run.
        """
        mailbox = Mailbox(order.draft_interval)
        handle = self.runner.submit(order.request, mailbox, _deadline(time_remaining))
        try:
            yield mailbox, handle
        finally:
            handle.cancel()


@contextmanager
def below(field: str) -> Iterator[None]:
    """Names the fields of errors that are raised inside as parts of `field`."""
    try:
        yield
    except InvalidRequest as error:
        moved = (Violation(f"{field}.{violation.field}", violation.description) for violation in error.violations)
        raise InvalidRequest(*moved) from error
    except UnsupportedRequest as error:
        raise UnsupportedRequest(f"{field}.{error.field}", error.description) from error


def _deadline(time_remaining: float | None) -> float | None:
    """The deadline on the monotonic clock."""
    if time_remaining is None:
        return None
    if time_remaining <= 0:
        raise DeadlineTooShort("the deadline passed before the request could be queued; set a later one")
    return time.monotonic() + time_remaining
