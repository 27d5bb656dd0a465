"""Page accounting of the paged K/V pool: who holds which page of which group. No tensors, no threads.

A layer's K/V live in pages of a fixed number of tokens. Sliding and full layers form one group of pages each, since a
sliding layer can let go of a page as soon as its window has passed it (paged attention: Kwon et al. 2023).
"""

from __future__ import annotations

from collections import deque

from runtime.bundle import ModelFacts
from runtime.engines.protocol import PoolGeometry, Prefix


class PoolExhausted(Exception):
    """The pages of a sequence are not free now."""


class PagePool:
    """The free pages of both groups, and what admitted sequences may still take of them.

    A sequence reserves at admission the most pages it will ever hold at a time, so growing it later cannot fail.
    """

    def __init__(self, geometry: PoolGeometry, facts: ModelFacts, longest_row: int) -> None:
        """Account for the pages of `geometry`.

        Args:
            geometry: the engine's memory.
            facts: the model; its window decides when a sliding page is done.
            longest_row: most tokens that one call encodes of a sequence.
        """
        self.page_size = geometry.page_size
        self.window = facts.sliding_window
        self._longest_row = max(longest_row, facts.canvas_length)
        self._sliding, self._full = _Group(geometry.sliding_pages), _Group(geometry.full_pages)

    def could_fit(self, tokens: int) -> bool:
        """Whether a sequence of `tokens` positions fits into the empty pool."""
        sliding, full = self._needed(tokens)
        return sliding <= self._sliding.size and full <= self._full.size

    def fits(self, tokens: int) -> bool:
        """Whether a sequence of `tokens` positions fits now."""
        sliding, full = self._needed(tokens)
        return sliding <= self._sliding.unreserved and full <= self._full.unreserved

    def reserve(self, tokens: int) -> Sequence:
        """Reserve the pages of a sequence of at most `tokens` positions.

        Raises:
            PoolExhausted: they are not free now.
        """
        if not self.fits(tokens):
            raise PoolExhausted(f"{tokens} positions need more pages than are free; wait for a sequence to end")
        sliding, full = self._needed(tokens)
        return Sequence(self, tokens, self._sliding.reserve(sliding), self._full.reserve(full))

    @property
    def idle(self) -> bool:
        """Whether every page is free and unreserved."""
        return self._sliding.idle and self._full.idle

    def _needed(self, tokens: int) -> tuple[int, int]:
        """Most pages a sequence holds at a time, `(sliding, full)`."""
        full = -(-tokens // self.page_size)
        # While a row is encoded its first token's window and the row itself are live; at the worst alignment a span of
        # n positions touches (n - 2) // page_size + 2 pages.
        span = self.window - 1 + self._longest_row
        return min(full, (span - 2) // self.page_size + 2), full


class Sequence:
    """The pages of one sequence, which grows at its end."""

    def __init__(self, pool: PagePool, tokens: int, sliding: _Share, full: _Share) -> None:
        self._pool, self._tokens = pool, tokens
        self._sliding, self._full = sliding, full

    def cover(self, start: int, end: int) -> Prefix:
        """Hold the pages for encoding the positions `start <= p < end` and return where everything lies.

        Sliding pages that no token from `start` on can see are given back.

        Args:
            start: end of what is encoded already; never falls from call to call.
            end: past the last position that will be written; `start` where nothing will be.
        """
        assert start <= end <= self._tokens, f"{start} to {end} of {self._tokens} reserved positions"
        size = self._pool.page_size
        self._sliding.drop_before(max(0, start - (self._pool.window - 1)) // size)
        for share in (self._sliding, self._full):
            share.grow_to(-(-end // size))
        return Prefix(tuple(self._sliding.pages), self._sliding.first * size, tuple(self._full.pages))

    def release(self) -> None:
        """Give back every page and what was reserved; the sequence is not used afterwards."""
        self._sliding.release()
        self._full.release()


class _Group:
    """The pages of one group; a page is free, or held by exactly one share."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.unreserved = size
        self._free = deque(range(size))

    @property
    def idle(self) -> bool:
        return len(self._free) == self.unreserved == self.size

    def reserve(self, count: int) -> _Share:
        assert count <= self.unreserved
        self.unreserved -= count
        return _Share(self, count)

    def take(self) -> int:
        return self._free.popleft()

    def give(self, page: int) -> None:
        self._free.append(page)


class _Share:
    """What one sequence reserved of a group, and the run of pages it holds now."""

    def __init__(self, group: _Group, reserved: int) -> None:
        self._group, self._reserved = group, reserved
        self.first = 0
        """Which page of the sequence `pages[0]` is, counted from position 0."""
        self.pages: deque[int] = deque()

    def drop_before(self, first: int) -> None:
        while self.pages and self.first < first:
            self._group.give(self.pages.popleft())
            self.first += 1

    def grow_to(self, last: int) -> None:
        while self.first + len(self.pages) < last:
            assert len(self.pages) < self._reserved
            self.pages.append(self._group.take())

    def release(self) -> None:
        while self.pages:
            self._group.give(self.pages.popleft())
        self._group.unreserved += self._reserved
        self._reserved = 0
