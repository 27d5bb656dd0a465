"""What a task draws: a conversation with one right answer, on one side of the split for good.

Operands are split into those that training sees and those held out, by a hash of the operands alone: a held-out pair of
numbers or list of words appears in no training example of any task, whatever its phrasing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random

HELD_OUT_SHARE = 10
"""One operand in this many is held out."""


@dataclass(frozen=True)
class Example:
    """A conversation that ends with the user's turn, and the answer."""

    messages: tuple[dict[str, str], ...]
    """`{"role": "user" | "assistant", "content": ...}`."""
    expected: str
    operands: str
    """What the train / held-out split hashes."""


@dataclass(frozen=True)
class Task:
    """A named kind of question."""

    name: str
    generate: Callable[[Random], Example]
    follow_up: bool = False
    """Whether the last turn refers to the turn before."""
    share: float = 1.0
    """How often training draws it, against the others."""
    promised: bool = True
    """Whether the checkpoint's card promises it; training and measurements have the others too."""


def held_out(operands: str) -> bool:
    """Whether these operands are kept from training."""
    return hashlib.sha256(operands.encode()).digest()[0] * HELD_OUT_SHARE < 256


def draw(task: Task, rng: Random, *, from_held_out: bool) -> Example:
    """The next example of one side of the split."""
    while True:
        example = task.generate(rng)
        if held_out(example.operands) == from_held_out:
            return example


def correct(example: Example, answer: str) -> bool:
    """Exact match but for surrounding white space."""
    return answer.strip() == example.expected


def ask(prompt: str, expected: str, operands: Iterable[object]) -> Example:
    """A question of one turn."""
    return Example(({"role": "user", "content": prompt},), expected, split_key(operands))


def follow(first: Example, prompt: str, expected: str) -> Example:
    """A second turn after the first example's answer, on its side of the split."""
    answer, request = {"role": "assistant", "content": first.expected}, {"role": "user", "content": prompt}
    return Example((*first.messages, answer, request), expected, first.operands)


def split_key(operands: Iterable[object]) -> str:
    """The operands as the split hashes them."""
    return "|".join(str(operand) for operand in operands)
