"""Mutated protobuf requests against the service's handlers, guided by the lines that they reach.

An input is a method and its messages, in bytes. One that reaches a line that none before it has reached joins the
corpus, from which the next ones are mutated (as AFL does: Zalewski 2013).
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import runtime
import service
from diffusiongemma.v1 import generation_pb2, model_pb2, options_pb2, prompt_pb2
from runtime.ticket import Priority
from tests.reliability.echo import Size, echoing, settled
from tests.reliability.grammar import Numbers, Turn, Ungrammatical
from tests.reliability.handlers import Ended, Handlers, Unmapped
from tests.reliability.mutation import mutate
from tests.service.support import message, request

SIZE = Size(active=4, waiting=16, positions=4096)
REQUESTS: dict[str, Any] = {
    "Generate": generation_pb2.GenerateRequest,
    "Converse": generation_pb2.ConverseRequest,
    "CountTokens": generation_pb2.CountTokensRequest,
    "GetModel": model_pb2.GetModelRequest,
}
WEIGHTS = (45, 35, 15, 5)
WATCHED = [Path(next(iter(package.__path__))) for package in (service, runtime)]
UNWATCHED = "engine"
"""The thread whose lines depend on time, and hardly on the input."""


@dataclass(frozen=True)
class Input:
    """What is sent to a method."""

    method: str
    messages: tuple[bytes, ...]

    def to_json(self) -> str:
        """For a file to replay."""
        return json.dumps({"method": self.method, "messages": [each.hex() for each in self.messages]})

    @classmethod
    def from_json(cls, text: str) -> Input:
        """What `to_json` wrote."""
        said = json.loads(text)
        return cls(said["method"], tuple(map(bytes.fromhex, said["messages"])))


@dataclass
class Fuzzed:
    """What came of it."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[tuple[Input, str]] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    corpus: int = 0
    lines: int = 0
    """Of service and runtime that were reached."""

    @property
    def good(self) -> bool:
        """Whether every call ended as the contract has it."""
        return not (self.wrong or self.leaks)


def seeds() -> list[Input]:
    """The corpus to begin with: every field of the contract in use."""
    diffusion = options_pb2.DiffusionOptions(
        max_denoising_step_count=5,
        entropy_bound=0.2,
        temperature_min=0.3,
        temperature_max=0.9,
        stability_threshold=1,
        confidence_threshold=0.01,
        end_token_guard=True,
    )
    options = options_pb2.GenerationOptions(
        max_output_token_count=64, seed=7, diffusion=diffusion, stop_sequences=["dog"], priority=Priority.BATCH
    )
    options.drafts.mode = options_pb2.DRAFT_MODE_ON
    options.drafts.min_draft_interval.FromMilliseconds(1)
    talk = [message("system", "be brief"), message("user", "hello"), message("model", "hi"), message("user", "a dog")]
    generates = [
        request("hello there"),
        request("words " * 12, drafts=True, options=options, model="fake"),
        generation_pb2.GenerateRequest(conversation=prompt_pb2.Conversation(messages=talk), options=options),
        generation_pb2.GenerateRequest(token_ids=prompt_pb2.TokenIds(ids=[2, 330, 340, 350] * 9), options=options),
        request("resumed", options=options, resume=generation_pb2.Resume(committed_token_ids=[330] * 32)),
    ]
    counts = [generation_pb2.CountTokensRequest(conversation=each.conversation) for each in generates[:3]]
    part = prompt_pb2.ContentPart(text="a turn")
    turns = [
        generation_pb2.ConverseRequest(setup=generation_pb2.ConversationSetup(history=talk[:3], options=options)),
        generation_pb2.ConverseRequest(start_turn=generation_pb2.TurnStart(parts=[part, part])),
        generation_pb2.ConverseRequest(cancel_turn=generation_pb2.TurnCancel(turn_index=0)),
        generation_pb2.ConverseRequest(start_turn=generation_pb2.TurnStart(parts=[part], options=options)),
    ]
    picture = generation_pb2.GenerateRequest.FromString(generates[0].SerializeToString())
    picture.conversation.messages[0].parts.add(image=b"\x89PNG")
    raw = [Input("Generate", (each.SerializeToString(),)) for each in (*generates, picture)]
    raw += [Input("CountTokens", (each.SerializeToString(),)) for each in counts]
    raw += [Input("GetModel", (model_pb2.GetModelRequest(model=name).SerializeToString(),)) for name in ("", "fake")]
    spoken = [each.SerializeToString() for each in turns]
    return [*raw, *(Input("Converse", tuple(spoken[:count])) for count in (1, 2, 3, 4))]


