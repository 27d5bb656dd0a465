"""The checkable tasks of the pocket checkpoint: prompts whose one right answer a program knows.

Each task draws operands, phrases a request about them in one of several ways and computes the answer. Operands are
split for good into those that training sees and those held out, by a hash of the operands alone: a held-out pair of
numbers or list of words appears in no training example of any task, whatever its phrasing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random

from checkpoints.pocket_recipe.numbers import ORDINALS, number_words
from checkpoints.pocket_recipe.words import CITIES, COUNTABLES, JOBS, NAMES, WORDS

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


# --- phrasing


def _phrase(rng: Random, *templates: str, **values: object) -> str:
    """One of the templates filled in, now and then without its capital or its last full stop."""
    text = rng.choice(templates).format(**values)
    if rng.random() < 0.2:
        text = text[0].lower() + text[1:]
    if rng.random() < 0.2 and text[-1] in ".?":
        text = text[:-1]
    return text


def _ask(prompt: str, expected: str, operands: Iterable[object]) -> Example:
    return Example(({"role": "user", "content": prompt},), expected, _operands(operands))


def _follow(first: Example, prompt: str, expected: str) -> Example:
    answer, request = {"role": "assistant", "content": first.expected}, {"role": "user", "content": prompt}
    return Example((*first.messages, answer, request), expected, first.operands)


def _operands(operands: Iterable[object]) -> str:
    return "|".join(str(operand) for operand in operands)


def _listed(rng: Random, items: Iterable[object]) -> str:
    texts = [str(item) for item in items]
    style = rng.random()
    if style < 0.15:
        return " ".join(texts)
    if style < 0.3:
        return ", ".join(texts[:-1]) + " and " + texts[-1]
    return ", ".join(texts)


def _joined(items: Iterable[object]) -> str:
    return ", ".join(str(item) for item in items)


# --- arithmetic


def _summands(rng: Random) -> tuple[int, int]:
    return rng.randint(1, 99), rng.randint(1, 99)


def _sum_operands(a: int, b: int) -> tuple[int, int]:
    """a + b, b + a and what can be subtracted from their sum share one fate in the split."""
    return min(a, b), max(a, b)


def _add(rng: Random) -> Example:
    a, b = _summands(rng)
    templates = (
        "What is {a} + {b}?", "What is {a} plus {b}?", "{a} + {b}", "{a} + {b} = ?",
        "Add {a} and {b}.", "Calculate {a} + {b}.", "How much is {a} + {b}?",
    )  # fmt: skip
    return _ask(_phrase(rng, *templates, a=a, b=b), f"{a} + {b} = {a + b}", _sum_operands(a, b))


def _subtract(rng: Random) -> Example:
    b, difference = _summands(rng)
    a = b + difference
    templates = (
        "What is {a} - {b}?", "What is {a} minus {b}?", "{a} - {b}", "{a} - {b} = ?",
        "Subtract {b} from {a}.", "Calculate {a} - {b}.", "How much is {a} - {b}?",
    )  # fmt: skip
    return _ask(_phrase(rng, *templates, a=a, b=b), f"{a} - {b} = {difference}", _sum_operands(b, difference))


def _add_in_words(rng: Random) -> Example:
    # Numbers below twenty have words of their own: drawn like the others, both are below it in one sum of 25.
    a, b = _summands(rng) if rng.random() < 0.7 else (rng.randint(1, 20), rng.randint(1, 20))
    words = {"a": number_words(a), "b": number_words(b)}
    prompt = _phrase(
        rng, "What is {a} plus {b}?", "{a} plus {b}", "Add {a} and {b}.", "How much is {a} plus {b}?", **words
    )
    return _ask(prompt, f"{words['a']} plus {words['b']} is {number_words(a + b)}", _sum_operands(a, b))


def _gain(rng: Random) -> Example:
    a, b = _summands(rng)
    name, things = rng.choice(NAMES), rng.choice(COUNTABLES)
    templates = (
        "{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?",
        "{name} has {a} {things}. {name} buys {b} more. How many {things} does {name} have?",
        "{name} had {a} {things} and found {b} more. How many {things} does {name} have now?",
    )
    prompt = _phrase(rng, *templates, name=name, things=things, a=a, b=b)
    return _ask(prompt, f"{a} + {b} = {a + b}. {name} has {a + b} {things}.", _sum_operands(a, b))


def _loss(rng: Random) -> Example:
    b, left = _summands(rng)
    a, name, things = b + left, rng.choice(NAMES), rng.choice(COUNTABLES)
    templates = (
        "{name} has {a} {things} and gives away {b}. How many {things} does {name} have now?",
        "{name} has {a} {things}. {name} loses {b}. How many {things} does {name} have?",
        "{name} had {a} {things} and sold {b}. How many {things} does {name} have now?",
    )
    prompt = _phrase(rng, *templates, name=name, things=things, a=a, b=b)
    return _ask(prompt, f"{a} - {b} = {left}. {name} has {left} {things}.", _sum_operands(b, left))


def _compare(rng: Random) -> Example:
    a, b = rng.sample(range(1000), 2)
    larger = rng.random() < 0.5
    templates = (
        "Which is {word}, {a} or {b}?", "Which number is {word}: {a} or {b}?", "What is {word}, {a} or {b}?",
    )  # fmt: skip
    prompt = _phrase(rng, *templates, word=rng.choice(("larger", "bigger") if larger else ("smaller",)), a=a, b=b)
    return _ask(prompt, str(max(a, b) if larger else min(a, b)), sorted((a, b)))


def _then_add(rng: Random) -> Example:
    while True:
        first = _add(rng)
        total, more = int(first.expected.split(" = ")[1]), rng.randint(1, 20)
        # The second sum is on the same side of the split as the first.
        if held_out(_operands(_sum_operands(total, more))) == held_out(first.operands):
            break
    prompt = _phrase(rng, "Now add {n}.", "Add {n} to that.", "Plus {n}?", "And plus {n}?", n=more)
    return _follow(first, prompt, f"{total} + {more} = {total + more}")


# --- numbers and digits


def _spell_number(rng: Random) -> Example:
    number = rng.randrange(1000) if rng.random() < 0.7 else rng.randrange(100)
    templates = (
        "Spell {n}.", "Spell out {n}.", "Write {n} in words.", "Write the number {n} in words.",
        "How do you write {n} in words?", "{n} in words",
    )  # fmt: skip
    return _ask(_phrase(rng, *templates, n=number), number_words(number), (number,))


def _read_number(rng: Random) -> Example:
    number = rng.randrange(1000) if rng.random() < 0.7 else rng.randrange(100)
    templates = ("Write {n} in digits.", "Write {n} as a number.", "What is {n} in digits?", "{n} in digits")
    return _ask(_phrase(rng, *templates, n=number_words(number)), str(number), (number,))


def _reverse_digits(rng: Random) -> Example:
    digits = "".join(rng.choices("0123456789", k=rng.randint(3, 7)))
    templates = ("Reverse the digits {d}.", "Write the digits {d} backwards.", "Reverse {d}.", "{d} backwards")
    return _ask(_phrase(rng, *templates, d=digits), digits[::-1], (digits,))


# --- lists


def _some_words(rng: Random, least: int = 3, most: int = 6) -> list[str]:
    return rng.sample(WORDS, rng.randint(least, most))


def _sort_numbers(rng: Random) -> Example:
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
    prompt = _phrase(rng, *(falling_templates if falling else rising_templates), x=_listed(rng, numbers))
    return _ask(prompt, _joined(sorted(numbers, reverse=falling)), sorted(numbers))


def _sort_words(rng: Random) -> Example:
    words = _some_words(rng, 3, 5)
    templates = (
        "Sort these words: {x}", "Sort {x}", "Sort alphabetically: {x}", "Put these words in order: {x}",
        "Sort the words {x}.", "Sort these words alphabetically: {x}",
    )  # fmt: skip
    return _ask(_phrase(rng, *templates, x=_listed(rng, words)), _joined(sorted(words)), sorted(words))


def _reverse_words(rng: Random) -> Example:
    words = _some_words(rng)
    templates = (
        "Reverse this list: {x}", "Reverse the list {x}.", "Reverse {x}", "Reverse the order: {x}",
        "Write these words backwards: {x}", "Reverse these words: {x}",
    )  # fmt: skip
    return _ask(_phrase(rng, *templates, x=_listed(rng, words)), _joined(reversed(words)), sorted(words))


def _nth_word(rng: Random) -> Example:
    words = _some_words(rng)
    place, index = _place(rng, len(words))
    templates = (
        "What is the {p} word of this list: {x}?", "What is the {p} word in {x}?", "Which word is {p}: {x}?",
        "Give me the {p} word of {x}.",
    )  # fmt: skip
    return _ask(_phrase(rng, *templates, p=place, x=_listed(rng, words)), words[index], sorted(words))


def _place(rng: Random, count: int) -> tuple[str, int]:
    index = rng.randrange(count)
    return ("last", index) if index == count - 1 and rng.random() < 0.7 else (ORDINALS[index], index)


def _count_words(rng: Random) -> Example:
    words = _some_words(rng, 2, 8)
    templates = (
        "How many words are in this list: {x}?", "How many words: {x}?", "Count the words: {x}",
        "Count these words: {x}",
    )  # fmt: skip
    return _ask(_phrase(rng, *templates, x=_listed(rng, words)), str(len(words)), sorted(words))


# --- letter case


def _case_phrase(rng: Random) -> list[str]:
    return _some_words(rng, 1, 4) if rng.random() < 0.2 else _some_words(rng, 2, 4)


def _upper_case(rng: Random) -> Example:
    words = _case_phrase(rng)
    templates = (
        "Write in upper case: {x}", "Change to upper case: {x}", "Upper case: {x}", "Make this upper case: {x}",
        "Write in capital letters: {x}", "{x} in upper case",
    )  # fmt: skip
    text = " ".join(words)
    return _ask(_phrase(rng, *templates, x=text), text.upper(), sorted(words))


def _lower_case(rng: Random) -> Example:
    words = _case_phrase(rng)
    templates = (
        "Write in lower case: {x}", "Change to lower case: {x}", "Lower case: {x}", "Make this lower case: {x}",
        "Write in small letters: {x}",
    )  # fmt: skip
    text = " ".join(words)
    shown = text.upper() if rng.random() < 0.7 else text.title()
    return _ask(_phrase(rng, *templates, x=shown), text, sorted(words))


def _title_case(rng: Random) -> Example:
    words = _case_phrase(rng)
    templates = (
        "Write in title case: {x}",
        "Change to title case: {x}",
        "Title case: {x}",
        "Capitalize each word: {x}",
    )
    text = " ".join(words)
    return _ask(_phrase(rng, *templates, x=text), text.title(), sorted(words))


# --- records


def _person(rng: Random) -> dict[str, str | int]:
    return {
        "name": rng.choice(NAMES),
        "age": rng.randint(2, 99),
        "city": rng.choice(CITIES),
        "job": rng.choice(JOBS),
    }


_SENTENCES = {
    ("name", "age", "city"): (
        "{name} is {age} and lives in {city}.",
        "{name} is {age} years old and lives in {city}.",
        "{name} lives in {city} and is {age} years old.",
        "{name}, {age}, lives in {city}.",
        "My friend {name} from {city} is {age}.",
    ),
    ("name", "job", "city"): (
        "{name} is a {job} in {city}.",
        "{name} works as a {job} in {city}.",
        "{name} lives in {city} and works as a {job}.",
    ),
    ("name", "age", "job"): (
        "{name} is {age} and works as a {job}.",
        "{name} is a {job} and is {age} years old.",
        "{name}, {age}, is a {job}.",
    ),
    ("name", "age", "job", "city"): (
        "{name} is {age}, lives in {city} and works as a {job}.",
        "{name} is a {job} from {city} and is {age} years old.",
    ),
}


def _json(rng: Random) -> Example:
    person = _person(rng)
    fields = rng.choice(tuple(_SENTENCES))
    sentence = rng.choice(_SENTENCES[fields]).format(**person)
    templates = (
        "Extract the {f} as JSON: {s}", "Write as JSON: {s}", "Turn this into JSON: {s}",
        "Give me the {f} as JSON. {s}", "{s} Write this as JSON.",
    )  # fmt: skip
    named = ", ".join(fields[:-1]) + " and " + fields[-1]
    record = {field: person[field] for field in fields}
    prompt = rng.choice(templates).format(f=named, s=sentence)
    return _ask(prompt, json.dumps(record), person.values())


def _then_field(rng: Random) -> Example:
    first = _json(rng)
    record = json.loads(first.expected)
    field = rng.choice([name for name in record if name != "name"])
    name = record["name"]
    templates = {
        "age": ("How old is {name}?", "What is the age?", "And the age alone?"),
        "city": ("Where does {name} live?", "What is the city?", "Which city is it?"),
        "job": ("What is the job?", "What does {name} do?", "Which job is it?"),
    }[field]
    return _follow(first, _phrase(rng, *templates, name=name), str(record[field]))


_COLUMNS: dict[str, Callable[[Random], object]] = {
    "age": lambda rng: rng.randint(2, 99),
    "city": lambda rng: rng.choice(CITIES),
    "job": lambda rng: rng.choice(JOBS),
}


def _pairs(rng: Random, least: int, most: int) -> tuple[str, list[tuple[str, object]]]:
    column = rng.choice(tuple(_COLUMNS))
    names = rng.sample(NAMES, rng.randint(least, most))
    return column, [(name, _COLUMNS[column](rng)) for name in names]


def _markdown(column: str, pairs: list[tuple[str, object]]) -> str:
    return "\n".join([f"| name | {column} |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in pairs)])


def _table(rng: Random) -> Example:
    column, pairs = _pairs(rng, 2, 4)
    shown = ", ".join(f"{name} {value}" for name, value in pairs)
    if rng.random() < 0.4:
        shown = ", ".join(f"{name}: {value}" for name, value in pairs)
    templates = (
        "Make a table of name and {c}: {x}", "Write a table with name and {c}: {x}",
        "Turn this into a table of name and {c}: {x}", "Table of name and {c}: {x}",
    )  # fmt: skip
    prompt = _phrase(rng, *templates, c=column, x=shown)
    return _ask(prompt, _markdown(column, pairs), (value for pair in pairs for value in pair))


_LOOKUPS = {
    "age": ("How old is {n}?", "What is the age of {n}?"),
    "city": ("Where does {n} live?", "What is the city of {n}?"),
    "job": ("What is the job of {n}?", "What does {n} do?"),
}
# The name stands beside its value as in the table's row: one look-up after the other, where the value alone would take
# two in one pass, which the pocket did not learn in 12,000 steps.
_FOUND = {"age": "{n} is {v} years old.", "city": "{n} lives in {v}.", "job": "{n} is a {v}."}


_FACTS = {"age": "{n} is {v}.", "city": "{n} lives in {v}.", "job": "{n} is a {v}."}


def _facts(rng: Random, column: str, pairs: list[tuple[str, object]]) -> str:
    """The pairs as sentences, as a list or as a table."""
    style = rng.random()
    if style < 0.4:
        return " ".join(_FACTS[column].format(n=name, v=value) for name, value in pairs)
    if style < 0.7:
        return ", ".join(f"{name}: {value}" for name, value in pairs) + "."
    return _markdown(column, pairs) + "\n"


def _lookup(rng: Random) -> Example:
    column, pairs = _pairs(rng, 2, 4)
    name, value = rng.choice(pairs)
    prompt = f"{_facts(rng, column, pairs)} {_phrase(rng, *_LOOKUPS[column], n=name)}".replace("\n ", "\n")
    return _ask(prompt, _FOUND[column].format(n=name, v=value), (value for pair in pairs for value in pair))


_SEVERAL = {
    "age": ("How old are {n}?", "What are the ages of {n}?"),
    "city": ("Where do {n} live?", "What are the cities of {n}?"),
    "job": ("What are the jobs of {n}?", "What do {n} do?"),
}


def _several_lookups(rng: Random) -> Example:
    column, pairs = _pairs(rng, 2, 4)
    asked = rng.sample(pairs, rng.randint(2, min(3, len(pairs))))
    *names, last = (name for name, _ in asked)
    question = _phrase(rng, *_SEVERAL[column], n=f"{', '.join(names)} and {last}")
    prompt = f"{_facts(rng, column, pairs)} {question}".replace("\n ", "\n")
    answer = " ".join(_FOUND[column].format(n=name, v=value) for name, value in asked)
    return _ask(prompt, answer, (value for pair in pairs for value in pair))


def _table_lookup(rng: Random) -> Example:
    column, pairs = _pairs(rng, 2, 4)
    name, value = rng.choice(pairs)
    prompt = f"{_markdown(column, pairs)}\n{_phrase(rng, *_LOOKUPS[column], n=name)}"
    return _ask(prompt, _FOUND[column].format(n=name, v=value), (value for pair in pairs for value in pair))


def _then_lookup(rng: Random) -> Example:
    first = _table(rng)
    header, _, *lines = first.expected.splitlines()
    column = header.split()[3]
    name, value = rng.choice([line.strip("| ").split(" | ") for line in lines])
    return _follow(first, _phrase(rng, *_LOOKUPS[column], n=name), _FOUND[column].format(n=name, v=value))


# --- second turns about a list


def _list_turn(rng: Random) -> Example:
    return rng.choice((_sort_words, _reverse_words, _sort_words, _reverse_words, _sort_numbers))(rng)


def _word_list_turn(rng: Random) -> Example:
    return rng.choice((_sort_words, _reverse_words))(rng)


def _then_reverse(rng: Random) -> Example:
    first = _list_turn(rng)
    prompt = _phrase(
        rng, "Now reverse it.", "Reverse it.", "Reverse that.", "And backwards?", "Now the other way round."
    )
    return _follow(first, prompt, _joined(reversed(first.expected.split(", "))))


def _then_sort(rng: Random) -> Example:
    first = _reverse_words(rng)
    prompt = _phrase(rng, "Now sort it.", "Sort it.", "Now sort them.", "And sorted?", "Now sort the list.")
    return _follow(first, prompt, _joined(sorted(first.expected.split(", "))))


def _then_upper(rng: Random) -> Example:
    first = _word_list_turn(rng)
    templates = (
        "And in upper case?",
        "Now in upper case.",
        "And in upper case",
        "Write it in upper case.",
        "In capital letters.",
    )
    return _follow(first, _phrase(rng, *templates), first.expected.upper())


def _then_nth(rng: Random) -> Example:
    first = _word_list_turn(rng)
    words = first.expected.split(", ")
    place, index = _place(rng, len(words))
    templates = ("What was the {p} word?", "What is the {p} word?", "Which word is {p}?", "And the {p} word?")
    return _follow(first, _phrase(rng, *templates, p=place), words[index])


def _then_count(rng: Random) -> Example:
    first = _word_list_turn(rng)
    templates = ("How many words are there?", "How many words is that?", "How many are there?", "Count them.")
    return _follow(first, _phrase(rng, *templates), str(len(first.expected.split(", "))))


TASKS: tuple[Task, ...] = (
    Task("add", _add, share=1.5),
    Task("subtract", _subtract),
    Task("add_in_words", _add_in_words, share=6.0),
    Task("gain", _gain),
    Task("loss", _loss, share=1.5),
    Task("compare", _compare),
    Task("spell_number", _spell_number),
    Task("read_number", _read_number),
    Task("reverse_digits", _reverse_digits),
    Task("sort_numbers", _sort_numbers, share=2.0),
    Task("sort_words", _sort_words, share=4.0),
    Task("reverse_words", _reverse_words),
    Task("nth_word", _nth_word),
    Task("count_words", _count_words),
    Task("upper_case", _upper_case),
    Task("lower_case", _lower_case),
    Task("title_case", _title_case),
    Task("json", _json),
    Task("table", _table),
    # Sentences are looked up more easily than tables, and several questions in one prompt teach more than one does.
    Task("lookup", _lookup, share=4.0, promised=False),
    Task("several_lookups", _several_lookups, share=5.0, promised=False),
    Task("table_lookup", _table_lookup, share=4.0, promised=False),
    Task("then_add", _then_add, follow_up=True, share=2.0),
    Task("then_field", _then_field, follow_up=True),
    Task("then_lookup", _then_lookup, follow_up=True, share=4.0, promised=False),
    Task("then_reverse", _then_reverse, follow_up=True),
    Task("then_sort", _then_sort, follow_up=True, share=8.0),
    Task("then_upper", _then_upper, follow_up=True),
    Task("then_nth", _then_nth, follow_up=True),
    Task("then_count", _then_count, follow_up=True),
)
