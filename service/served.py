"""What a server serves: the model's facts, its prompts, and the runner of its engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from diffusiongemma.v1 import generation_pb2, options_pb2
from runtime.bundle import GenerationDefaults, ModelFacts
from runtime.errors import InvalidRequest, ModelNotFound, UnsupportedRequest, Violation
from runtime.prompt import Message
from runtime.request import GenerationRequest, output_room
from runtime.runner import Runner
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

    def check_options(self, options: options_pb2.GenerationOptions, field: str) -> None:
        """Look whether the options could serve the shortest of prompts.

        Raises:
            InvalidRequest: a setting is wrong; named below `field`.
        """
        with below(field):
            draft_interval_of(options, self.min_draft_interval)
            overrides_of(options).resolve(self.defaults, output_room(self.facts, prompt_tokens=1))

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
