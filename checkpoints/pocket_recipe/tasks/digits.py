"""Numbers as words and as digits."""

from __future__ import annotations

from random import Random

from checkpoints.pocket_recipe.numbers import number_words
from checkpoints.pocket_recipe.tasks.example import Example, ask
from checkpoints.pocket_recipe.tasks.phrasing import phrase


def spell_number(rng: Random) -> Example:
    """Digits to words, 0 to 999."""
    number = rng.randrange(1000) if rng.random() < 0.7 else rng.randrange(100)
    templates = (
        "Spell {n}.", "Spell out {n}.", "Write {n} in words.", "Write the number {n} in words.",
        "How do you write {n} in words?", "{n} in words",
    )  # fmt: skip
    return ask(phrase(rng, *templates, n=number), number_words(number), (number,))


def read_number(rng: Random) -> Example:
    """Words to digits, 0 to 999."""
    number = rng.randrange(1000) if rng.random() < 0.7 else rng.randrange(100)
    templates = ("Write {n} in digits.", "Write {n} as a number.", "What is {n} in digits?", "{n} in digits")
    return ask(phrase(rng, *templates, n=number_words(number)), str(number), (number,))


def reverse_digits(rng: Random) -> Example:
    """Three to seven digits backwards."""
    digits = "".join(rng.choices("0123456789", k=rng.randint(3, 7)))
    templates = ("Reverse the digits {d}.", "Write the digits {d} backwards.", "Reverse {d}.", "{d} backwards")
    return ask(phrase(rng, *templates, d=digits), digits[::-1], (digits,))
