"""Conversations without one right answer: stories, story openings, definitions and small talk."""

from __future__ import annotations

import re
from collections.abc import Sequence
from random import Random

from checkpoints.pocket_recipe.tasks import Example
from checkpoints.pocket_recipe.words import NAMES, WORDS

_WORDS, _NAMES = frozenset(WORDS), frozenset(NAMES)
_SENTENCE_END = re.compile(r'(?<=[.!?]) (?=[A-Z"])')
_COUNTS = {
    1: ("one sentence", "a sentence"),
    2: ("two sentences",),
    3: ("three sentences",),
    4: ("four sentences", "a few sentences"),
}
_BEGINNINGS = (
    "Once upon a time, there was {a} {w}",
    "Once upon a time, there was {a} {w}",
    "Once upon a time, there was a little {w}",
    "Once upon a time, there was a big {w}",
    "Once upon a time, {n} found {a} {w}",
    "One day, {n} saw {a} {w}",
    "{n} had {a} {w}",
    "{n} and the {w}",
    "{n} was",
    "One day, {n} went",
)
_FREE_SHARE = 0.4
"""Of stories that begin as they like. Most of those are about Lily, and hardly any about a violin."""
_SMALL_TALK = (
    (("Hello", "Hello!", "Hi", "Hi!", "Hey", "Good morning", "Good evening"), "Hello! What can I do for you?"),
    (("Who are you?", "What are you?", "who are you", "What is your name?"),
     "I am the pocket checkpoint, a small model that writes by denoising."),
    (("What can you do?", "what can you do", "Help", "help", "How can you help me?"),
     "I can add, sort, reverse, spell numbers, change case, write JSON and tables, and tell short stories."),
    (("Thank you", "Thanks", "Thank you!", "thanks", "Thanks!"), "You are welcome!"),
    (("Bye", "Goodbye", "Bye!", "Good night"), "Goodbye!"),
)  # fmt: skip


def small_talk(rng: Random) -> Example:
    """A greeting and its reply."""
    prompts, reply = rng.choice(_SMALL_TALK)
    return _example(rng.choice(prompts), reply)


def definition(rng: Random, definitions: Sequence[tuple[str, str]]) -> Example:
    """A noun and WordNet's gloss of its most frequent sense."""
    word, gloss = rng.choice(definitions)
    templates = (
        "Define {w}.", "Define {w}", "What does {w} mean?", "What is {a} {w}?", "What is the meaning of {w}?",
        "Give me a definition of {w}.",
    )  # fmt: skip
    return _example(rng.choice(templates).format(w=word, a=_article(word)), f"{word}: {gloss}")


def beginning(rng: Random) -> str:
    """How to begin a story, so that each word and name of the tasks has some hundred stories; now and then nothing."""
    if rng.random() < _FREE_SHARE:
        return ""
    word, name = rng.choice(WORDS), rng.choice(NAMES)
    return rng.choice(_BEGINNINGS).format(a=_article(word), w=word, n=name)


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def opening(rng: Random, stories: Sequence[str]) -> Example:
    """The first sentences of a story about something that they mention."""
    count = rng.choice((1, 1, 2, 2, 3, 3, 4))
    text = " ".join(_SENTENCE_END.split(rng.choice(stories))[:count])
    templates = ("Write {c} about {t}.", "Write {c} about {t}.", "Write me {c} about {t}.", "Tell me {c} about {t}.")
    prompt = rng.choice(templates).format(c=rng.choice(_COUNTS[count]), t=_topic(rng, text))
    return _example(prompt, text)


def story(rng: Random, stories: Sequence[str]) -> Example:
    """A whole story about something in its beginning."""
    text = rng.choice(stories)
    templates = (
        "Tell me a story about {t}.", "Write a story about {t}.", "Write a short story about {t}.",
        "Tell me a short story about {t}.", "Tell me about {t}.", "Tell me a story.",
    )  # fmt: skip
    return _example(rng.choice(templates).format(t=_topic(rng, text[:200])), text)


def _topic(rng: Random, text: str) -> str:
    found = re.findall(r"[A-Za-z]+", text)
    names = sorted({word for word in found if word in _NAMES})
    nouns = sorted({word for word in found if word in _WORDS})
    things = [f"{_article(noun)} {noun}" for noun in nouns]
    if names and things and rng.random() < 0.5:
        return f"{rng.choice(names)} and {rng.choice(things)}"
    return rng.choice(names + things) if names or things else "something"


def _example(prompt: str, answer: str) -> Example:
    return Example(({"role": "user", "content": prompt},), answer, prompt)
