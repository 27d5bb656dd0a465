"""Upper, lower and title case."""

from __future__ import annotations

from random import Random

from checkpoints.pocket_recipe.tasks.example import Example, ask
from checkpoints.pocket_recipe.tasks.lists import some_words
from checkpoints.pocket_recipe.tasks.phrasing import phrase


def _case_phrase(rng: Random) -> list[str]:
    return some_words(rng, 1, 4) if rng.random() < 0.2 else some_words(rng, 2, 4)


def upper_case(rng: Random) -> Example:
    """Words to UPPER CASE."""
    words = _case_phrase(rng)
    templates = (
        "Write in upper case: {x}", "Change to upper case: {x}", "Upper case: {x}", "Make this upper case: {x}",
        "Write in capital letters: {x}", "{x} in upper case",
    )  # fmt: skip
    text = " ".join(words)
    return ask(phrase(rng, *templates, x=text), text.upper(), sorted(words))


def lower_case(rng: Random) -> Example:
    """Words to lower case."""
    words = _case_phrase(rng)
    templates = (
        "Write in lower case: {x}", "Change to lower case: {x}", "Lower case: {x}", "Make this lower case: {x}",
        "Write in small letters: {x}",
    )  # fmt: skip
    text = " ".join(words)
    shown = text.upper() if rng.random() < 0.7 else text.title()
    return ask(phrase(rng, *templates, x=shown), text, sorted(words))


def title_case(rng: Random) -> Example:
    """Words to Title Case."""
    words = _case_phrase(rng)
    templates = (
        "Write in title case: {x}",
        "Change to title case: {x}",
        "Title case: {x}",
        "Capitalize each word: {x}",
    )
    text = " ".join(words)
    return ask(phrase(rng, *templates, x=text), text.title(), sorted(words))
