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
from runtime.job import Prepared
from runtime.prompt import Message
from runtime.request import GenerationRequest, output_room
from runtime.runner import Runner
from runtime.text import AnswerText
from runtime.vocabulary import Vocabulary
from service.delivery import Delivery
from service.mapping import delivery_of, messages_of, overrides_of


class Prompts(Protocol):
    """Renders and checks prompts; `runtime.prompt.PromptBuilder` is the one that serves."""

    def conversation(self, messages: Sequence[Message], field: str = ...) -> NDArray[np.int64]:
        """Token ids of a conversation, up to where the answer begins; errors name `field`."""

    def token_ids(self, ids: Sequence[int], field: str = ...) -> NDArray[np.int64]:
        """The ids, checked; errors name `field`."""


@dataclass(frozen=True)
class Fields:
    """Where in the client's message the parts of an order stand, for errors that name them."""

    prompt: str
    options: str
    resume: str

    @contextmanager
    def named(self) -> Iterator[None]:
        """Names the fields of errors of the runtime, which knows no messages, as the client has sent them."""
        places = {
            "committed_ids": f"{self.resume}.committed_token_ids",
            "max_output_token_count": f"{self.options}.max_output_token_count",
        }
        try:
            yield
        except InvalidRequest as error:
            moved = (Violation(places.get(found.field, found.field), found.description) for found in error.violations)
            raise InvalidRequest(*moved) from error


@dataclass(frozen=True)
class Order:
    """A request that was found good, as the runner takes it, and how its answer is wanted."""

    request: GenerationRequest
    prepared: Prepared
    """The request as the runner queues it."""
    delivery: Delivery
    fields: Fields


@dataclass(frozen=True)
class Served:
    """The one model that a server serves."""

    facts: ModelFacts
    defaults: GenerationDefaults
    precision: str
    engine: str
    """What runs the graph, as clients are told."""
    prompts: Prompts
    vocabulary: Vocabulary
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
            delivery_of(options, self.min_draft_interval)
            overrides_of(options).resolve(self.defaults, output_room(self.facts, prompt_tokens=1))

    def order(
        self,
        prompt_ids: NDArray[np.int64],
        options: options_pb2.GenerationOptions,
        resume: generation_pb2.Resume,
        fields: Fields,
    ) -> Order:
        """What to run for a prompt with these options, behind what was committed of its answer before.

        Raises:
            InvalidRequest: the prompt is too long, a setting is wrong, or what was committed is no blocks of tokens.
        """
        room = output_room(self.facts, len(prompt_ids), fields.prompt)
        with below(fields.options):
            delivery = delivery_of(options, self.min_draft_interval)
            sampling = overrides_of(options).resolve(self.defaults, room)
        committed_ids = np.zeros(0, np.int64)
        if resume.committed_token_ids:
            committed_ids = self.prompts.token_ids(
                resume.committed_token_ids, field=f"{fields.resume}.committed_token_ids"
            )
            if not options.HasField("seed"):
                missing = "is missing; an answer goes on as it began with the seed that `started` told"
                raise InvalidRequest(Violation(f"{fields.options}.seed", missing))
        drafts = delivery.draft_interval is not None
        request = GenerationRequest(self.facts.name, prompt_ids, sampling, drafts, committed_ids)
        with fields.named():
            prepared = self.runner.prepare(request)
        return Order(request, prepared, delivery, fields)

    def committed_text(self, request: GenerationRequest) -> str:
        """The text of the blocks that an earlier stream of the request has committed."""
        answer = AnswerText(self.vocabulary, request.sampling.stop_strings)
        return answer.append(request.committed_ids, last=False).text


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
