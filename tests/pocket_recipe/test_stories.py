"""The story sampler against other readings of the same weights and vocabulary: transformers' Llama, tokenizers' BPE."""

from __future__ import annotations

import math
import struct
from itertools import pairwise, product
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from checkpoints.pocket_recipe import prose, stories15m
from checkpoints.pocket_recipe.stories15m import Shape, StoryModel
from checkpoints.pocket_recipe.words import NAMES, WORDS

SHAPE = Shape(hidden=16, intermediate=24, layers=2, heads=2, kv_heads=2, vocabulary=0, context=48)


def _vocabulary(letters: str, longest: int, keep: int, seed: int) -> tuple[list[bytes], list[float]]:
    """Control tokens, then every letter, then some pieces that merge from smaller ones, in an order of their own."""
    rng = Random(seed)
    pieces = [b"<unk>", b"<s>", b"</s>", b" ", *(letter.encode() for letter in letters)]
    while len(pieces) < keep:
        piece = rng.choice(pieces[3:]) + rng.choice(pieces[3:])
        if piece not in pieces and len(piece) <= longest and b" " not in piece[1:]:
            pieces.append(piece)
    ranks = list(range(len(pieces)))
    rng.shuffle(ranks)
    return pieces, [-float(rank) for rank in ranks]


def _model(letters: str = "abc", longest: int = 5, keep: int = 60, seed: int = 1) -> StoryModel:
    pieces, scores = _vocabulary(letters, longest, keep, seed)
    shape = SHAPE._replace(vocabulary=len(pieces))
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.randn(size, generator=generator) * 0.3 + (1.0 if "norm" in name else 0.0)
        for name, size in stories15m._tensors(shape)
    }
    return StoryModel(shape, weights, pieces, scores)


def _oracle(model: StoryModel) -> Tokenizer:
    """The same vocabulary as tokenizers reads a SentencePiece BPE: merges in the order of what they make."""
    names = [piece.decode() for piece in model.pieces]
    ids = {name: index for index, name in enumerate(names)}
    by_score = sorted(names[3:], key=lambda name: -model.scores[ids[name]])
    splits = ((name[:cut], name[cut:]) for name in by_score for cut in range(1, len(name)))
    merges = [(head, tail) for head, tail in splits if head in ids and tail in ids]
    return Tokenizer(models.BPE(ids, merges))


@pytest.mark.parametrize("seed", range(4))
def test_words_are_split_as_another_bpe_splits_them(seed: int) -> None:
    """Catches merges from the left in place of the best first, ties of equal pieces, and a lost space."""
    model = _model(seed=seed)
    oracle = _oracle(model)
    for length in range(1, 7):
        for letters in product("abc", repeat=length):
            word = "".join(letters)
            assert stories15m.encode(model, word) == oracle.encode(f" {word}").ids, word


@given(st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=5))
def test_text_is_encoded_word_by_word(words: list[str]) -> None:
    """Catches a merge across a space, and spaces that make tokens of their own."""
    ids = stories15m.encode(PROSE_MODEL, "  ".join(words))
    assert b"".join(PROSE_MODEL.pieces[index] for index in ids).decode() == " " + " ".join(words)
    assert ids == [index for word in words for index in stories15m.encode(PROSE_MODEL, word)]


PROSE_MODEL = _model("ab", seed=9)


def _interleaved_to_halves(weight: Tensor, heads: int) -> Tensor:
    """llama2.c rotates neighbours, transformers rotates the first half of a head with the second."""
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _llama(model: StoryModel) -> LlamaForCausalLM:
    shape, weights = model.shape, model.weights
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        max_position_embeddings=shape.context,
    )
    llama = LlamaForCausalLM(config).eval()
    state = {"model.embed_tokens.weight": weights["embedding"], "lm_head.weight": weights["embedding"]}
    state["model.norm.weight"] = weights["norm"]
    for layer in range(shape.layers):
        name = f"model.layers.{layer}."
        state[f"{name}input_layernorm.weight"] = weights["attention_norm"][layer]
        state[f"{name}post_attention_layernorm.weight"] = weights["feed_forward_norm"][layer]
        for theirs, ours in (("q", "query"), ("k", "key")):
            halves = _interleaved_to_halves(weights[ours][layer], shape.heads)
            state[f"{name}self_attn.{theirs}_proj.weight"] = halves
        state[f"{name}self_attn.v_proj.weight"] = weights["value"][layer]
        state[f"{name}self_attn.o_proj.weight"] = weights["output"][layer]
        for part in ("gate", "up", "down"):
            state[f"{name}mlp.{part}_proj.weight"] = weights[part][layer]
    llama.load_state_dict(state)
    return llama


