"""What a benchmark is given and what it reports."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Setting:
    """What every benchmark measures on."""

    bundle: Path
    checkpoint: Path | None
    """The Hugging Face directory that the bundle was made of; None where the reference is not to be run."""
    threads: int
    rounds: int
    """How often a timed thing is repeated."""


@dataclass(frozen=True)
class Figure:
    """One measured number."""

    name: str
    value: float
    unit: str
    most: float | None = None
    """The bar, where less is better."""
    least: float | None = None
    """The bar, where more is better."""
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the bar is met; None where there is none."""
        if self.most is not None:
            return self.value <= self.most
        return None if self.least is None else self.value >= self.least


class Unavailable(Exception):
    """A benchmark cannot run here; says what is missing."""


def milliseconds(seconds: Sequence[float]) -> float:
    """The median."""
    return statistics.median(seconds) * 1e3


def quiet_milliseconds(seconds: Sequence[float]) -> float:
    """The first decile: what the machine does when nothing else runs on it."""
    return statistics.quantiles(seconds, n=10)[0] * 1e3
