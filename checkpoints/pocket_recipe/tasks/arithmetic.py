"""Sums and differences, plain, in words and as little stories; comparisons."""

from __future__ import annotations

from random import Random

from checkpoints.pocket_recipe.numbers import number_words
from checkpoints.pocket_recipe.tasks.example import Example, ask, follow, held_out, split_key
from checkpoints.pocket_recipe.tasks.phrasing import phrase
from checkpoints.pocket_recipe.words import COUNTABLES, NAMES


def _summands(rng: Random) -> tuple[int, int]:
    return rng.randint(1, 99), rng.randint(1, 99)


def _sum_operands(a: int, b: int) -> tuple[int, int]:
    """a + b, b + a and what can be subtracted from their sum share one fate in the split."""
    return min(a, b), max(a, b)


def add(rng: Random) -> Example:
    """`35 + 48`."""
    a, b = _summands(rng)
    templates = (
        "What is {a} + {b}?", "What is {a} plus {b}?", "{a} + {b}", "{a} + {b} = ?",
        "Add {a} and {b}.", "Calculate {a} + {b}.", "How much is {a} + {b}?",
    )  # fmt: skip
    return ask(phrase(rng, *templates, a=a, b=b), f"{a} + {b} = {a + b}", _sum_operands(a, b))


def subtract(rng: Random) -> Example:
    """`83 - 48`."""
    b, difference = _summands(rng)
    a = b + difference
    templates = (
        "What is {a} - {b}?", "What is {a} minus {b}?", "{a} - {b}", "{a} - {b} = ?",
        "Subtract {b} from {a}.", "Calculate {a} - {b}.", "How much is {a} - {b}?",
    )  # fmt: skip
    return ask(phrase(rng, *templates, a=a, b=b), f"{a} - {b} = {difference}", _sum_operands(b, difference))


def add_in_words(rng: Random) -> Example:
    """`five plus fifteen`."""
    # Numbers below twenty have words of their own: drawn like the others, both are below it in one sum of 25.
    a, b = _summands(rng) if rng.random() < 0.7 else (rng.randint(1, 20), rng.randint(1, 20))
    words = {"a": number_words(a), "b": number_words(b)}
    prompt = phrase(
        rng, "What is {a} plus {b}?", "{a} plus {b}", "Add {a} and {b}.", "How much is {a} plus {b}?", **words
    )
    return ask(prompt, f"{words['a']} plus {words['b']} is {number_words(a + b)}", _sum_operands(a, b))


def gain(rng: Random) -> Example:
    """A sum as a little story."""
    a, b = _summands(rng)
    name, things = rng.choice(NAMES), rng.choice(COUNTABLES)
    templates = (
        "{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?",
        "{name} has {a} {things}. {name} buys {b} more. How many {things} does {name} have?",
        "{name} had {a} {things} and found {b} more. How many {things} does {name} have now?",
    )
    prompt = phrase(rng, *templates, name=name, things=things, a=a, b=b)
    return ask(prompt, f"{a} + {b} = {a + b}. {name} has {a + b} {things}.", _sum_operands(a, b))


def loss(rng: Random) -> Example:
    """A difference as a little story."""
    b, left = _summands(rng)
    a, name, things = b + left, rng.choice(NAMES), rng.choice(COUNTABLES)
    templates = (
        "{name} has {a} {things} and gives away {b}. How many {things} does {name} have now?",
        "{name} has {a} {things}. {name} loses {b}. How many {things} does {name} have?",
        "{name} had {a} {things} and sold {b}. How many {things} does {name} have now?",
    )
    prompt = phrase(rng, *templates, name=name, things=things, a=a, b=b)
    return ask(prompt, f"{a} - {b} = {left}. {name} has {left} {things}.", _sum_operands(b, left))


def compare(rng: Random) -> Example:
    """The larger or smaller of two numbers below 1000."""
    a, b = rng.sample(range(1000), 2)
    larger = rng.random() < 0.5
    templates = (
        "Which is {word}, {a} or {b}?", "Which number is {word}: {a} or {b}?", "What is {word}, {a} or {b}?",
    )  # fmt: skip
    prompt = phrase(rng, *templates, word=rng.choice(("larger", "bigger") if larger else ("smaller",)), a=a, b=b)
    return ask(prompt, str(max(a, b) if larger else min(a, b)), sorted((a, b)))


def then_add(rng: Random) -> Example:
    """A sum, then more on top of it."""
    while True:
        first = add(rng)
        total, more = int(first.expected.split(" = ")[1]), rng.randint(1, 20)
        # The second sum is on the same side of the split as the first.
        if held_out(split_key(_sum_operands(total, more))) == held_out(first.operands):
            break
    prompt = phrase(rng, "Now add {n}.", "Add {n} to that.", "Plus {n}?", "And plus {n}?", n=more)
    return follow(first, prompt, f"{total} + {more} = {total + more}")