@torch.inference_mode()
def test_loss_is_what_llama_gives() -> None:
    """Catches wrong rotations, norms or residuals, a target off by one, and padding that counts as text."""
    model = _model()
    llama, texts = _llama(model), ["abc cab a", "bb", "cabcab abcabc ccc bacab"]
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([[1, *stories15m.encode(model, text)]])
        tokens = ids.shape[1] - 1
        total, count = total + llama(input_ids=ids, labels=ids).loss.item() * tokens, count + tokens
    # float32, a mean of some dozen tokens of about ln 60 nats; a wrong rotation changes it by tenths.
    assert math.isclose(stories15m.loss(model, texts), total / count, rel_tol=1e-5)


@pytest.mark.parametrize("odd", ["ab é", "ab \x01", "ab \ufffd"])
def test_odd_characters_are_judged_too(odd: str) -> None:
    """Catches a judge that ends the whole comparison over one character that it has no token for."""
    model = _model("ab?")
    assert stories15m.loss(model, [odd]) == stories15m.loss(model, ["ab ?"])


def test_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Catches weights in another order, rotary tables read as vocabulary, and a lost score."""
    model = _model()
    shape, head = model.shape, model.shape.hidden // model.shape.heads
    raw = struct.pack("<7i", *shape)
    raw += b"".join(model.weights[name].numpy().tobytes() for name, _ in stories15m._tensors(shape))
    raw += np.ones(shape.context * head, "<f4").tobytes() + struct.pack("<i", max(map(len, model.pieces)))
    for piece, score in zip(model.pieces, model.scores, strict=True):
        raw += struct.pack("<fi", score, len(piece)) + piece
    (tmp_path / "llama2.data").write_bytes(raw)
    stories15m.shrink(tmp_path / "llama2.data", tmp_path / "stories15m.f16")
    loaded = stories15m.load(tmp_path / "stories15m.f16", torch.device("cpu"), torch.float32)
    assert (loaded.shape, loaded.pieces, loaded.scores) == (shape, model.pieces, model.scores)
    assert loaded.weights.keys() == model.weights.keys()
    for name, weight in model.weights.items():
        assert torch.equal(loaded.weights[name], weight.half().float()), name


def test_beginnings_name_words_and_names_with_their_article() -> None:
    """Catches `a apple`, an unfilled blank, and lists of which only some words are ever told about."""
    rng = Random(1)
    drawn = [prose.beginning(rng) for _ in range(20_000)]
    told = [text for text in drawn if text]
    # Four in ten begin as they like; 20,000 of them stray by 5 standard deviations (0.017) less than once in a million.
    assert abs(1 - len(told) / len(drawn) - 0.4) < 0.018
    assert not any("{" in text for text in told)
    mentioned = {word.strip(",") for text in told for word in text.split()}
    # Each word comes 30 times on average: that one never does has a chance of 400 / e^30.
    assert mentioned >= set(WORDS)
    assert mentioned >= set(NAMES)
    for text in told:
        words = text.split()
        for article, following in pairwise(words):
            if article in ("a", "an"):
                assert (article == "an") == (following[0] in "aeiou"), text


def test_openings_ask_for_what_their_text_has() -> None:
    """Catches a count of sentences or a topic that the answer does not keep."""
    story = "One day, Tim saw a cat. The cat was big! Tim ran. He was sad. The end."
    counts = {"one": 1, "a": 1, "two": 2, "three": 3, "four": 4, "few": 4}
    for seed in range(100):
        example = prose.opening(Random(seed), [story])
        words = example.messages[0]["content"].removesuffix(".").split()
        asked = words[words.index("about") - 2] if "few" not in words else "few"
        sentences = sum(example.expected.count(mark) for mark in ".!")
        assert sentences == counts[asked], example
        topic = words[words.index("about") + 1 :]
        assert all(word in example.expected for word in topic if word not in ("and", "a")), example
