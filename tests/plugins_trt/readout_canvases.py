"""Canvases to read out, for the faces of the readout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Canvas:
    """A readout's sizes."""

    catches: str
    rows: int = 2
    positions: int = 5
    hidden: int = 16
    vocabulary: int = 60
    temperature: float = 0.7
    spread: float = 1.0
    """Of the logits."""
    guarded: tuple[int, ...] = (1, 59)


CASES = [
    Canvas("an ordinary canvas"),
    Canvas("a prime vocabulary: blocks of one token", vocabulary=61, guarded=(1,)),
    Canvas("one position: the guarded one", positions=1),
    Canvas("no row: an encode call", rows=0),
    Canvas("nothing to guard", guarded=()),
    Canvas(
        "logits far beyond the softcap and a low temperature: nearly all weights underflow",
        spread=60.0,
        temperature=0.05,
    ),
    Canvas("flat logits: every block counts", spread=0.001),
]


def arguments(case: Canvas) -> list[Tensor]:
    """Arguments of `canvas_readout` up to the guarded ids, float32."""
    random = torch.Generator().manual_seed(case.vocabulary)
    return [
        case.spread * torch.randn(case.rows, case.positions, case.hidden, generator=random),
        torch.randn(case.vocabulary, case.hidden, generator=random) / case.hidden**0.5,
        torch.full((case.rows,), case.temperature),
        torch.rand(case.rows, case.positions, generator=random),
        torch.arange(case.rows) % 2 == 0,
        torch.tensor(case.guarded, dtype=torch.int64),
    ]
