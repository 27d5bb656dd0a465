"""Texts of growing answers against the whole answer decoded at once and searched character by character."""

from __future__ import annotations

import codecs
import lzma
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders

from runtime.errors import BundleError
from runtime.text import AnswerText
from runtime.vocabulary import Vocabulary
from tests.runtime.vocabularies import CONTROL_TOKENS, byte_tokenizer

GEMMA = Path(__file__).parents[1] / "data" / "gemma4_tokenizer.json.xz"
VOCABULARY = Vocabulary(byte_tokenizer())
SIZE = byte_tokenizer().get_vocab_size()

# Mostly pieces and the bytes of few characters, so that stop strings and split characters come up often.
token_ids = st.one_of(
    st.integers(0, SIZE - 1),
    st.sampled_from([len(CONTROL_TOKENS) + byte for byte in (*"é🦄".encode(), 0xFF, 0x80, ord("E"), ord("a"))]),
    st.integers(len(CONTROL_TOKENS) + 256, SIZE + 3),  # pieces, and three ids that the tokenizer does not have
)
runs = st.lists(st.lists(token_ids, max_size=8), min_size=1, max_size=6)
stops = st.lists(
    st.one_of(
        st.sampled_from(["END", "EN", "ND", "E", " a", "aa", "aab", "é", "🦄b", "\ufffd", "\ufffd\ufffd", "aEND"]),
        st.text("aEND é🦄\n", min_size=1, max_size=4),
    ),
    max_size=3,
)


def array(ids: list[int]) -> NDArray[np.int64]:
    return np.array(ids, dtype=np.int64)


def raw_bytes(ids: list[int]) -> bytes:
    names = {index: name for name, index in byte_tokenizer().get_vocab().items()}
    pieces = []
    for index in ids:
        name = names.get(index, "")
        if name.startswith("<0x"):
            pieces.append(bytes([int(name[3:5], 16)]))
        elif name not in CONTROL_TOKENS:
            pieces.append(name.replace("▁", " ").encode())
    return b"".join(pieces)


def whole_text(ids: list[int]) -> str:
    """Everything decoded at once."""
    return raw_bytes(ids).decode("utf-8", errors="replace")


def characters(ids: list[int]) -> int:
    """Characters that these tokens complete: all but a last one of which bytes are missing."""
    return len(codecs.utf_8_decode(raw_bytes(ids), "replace", False)[0])


def cut(text: str, stop_strings: list[str]) -> tuple[str, str | None]:
    """`text` before the stop string that is complete first, the longest of those, and that stop string."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stop_strings, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


def run_through(blocks: list[list[int]], stop_strings: list[str]) -> tuple[list[str], str | None, int]:
    """Texts that came out, the stop string found, and tokens counted as the answer's."""
    answer, texts, count = AnswerText(VOCABULARY, stop_strings), [], 0
    for index, block in enumerate(blocks):
        added = answer.append(array(block), last=index == len(blocks) - 1)
        texts.append(added.text)
        count += added.token_count
        if added.stop_string is not None:
            return texts, added.stop_string, count
    return texts, None, count


@settings(max_examples=500)
@given(runs, stops)
def test_runs_add_up_to_the_whole_text_cut_at_the_first_stop_string(
    blocks: list[list[int]], stop_strings: list[str]
) -> None:
    ids = [token for block in blocks for token in block]
    texts, stop_string, count = run_through(blocks, stop_strings)
    assert ("".join(texts), stop_string) == cut(whole_text(ids), stop_strings)
    assert not any(stop in "".join(texts) for stop in stop_strings)
    # Of the run in which the stop string became complete, the tokens that begin before it; of the others all.
    earlier = sum(map(len, blocks[: len(texts) - 1]))
    last = range(earlier, earlier + len(blocks[len(texts) - 1]))
    counted = [index for index in last if stop_string is None or characters(ids[:index]) < len("".join(texts))]
    assert count == earlier + len(counted)


@given(runs, stops)
def test_no_event_splits_a_character_or_shows_the_head_of_a_stop_string(
    blocks: list[list[int]], stop_strings: list[str]
) -> None:
    """What has come out at any point is part of the answer whatever comes next: here, each stop string's rest."""
    answer, out = AnswerText(VOCABULARY, stop_strings), ""
    for block in blocks:
        added = answer.append(array(block), last=False)
        out += added.text
        if added.stop_string is not None:
            return
    for stop in stop_strings:
        for size in range(1, len(stop)):
            assert not out.endswith(stop[:size]), "would be the head of a stop string if its rest came"


