"""The pocket's tokenizer and chat template as their users load them."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from checkpoints.pocket_recipe.batches import prompt_text
from checkpoints.pocket_recipe.tokenizer import CONTROL_IDS, CONTROL_TOKENS, VOCABULARY_SIZE
from checkpoints.pocket_recipe.words import WORDS

POCKET = Path(__file__).parents[2] / "checkpoints" / "pocket"


@pytest.fixture(scope="module")
def loaded() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(POCKET)


def test_special_tokens_have_gemma_names_and_places(loaded: PreTrainedTokenizerFast) -> None:
    """Catches a shifted vocabulary."""
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.bos_token_id, loaded.mask_token_id) == (0, 1, 2, 4)
    assert len(loaded) == VOCABULARY_SIZE
    assert loaded.convert_tokens_to_ids(list(CONTROL_TOKENS)) == list(range(len(CONTROL_TOKENS)))


@pytest.mark.parametrize(
    "text", ["two  spaces\n\n and\ttabs", "naïve 漢字 😀", '{"a": [1, 23]}', "| a |\n| --- |", " x"]
)
def test_text_survives_a_round_trip(loaded: PreTrainedTokenizerFast, text: str) -> None:
    """Catches a lossy normalizer and missing byte fallback."""
    assert loaded.decode(loaded.encode(text, add_special_tokens=False)) == text


def test_digits_and_newlines_stand_alone_and_task_words_are_one_token(loaded: PreTrainedTokenizerFast) -> None:
    """Catches a merge across digits, and a word list that outgrew the vocabulary."""
    assert loaded.tokenize("1234\n\n5") == ["1", "2", "3", "4", "\n", "\n", "5"]
    forms = [form for word in WORDS for form in (word, word.upper(), word.title(), f" {word}", f" {word.upper()}")]
    assert {len(loaded.tokenize(form)) for form in forms} == {1}


def test_merges_cannot_spell_a_control_token(loaded: PreTrainedTokenizerFast) -> None:
    """Catches a control token that ordinary pieces of text can become."""
    merges = {"".join(pair) for pair in _merges(loaded)}
    assert not merges & set(CONTROL_IDS)


def _merges(loaded: PreTrainedTokenizerFast) -> list[list[str]]:
    import json

    return json.loads(loaded.backend_tokenizer.to_str())["model"]["merges"]  # type: ignore[no-any-return]


def test_template_renders_what_training_saw(loaded: PreTrainedTokenizerFast) -> None:
    """Catches a template that differs from the recipe's by a newline."""
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Sort: b a "},
        {"role": "assistant", "content": "a, b"},
        {"role": "user", "content": "Reverse it."},
    ]
    rendered = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == prompt_text(messages)
    ids = loaded.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == loaded.encode(rendered, add_special_tokens=False)
    assert ids[0] == CONTROL_IDS["<bos>"]
