"""A person in a sentence, as JSON, and one of its fields."""

from __future__ import annotations

import json
from random import Random

from checkpoints.pocket_recipe.tasks.example import Example, ask, follow
from checkpoints.pocket_recipe.tasks.phrasing import phrase
from checkpoints.pocket_recipe.words import CITIES, JOBS, NAMES


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


def as_json(rng: Random) -> Example:
    """The fields that a sentence names, as a JSON object."""
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
    return ask(prompt, json.dumps(record), person.values())


def then_field(rng: Random) -> Example:
    """A JSON object, then one of its fields."""
    first = as_json(rng)
    record = json.loads(first.expected)
    field = rng.choice([name for name in record if name != "name"])
    name = record["name"]
    templates = {
        "age": ("How old is {name}?", "What is the age?", "And the age alone?"),
        "city": ("Where does {name} live?", "What is the city?", "Which city is it?"),
        "job": ("What is the job?", "What does {name} do?", "Which job is it?"),
    }[field]
    return follow(first, phrase(rng, *templates, name=name), str(record[field]))
