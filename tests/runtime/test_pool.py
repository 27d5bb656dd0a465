"""The page accounting against dictionaries: who holds which page, and what an engine would have written there."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field

import msgspec
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from runtime.bundle import ModelFacts
from runtime.engines.fake import FACTS
from runtime.engines.protocol import PoolGeometry, Prefix
from runtime.pool import PagePool, PoolExhausted, Sequence

GROUPS = (0, 1)
"""Sliding, full."""

KV = tuple[tuple[int, ...], int, int]
"""What a token's K/V depend on, to the last bit: the tokens up to it, and the row it was encoded in (start, end)."""


@dataclass
class Model:
    """One sequence as the test knows it."""

    sequence: Sequence
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    """Tokens that no other sequence has."""
    needed: tuple[int, int]
    end: int = 0
    rows: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Of each encoded position behind the prompt its row."""
    held: tuple[dict[int, int], dict[int, int]] = field(default_factory=lambda: ({}, {}))
    """The pool's page for each page of the sequence."""

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.prompt + self.answer

    def kv(self, position: int, chunk: int) -> KV:
        """What this sequence would have written itself."""
        begin = position // chunk * chunk
        row = self.rows.get(position, (begin, min(begin + chunk, len(self.prompt))))
        return self.tokens[: position + 1], *row


