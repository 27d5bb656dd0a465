"""Builds the pocket's tokenizer: Gemma 4's manner and control tokens, a vocabulary of its own.

4096 entries: the 24 control tokens, 256 bytes for fallback, and 3816 pieces, which is what it takes for each word of
the tasks to be one token in lower, Capitalised and UPPER case, with and without a space before it (about 2100), and for
stories to come to three characters a token. Twice as many would cost a tenth of the model's parameters.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from checkpoints.pocket_recipe.numbers import ORDINALS, number_words
from checkpoints.pocket_recipe.tasks import TASKS
from checkpoints.pocket_recipe.words import CITIES, COUNTABLES, JOBS, NAMES, WORDS

VOCABULARY_SIZE = 4096
CONTROL_TOKENS: tuple[str, ...] = (
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<mask>",
    "<|tool>",
    "<tool|>",
    "<|tool_call>",
    "<tool_call|>",
    "<|tool_response>",
    "<tool_response|>",
    '<|"|>',
    "<|think|>",
    "<|channel>",
    "<channel|>",
    "<|turn>",
    "<turn|>",
    "<|image>",
    "<|audio>",
    "<|image|>",
    "<|audio|>",
    "<image|>",
    "<audio|>",
    "<|video|>",
)
"""Gemma 4's, under its names; the id is the place in this tuple."""
CONTROL_IDS = {name: index for index, name in enumerate(CONTROL_TOKENS)}
PAD, EOS, TURN_END = (CONTROL_IDS[name] for name in ("<pad>", "<eos>", "<turn|>"))
END_TOKENS = (EOS, TURN_END, CONTROL_IDS["<|tool_response>"])

# A letter run or a punctuation run, each with at most one space before it; digits and newlines stand alone.
_PIECES = r"▁?\p{L}+|\p{N}|\n|▁?[^\p{L}\p{N}\n▁]+|▁+"


def build(stories: Iterable[str], definitions: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """`tokenizer.json` as an object, trained on the tasks, the definitions and the stories."""
    normalizer = normalizers.Replace(" ", "▁")
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizer
    trained.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECES), "isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(CONTROL_TOKENS) - 256,
        initial_alphabet=[chr(code) for code in range(33, 127)] + ["▁", "\n"],
        show_progress=False,
    )
    trained.train_from_iterator(_corpus(stories, definitions), trainer)
    return _assemble(json.loads(trained.to_str()))


def _corpus(stories: Iterable[str], definitions: Iterable[tuple[str, str]]) -> Iterator[str]:
    yield from (story for story in stories for _ in range(3))
    for word, gloss in definitions:
        yield from (f"{word}: {gloss}",) * 5
    for word in (*WORDS, *NAMES, *CITIES, *COUNTABLES, *JOBS, *ORDINALS, *map(number_words, range(21))):
        forms = (word, word.title(), word.upper()) if word in WORDS else (word,)
        yield from (form for plain in forms for form in (plain, f" {plain}") for _ in range(300))
    rng = Random(0)
    for index in range(30 * 400):
        example = TASKS[index % len(TASKS)].generate(rng)
        yield from (message["content"] for message in example.messages)
        yield example.expected


def _assemble(trained: dict[str, Any]) -> dict[str, Any]:
    pieces = sorted(trained["model"]["vocab"], key=trained["model"]["vocab"].__getitem__)
    names = [*CONTROL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    bos = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": kind}} for kind, name in enumerate("AB"))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": name, **flags} for index, name in enumerate(CONTROL_TOKENS)],
        "normalizer": trained["normalizer"],
        "pre_tokenizer": trained["pre_tokenizer"],
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, first],
            "pair": [bos, first, {"SpecialToken": {"id": "<bos>", "type_id": 1}}, second],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [CONTROL_IDS["<bos>"]], "tokens": ["<bos>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": trained["model"]
        | {
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {name: index for index, name in enumerate(names)},
        },
    }


def write(directory: Path, tokenizer: dict[str, Any]) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`."""
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False, indent=1), encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load(directory: Path) -> Tokenizer:
    """The tokenizer of a checkpoint directory."""
    return Tokenizer.from_file(str(directory / "tokenizer.json"))
