"""The page accounting against dictionaries that say who holds which page, filled in by counting positions singly."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from runtime.engines.fake import FACTS
from runtime.engines.protocol import PoolGeometry, Prefix
from runtime.pool import PagePool, PoolExhausted, Sequence


class Model:
    """One sequence as the test knows it."""

    def __init__(self, sequence: Sequence, tokens: int, reserved: tuple[int, int]) -> None:
        self.sequence, self.tokens, self.reserved = sequence, tokens, reserved
        self.end = 0
        self.sliding: dict[int, int] = {}
        """The pool's page for each page of the sequence."""
        self.full: dict[int, int] = {}


class PoolMachine(RuleBasedStateMachine):
    """Any order of reserve, grow and release; the sizes of a run mostly do not divide one another."""

    @initialize(
        page_size=st.integers(1, 7),
        window=st.integers(1, 20),
        chunk=st.integers(1, 12),
        canvas=st.integers(1, 9),
        sliding_pages=st.integers(1, 40),
        full_pages=st.integers(1, 40),
    )
    def make(self, page_size: int, window: int, chunk: int, canvas: int, sliding_pages: int, full_pages: int) -> None:
        facts = msgspec.structs.replace(FACTS, sliding_window=window, canvas_length=canvas)
        self.page_size, self.window, self.longest_row = page_size, window, max(chunk, canvas)
        self.sizes = (sliding_pages, full_pages)
        self.pool = PagePool(PoolGeometry(page_size, sliding_pages, full_pages, 1), facts, chunk)
        self.sequences: list[Model] = []

    def needed(self, tokens: int) -> tuple[int, int]:
        """Most pages at a time, over every alignment of a window and a row."""
        span = self.window - 1 + self.longest_row
        sliding = max(len(self.pages_of(at, at + span)) for at in range(self.page_size))
        full = len(self.pages_of(0, tokens))
        return min(sliding, full), full

    def pages_of(self, start: int, end: int) -> set[int]:
        return {position // self.page_size for position in range(start, end)}

    @rule(tokens=st.integers(1, 60))
    def reserve(self, tokens: int) -> None:
        needed = self.needed(tokens)
        taken = [sum(model.reserved[group] for model in self.sequences) for group in (0, 1)]
        fits = all(taken[group] + needed[group] <= self.sizes[group] for group in (0, 1))
        assert self.pool.could_fit(tokens) == all(needed[group] <= self.sizes[group] for group in (0, 1))
        assert self.pool.fits(tokens) == fits
        if fits:
            self.sequences.append(Model(self.pool.reserve(tokens), tokens, needed))
        else:
            with pytest.raises(PoolExhausted):
                self.pool.reserve(tokens)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def grow(self, data: st.DataObject) -> None:
        model = data.draw(st.sampled_from(self.sequences))
        row = data.draw(st.integers(0, min(self.longest_row, model.tokens - model.end)))
        prefix = model.sequence.cover(model.end, model.end + row)
        self.check_prefix(model, prefix, model.end + row)
        model.end += row

    def check_prefix(self, model: Model, prefix: Prefix, end: int) -> None:
        assert prefix.sliding_base % self.page_size == 0
        first = prefix.sliding_base // self.page_size
        sliding = dict(enumerate(prefix.sliding_pages, first))
        full = dict(enumerate(prefix.full_pages))
        assert set(full) == self.pages_of(0, end)
        # A page is kept for what the next token sees and for its slots that are still to be written.
        oldest = max(0, model.end - (self.window - 1))
        assert set(sliding) == {page for page in full if (page + 1) * self.page_size > oldest}
        for before, after in ((model.sliding, sliding), (model.full, full)):
            moved = [page for page in before.keys() & after.keys() if before[page] != after[page]]
            assert not moved, "a page that is still held must stay where its K/V are"
        model.sliding, model.full = sliding, full

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        model = data.draw(st.sampled_from(self.sequences))
        model.sequence.release()
        self.sequences.remove(model)

    @invariant()
    def no_page_is_held_twice(self) -> None:
        if not hasattr(self, "sequences"):
            return
        for group, size in zip(("sliding", "full"), self.sizes, strict=True):
            held = [page for model in self.sequences for page in getattr(model, group).values()]
            assert len(held) == len(set(held))
            assert set(held) <= set(range(size))

    @invariant()
    def nothing_leaks(self) -> None:
        if hasattr(self, "sequences") and not self.sequences:
            assert self.pool.idle

    def teardown(self) -> None:
        for model in getattr(self, "sequences", []):
            model.sequence.release()
        assert not hasattr(self, "pool") or self.pool.idle


PoolMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase
