"""A client in plain Python values: prompts in, the runtime's events out, failures as `CallFailed`.

    with Client("127.0.0.1:50051") as client:
        for event in client.generate("Spell 42.", timeout=30):
            if isinstance(event, Committed):
                print(event.text, end="")

Every call takes a timeout, which travels as the call's deadline; gRPC itself would wait for ever.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from diffusiongemma.v1 import generation_pb2, generation_pb2_grpc, model_pb2, model_pb2_grpc, prompt_pb2
from runtime.errors import DgemmaError, Violation
from runtime.events import Event
from runtime.prompt import Message, Role
from runtime.request import SamplingOverrides
from runtime.ticket import Priority
from service.channel import Credentials, open_channel
from service.delivery import Delivery
from service.mapping import event_of, message_proto, overrides_proto
from service.progress import Progress
from service.status import DETAILS_KEY

Prompt = str | Sequence[Message] | Sequence[int]
"""A user's message, a conversation, or token ids."""

PLAIN = Credentials()


class CallFailed(DgemmaError):
    """A call ended with a status other than OK."""

    def __init__(self, code: grpc.StatusCode, message: str, details: Sequence[Any] = ()) -> None:
        """Take over a status.

        Args:
            code: of the status.
            message: of the status.
            details: its `google.rpc` messages, unpacked.
        """
        super().__init__(f"{code.name}: {message}")
        self.code, self.message = code, message
        self.reason = ""
        """`ErrorInfo.reason`; empty where the status came from gRPC itself."""
        self.metadata: dict[str, str] = {}
        """The variables of the message."""
        self.violations: tuple[Violation, ...] = ()
        self.retry_after: float | None = None
        """Seconds after which the call may be tried again."""
        for detail in details:
            self._take(detail)

    def _take(self, detail: object) -> None:
        match detail:
            case error_details_pb2.ErrorInfo():
                self.reason, self.metadata = detail.reason, dict(detail.metadata)
            case error_details_pb2.BadRequest():
                found = (Violation(violation.field, violation.description) for violation in detail.field_violations)
                self.violations = tuple(found)
            case error_details_pb2.RetryInfo():
                self.retry_after = detail.retry_delay.ToNanoseconds() / 1e9

    @classmethod
    def of(cls, error: Any) -> CallFailed:
        """The failure in an `RpcError` that a call raised, with such details as came along."""
        raw = next((value for key, value in error.trailing_metadata() or () if key == DETAILS_KEY), b"")
        return cls(error.code(), error.details() or "", _unpack(raw))


def _unpack(raw: bytes) -> list[Any]:
    """The details in a serialised status; none where they cannot be read, for then the code still can."""
    kinds = (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo)
    found = []
    try:
        for packed in status_pb2.Status.FromString(raw).details:
            for kind in kinds:
                if packed.Is(kind.DESCRIPTOR):
                    found.append(kind.FromString(packed.value))
    except DecodeError:
        return []
    return found


@contextmanager
def _failures() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise CallFailed.of(error) from error


class _Responses:
    """The responses of a stream, read as soon as they come by a thread of their own.

    So a reader may be slow, be interrupted, and go on: gRPC's own iterator can be neither, once it was interrupted.
    """

    def __init__(self, call: Any) -> None:
        self._call = call
        self._received: queue.SimpleQueue[Any] = queue.SimpleQueue()
        """None at the end."""
        self._failure: CallFailed | None = None
        threading.Thread(target=self._receive, name="responses", daemon=True).start()

    def __iter__(self) -> Iterator[Any]:
        while (response := self._received.get()) is not None:
            yield response
        self._received.put(None)  # for the next reader
        if self._failure is not None:
            raise self._failure

    def cancel(self) -> None:
        self._call.cancel()

    def _receive(self) -> None:
        try:
            for response in self._call:
                self._received.put(response)
        except grpc.RpcError as error:
            self._failure = CallFailed.of(error)
        self._received.put(None)


class Events:
    """The events of one generation, as they come; kinds that this version does not know are skipped."""

    def __init__(self, call: Any) -> None:
        self._responses = _Responses(call)

    def __iter__(self) -> Iterator[Event]:
        """Iterate over the events.

        Raises:
            CallFailed: the generation ended badly.
        """
        for response in self._responses:
            if (event := event_of(response)) is not None:
                yield event

    def cancel(self) -> None:
        """End the call; the server stops within a denoising step."""
        self._responses.cancel()


@dataclass(frozen=True)
class TurnCancelled:
    """The turn was cancelled; no event of it follows."""


