"""Requests of a mixed crowd on the pocket, and what a client measures of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from threading import Event as Flag

from checkpoints.pocket_recipe.tasks import TASKS, draw
from runtime.events import Committed, Draft, Event, Finished, Started
from runtime.request import SamplingOverrides
from runtime.ticket import Priority
from service.client import Client

TIMEOUT = 600.0
STORY_EVERY = 4
"""One request of this many is a story, of some 30 steps; the others are tasks of 2 or 3."""
HEROES = ("dog", "cat", "bird", "bear", "fish", "frog", "duck", "girl")
PLACES = ("garden", "park", "forest", "house", "river", "box", "tree", "car")


@dataclass(frozen=True)
class Question:
    """What is asked, and the seed of its answer."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class Answered:
    """What a client saw of one request, in seconds from its sending."""

    first_draft: float | None
    """None where none came: drafts were not asked for."""
    first_block: float
    done: float
    tokens: int
    blocks: int

    @property
    def per_block(self) -> float:
        """Seconds a block, the wait for the first included."""
        return self.done / self.blocks


def questions(count: int, seed: int = 0) -> list[Question]:
    """The same mix for the same seed: single-turn tasks that the pocket knows, and stories."""
    chance = Random(seed)
    return [Question(_story(chance) if n % STORY_EVERY == 0 else _task(chance), n) for n in range(count)]


def stories(seed: int = 1) -> Iterator[Question]:
    """Long answers without end."""
    chance = Random(seed)
    while True:
        yield Question(_story(chance), chance.getrandbits(30))


def _story(chance: Random) -> str:
    return f"Write two sentences about a {chance.choice(HEROES)} and a {chance.choice(PLACES)}."


def _task(chance: Random) -> str:
    while True:
        example = draw(chance.choice([task for task in TASKS if task.promised]), chance, from_held_out=True)
        if len(example.messages) == 1:
            return str(example.messages[0]["content"])


def ask(
    client: Client,
    question: Question,
    priority: Priority = Priority.INTERACTIVE,
    begun: Callable[[], None] = lambda: None,
) -> Answered:
    """Send a request with drafts and read it to its end; `begun` is called when it is admitted."""
    began = time.perf_counter()
    draft, blocks, event = None, list[float](), None
    sampling = SamplingOverrides(seed=question.seed, max_output_tokens=256)
    for event in client.generate(question.prompt, sampling, draft_interval=0.0, priority=priority, timeout=TIMEOUT):
        seconds = time.perf_counter() - began
        if isinstance(event, Started):
            begun()
        elif isinstance(event, Draft) and draft is None:
            draft = seconds
        elif isinstance(event, Committed):
            blocks.append(seconds)
    tokens = _tokens(event)
    return Answered(draft, blocks[0], time.perf_counter() - began, tokens, len(blocks))


def _tokens(last: Event | None) -> int:
    assert isinstance(last, Finished)
    return last.usage.output_tokens


def tokens_per_second(client: Client, asked: Sequence[Question], concurrency: int) -> float:
    """Tokens of all answers by the time that they took, `concurrency` at a time."""
    began = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as readers:
        tokens = sum(answered.tokens for answered in readers.map(lambda each: ask(client, each), asked))
    return tokens / (time.perf_counter() - began)


def poisson(client: Client, asked: Sequence[Question], rate: float, seed: int = 2) -> list[Answered]:
    """Answers to requests that come at random, `rate` a second on average, however busy the server is."""
    chance = Random(seed)
    with ThreadPoolExecutor(len(asked)) as readers:
        coming, arrival = [], time.perf_counter()
        for question in asked:
            arrival += chance.expovariate(rate)
            time.sleep(max(0.0, arrival - time.perf_counter()))
            coming.append(readers.submit(ask, client, question))
        return [each.result() for each in coming]


@contextmanager
def saturated(client: Client, readers: int, priority: Priority) -> Iterator[Callable[[], int]]:
    """So many users who always read a story, all of whom have begun when the block is entered, until it is left.

    The function tells how many stories were read by then.
    """
    over, read, begun = Flag(), [0] * readers, [Flag() for _ in range(readers)]

    def keep_reading(number: int) -> None:
        for question in stories(number):
            if over.is_set():
                return
            ask(client, question, priority, begun[number].set)
            read[number] += 1

    with ThreadPoolExecutor(readers) as crowd:
        reading = [crowd.submit(keep_reading, number) for number in range(readers)]
        try:
            for has_begun, each in zip(begun, reading, strict=True):
                while not has_begun.wait(0.1) and not each.done():  # done: it failed, which is told below
                    pass
            yield lambda: sum(read)
        finally:
            over.set()
        for each in reading:
            each.result()
