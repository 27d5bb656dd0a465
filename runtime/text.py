"""Token ids to text while an answer grows: whole characters only, and never a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtime.vocabulary import Vocabulary


@dataclass(frozen=True)
class AddedText:
    """What a run of tokens adds to an answer."""

    text: str
    token_count: int
    """Tokens of the run that belong to the answer: all, or those that begin before the stop string."""
    stop_string: str | None
    """The stop string that was found; the answer ends before it."""


@dataclass(frozen=True)
class PreviewText:
    """A run of tokens as text, for display."""

    text: str
    token_lengths: tuple[int, ...]
    """Characters that each token adds to `text`; they sum to its length."""


class AnswerText:
    """The text of one answer, token run by token run.

    Held back until more is known are the bytes of an incomplete character and the longest end of the text that may
    become a stop string. Control tokens have no text. Invalid UTF-8 becomes U+FFFD, as `bytes.decode` does it. The stop
    string that counts is the first to be complete, and of two that are complete at once the longer one: it does not
    depend on how the tokens were divided into runs.
    """

    def __init__(self, vocabulary: Vocabulary, stop_strings: Sequence[str]) -> None:
        self._vocabulary, self._stop_strings = vocabulary, tuple(stop_strings)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def append(self, token_ids: NDArray[np.int64], last: bool) -> AddedText:
        """Add a run of tokens; with the `last` one everything held back comes out.

        A token counts as part of the answer if its text begins before the stop string, even if it reaches into it; the
        tokens of earlier runs have been told already and stay, also where a stop string turns out to begin in them.
        """
        pieces = self._decode(token_ids)
        text = self._held + "".join(pieces) + (self._decoder.decode(b"", final=True) if last else "")
        found = find_stop(text, self._stop_strings)
        if found is not None:
            count = _begun_before(found.begin - len(self._held), pieces)
            return AddedText(text[: found.begin], count, found.stop_string)
        keep = 0 if last else longest_stop_head(text, self._stop_strings)
        self._held = text[len(text) - keep :]
        return AddedText(text[: len(text) - keep], len(token_ids), None)

    def preview(self, token_ids: NDArray[np.int64]) -> PreviewText:
        """What the tokens would add, cut at a stop string, with nothing kept; what is held back now is not repeated."""
        state = self._decoder.getstate()
        pieces = self._decode(token_ids)
        if pieces:
            pieces[-1] += self._decoder.decode(b"", final=True)
        self._decoder.setstate(state)
        text = "".join(pieces)
        found = find_stop(self._held + text, self._stop_strings)
        if found is None:
            return PreviewText(text, tuple(map(len, pieces)))
        end = max(0, found.begin - len(self._held))
        ends = [min(end, total) for total in accumulate(map(len, pieces))]
        lengths = tuple(after - before for before, after in zip([0, *ends], ends, strict=False))
        return PreviewText(text[:end], lengths)

    def _decode(self, token_ids: NDArray[np.int64]) -> list[str]:
        vocabulary, decode, ids = self._vocabulary, self._decoder.decode, token_ids.tolist()
        pending, _ = self._decoder.getstate()
        texts = None if pending else vocabulary.texts(ids)
        return [decode(vocabulary.token_bytes(token_id)) for token_id in ids] if texts is None else texts


class FoundStop(NamedTuple):
    """Where a stop string lies."""

    begin: int
    stop_string: str


def find_stop(text: str, stop_strings: Iterable[str]) -> FoundStop | None:
    """The stop string that is complete first, the longest of several that end there; None where there is none."""
    found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stop_strings if stop in text]
    if not found:
        return None
    end, _, stop_string = min(found)
    return FoundStop(end - len(stop_string), stop_string)


def longest_stop_head(text: str, stop_strings: Iterable[str]) -> int:
    """Length of the longest end of `text` that a stop string could begin with, short of the whole stop string."""
    heads = (
        size
        for stop in stop_strings
        for size in range(1, min(len(stop) - 1, len(text)) + 1)
        if text.endswith(stop[:size])
    )
    return max(heads, default=0)


def _begun_before(end: int, pieces: Sequence[str]) -> int:
    begins = accumulate(map(len, pieces[:-1]), initial=0) if pieces else ()
    return sum(begin < end for begin in begins)
