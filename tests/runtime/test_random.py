"""The stream against Philox4x64-10 written out in whole numbers, and pinned: a change changes every seed's answer."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from runtime.random import CanvasStream
from runtime.request import MAX_SEED

_WORD = 2**64


def philox(counter: int, key: tuple[int, int]) -> tuple[int, int, int, int]:
    """One block of Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3")."""
    words = [counter % _WORD, counter // _WORD, 0, 0]
    first_key, second_key = key
    for _ in range(10):
        first = 0xD2E7470EE14C6C93 * words[0]
        second = 0xCA5A826395121157 * words[2]
        words = [
            second // _WORD ^ words[1] ^ first_key,
            second % _WORD,
            first // _WORD ^ words[3] ^ second_key,
            first % _WORD,
        ]
        first_key = (first_key + 0x9E3779B97F4A7C15) % _WORD
        second_key = (second_key + 0xBB67AE8584CAA73B) % _WORD
    return words[0], words[1], words[2], words[3]


def test_philox_of_the_test_is_the_published_one() -> None:
    """Known answer of the authors' library (Random123, kat_vectors): all bits zero."""
    published = (0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B)
    assert philox(0, (0, 0)) == published


@pytest.mark.parametrize(
    ("seed", "canvas_index", "vocab_size"),
    [
        (0, 0, 262_144),  # a power of two, the released vocabulary
        (MAX_SEED, 3, 4_096),  # the largest seed: no sign, no wrap
        (12_345, 1_000_000, 61),  # a prime vocabulary: floor(u * V) rounds
    ],
)
def test_draws_are_top_bits_of_philox_in_order(seed: int, canvas_index: int, vocab_size: int) -> None:
    length = 10  # not a multiple of a block: draws must not begin blocks anew
    stream = CanvasStream(seed, canvas_index, length)
    # numpy counts before it draws: the first block is that of counter 1.
    words = [word for counter in range(1, 12) for word in philox(counter, (seed, canvas_index))]
    for draw in range(4):
        mine = words[draw * length : (draw + 1) * length]
        if draw % 2:
            assert stream.uniforms().tolist() == [float(Fraction(word >> 40, 2**24)) for word in mine]
        else:
            assert stream.tokens(vocab_size).tolist() == [(word >> 11) * vocab_size // 2**53 for word in mine]


def test_stream_is_pinned() -> None:
    stream = CanvasStream(seed=2026, canvas_index=1, length=256)
    assert stream.tokens(262_144)[:4].tolist() == [184895, 1164, 195102, 40002]
    assert (stream.uniforms()[:4] * 2**24).tolist() == [12214532.0, 10980892.0, 6001289.0, 3343848.0]


def test_ranges_and_types() -> None:
    stream = CanvasStream(seed=1, canvas_index=0, length=100_000)
    tokens, uniforms = stream.tokens(7), stream.uniforms()
    assert (tokens.dtype, uniforms.dtype) == (np.int64, np.float32)
    assert np.bincount(tokens).min() > 0
    assert (tokens.min(), tokens.max()) == (0, 6)
    assert uniforms.min() >= 0
    assert uniforms.max() < 1


@pytest.mark.parametrize("other", [(8, 0), (7, 1), (0, 7)])
def test_seeds_and_canvases_have_streams_of_their_own(other: tuple[int, int]) -> None:
    """(0, 7): seed and canvas index must not be interchangeable."""
    assert not np.array_equal(CanvasStream(7, 0, 64).tokens(4096), CanvasStream(*other, 64).tokens(4096))
