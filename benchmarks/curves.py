"""A plot of shares: how many of the measured times lie below each time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 900, 480
LEFT, RIGHT, TOP, BOTTOM = 60, 20, 40, 50
COLOURS = ("#1b6ca8", "#c0392b", "#27824a", "#8e5ea2")
INK, GRID = "#222222", "#dddddd"
SHARES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)
TICKS = 6


def write_curves(path: Path, title: str, curves: Mapping[str, Sequence[float]]) -> None:
    """Write a picture of the curves' empirical distributions.

    Args:
        path: of the PNG file.
        title: above the plot.
        curves: measured seconds by name, at least one for each.
    """
    longest = max(max(values) for values in curves.values())
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)

    def place(seconds: float, share: float) -> tuple[float, float]:
        across = LEFT + seconds / longest * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    for share in SHARES:
        draw.line([place(0, share), place(longest, share)], GRID)
        draw.text(place(0, share), f"{share:.0%} ", INK, font, anchor="rm")
    for tick in range(TICKS + 1):
        seconds = longest * tick / TICKS
        draw.line([place(seconds, 0), place(seconds, 1)], GRID)
        draw.text(place(seconds, -0.03), f"{seconds:.2f} s", INK, font, anchor="mt")
    for number, (name, values) in enumerate(curves.items()):
        ordered = sorted(values)
        points = [(0.0, 0.0)]
        for index, seconds in enumerate(ordered):
            points += [(seconds, index / len(ordered)), (seconds, (index + 1) / len(ordered))]
        draw.line([place(*point) for point in points], COLOURS[number % len(COLOURS)], 2)
        draw.text((LEFT + 200 * number + 10, HEIGHT - 8), name, COLOURS[number % len(COLOURS)], font, anchor="lb")
    draw.text((LEFT, 12), title, INK, font)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