class Conversation:
    """One stream of many turns; `start_turn` and `cancel_turn` may be called from any thread."""

    def __init__(
        self,
        converse: Callable[[Iterator[generation_pb2.ConverseRequest]], Any],
        setup: generation_pb2.ConversationSetup,
        delivery: Delivery,
    ) -> None:
        self._delivery = delivery
        self._requests: queue.SimpleQueue[generation_pb2.ConverseRequest | None] = queue.SimpleQueue()
        self._requests.put(generation_pb2.ConverseRequest(setup=setup))
        self._turns = 0
        self._responses = _Responses(converse(iter(self._requests.get, None)))

    def start_turn(self, text: str, progress: Progress | None = None) -> int:
        """Send a user's message and return the turn's index; with `progress` its answer goes on from there."""
        start = generation_pb2.TurnStart(parts=[prompt_pb2.ContentPart(text=text)])
        if progress is not None and (sampling := progress.sampling) is not None:
            start.options.CopyFrom(overrides_proto(sampling, self._delivery))
            start.resume.committed_token_ids.extend(progress.committed_ids)
        self._requests.put(generation_pb2.ConverseRequest(start_turn=start))
        self._turns += 1
        return self._turns - 1

    def cancel_turn(self, index: int) -> None:
        """Cancel a turn, open or waiting; its last event is then `TurnCancelled`, unless it has just ended."""
        cancel = generation_pb2.TurnCancel(turn_index=index)
        self._requests.put(generation_pb2.ConverseRequest(cancel_turn=cancel))

    def half_close(self) -> None:
        """Say that no more turns come; the stream ends once all are answered."""
        self._requests.put(None)

    def __iter__(self) -> Iterator[tuple[int, Event | TurnCancelled]]:
        """Iterate over turns' indices and events; can be left, or interrupted, and taken up again by another iterator.

        Raises:
            CallFailed: the conversation ended badly.
        """
        for response in self._responses:
            if response.HasField("cancelled"):
                yield response.turn_index, TurnCancelled()
            elif (event := event_of(response)) is not None:
                yield response.turn_index, event

    def close(self) -> None:
        """End the stream at once."""
        self._responses.cancel()
        self._requests.put(None)

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Client:
    """A channel to one server. Safe to use from many threads."""

    def __init__(self, address: str, credentials: Credentials = PLAIN) -> None:
        """Open a channel; the server is first asked with the first call.

        Raises:
            UnusableFile: a file of the credentials cannot be read.
        """
        self.address, self._metadata = address, credentials.metadata
        self._channel = open_channel(address, credentials)
        self._generation = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._models = model_pb2_grpc.ModelServiceStub(self._channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)

    def generate(
        self,
        prompt: Prompt,
        sampling: SamplingOverrides | None = None,
        *,
        draft_interval: float | None = None,
        priority: Priority = Priority.INTERACTIVE,
        committed_ids: Sequence[int] = (),
        timeout: float,
    ) -> Events:
        """Generate the answer to one prompt; `service.resuming` does so over as many streams as it takes.

        Args:
            prompt: what is asked.
            sampling: settings; what is None in it takes the model's default.
            draft_interval: least seconds between two drafts; None for no drafts.
            priority: who goes first where there is not room for all.
            committed_ids: tokens of the blocks that an earlier stream has committed, to go on behind them.
            timeout: seconds for the whole call.
        """
        options = overrides_proto(sampling or SamplingOverrides(), Delivery(draft_interval, priority))
        request = generation_pb2.GenerateRequest(options=options, resume=_resume(committed_ids))
        call = self._generation.Generate(_with_prompt(request, prompt), timeout=timeout, metadata=self._metadata)
        return Events(call)

    def converse(
        self,
        history: Sequence[Message] = (),
        sampling: SamplingOverrides | None = None,
        *,
        draft_interval: float | None = None,
        timeout: float,
    ) -> Conversation:
        """Open a conversation behind `history`; the other arguments are those of `generate`, for every turn."""
        delivery = Delivery(draft_interval)
        setup = generation_pb2.ConversationSetup(
            history=[message_proto(message) for message in history],
            options=overrides_proto(sampling or SamplingOverrides(), delivery),
        )
        converse = partial(self._generation.Converse, timeout=timeout, metadata=self._metadata)
        return Conversation(converse, setup, delivery)

    def count_tokens(self, prompt: Prompt, *, timeout: float) -> int:
        """How many tokens a prompt has, rendered."""
        request = _with_prompt(generation_pb2.CountTokensRequest(), prompt)
        with _failures():
            return self._generation.CountTokens(request, timeout=timeout, metadata=self._metadata).token_count

    def model(self, name: str = "", *, timeout: float) -> model_pb2.Model:
        """What is served."""
        with _failures():
            request = model_pb2.GetModelRequest(model=name)
            return self._models.GetModel(request, timeout=timeout, metadata=self._metadata).model

    def wait_serving(self, timeout: float) -> None:
        """Wait until the server's health is SERVING, also for a server that does not listen yet.

        Raises:
            CallFailed: it did not become so in `timeout` seconds.
        """
        request = health_pb2.HealthCheckRequest()
        call = self._health.Watch(request, timeout=timeout, wait_for_ready=True)
        with _failures():
            for response in call:
                if response.status == health_pb2.HealthCheckResponse.SERVING:
                    call.cancel()
                    return

    def close(self) -> None:
        """Close the channel, and with it all open calls."""
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _resume(committed_ids: Sequence[int]) -> generation_pb2.Resume | None:
    return generation_pb2.Resume(committed_token_ids=committed_ids) if committed_ids else None


def _with_prompt(request: Any, prompt: Prompt) -> Any:
    if isinstance(prompt, str):
        prompt = [Message(Role.USER, prompt)]
    messages = [message_proto(message) for message in prompt if isinstance(message, Message)]
    if messages:
        request.conversation.messages.extend(messages)
    else:
        request.token_ids.ids.extend(prompt)
    return request
