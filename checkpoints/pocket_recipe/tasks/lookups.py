"""One of several names' values, looked up in sentences, in a list or in a table; the pocket has not learned it."""

from __future__ import annotations

from random import Random

from checkpoints.pocket_recipe.tasks.example import Example, ask, follow
from checkpoints.pocket_recipe.tasks.phrasing import phrase
from checkpoints.pocket_recipe.tasks.tables import markdown, name_pairs, table

_LOOKUPS = {
    "age": ("How old is {n}?", "What is the age of {n}?"),
    "city": ("Where does {n} live?", "What is the city of {n}?"),
    "job": ("What is the job of {n}?", "What does {n} do?"),
}
# The name stands beside its value as in the table's row: one look-up after the other, where the value alone would take
# two in one pass. The pocket learned neither: 12,000 steps of values alone and 8,000 of sentences left it at chance.
_FOUND = {"age": "{n} is {v} years old.", "city": "{n} lives in {v}.", "job": "{n} is a {v}."}
_FACTS = {"age": "{n} is {v}.", "city": "{n} lives in {v}.", "job": "{n} is a {v}."}


def _facts(rng: Random, column: str, pairs: list[tuple[str, object]]) -> str:
    """The pairs as sentences, as a list or as a table."""
    style = rng.random()
    if style < 0.4:
        return " ".join(_FACTS[column].format(n=name, v=value) for name, value in pairs)
    if style < 0.7:
        return ", ".join(f"{name}: {value}" for name, value in pairs) + "."
    return markdown(column, pairs) + "\n"


def lookup(rng: Random) -> Example:
    """One value from facts in any form."""
    column, pairs = name_pairs(rng, 2, 4)
    name, value = rng.choice(pairs)
    prompt = f"{_facts(rng, column, pairs)} {phrase(rng, *_LOOKUPS[column], n=name)}".replace("\n ", "\n")
    return ask(prompt, _FOUND[column].format(n=name, v=value), (value for pair in pairs for value in pair))


_SEVERAL = {
    "age": ("How old are {n}?", "What are the ages of {n}?"),
    "city": ("Where do {n} live?", "What are the cities of {n}?"),
    "job": ("What are the jobs of {n}?", "What do {n} do?"),
}


def several_lookups(rng: Random) -> Example:
    """Two or three values, in the order asked for."""
    column, pairs = name_pairs(rng, 2, 4)
    asked = rng.sample(pairs, rng.randint(2, min(3, len(pairs))))
    *names, last = (name for name, _ in asked)
    question = phrase(rng, *_SEVERAL[column], n=f"{', '.join(names)} and {last}")
    prompt = f"{_facts(rng, column, pairs)} {question}".replace("\n ", "\n")
    answer = " ".join(_FOUND[column].format(n=name, v=value) for name, value in asked)
    return ask(prompt, answer, (value for pair in pairs for value in pair))


def table_lookup(rng: Random) -> Example:
    """One value from a table."""
    column, pairs = name_pairs(rng, 2, 4)
    name, value = rng.choice(pairs)
    prompt = f"{markdown(column, pairs)}\n{phrase(rng, *_LOOKUPS[column], n=name)}"
    return ask(prompt, _FOUND[column].format(n=name, v=value), (value for pair in pairs for value in pair))


def then_lookup(rng: Random) -> Example:
    """A table, then one value from it."""
    first = table(rng)
    header, _, *lines = first.expected.splitlines()
    column = header.split()[3]
    name, value = rng.choice([line.strip("| ").split(" | ") for line in lines])
    return follow(first, phrase(rng, *_LOOKUPS[column], n=name), _FOUND[column].format(n=name, v=value))