@given(runs)
def test_valid_text_is_what_the_tokenizer_decodes(blocks: list[list[int]]) -> None:
    """The library decodes a whole run of bytes or none of it, so the two are compared where all is valid UTF-8."""
    ids = [token for block in blocks for token in block if token < SIZE]
    if "\ufffd" not in whole_text(ids):
        texts, _, _ = run_through(blocks, [])
        assert "".join(texts) == byte_tokenizer().decode(ids, skip_special_tokens=True)


@given(st.lists(token_ids, max_size=8), st.lists(token_ids, max_size=12), stops)
def test_preview_changes_nothing_and_accounts_for_each_character(
    before: list[int], ids: list[int], stop_strings: list[str]
) -> None:
    answer, undisturbed = AnswerText(VOCABULARY, stop_strings), AnswerText(VOCABULARY, stop_strings)
    if (
        answer.append(array(before), last=False).stop_string
        or undisturbed.append(array(before), last=False).stop_string
    ):
        return
    preview = answer.preview(array(ids))
    assert len(preview.token_lengths) == len(ids)
    assert sum(preview.token_lengths) == len(preview.text)
    assert min(preview.token_lengths, default=0) >= 0
    assert not any(stop in preview.text for stop in stop_strings)
    assert answer.append(array(ids), last=True) == undisturbed.append(array(ids), last=True)


def test_characters_belong_to_the_token_that_completes_them() -> None:
    horse = [len(CONTROL_TOKENS) + byte for byte in "🦄".encode()]
    a = byte_tokenizer().token_to_id("a")
    preview = AnswerText(VOCABULARY, ()).preview(array([a, *horse, a, horse[0]]))
    assert (preview.text, preview.token_lengths) == ("a🦄a\ufffd", (1, 0, 0, 0, 1, 1, 1))


def test_tokens_that_begin_before_the_stop_string_are_counted() -> None:
    """ "ab" reaches into the stop string "bEN", which ends in the next block; "▁a" before it is told already."""
    name = byte_tokenizer().token_to_id
    answer = AnswerText(VOCABULARY, ("bEN",))
    first = answer.append(array([name("▁a"), name("ab"), name("E")]), last=False)
    assert (first.text, first.token_count, first.stop_string) == (" aa", 3, None)
    second = answer.append(array([name("N"), name("D")]), last=False)
    assert (second.text, second.token_count, second.stop_string) == ("", 0, "bEN")
    once = AnswerText(VOCABULARY, ("bEN",)).append(array([name("▁a"), name("ab"), name("E"), name("N")]), last=False)
    assert (once.text, once.token_count, once.stop_string) == (" aa", 2, "bEN")


def test_text_held_back_is_none_of_the_runs_tokens() -> None:
    """The "E" held back was no stop string's head after all; the one that is begins behind the run's first token."""
    name = byte_tokenizer().token_to_id
    answer = AnswerText(VOCABULARY, ("END",))
    assert answer.append(array([name("E")]), last=False).text == ""
    added = answer.append(array([name("a"), name("E"), name("N"), name("D")]), last=False)
    assert (added.text, added.token_count, added.stop_string) == ("Ea", 1, "END")


@pytest.mark.parametrize("stop_strings", [("ND", "END"), ("END", "ND")])
def test_longer_of_two_stop_strings_that_end_together_counts(stop_strings: tuple[str, str]) -> None:
    name = byte_tokenizer().token_to_id
    added = AnswerText(VOCABULARY, stop_strings).append(array([name("a"), name("END")]), last=False)
    assert (added.text, added.token_count, added.stop_string) == ("a", 1, "END")


def test_foreign_decoders_are_refused() -> None:
    """A decoder that strips the first space, as Llama's does, makes a token's text depend on its place."""
    tokenizer = byte_tokenizer()
    tokenizer.decoder = decoders.Metaspace()
    with pytest.raises(BundleError, match="not Gemma's"):
        Vocabulary(tokenizer)


@pytest.fixture(scope="module")
def gemma() -> Tokenizer:
    return Tokenizer.from_str(lzma.decompress(GEMMA.read_bytes()).decode())


@pytest.mark.parametrize(
    "text",
    ["Grüße, Welt! 🦄\n\n\tEnde", "漢字とかな 한국어 العربية हिन्दी", "a  b   c\r\n", "def f(x):\n    return x\n"],
)
def test_gemmas_tokens_come_back_as_the_text(gemma: Tokenizer, text: str) -> None:
    vocabulary = Vocabulary(gemma)
    ids = vocabulary.encode(text)
    answer = AnswerText(vocabulary, ())
    assert "".join(answer.append(array([token]), last=False).text for token in ids) == text
    assert gemma.decode(ids) == text
