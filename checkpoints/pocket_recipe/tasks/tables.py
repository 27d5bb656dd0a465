"""Pairs of a name and a value as a Markdown table."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from checkpoints.pocket_recipe.tasks.example import Example, ask
from checkpoints.pocket_recipe.tasks.phrasing import phrase
from checkpoints.pocket_recipe.words import CITIES, JOBS, NAMES

_COLUMNS: dict[str, Callable[[Random], object]] = {
    "age": lambda rng: rng.randint(2, 99),
    "city": lambda rng: rng.choice(CITIES),
    "job": lambda rng: rng.choice(JOBS),
}


def name_pairs(rng: Random, least: int, most: int) -> tuple[str, list[tuple[str, object]]]:
    """A column, and `least` to `most` names with their values in it."""
    column = rng.choice(tuple(_COLUMNS))
    names = rng.sample(NAMES, rng.randint(least, most))
    return column, [(name, _COLUMNS[column](rng)) for name in names]


def markdown(column: str, pairs: list[tuple[str, object]]) -> str:
    """The table, without a newline at its end."""
    return "\n".join([f"| name | {column} |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in pairs)])


def table(rng: Random) -> Example:
    """A list of names and values as a table."""
    column, pairs = name_pairs(rng, 2, 4)
    shown = ", ".join(f"{name} {value}" for name, value in pairs)
    if rng.random() < 0.4:
        shown = ", ".join(f"{name}: {value}" for name, value in pairs)
    templates = (
        "Make a table of name and {c}: {x}", "Write a table with name and {c}: {x}",
        "Turn this into a table of name and {c}: {x}", "Table of name and {c}: {x}",
    )  # fmt: skip
    prompt = phrase(rng, *templates, c=column, x=shown)
    return ask(prompt, markdown(column, pairs), (value for pair in pairs for value in pair))
