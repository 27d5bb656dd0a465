"""The picture of a block being denoised: a grid of steps by positions."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from PIL import Image, ImageDraw, ImageFont
from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.style import Style
from rich.text import Text

from runtime.events import Committed, Draft
from service.cli.shades import rgb, shade

WIDEST_CELL = 12
"""Characters; a longer token is cut."""
SVG_WIDTH = 132
"""Characters."""
PNG_WIDTH, ROW_HEIGHT, FONT_SIZE, MARGIN = 1400, 24, 14, 16
"""Pixels."""
BACKGROUND, INK, LIGHT_INK, FAINT = (24, 24, 30), (16, 16, 20), (215, 215, 220), (150, 150, 160)


@dataclass(frozen=True)
class Cell:
    """One token at one step."""

    text: str
    entropy: float
    """Nats."""
    accepted: bool


@dataclass(frozen=True)
class Row:
    """One step."""

    label: str
    cells: Sequence[Cell]


class Picture:
    """Draws the drafts of a block and its commit, on a console, as SVG or as an image."""

    def __init__(self, title: str, drafts: Sequence[Draft], committed: Committed) -> None:
        self.title = title
        length = max(1, len(committed.token_ids))
        self.rows = [Row(f"step {draft.step}", list(_cells(draft))[:length]) for draft in drafts]
        self.rows.append(Row("committed", _committed_cells(drafts, committed)))
        self.summary = f"{committed.step_count} steps, {len(committed.token_ids)} tokens"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The grid in bands as wide as the console, each with all steps."""
        gutter = max(len(row.label) for row in self.rows) + 2
        yield Text.assemble((" ".join(self.title.split()), "bold"), f"  ({self.summary})")
        for first, last in self._bands([cell_len(text) for text in self._widest()], options.max_width - gutter):
            yield Text()
            for row in self.rows:
                yield self._line(row, first, last, gutter)

    def svg(self) -> str:
        """The grid as an SVG image of a terminal."""
        console = Console(
            record=True, width=SVG_WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor"
        )
        console.print(self)
        return console.export_svg(title="dgemma trace")

    def image(self) -> Image.Image:
        """The grid as an image, one coloured box a token."""
        font = ImageFont.load_default(FONT_SIZE)
        gutter = MARGIN + max(round(font.getlength(row.label)) for row in self.rows) + MARGIN
        widths = [
            max(10, *(round(font.getlength(cell.text)) + 6 for cell in column if cell is not None))
            for column in zip_longest(*(row.cells for row in self.rows))
        ]
        bands = list(self._bands(widths, PNG_WIDTH - gutter - MARGIN))
        title = f"{' '.join(self.title.split())}  ({self.summary})"
        used = max(
            gutter + max(sum(widths[first:last]) for first, last in bands), round(font.getlength(title)) + MARGIN
        )
        band_height = (len(self.rows) + 1) * ROW_HEIGHT
        image = Image.new(
            "RGB", (min(PNG_WIDTH, used + MARGIN), MARGIN + ROW_HEIGHT + band_height * len(bands) + MARGIN), BACKGROUND
        )
        draw = ImageDraw.Draw(image)
        draw.text((MARGIN, MARGIN), title, fill=FAINT, font=font)
        top = MARGIN + ROW_HEIGHT + ROW_HEIGHT // 2
        for first, last in bands:
            for row in self.rows:
                draw.text((MARGIN, top + 3), row.label, fill=FAINT, font=font)
                left = gutter
                for position in range(first, last):
                    if position < len(row.cells):
                        _draw_cell(draw, row.cells[position], (left, top), widths[position], font)
                    left += widths[position]
                top += ROW_HEIGHT
            top += ROW_HEIGHT
        return image

    def _line(self, row: Row, first: int, last: int, gutter: int) -> Text:
        line = Text(row.label.ljust(gutter), style="dim", no_wrap=True, overflow="crop")
        widths = [cell_len(text) for text in self._widest()]
        for position in range(first, last):
            if position >= len(row.cells):
                break
            cell = row.cells[position]
            style = shade(cell.entropy, cell.accepted) + Style(underline=cell.accepted, dim=False)
            line.append(set_cell_size(cell.text, widths[position]), style)
        return line

    def _widest(self) -> list[str]:
        """The widest text at each position."""
        count = max(len(row.cells) for row in self.rows)
        return [
            max((row.cells[position].text for row in self.rows if position < len(row.cells)), key=cell_len)
            for position in range(count)
        ]

    @staticmethod
    def _bands(widths: Sequence[int], room: int) -> Iterator[tuple[int, int]]:
        """Positions in groups that fit into `room`."""
        first = used = 0
        for position, width in enumerate(widths):
            if position > first and used + width > room:
                yield first, position
                first, used = position, 0
            used += width
        yield first, len(widths)


def _draw_cell(
    draw: ImageDraw.ImageDraw,
    cell: Cell,
    corner: tuple[int, int],
    width: int,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    left, top = corner
    box = (left, top, left + width - 2, top + ROW_HEIGHT - 4)
    colour = rgb(cell.entropy)
    draw.rectangle(box, fill=colour)
    if cell.accepted:
        draw.line((box[0], box[3], box[2], box[3]), fill=(255, 255, 255), width=2)
    draw.text((left + 2, top + 2), cell.text, fill=INK if sum(colour) > 330 else LIGHT_INK, font=font)


def _cells(draft: Draft) -> Iterator[Cell]:
    start = 0
    for position, length in enumerate(draft.token_text_lengths):
        text = draft.text[start : start + length]
        start += length
        yield Cell(_plain(text), float(draft.entropy[position]), bool(draft.accepted[position]))


def _committed_cells(drafts: Sequence[Draft], committed: Committed) -> list[Cell]:
    """The committed tokens; a commit brings no lengths, so their texts are looked up in the drafts."""
    spelled = {
        int(token): cell.text for draft in drafts for token, cell in zip(draft.token_ids, _cells(draft), strict=True)
    }
    if any(int(token) not in spelled for token in committed.token_ids):
        return [Cell(_marked(committed.text), 0.0, False)]
    return [Cell(spelled[int(token)], 0.0, False) for token in committed.token_ids]


def _plain(text: str) -> str:
    """The text on one line, cut where it is long."""
    shown = _marked(text)
    return shown if cell_len(shown) <= WIDEST_CELL else set_cell_size(shown, WIDEST_CELL - 1) + "…"


def _marked(text: str) -> str:
    """The text with marks for spaces, line breaks, and what cannot be shown."""
    return "".join({" ": "·", "\n": "↵"}.get(letter, letter if letter.isprintable() else "�") for letter in text)
