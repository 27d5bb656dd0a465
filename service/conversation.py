"""One conversation: many turns on one stream, answered in order, each of which can be cancelled.

Two coroutines share it. `_read` takes the client's messages as they come, so that a cancellation is heard while an
answer is under way; `_answer` alone writes, one turn after the other, and raises whatever ends the stream, also what
`_read` met: a write that is under way is thus never cut off.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import AsyncIterator
from functools import partial
from typing import Any, TypeAlias

import grpc

from diffusiongemma.v1 import generation_pb2
from runtime.errors import Cancelled, InvalidRequest, QueueFull, Violation
from runtime.events import Committed, Event, Finished
from runtime.prompt import Message, Role
from service.held_texts import Hold
from service.intake import Intake
from service.mapping import event_proto, messages_of, text_of
from service.quota import Account
from service.running import Running
from service.served import Fields, Order

MAX_WAITING_TURNS = 8
"""Turns that may wait for the open one: who types ahead stays below, who sends without reading is stopped."""

MAX_CANCELLED_TURNS = 256
"""Turns cancelled while they waited whose end was not told yet; they hold no text, only their place in the order."""

FEW_PARTS = 256
"""Parts that are joined on the event loop, in under a millisecond; a message of 4 MB can hold 800,000."""

Context: TypeAlias = "grpc.aio.ServicerContext[generation_pb2.ConverseRequest, generation_pb2.ConverseResponse]"


class _Turn:
    """A turn that was started."""

    def __init__(self, index: int, text: str, start: generation_pb2.TurnStart) -> None:
        self.index, self.text, self.start, self.size = index, text, start, start.ByteSize()
        self.running: Running | None = None
        """Once it is submitted."""
        self.cancelled = False
        """By the client."""

    def cancel(self) -> None:
        self.cancelled = True
        self.text, self.start = "", generation_pb2.TurnStart()  # nobody asks for them any more
        self.stop()

    def stop(self) -> None:
        if self.running is not None:
            self.running.cancel()


class Conversation:
    """The server's side of one `Converse` stream."""

    def __init__(self, intake: Intake, context: Context) -> None:
        self._intake, self._served, self._context = intake, intake.served, context
        self._setup: generation_pb2.ConversationSetup | None = None
        self._history: list[Message] = []
        self._given = 0
        """How many messages of the history came with the setup."""
        self._started = 0
        """Turns that the client started."""
        self._waiting: deque[_Turn] = deque()
        self._open: _Turn | None = None
        self._sequence_number = 0
        self._half_closed = False
        self._failure: Exception | None = None
        """What `_read` met."""
        self._changed = asyncio.Event()
        self._count_held: Hold = lambda count, made=False: None
        """While the stream is open; see `Intake.conversation`."""

    async def hold(self, requests: AsyncIterator[generation_pb2.ConverseRequest]) -> None:
        """Answer the client's turns until it has half-closed and all are answered."""
        with self._intake.enter(on_drain=self._changed.set), self._intake.conversation() as self._count_held:
            reader = asyncio.create_task(self._read(requests))
            try:
                await self._answer()
            finally:
                reader.cancel()
                await asyncio.gather(reader, return_exceptions=True)

    # What the client says

    async def _read(self, requests: AsyncIterator[generation_pb2.ConverseRequest]) -> None:
        try:
            async for request in requests:
                await self._take(request)
            self._half_closed = True
        except Exception as error:
            self._failure = error
            if self._open is not None:
                self._open.stop()
        self._changed.set()

    async def _take(self, request: generation_pb2.ConverseRequest) -> None:
        action = request.WhichOneof("action")
        if action is None:
            raise InvalidRequest(Violation("action", "is missing; give setup, start_turn or cancel_turn"))
        if (action == "setup") != (self._setup is None):
            raise InvalidRequest(Violation(action, "is out of place; setup comes first, and once"))
        match action:
            case "setup":
                await self._set_up(request.setup)
            case "start_turn":
                await self._start(request.start_turn)
            case "cancel_turn":
                self._cancel(request.cancel_turn.turn_index)
        self._changed.set()

    async def _set_up(self, setup: generation_pb2.ConversationSetup) -> None:
        self._served.check_model(setup.model)
        self._count_held(setup.ByteSize())
        read = partial(messages_of, setup.history, "setup.history")
        self._history = await self._intake.prepared(setup.ByteSize(), read)
        self._given = len(self._history)
        if self._history and self._history[-1].role is Role.USER:
            field = f"setup.history[{self._given - 1}].role"
            raise InvalidRequest(Violation(field, "is ROLE_USER; send the user's last message in start_turn"))
        self._served.check_options(setup.options, "setup.options")
        setup.ClearField("history")  # which would be held twice
        self._setup = setup

    async def _start(self, start: generation_pb2.TurnStart) -> None:
        assert self._setup is not None
        cancelled = sum(turn.cancelled for turn in self._waiting)
        if len(self._waiting) - cancelled >= MAX_WAITING_TURNS or cancelled >= MAX_CANCELLED_TURNS:
            raise QueueFull(len(self._waiting), retry_after=1.0)
        self._count_held(start.ByteSize())
        read = partial(text_of, start.parts, "start_turn.parts")
        few = len(start.parts) <= FEW_PARTS
        text = read() if few else await self._intake.prepared(start.ByteSize(), read)
        self._waiting.append(_Turn(self._started, text, start))
        self._started += 1

    def _cancel(self, index: int) -> None:
        if not 0 <= index < self._started:
            raise InvalidRequest(
                Violation("cancel_turn.turn_index", f"is {index}; {self._started} turns were started, from 0")
            )
        for turn in (self._open, *self._waiting):
            if turn is not None and turn.index == index:
                turn.cancel()

    # What the server answers

    async def _answer(self) -> None:
        while (turn := await self._next()) is not None:
            self._open = turn
            await self._answer_turn(turn)
            self._open = None

    async def _next(self) -> _Turn | None:
        """The next turn; None once there will be no more."""
        while True:
            self._changed.clear()
            if self._failure is not None:
                raise self._failure
            if self._half_closed and not self._waiting:
                return None
            self._intake.refuse_when_draining()
            if self._waiting:
                return self._waiting.popleft()
            await self._changed.wait()

    async def _answer_turn(self, turn: _Turn) -> None:
        question = Message(Role.USER, turn.text)
        try:
            if turn.cancelled:  # while it waited
                raise Cancelled
            messages = [*self._history, question]
            size = sum(len(message.text) for message in messages) + turn.start.ByteSize()
            with self._intake.account() as account:
                order, before = await self._intake.prepared(size, partial(self._order, turn, messages))
                answer = before + await self._run(turn, order, account)
        except Cancelled:
            if self._failure is not None:
                raise self._failure from None
            if not turn.cancelled:
                raise
            self._count_held(-turn.size)
            await self._write(turn, {"cancelled": generation_pb2.TurnCancelled()})
        else:
            self._count_held(len(answer), made=True)
            self._history += [question, Message(Role.MODEL, answer)]

    async def _run(self, turn: _Turn, order: Order, account: Account) -> str:
        """Write the events of a turn's generation and return what they add to its answer."""
        texts: list[str] = []
        async with self._intake.running(order, account, self._context.time_remaining()) as running:
            turn.running = running
            if turn.cancelled or self._failure is not None:  # while it was prepared
                running.cancel()
            event: Event | None = None
            while not isinstance(event, Finished):
                event = await running.next()
                if isinstance(event, Committed):
                    texts.append(event.text)
                await self._write(turn, event_proto(event, order.delivery))
        return "".join(texts)

    async def _write(self, turn: _Turn, fields: dict[str, Any]) -> None:
        number, self._sequence_number = self._sequence_number, self._sequence_number + 1
        await self._context.write(
            generation_pb2.ConverseResponse(sequence_number=number, turn_index=turn.index, **fields)
        )

    def _order(self, turn: _Turn, messages: list[Message]) -> tuple[Order, str]:
        """The turn checked and rendered behind the history, and the text that was committed of its answer before."""
        try:
            prompt_ids = self._served.prompts.conversation(messages, field="messages")
        except InvalidRequest as error:
            moved = (Violation(self._place(violation.field), violation.description) for violation in error.violations)
            raise InvalidRequest(*moved) from error
        assert self._setup is not None
        own = turn.start.HasField("options")
        options, field = (turn.start.options, "start_turn.options") if own else (self._setup.options, "setup.options")
        fields = Fields("start_turn.parts", field, "start_turn.resume")
        order = self._served.order(prompt_ids, options, turn.start.resume, fields)
        return order, self._served.committed_text(order.request)

    def _place(self, field: str) -> str:
        """Where in the client's messages a field of the rendered conversation came from."""
        found = re.match(r"messages\[(\d+)\]", field)
        if found is not None and int(found[1]) < self._given:
            return f"setup.history[{found[1]}]{field[found.end() :]}"
        return "start_turn.parts"
