"""How the torch engine runs, and how much memory it takes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from runtime.bundle import ModelFacts
from runtime.engines.protocol import ENCODE_CHUNK, PoolGeometry
from runtime.engines.torch.program import Rewrites


@dataclass(frozen=True)
class Options:
    """Where and how to run, and how much memory to give it; by default plainly, `serving` says what suits a device."""

    device: str = "cpu"
    """`cpu`, `cuda` or `cuda:1`."""
    page_size: int = 64
    """Tokens."""
    canvas_slots: int = 8
    """Canvases that can be denoised in turn."""
    positions: int | None = None
    """Positions that the full layers hold over all requests; None: as many as one sequence may span, at least 4096 a
    slot."""
    encode_chunk: int = ENCODE_CHUNK
    """Most tokens of an encode row: a prompt is done sooner with longer ones and open canvases wait longer."""
    encode_bucket: int | None = None
    """Encode rows are padded to so many tokens, twice, four times as many and so on, so that few shapes occur; None
    pads none."""
    batch: int = 1
    """Most rows of one denoise call; the calls' numbers of rows are rounded up to powers of two."""
    compiler: str | None = None
    """Backend of `torch.compile`; None runs the graph node by node."""
    graphs: bool = False
    """Capture CUDA graphs."""
    beside: bool = False
    """Run the dense feed-forward beside the experts on a second CUDA stream."""
    rewrites: Rewrites = field(default_factory=Rewrites)

    @classmethod
    def serving(cls, device: str, canvas_slots: int) -> Options:
        """What serves well there: on a GPU compiled code in graphs, and longer prompt chunks, which it needs to be
        busy."""
        plain = cls(device, canvas_slots=canvas_slots)
        if torch.device(device).type == "cpu":
            return plain
        # A page holds a tile of keys, so that attention looks one up a tile and not a key: 7 % of it over 256K tokens.
        # Prefixes are then shared in steps of 256 tokens, which is also what encode rows are padded to.
        longer = replace(plain, page_size=256, encode_chunk=4096, encode_bucket=256, batch=16)
        return replace(
            longer,
            compiler="inductor",
            graphs=True,
            beside=True,
            rewrites=Rewrites(take_apart=True, join_residuals=True),
        )

    def geometry(self, facts: ModelFacts) -> PoolGeometry:
        """The pool of a model's engine: sliding pages for every slot's window, full pages for `positions`."""
        positions = self.positions or max(facts.max_position, 4096 * self.canvas_slots)
        window = facts.sliding_window - 1 + max(facts.canvas_length, self.encode_chunk)
        sliding_pages = self.canvas_slots * ((window - 2) // self.page_size + 2)
        return PoolGeometry(
            page_size=self.page_size,
            sliding_pages=sliding_pages,
            full_pages=-(-positions // self.page_size),
            canvas_slots=self.canvas_slots,
            rows_per_call=min(self.batch, self.canvas_slots),
            encode_chunk=self.encode_chunk,
            # Where rows share calls their bits depend on how many there are anyway.
            prefix_step=None if self.batch == 1 else self.page_size,
        )
