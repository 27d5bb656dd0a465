"""Ways to say the same."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random


def phrase(rng: Random, *templates: str, **values: object) -> str:
    """One of the templates filled in, now and then without its capital or its last full stop."""
    text = rng.choice(templates).format(**values)
    if rng.random() < 0.2:
        text = text[0].lower() + text[1:]
    if rng.random() < 0.2 and text[-1] in ".?":
        text = text[:-1]
    return text


def listed(rng: Random, items: Iterable[object]) -> str:
    """Items with commas, with `and` before the last, or with spaces alone."""
    texts = [str(item) for item in items]
    style = rng.random()
    if style < 0.15:
        return " ".join(texts)
    if style < 0.3:
        return ", ".join(texts[:-1]) + " and " + texts[-1]
    return ", ".join(texts)


def joined(items: Iterable[object]) -> str:
    """Items with commas, as answers list them."""
    return ", ".join(str(item) for item in items)
