"""The random numbers of a canvas: one stream for each (seed, canvas index), whatever else the engine works on.

The stream is the output of Philox4x64-10 (Salmon et al. 2011) under the 128-bit key (seed, canvas index) as numpy
counts it, and a number is made of the top bits of one 64-bit output. That is written out here, in place of numpy's own
distributions, since numpy keeps its bit generators stable over versions but not what its distributions make of them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class CanvasStream:
    """The draws of one canvas of `length` positions.

    In this order: `tokens` once for the initial canvas, then for every denoising step `uniforms` once for the
    candidates and `tokens` once for the renoising. Each draw takes `length` outputs of the generator.
    """

    def __init__(self, seed: int, canvas_index: int, length: int) -> None:
        """`seed` in `[0, 2^63)`, `canvas_index` from 0 within the request."""
        self._generator = np.random.Philox(key=np.array([seed, canvas_index], dtype=np.uint64))
        self._length = length

    def uniforms(self) -> NDArray[np.float32]:
        """`[length]` in `[0, 1)`: the top 24 bits over 2^24, all that float32 holds."""
        return (self._draw() >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)

    def tokens(self, vocab_size: int) -> NDArray[np.int64]:
        """`[length]` token ids in `[0, vocab_size)`: `floor(u * vocab_size)` with `u` the top 53 bits over 2^53."""
        uniform = (self._draw() >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return (uniform * vocab_size).astype(np.int64)

    def _draw(self) -> NDArray[np.uint64]:
        return self._generator.random_raw(self._length)
