"""Short definitions of common nouns from WordNet 3.0 (Debian package `wordnet-base`, WordNet licence)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from checkpoints.pocket_recipe.words import WORDS

_COUNT = 950
_LONGEST = 80
_LONGEST_OF_TASKS = 120
"""Characters. The tasks' words are the ones people ask for: with 80 the dog and the cat would be missing."""


def extract(wordnet: Path) -> list[tuple[str, str]]:
    """`(word, definition)` of the tasks' words and of the nouns most often tagged in WordNet's own corpora.

    Args:
        wordnet: the directory with `index.noun`, `data.noun` and `cntlist.rev`.
    """
    senses, glosses = dict(_first_senses(wordnet)), dict(_glosses(wordnet))
    others = [word for word in _by_frequency(wordnet) if word not in set(WORDS)]
    limits = [*((word, _LONGEST_OF_TASKS) for word in WORDS), *((word, _LONGEST) for word in others)]
    found = [(word, glosses.get(senses.get(word, ""), ""), longest) for word, longest in limits]
    return [(word, gloss) for word, gloss, longest in found if 0 < len(gloss) <= longest][:_COUNT]


def _lines(path: Path) -> Iterator[str]:
    # The licence at the head of each file is indented by two spaces.
    return (line for line in path.read_text(encoding="latin-1").splitlines() if not line.startswith("  "))


def _first_senses(wordnet: Path) -> Iterator[tuple[str, str]]:
    """The offset of each noun's most frequent sense."""
    for line in _lines(wordnet / "index.noun"):
        fields = line.split()
        yield fields[0], fields[6 + int(fields[3])]


def _glosses(wordnet: Path) -> Iterator[tuple[str, str]]:
    for line in _lines(wordnet / "data.noun"):
        gloss = line.partition(" | ")[2].split(";")[0]
        plain = " ".join(re.sub(r"\([^)]*\)", "", gloss).split())
        if plain.isascii() and '"' not in plain:
            yield line.split()[0], plain


def _by_frequency(wordnet: Path) -> list[str]:
    counts: dict[str, int] = {}
    for line in _lines(wordnet / "cntlist.rev"):
        key, _, count = line.split()
        word, _, rest = key.partition("%")
        if rest.startswith("1:") and re.fullmatch("[a-z]{3,10}", word):
            counts[word] = counts.get(word, 0) + int(count)
    return sorted(counts, key=lambda word: -counts[word])
