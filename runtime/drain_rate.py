"""How fast requests leave a busy engine: what a client that is turned away is told to wait."""

from __future__ import annotations

FIRST_GUESS = 1.0
"""Seconds a request is taken to need before any has finished."""
LONGEST_RETRY = 60.0
"""Seconds; a client that comes later than this learns nothing new by waiting."""
SMOOTHING = 0.2
"""Weight of the newest interval: about the last ten requests count."""


class DrainRate:
    """Smoothed seconds between two requests leaving a busy engine."""

    def __init__(self) -> None:
        self._interval: float | None = None
        self._since: float | None = None

    def busy_from(self, now: float) -> None:
        """The engine has work from now on, if it had none."""
        if self._since is None:
            self._since = now

    def finished(self, now: float, idle: bool) -> None:
        """A request left; `idle` says that it was the last one, so that the time from here on is nobody's."""
        if self._since is not None:
            interval = now - self._since
            previous = interval if self._interval is None else self._interval
            self._interval = previous + SMOOTHING * (interval - previous)
        self._since = None if idle else now

    def seconds(self, requests: int) -> float:
        """How long that many requests take to leave, at most `LONGEST_RETRY`."""
        interval = FIRST_GUESS if self._interval is None else self._interval
        return min(LONGEST_RETRY, requests * interval)
