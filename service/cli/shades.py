"""The colours in which tokens are shown: from green where the model is sure to grey where it guesses."""

from __future__ import annotations

import math

from rich.color import Color
from rich.color_triplet import ColorTriplet
from rich.style import Style

SURE, GUESS = (120, 220, 140), (90, 90, 100)
FADED = 4.0
"""Nats from which on a token is as grey as it gets: a choice among 55 equally likely tokens."""


def rgb(entropy: float) -> tuple[int, int, int]:
    """The colour of a token whose entropy is `entropy` nats."""
    # Most of what can be seen happens below one nat, so the root spreads it out.
    share = min(1.0, math.sqrt(max(0.0, entropy) / FADED))
    red, green, blue = (round(sure + (guess - sure) * share) for sure, guess in zip(SURE, GUESS, strict=True))
    return red, green, blue


def shade(entropy: float, accepted: bool) -> Style:
    """The style of a token; bold where the step accepted it."""
    return Style(color=Color.from_triplet(ColorTriplet(*rgb(entropy))), bold=accepted)