async def fuzz(directory: Path, runs: int, seed: int, tell: Callable[[str], None] = lambda _: None) -> Fuzzed:
    """Send `runs` mutated inputs, one after the other."""
    chance, result, corpus, began = random.Random(seed), Fuzzed(), seeds(), time.monotonic()
    served = echoing(directory, SIZE)
    with _lines() as reached:
        handlers = Handlers(served)
        for number in range(runs):
            # The seeds themselves come first: all of them must be good, and what they reach is no news.
            sent = corpus[number] if number < len(corpus) and not result.corpus else _mutated(corpus, chance)
            known = len(reached)
            await _send(handlers, sent, result)
            if number >= len(seeds()) and len(reached) > known:
                corpus.append(sent)
                result.corpus = len(corpus)
            if number % 5000 == 4999:
                tell(f"  {number + 1} inputs, {len(reached)} lines, {time.monotonic() - began:.0f} s")
        handlers.close()
    result.corpus, result.lines = len(corpus), len(reached)
    result.leaks = settled(served.runner)
    served.runner.close()
    return result


async def replay(directory: Path, sent: Input) -> Fuzzed:
    """Send one input."""
    served, result = echoing(directory, SIZE), Fuzzed()
    handlers = Handlers(served)
    await _send(handlers, sent, result)
    handlers.close()
    result.leaks = settled(served.runner)
    served.runner.close()
    return result


async def _send(handlers: Handlers, sent: Input, result: Fuzzed) -> None:
    try:
        ended = await handlers.call(sent.method, sent.messages)
        _check(sent.method, ended)
        result.outcomes[f"{sent.method}: {ended.name}"] += 1
    except (Unmapped, Ungrammatical) as error:
        result.wrong.append((sent, str(error)))


def _check(method: str, ended: Ended) -> None:
    """Whether the client could make sense of it. Nothing fails here but by the client's fault: INTERNAL is a bug."""
    failure = ended.failure
    if failure is not None and (not failure.reason or failure.code.name in ("INTERNAL", "UNKNOWN")):
        raise Unmapped(f"{failure} of reason {failure.reason!r}")
    if method not in ("Generate", "Converse"):
        return
    turns: dict[int, Turn] = {}
    numbers = Numbers()
    for response in ended.responses:
        numbers.take(response)
        index = response.turn_index if method == "Converse" else 0
        first = response.committed.block_index if response.HasField("committed") else response.draft.block_index
        if index not in turns or (turns[index].started is not None and not (turns[index].texts or turns[index].drafts)):
            turns.setdefault(index, Turn()).first_block = first
        turns[index].take(response)
    if failure is None and not ended.left and method == "Generate" and not turns[0].ended:
        raise Unmapped("OK without finished")


def _mutated(corpus: Sequence[Input], chance: random.Random) -> Input:
    """A mutation of one input of the corpus, the newest of them more often."""
    method = chance.choices(list(REQUESTS), WEIGHTS)[0]
    fitting = [each for each in corpus if each.method == method]
    parent = chance.choice(fitting[-20:] if chance.random() < 0.5 else fitting)
    others = [each for one in fitting for each in one.messages]
    messages = list(parent.messages)
    place = chance.randrange(len(messages))
    messages[place] = mutate(messages[place], REQUESTS[method], others, chance)
    if method == "Converse" and chance.random() < 0.5:
        act = chance.randrange(4)
        if act == 0:
            messages.insert(chance.randint(0, len(messages)), chance.choice(others))
        elif act == 1 and len(messages) > 1:
            del messages[place]
        elif act == 2:
            messages[place:place] = [messages[place]] * chance.choice((1, 2, 12))
        else:
            chance.shuffle(messages)
    return Input(method, tuple(messages[:40]))


@contextmanager
def _lines() -> Iterator[set[tuple[CodeType, int]]]:
    """The lines of the watched packages that are reached inside the block, on all threads that begin there.

    By Python's own tracing: fuzzers with compiled instrumentation know no async code, and pull in a compiler.
    """
    reached: set[tuple[CodeType, int]] = set()
    watched = tuple(map(str, WATCHED))

    def line(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            reached.add((frame.f_code, frame.f_lineno))
        return line

    def call(frame: FrameType, event: str, _: Any) -> Any:
        return line if frame.f_code.co_filename.startswith(watched) else None

    before = sys.gettrace()
    sys.settrace(call)
    threading.settrace(call)
    try:
        yield reached
    finally:
        sys.settrace(before)
        threading.settrace(None)  # type: ignore[arg-type]
