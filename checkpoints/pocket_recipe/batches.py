"""Batches of prompts and canvases as arrays; batch `i` is a pure function of the seed and `i`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from checkpoints.pocket_recipe import prose
from checkpoints.pocket_recipe.tasks import TASKS, Example, draw
from checkpoints.pocket_recipe.tokenizer import PAD, TURN_END

CANVAS = 256
SOURCES: tuple[str, ...] = (*(task.name for task in TASKS), "definition", "opening", "story", "continued", "small_talk")
"""What a row can come from, by the index in `Batch.sources`."""
_TASK_SHARES = [task.share for task in TASKS]


class Batch(NamedTuple):
    """`B` rows, each with `P` prefix tokens (padded at the end) and a canvas of `C` tokens."""

    prefix: npt.NDArray[np.int16]
    length: npt.NDArray[np.int64]
    """Prefix tokens without padding, `[B]`."""
    canvas: npt.NDArray[np.int16]
    """The clean canvas: the answer, the end of the turn, padding."""
    sources: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Bucket:
    """A batch shape and what fills it: shares of the rows by kind; `tasks` are drawn by their own shares."""

    name: str
    rows: int
    prefix: int
    canvas: int
    shares: dict[str, float]
    compiled: bool = True
    """False where the batches are too rare to earn back the minute that compiling their shape takes."""


BUCKETS: dict[str, Bucket] = {
    bucket.name: bucket
    for bucket in (
        # Answers of tasks are short: three times the examples in the same time, against a canvas of full length.
        Bucket("short", 512, 112, 64, {"tasks": 0.68, "definition": 0.06, "opening": 0.25, "small_talk": 0.01}),
        Bucket(
            "full",
            192,
            128,
            CANVAS,
            {"tasks": 0.34, "definition": 0.05, "opening": 0.25, "story": 0.35, "small_talk": 0.01},
        ),
        Bucket("continued", 96, 384, CANVAS, {"continued": 1.0}, compiled=False),
    )
}


@dataclass(frozen=True)
class Material:
    """What rows are made from."""

    tokenizer: Tokenizer
    stories: Sequence[str]
    definitions: Sequence[tuple[str, str]]


def prompt_text(messages: Sequence[dict[str, str]]) -> str:
    """The prompt as the checkpoint's chat template renders it, up to the head of the model's turn."""
    roles = {"user": "user", "assistant": "model", "system": "system"}
    turns = (f"<|turn>{roles[message['role']]}\n{message['content'].strip()}<turn|>\n" for message in messages)
    return "<bos>" + "".join(turns) + "<|turn>model\n"


def make_batch(material: Material, bucket: Bucket, rng: Random) -> Batch:
    """Fill a batch; examples that do not fit the bucket's shape are drawn again."""
    rows: list[tuple[list[int], list[int], int]] = []
    while len(rows) < bucket.rows:
        rows += _fitting(material, bucket, rng, bucket.rows - len(rows))
    batch = Batch(
        np.full((bucket.rows, bucket.prefix), PAD, np.int16),
        np.zeros(bucket.rows, np.int64),
        np.full((bucket.rows, bucket.canvas), PAD, np.int16),
        np.array([source for _, _, source in rows]),
    )
    for index, (prefix, canvas, _) in enumerate(rows):
        batch.prefix[index, : len(prefix)], batch.length[index] = prefix, len(prefix)
        batch.canvas[index, : len(canvas)] = canvas
    return batch


def _fitting(material: Material, bucket: Bucket, rng: Random, count: int) -> list[tuple[list[int], list[int], int]]:
    kinds = rng.choices(tuple(bucket.shares), tuple(bucket.shares.values()), k=count)
    drawn = [_draw(material, kind, rng) for kind in kinds]
    prompts = _encode(material.tokenizer, [prompt_text(example.messages) for _, example in drawn])
    answers = _encode(material.tokenizer, [example.expected for _, example in drawn])
    rows = []
    for (source, _), prefix, answer in zip(drawn, prompts, answers, strict=True):
        whole = [*answer, TURN_END]
        if source == "continued":
            prefix, whole = prefix + whole[:CANVAS], whole[CANVAS:]
        elif source == "story":
            whole = whole[:CANVAS]
        if 0 < len(whole) <= bucket.canvas and len(prefix) <= bucket.prefix:
            rows.append((prefix, whole, SOURCES.index(source)))
    return rows


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def _draw(material: Material, kind: str, rng: Random) -> tuple[str, Example]:
    if kind == "tasks":
        task = rng.choices(TASKS, _TASK_SHARES)[0]
        return task.name, draw(task, rng, from_held_out=False)
    makers: dict[str, Callable[[], Example]] = {
        "definition": lambda: prose.definition(rng, material.definitions),
        "opening": lambda: prose.opening(rng, material.stories),
        "story": lambda: prose.story(rng, material.stories),
        "continued": lambda: prose.story(rng, material.stories),
        "small_talk": lambda: prose.small_talk(rng),
    }
    return kind, makers[kind]()


class Batches:
    """A map-style dataset: item `i` is `(bucket name, Batch)` of step `i`."""

    def __init__(
        self, material: Material, buckets: dict[str, Bucket], schedule: Callable[[int], dict[str, float]], seed: int
    ):
        self.material, self.buckets, self.schedule, self.seed = material, buckets, schedule, seed

    def __getitem__(self, step: int) -> tuple[str, Batch]:
        """The batch of a step, whatever was asked for before."""
        rng = Random(f"{self.seed}/{step}")
        shares = self.schedule(step)
        name = rng.choices(tuple(shares), tuple(shares.values()))[0]
        return name, make_batch(self.material, self.buckets[name], rng)
