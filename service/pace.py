"""How fast the engine has been of late: what a deadline is compared with before a request is begun."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from runtime.events import Usage
from runtime.request import SamplingParameters

REMEMBERED = 32
"""Generations whose steps are remembered; the fastest of them counts, so that a crowd that has left is soon forgotten
and nobody is refused who could have made it."""

REMEMBERED_SECONDS = 30.0
"""How long a generation is remembered: where what was measured in a crowd has everybody refused, nothing new is."""


class Pace:
    """Measures generations as they end."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with nothing measured; `clock` tells seconds."""
        self._clock = clock
        self._measured: deque[tuple[float, float]] = deque(maxlen=REMEMBERED)
        """When a generation ended, and its seconds a step."""

    def learn(self, usage: Usage) -> None:
        """A generation has ended well."""
        if usage.denoising_steps:
            self._measured.append((self._clock(), usage.denoise_seconds / usage.denoising_steps))

    def least_seconds(self, sampling: SamplingParameters) -> float:
        """How long a request takes from its beginning to its first block at least; 0 where nothing was measured.

        Encoding its prompt is not counted, since it may be in memory already, nor is the queue, in which it may be
        next, whoever else waits.
        """
        oldest = self._clock() - REMEMBERED_SECONDS
        return fewest_steps(sampling) * min(
            (seconds for when, seconds in self._measured if when >= oldest), default=0.0
        )


def fewest_steps(sampling: SamplingParameters) -> int:
    """Steps after which a block can end at the earliest: it must have stayed the same, and become sure."""
    if sampling.confidence_threshold <= 0:
        return sampling.max_denoising_steps
    return min(sampling.max_denoising_steps, sampling.stability_threshold + 1)
