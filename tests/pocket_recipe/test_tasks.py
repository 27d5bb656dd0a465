"""The tasks' answers against independent readings of their prompts, and the split."""

from __future__ import annotations

import json
import re
from random import Random

import pytest

from checkpoints.pocket_recipe.numbers import number_words
from checkpoints.pocket_recipe.tasks import TASKS, Example, Task, draw, held_out
from checkpoints.pocket_recipe.words import NAMES

BY_NAME = {task.name: task for task in TASKS}


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_split_separates_operands(task: Task) -> None:
    """Catches a task whose operands are hashed in two spellings and so fall on both sides."""
    seen, kept = (
        {draw(task, Random(seed), from_held_out=side).operands for seed in range(300)} for side in (False, True)
    )
    assert not any(map(held_out, seen))
    assert all(map(held_out, kept))


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_follow_ups_are_second_turns(task: Task) -> None:
    """Catches a follow-up that lost its first turn."""
    roles = [message["role"] for message in task.generate(Random(1)).messages]
    assert roles == (["user", "assistant", "user"] if task.follow_up else ["user"])


@pytest.mark.parametrize("name", ["add", "subtract", "gain", "loss", "then_add"])
def test_equations_hold_and_use_the_prompt_numbers(name: str) -> None:
    """Catches a wrong sign, swapped operands and an answer about other numbers than were asked for."""
    for seed in range(200):
        example = BY_NAME[name].generate(Random(seed))
        a, sign, b, result = re.match(r"(\d+) ([+-]) (\d+) = (\d+)", example.expected).groups()  # type: ignore[union-attr]
        assert int(result) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
        asked = re.findall(r"\d+", example.messages[-1]["content"])
        assert sorted(asked) == sorted([b] if name == "then_add" else [a, b])


def test_sorted_and_reversed_lists_are_permutations_of_the_prompt() -> None:
    """Catches items lost or invented between prompt and answer."""
    for name in ("sort_words", "reverse_words"):
        for seed in range(100):
            example = BY_NAME[name].generate(Random(seed))
            answer = example.expected.split(", ")
            tail = re.findall(r"[a-z]+", example.messages[0]["content"])[-len(answer) - 1 :]
            assert set(answer) <= set(tail)
            assert name != "sort_words" or answer == sorted(answer)


def test_json_answers_parse_and_name_what_the_prompt_says() -> None:
    """Catches a field taken from another draw."""
    for seed in range(100):
        example = BY_NAME["json"].generate(Random(seed))
        for value in json.loads(example.expected).values():
            assert str(value) in example.messages[0]["content"]


@pytest.mark.parametrize("name", ["lookup", "several_lookups", "table_lookup", "then_lookup"])
def test_lookups_answer_with_what_stands_beside_the_name(name: str) -> None:
    """Catches a value of another name, names out of the order asked for, and a question about no name of the facts."""
    for seed in range(200):
        example = BY_NAME[name].generate(Random(seed))
        facts, question = _facts_and_question(example)
        asked = [word for word in re.findall(r"[A-Z][a-z]+", question) if word in NAMES]
        answered = re.findall(r"([A-Z][a-z]+) (?:lives in|is(?: a)?) (\w+)", example.expected)
        assert [person for person, _ in answered] == asked
        assert len(asked) == len(set(asked)) == example.expected.count(".")
        for person, value in answered:
            beside = re.search(rf"\b{person}(?: is a | is | lives in |: | \| )(\w+)", facts)
            assert beside is not None
            assert beside.group(1) == value


def _facts_and_question(example: Example) -> tuple[str, str]:
    """The question is what follows the last fact, or the last turn of two."""
    last = example.messages[-1]["content"]
    if len(example.messages) > 1:
        return example.messages[1]["content"], last
    start = max(last.rfind(f" {word} ") for word in ("What", "what", "How", "how", "Where", "where"))
    start = max(start, last.rfind("\n"))
    return last[:start], last[start:]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (40, "forty"),
        (99, "ninety-nine"),
        (100, "one hundred"),
        (905, "nine hundred five"),
    ],
)
def test_number_words(number: int, words: str) -> None:
    """Catches the irregular names and an `and` or hyphen too many."""
    assert number_words(number) == words