class PoolMachine(RuleBasedStateMachine):
    """Any order of reserve, share, grow, fail and release; the sizes of a run mostly do not divide one another."""

    @initialize(
        page_size=st.integers(1, 4),
        window=st.integers(1, 14),
        chunk=st.integers(1, 6),
        canvas=st.integers(1, 7),
        sliding_pages=st.integers(6, 40),
        full_pages=st.integers(8, 60),
        base=st.lists(st.integers(0, 1), min_size=40, max_size=40),
    )
    def make(
        self,
        page_size: int,
        window: int,
        chunk: int,
        canvas: int,
        sliding_pages: int,
        full_pages: int,
        base: list[int],
    ) -> None:
        facts = msgspec.structs.replace(FACTS, sliding_window=window, canvas_length=canvas)
        self.page_size, self.window, self.chunk, self.longest_row = page_size, window, chunk, max(chunk, canvas)
        self.sizes, self.base = (sliding_pages, full_pages), tuple(base)
        self.pool = PagePool(PoolGeometry(page_size, sliding_pages, full_pages, 1, encode_chunk=chunk), facts)
        self.models: list[Model] = []
        self.memory: tuple[dict[tuple[int, int], KV], ...] = ({}, {})
        """What was written to each slot of each page of each group."""
        self.answers = 2

    def needed(self, tokens: int) -> tuple[int, int]:
        """Most pages at a time, over every alignment of a window and a row."""
        span = self.window - 1 + self.longest_row
        sliding = max(len(self.pages_of(at, at + span)) for at in range(self.page_size))
        full = len(self.pages_of(0, tokens))
        return min(sliding, full), full

    def pages_of(self, start: int, end: int) -> set[int]:
        return {position // self.page_size for position in range(start, end)}

    @rule(
        prompt_tokens=st.integers(1, 40),
        other=st.just([]) | st.lists(st.integers(0, 1), max_size=6),
        answer=st.integers(0, 16),
    )
    def reserve(self, prompt_tokens: int, other: list[int], answer: int) -> None:
        prompt, self.answers = self.base[:prompt_tokens] + tuple(other), self.answers + 1
        tokens = len(prompt) + answer
        digests = self.pool.digests(np.array(prompt, np.int64))
        needed = self.needed(tokens)
        assert self.pool.could_fit(tokens) == all(needed[group] <= self.sizes[group] for group in GROUPS)
        held = [{page for model in self.models for page in model.held[group].values()} for group in GROUPS]
        shared = {self.pool.full.find(digest) for digest in digests[: self.pool.sharable(0, digests)]}
        promised = sum(model.needed[1] - len(model.held[1]) for model in self.models)
        room = self.sizes[1] - len(held[1] | shared) - promised
        fits = sum(model.needed[0] for model in self.models) + needed[0] <= self.sizes[0]
        fits = fits and needed[1] - len(shared) <= room
        assert self.pool.fits(tokens, digests) == fits
        if not fits:
            with pytest.raises(PoolExhausted):
                self.pool.reserve(tokens, digests)
            return
        model = Model(self.pool.reserve(tokens, digests), prompt, (self.answers,) * answer, needed)
        self.models.append(model)
        self.share(model)

    def share(self, model: Model) -> None:
        end = model.sequence.share(model.end)
        assert model.end <= end <= len(model.prompt)
        if end > model.end:
            assert end % math.lcm(self.page_size, self.chunk) == 0
        model.end = end
        self.look(model, model.sequence.cover(end, end))

    @precondition(lambda self: self.models)
    @rule(data=st.data(), rows=st.integers(1, 8), fault=st.booleans())
    def grow(self, data: st.DataObject, rows: int, fault: bool) -> None:
        model = data.draw(st.sampled_from(self.models))
        for row in range(rows):
            if model.end < len(model.prompt):
                self.share(model)
            self.encode(model, fault=fault and row == rows - 1)

    def encode(self, model: Model, fault: bool) -> None:
        start = model.end
        if start < len(model.prompt):
            end = min(start + self.chunk, len(model.prompt))
        else:
            end = min(start + self.longest_row, len(model.tokens))
            model.rows |= dict.fromkeys(range(start, end), (start, end))
        if start == end:
            return
        self.look(model, model.sequence.cover(start, end), end)
        for group in GROUPS:
            for position in range(start, end):
                page, slot = divmod(position, self.page_size)
                physical = model.held[group][page]
                others = [other for other in self.models if other is not model]
                assert all(physical not in other.held[group].values() for other in others), "a shared page is written"
                written: KV = ((-1,), 0, 0) if fault else model.kv(position, self.chunk)
                self.memory[group][physical, slot] = written
        if fault:  # The request ends; what its call wrote is nonsense.
            self.release(model)
        else:
            model.sequence.record(end)
            model.end = end

    def look(self, model: Model, prefix: Prefix, end: int | None = None) -> None:
        """Everything that can be seen from `model.end` must be there, as the sequence would have written it."""
        assert prefix.sliding_base % self.page_size == 0
        sliding = dict(enumerate(prefix.sliding_pages, prefix.sliding_base // self.page_size))
        full = dict(enumerate(prefix.full_pages))
        assert set(full) == self.pages_of(0, model.end if end is None else end)
        # A page is kept for what the next token sees and for its slots that are still to be written.
        oldest = max(0, model.end - (self.window - 1))
        assert set(sliding) == {page for page in full if (page + 1) * self.page_size > oldest}
        for group, pages, first in ((0, sliding, oldest), (1, full, 0)):
            moved = [page for page in model.held[group].keys() & pages.keys() if model.held[group][page] != pages[page]]
            assert not moved, "a page that is still held must stay where its K/V are"
            for position in range(first, model.end):
                page, slot = divmod(position, self.page_size)
                assert self.memory[group][pages[page], slot] == model.kv(position, self.chunk)
        model.held = (sliding, full)

    @precondition(lambda self: self.models)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.release(data.draw(st.sampled_from(self.models)))

    def release(self, model: Model) -> None:
        model.sequence.release()
        self.models.remove(model)

    @precondition(lambda self: self.models)
    @rule(data=st.data(), prompt_tokens=st.integers(1, 40), answer=st.integers(0, 16))
    def look_what_would_fit(self, data: st.DataObject, prompt_tokens: int, answer: int) -> None:
        """Without some of the sequences: as the pool would say had they been released, which a copy of it tells."""
        prompt = self.base[:prompt_tokens]
        digests = self.pool.digests(np.array(prompt, np.int64))
        leaving = data.draw(st.lists(st.sampled_from(self.models), unique_by=id))
        predicted = self.pool.fits(len(prompt) + answer, digests, [model.sequence for model in leaving])
        pool, released = copy.deepcopy((self.pool, [model.sequence for model in leaving]))
        for sequence in released:
            sequence.release()
        assert predicted == pool.fits(len(prompt) + answer, digests)

    @precondition(lambda self: not self.models)
    @rule()
    def lose_the_engine(self) -> None:
        self.pool.forget()
        for memory in self.memory:
            memory.clear()

    @invariant()
    def pages_are_counted_exactly(self) -> None:
        if not hasattr(self, "models"):
            return
        for group, pages, size in ((0, self.pool.sliding, self.sizes[0]), (1, self.pool.full, self.sizes[1])):
            held = [page for model in self.models for page in model.held[group].values()]
            assert set(held) <= set(range(size))
            assert pages.held == len(held)
            assert pages.promised == sum(model.needed[group] - len(model.held[group]) for model in self.models)
            assert pages.unpromised + pages.promised == size - len(set(held)), "a page leaked or was freed twice"
            assert pages.unpromised >= 0, "more was promised than there is"
        assert self.pool.idle == (not self.models)

    def teardown(self) -> None:
        for model in list(getattr(self, "models", [])):
            self.release(model)
        assert not hasattr(self, "pool") or self.pool.idle


PoolMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase


def pool(sliding_pages: int = 100, full_pages: int = 200, window: int = 9, step: int | None = None) -> PagePool:
    """Pages of 4 tokens, chunks of 8."""
    facts: ModelFacts = msgspec.structs.replace(FACTS, sliding_window=window, canvas_length=8)
    geometry = PoolGeometry(4, sliding_pages, full_pages, 1, encode_chunk=8, prefix_step=step)
    return PagePool(geometry, facts)


def prefill(pages: PagePool, prompt: list[int], answer: int = 8) -> tuple[Sequence, int]:
    """Encode a prompt; the sequence, and how many of its tokens were there already."""
    sequence = pages.reserve(len(prompt) + answer, pages.digests(np.array(prompt, np.int64)))
    shared = sequence.share(0)
    for start in range(shared, len(prompt), 8):
        end = min(start + 8, len(prompt))
        sequence.cover(start, end)
        sequence.record(end)
    return sequence, shared


SYSTEM = list(range(100, 143))
"""43 tokens: five chunks of 8 and a rest."""


@pytest.mark.parametrize(
    ("second", "shared"),
    [
        pytest.param([*SYSTEM, 7, 8], 40, id="an equal system prompt, to its last whole chunk"),
        pytest.param(SYSTEM, 40, id="the same prompt"),
        pytest.param(SYSTEM[:40], 40, id="one that is nothing but whole chunks"),
        pytest.param([*SYSTEM[:20], 9, *SYSTEM[21:]], 16, id="one that differs in its third chunk"),
        pytest.param([9, *SYSTEM], 0, id="one that is shifted"),
        pytest.param(SYSTEM[:7], 0, id="one shorter than a chunk"),
    ],
)
@pytest.mark.parametrize("at_once", [True, False])
def test_equal_prefixes_are_encoded_once(second: list[int], shared: int, at_once: bool) -> None:
    """While the first request runs, and after it has ended."""
    pages = pool()
    first, there = prefill(pages, SYSTEM)
    assert there == 0
    if not at_once:
        first.release()
    assert prefill(pages, second)[1] == shared


def test_a_conversation_shares_its_earlier_turns() -> None:
    """Turn by turn; the window has passed most of the prompt by the time the answer ends."""
    pages, history, earlier = pool(), list(SYSTEM), 0
    for turn in range(4):
        sequence, shared = prefill(pages, history, answer=80)
        assert shared == earlier
        for start in range(len(history), len(history) + 80, 8):
            sequence.cover(start, start + 8)
        sequence.release()
        earlier = len(history) // 8 * 8
        history += [turn] * 21


def test_what_one_encodes_another_takes_over_in_the_midst_of_its_prompt() -> None:
    """Two equal prompts that came at once take turns: each chunk is encoded by one of them."""
    pages = pool()
    digests = pages.digests(np.array(SYSTEM, np.int64))
    first, second = (pages.reserve(len(SYSTEM), digests) for _ in range(2))
    for start in range(0, 40, 8):
        assert second.share(start) == start
        first.cover(start, start + 8)
        first.record(start + 8)
        assert second.share(start) == start + 8
    assert second.cover(40, 40).full_pages == first.cover(40, 40).full_pages


def test_what_was_cut_short_is_not_shared() -> None:
    """The first prompt's third page was encoded alone, as a longer prompt would not do: the second's is shared."""
    pages = pool()
    short, long, third = (prefill(pages, SYSTEM[:tokens])[0] for tokens in (12, 24, 25))
    third_page = [sequence.cover(12, 12).full_pages[2] for sequence in (short, long, third)]
    assert third_page[2] == third_page[1] != third_page[0]


def test_shared_pages_are_not_reserved_twice() -> None:
    """Full pages: 11 for the first, then one for each that shares ten of them."""
    pages = pool(full_pages=14)
    prefill(pages, SYSTEM, answer=0)
    others = [prefill(pages, SYSTEM, answer=0) for _ in range(3)]
    assert [shared for _, shared in others] == [40, 40, 40]
    digests = pages.digests(np.array(SYSTEM, np.int64))
    assert not pages.fits(len(SYSTEM), digests)
    assert pages.could_fit(56)
    assert not pages.could_fit(57)


def test_the_least_recently_used_prefix_goes_first() -> None:
    """Room for two prompts of ten pages beside ten free ones; of the one that was not used again the end goes."""
    pages = pool(full_pages=30)
    prompts = [[name] * 40 for name in range(3)]
    for prompt in (prompts[0], prompts[1], prompts[0]):
        prefill(pages, prompt, answer=0)[0].release()
    prefill(pages, [7] * 50, answer=0)[0].release()  # 13 pages: three go
    assert prefill(pages, prompts[0], answer=0)[1] == 40
    assert prefill(pages, prompts[1], answer=0)[1] == 24


def test_one_long_prompt_does_not_wash_out_the_windows_of_others() -> None:
    """Catches plain LRU: the pages that a long prompt's window has passed are newer than everybody's last windows."""
    pages = pool(sliding_pages=20, full_pages=500)
    prefill(pages, SYSTEM)[0].release()
    prefill(pages, list(range(1000, 1400)))[0].release()
    assert prefill(pages, SYSTEM)[1] == 40


def test_pages_that_were_let_go_are_used_before_new_ones() -> None:
    """Catches pages taken in turn: requests that need three at a time would write a whole pool, and keep its memory."""
    used: set[int] = set()
    pages = pool()
    for name in range(50):
        sequence, shared = prefill(pages, [name] * 7, answer=5)
        assert shared == 0
        used.update(sequence.cover(7, 12).full_pages)
        sequence.release()
    assert len(used) == 3


def test_a_prefix_needs_its_window_as_well() -> None:
    """Catches sharing by the full layers alone, where the sliding pages behind them are gone."""
    pages = pool(sliding_pages=5, full_pages=500)
    prefill(pages, SYSTEM)[0].release()
    prefill(pages, list(range(1000, 1040)))[0].release()
    assert prefill(pages, SYSTEM)[1] == 0


def test_an_engine_may_share_page_by_page() -> None:
    assert prefill(pages := pool(step=4), SYSTEM[:15])[1] == 0
    assert prefill(pages, SYSTEM[:15])[1] == 12
