"""How far an answer has come for its reader: what a broken stream is resumed with."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from itertools import chain

from runtime.events import Committed, Event, Started
from runtime.request import SamplingOverrides


@dataclass
class Progress:
    """Made of the events of one answer, over however many streams they came."""

    started: Started | None = None
    """With the settings in force, the seed among them; None before the answer has started."""
    blocks: list[list[int]] = field(default_factory=list)
    """Tokens of the blocks that were committed."""

    def take(self, event: Event) -> bool:
        """Take an event; False for one that the reader knows already from an earlier stream."""
        match event:
            case Started():
                known, self.started = self.started is not None, event
                return not known
            case Committed() if event.block_index < len(self.blocks):
                return False
            case Committed():
                self.blocks.append(event.token_ids.tolist())
        return True

    @property
    def sampling(self) -> SamplingOverrides | None:
        """The settings to ask for the rest with."""
        if self.started is None:
            return None
        names = [setting.name for setting in fields(SamplingOverrides)]
        return SamplingOverrides(**{name: getattr(self.started.sampling, name) for name in names})

    @property
    def committed_ids(self) -> list[int]:
        """The tokens to resume behind. A block that may have been the last is left out, and comes again, before the
        `Finished` that got lost."""
        kept = self.blocks[:-1] if self._may_be_complete() else self.blocks
        return list(chain.from_iterable(kept))

    def _may_be_complete(self) -> bool:
        if self.started is None or not self.blocks:
            return False
        sampling = self.started.sampling
        full = len(self.blocks[-1]) == self.started.canvas_length
        room = sum(map(len, self.blocks)) < sampling.max_output_tokens
        return not (full and room) or bool(sampling.stop_strings)
