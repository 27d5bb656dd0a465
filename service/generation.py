"""GenerationService: answers to one prompt, conversations, and counts of tokens."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from typing import TypeAlias

import grpc

from diffusiongemma.v1 import generation_pb2, generation_pb2_grpc
from runtime.events import Finished
from service.conversation import Conversation
from service.intake import Intake
from service.mapping import event_proto
from service.served import Fields, Order

GenerateContext: TypeAlias = "grpc.aio.ServicerContext[generation_pb2.GenerateRequest, generation_pb2.GenerateResponse]"
ConverseContext: TypeAlias = "grpc.aio.ServicerContext[generation_pb2.ConverseRequest, generation_pb2.ConverseResponse]"


class GenerationServicer(generation_pb2_grpc.GenerationServiceServicer):
    """The methods of `diffusiongemma.v1.GenerationService`; what they raise is told by the interceptor.

    The streams are coroutines that write (see `service.interceptor`), where the generated types expect generators.
    """

    def __init__(self, intake: Intake) -> None:
        self._intake, self._served = intake, intake.served

    async def Generate(  # type: ignore[override]  # noqa: N802
        self, request: generation_pb2.GenerateRequest, context: GenerateContext
    ) -> None:
        """Writes the events of one generation."""
        with self._intake.enter(), self._intake.account() as account:
            order = await self._intake.prepared(request.ByteSize(), partial(self._order, request))
            async with self._intake.running(order, account, context.time_remaining()) as running:
                number, event = 0, None
                while not isinstance(event, Finished):
                    event = await running.next()
                    fields = event_proto(event, order.delivery)
                    await context.write(generation_pb2.GenerateResponse(sequence_number=number, **fields))
                    number += 1

    async def Converse(  # type: ignore[override]  # noqa: N802
        self, requests: AsyncIterator[generation_pb2.ConverseRequest], context: ConverseContext
    ) -> None:
        """Writes the events of a conversation's turns."""
        await Conversation(self._intake, context).hold(requests)

    async def CountTokens(  # noqa: N802
        self, request: generation_pb2.CountTokensRequest, context: object
    ) -> generation_pb2.CountTokensResponse:
        """Counts a prompt's tokens."""
        with self._intake.enter():
            account = self._intake.spender()
            self._served.check_model(request.model)
            ids = await self._intake.prepared(request.ByteSize(), partial(self._served.prompt_ids, request))
            account.spend(len(ids))
            return generation_pb2.CountTokensResponse(token_count=len(ids))

    def _order(self, request: generation_pb2.GenerateRequest) -> Order:
        """The request checked and rendered: tokenising a long prompt takes a while, so not on the event loop."""
        self._served.check_model(request.model)
        fields = Fields(request.WhichOneof("prompt") or "prompt", "options", "resume")
        return self._served.order(self._served.prompt_ids(request), request.options, request.resume, fields)
