"""A served fake engine that answers every user with the user's own words, so that each answer is known beforehand."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from runtime.engines.fake import FACTS, FakeEngine, Faults
from runtime.engines.protocol import DenoiseRow, PoolGeometry, Readout
from runtime.generation import Generation
from runtime.prompt import PromptBuilder
from runtime.runner import Load, Runner
from runtime.scheduler import Limits
from runtime.vocabulary import Vocabulary
from service.served import Served
from service.transport import MAX_MESSAGE_BYTES
from tests.service.support import DEFAULTS, END, write_bundle

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "old", "owls", "watch")


def words(chance: random.Random, least: int, most: int) -> str:
    """From `least` to `most` characters of words: what to ask, and so the answer."""
    text, length = "", chance.randint(least, most)
    while len(text) < length:
        text += chance.choice(WORDS) + " "
    return text[:length].rstrip() + "."


@dataclass(frozen=True)
class Size:
    """How much the server takes on."""

    active: int = 8
    waiting: int = 64
    positions: int = 512
    """Of a request, prompt and whole canvases, for which each of the active ones finds room."""
    park_seconds: float = 10.0

    @property
    def pool(self) -> PoolGeometry:
        """Pages for all active requests, sharing none."""
        page = 16
        sliding = (FACTS.sliding_window - 1 + 256 - 2) // page + 2
        pages = self.active * -(-self.positions // page)
        return PoolGeometry(
            page_size=page,
            sliding_pages=self.active * sliding,
            full_pages=max(pages, FACTS.max_position // page),
            canvas_slots=self.active,
            rows_per_call=64,
        )

    @property
    def limits(self) -> Limits:
        """Of the scheduler."""
        return Limits(self.active, self.waiting, park_seconds=self.park_seconds)


class PacedEngine(FakeEngine):
    """A fake engine whose calls take time, as a real one's do."""

    seconds = 0.0
    """Of a denoising call."""

    def denoise(self, rows: Sequence[DenoiseRow]) -> list[Readout]:
        """One step, after the time it takes."""
        time.sleep(self.seconds)
        return super().denoise(rows)


def _last_words(vocabulary: Vocabulary, prompt: tuple[int, ...]) -> Sequence[int]:
    """What the user said last, in the prompt's own tokens: between its last user's turn and that turn's end."""
    texts = [vocabulary.token_bytes(token) or vocabulary.spelling(token).encode() for token in prompt]
    spelled = b"".join(texts).decode(errors="replace")
    return vocabulary.encode(spelled.rpartition("<|turn>user\n")[2].partition("<turn|>")[0])


def echoing(directory: Path, size: Size, *, faults: Faults | None = None, step_seconds: float = 0.0) -> Served:
    """What is served, with a runner that runs."""
    bundle = write_bundle(directory)
    vocabulary = Vocabulary.load(bundle)
    answer = lru_cache(2 * size.active)(partial(_last_words, vocabulary))
    built = 0

    def engine() -> FakeEngine:
        nonlocal built
        # Other faults than those that made the last engine suspect.
        drawn = None if faults is None else Faults(faults.seed + built, faults.error_rate, faults.shortage_rate)
        built += 1
        made = PacedEngine(FACTS, size.pool, answer=answer, end_token_id=END, faults=drawn)
        made.seconds = step_seconds
        return made

    generations = partial(Generation, facts=FACTS, defaults=DEFAULTS, vocabulary=vocabulary)
    runner = Runner(engine(), generations, limits=size.limits, rebuild=engine)
    runner.start()
    return Served(
        facts=FACTS,
        defaults=DEFAULTS,
        precision="float32",
        engine="fake",
        prompts=PromptBuilder(bundle, vocabulary),
        vocabulary=vocabulary,
        runner=runner,
        min_draft_interval=0.0,
        max_message_bytes=MAX_MESSAGE_BYTES,
    )


def leaks(runner: Runner) -> list[str]:
    """What a runner without requests still holds: nothing, if all is well. Looks behind its doors on purpose."""
    found = []
    if runner.load != Load(0, 0):
        found.append(f"requests: {runner.load}")
    pool, scheduler = runner._pool, runner._scheduler
    for name, group in (("sliding", pool.sliding), ("full", pool.full)):
        if not group.idle:
            found.append(f"{name} pages: {group.held} held, {group.promised} promised, {group.unpromised} left")
    slots = sorted(scheduler._free_slots)
    if slots != list(range(scheduler._places)):
        found.append(f"slots: {slots} of {scheduler._places} are free")
    return found


def settled(runner: Runner, seconds: float = 10.0, pause: Callable[[float], None] = time.sleep) -> list[str]:
    """`leaks`, once the engine's thread has swept what was cancelled last, or `seconds` have passed."""
    until = time.monotonic() + seconds
    while (found := leaks(runner)) and time.monotonic() < until:
        pause(0.02)
    return found
