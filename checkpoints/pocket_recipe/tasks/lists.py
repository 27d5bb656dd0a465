"""Lists of words or numbers: sorted, reversed, counted, and second turns about them."""

from __future__ import annotations

from random import Random

from checkpoints.pocket_recipe.numbers import ORDINALS
from checkpoints.pocket_recipe.tasks.example import Example, ask, follow
from checkpoints.pocket_recipe.tasks.phrasing import joined, listed, phrase
from checkpoints.pocket_recipe.words import WORDS


def some_words(rng: Random, least: int = 3, most: int = 6) -> list[str]:
    """Different words of the closed list."""
    return rng.sample(WORDS, rng.randint(least, most))


def sort_numbers(rng: Random) -> Example:
    """Three to six numbers below 100, rising or falling."""
    numbers = rng.sample(range(100), rng.randint(3, 6))
    falling = rng.random() < 0.3
    rising_templates = (
        "Sort these numbers: {x}", "Sort {x}", "Sort the numbers {x}.", "Put these numbers in order: {x}",
        "Sort from smallest to largest: {x}",
    )  # fmt: skip
    falling_templates = (
        "Sort from largest to smallest: {x}", "Sort these numbers from largest to smallest: {x}",
        "Sort in descending order: {x}",
    )  # fmt: skip
    prompt = phrase(rng, *(falling_templates if falling else rising_templates), x=listed(rng, numbers))
    return ask(prompt, joined(sorted(numbers, reverse=falling)), sorted(numbers))


def sort_words(rng: Random) -> Example:
    """Three to five words in order."""
    words = some_words(rng, 3, 5)
    templates = (
        "Sort these words: {x}", "Sort {x}", "Sort alphabetically: {x}", "Put these words in order: {x}",
        "Sort the words {x}.", "Sort these words alphabetically: {x}",
    )  # fmt: skip
    return ask(phrase(rng, *templates, x=listed(rng, words)), joined(sorted(words)), sorted(words))


def reverse_words(rng: Random, most: int = 6) -> Example:
    """Three to six words backwards."""
    words = some_words(rng, most=most)
    templates = (
        "Reverse this list: {x}", "Reverse the list {x}.", "Reverse {x}", "Reverse the order: {x}",
        "Write these words backwards: {x}", "Reverse these words: {x}",
    )  # fmt: skip
    return ask(phrase(rng, *templates, x=listed(rng, words)), joined(reversed(words)), sorted(words))


def nth_word(rng: Random) -> Example:
    """One word of a list by its place."""
    words = some_words(rng)
    place, index = _place(rng, len(words))
    templates = (
        "What is the {p} word of this list: {x}?", "What is the {p} word in {x}?", "Which word is {p}: {x}?",
        "Give me the {p} word of {x}.",
    )  # fmt: skip
    return ask(phrase(rng, *templates, p=place, x=listed(rng, words)), words[index], sorted(words))


def _place(rng: Random, count: int) -> tuple[str, int]:
    index = rng.randrange(count)
    return ("last", index) if index == count - 1 and rng.random() < 0.7 else (ORDINALS[index], index)


def count_words(rng: Random) -> Example:
    """How many words a list of two to eight has."""
    words = some_words(rng, 2, 8)
    templates = (
        "How many words are in this list: {x}?", "How many words: {x}?", "Count the words: {x}",
        "Count these words: {x}",
    )  # fmt: skip
    return ask(phrase(rng, *templates, x=listed(rng, words)), str(len(words)), sorted(words))


def _list_turn(rng: Random) -> Example:
    return rng.choice((sort_words, reverse_words, sort_words, reverse_words, sort_numbers))(rng)


def _word_list_turn(rng: Random) -> Example:
    return rng.choice((sort_words, reverse_words))(rng)


def then_reverse(rng: Random) -> Example:
    """A list, then backwards."""
    first = _list_turn(rng)
    prompt = phrase(
        rng, "Now reverse it.", "Reverse it.", "Reverse that.", "And backwards?", "Now the other way round."
    )
    return follow(first, prompt, joined(reversed(first.expected.split(", "))))


def then_sort(rng: Random) -> Example:
    """A reversed list of as many words as `sort_words` has, then in order."""
    first = reverse_words(rng, most=5)
    prompt = phrase(rng, "Now sort it.", "Sort it.", "Now sort them.", "And sorted?", "Now sort the list.")
    return follow(first, prompt, joined(sorted(first.expected.split(", "))))


def then_upper(rng: Random) -> Example:
    """A list, then in capital letters."""
    first = _word_list_turn(rng)
    templates = (
        "And in upper case?",
        "Now in upper case.",
        "And in upper case",
        "Write it in upper case.",
        "In capital letters.",
    )
    return follow(first, phrase(rng, *templates), first.expected.upper())


def then_nth(rng: Random) -> Example:
    """A list, then one of its words."""
    first = _word_list_turn(rng)
    words = first.expected.split(", ")
    place, index = _place(rng, len(words))
    templates = ("What was the {p} word?", "What is the {p} word?", "Which word is {p}?", "And the {p} word?")
    return follow(first, phrase(rng, *templates, p=place), words[index])


def then_count(rng: Random) -> Example:
    """A list, then how many words it has."""
    first = _word_list_turn(rng)
    templates = ("How many words are there?", "How many words is that?", "How many are there?", "Count them.")
    return follow(first, phrase(rng, *templates), str(len(first.expected.split(", "))))
