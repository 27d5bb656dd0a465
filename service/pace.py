"""How fast the engine has been of late: what a deadline is compared with before a request is begun."""

from __future__ import annotations

from collections import deque

from runtime.drain_rate import DrainRate
from runtime.events import Usage
from runtime.request import SamplingParameters

REMEMBERED = 32
"""Generations whose steps are remembered; the fastest of them counts, so that a crowd that has left is soon forgotten
and nobody is refused who could have made it."""


class Pace:
    """Measures generations as they end."""

    def __init__(self) -> None:
        self._step_seconds: deque[float] = deque(maxlen=REMEMBERED)
        self._drain = DrainRate()
        self._open = 0

    def began(self, now: float) -> None:
        """A generation was queued."""
        self._open += 1
        self._drain.busy_from(now)

    def ended(self, now: float, usage: Usage | None) -> None:
        """A generation ended, with `usage` where it ended well."""
        self._open -= 1
        if usage is not None and usage.denoising_steps:
            self._step_seconds.append(usage.denoise_seconds / usage.denoising_steps)
        self._drain.finished(now, idle=not self._open)

    def least_seconds(self, sampling: SamplingParameters, waiting: int) -> float:
        """How long a request takes at least to its first block, by what was measured; 0 before anything was.

        Waiting for its turn, then the fewest steps of a block. Encoding the prompt is not counted, since it may be in
        memory already.

        Args:
            sampling: the request's settings.
            waiting: requests in the queue.
        """
        if not self._step_seconds:
            return 0.0
        return self._drain.seconds(waiting) + fewest_steps(sampling) * min(self._step_seconds)


def fewest_steps(sampling: SamplingParameters) -> int:
    """Steps after which a block can end at the earliest: it must have stayed the same, and become sure."""
    if sampling.confidence_threshold <= 0:
        return sampling.max_denoising_steps
    return min(sampling.max_denoising_steps, sampling.stability_threshold + 1)
