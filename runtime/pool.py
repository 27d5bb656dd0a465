"""Page accounting of the paged K/V pool: who holds which page of which group. No tensors, no threads.

A layer's K/V live in pages of a fixed number of tokens (paged attention: Kwon et al. 2023). Sliding and full layers
form one group of pages each, since a sliding layer can let go of a page as soon as its window has passed it.

Pages of a prompt are found again by content: a page's digest covers its tokens and everything before it. A later
request shares the longest prefix of which the full layers have all pages and the sliding ones those that the window at
its end can see.

Prefixes end at multiples of a step that the engine's chunk divides, so the same tokens are always encoded in the same
pieces. That costs a chat at most one chunk a turn, and is what keeps answers independent of what ran before: the
rounding of a token's K/V depends on how many tokens are encoded with it.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import ModelFacts
from runtime.engines.protocol import PoolGeometry, Prefix
from runtime.pages import PageGroup, Share


class PoolExhausted(Exception):
    """The pages of a sequence are not free now."""


class PagePool:
    """The pages of both groups, what is in them, and what admitted sequences may still take.

    A sequence reserves at admission the most pages it will ever take, so growing it later cannot fail.
    """

    def __init__(self, geometry: PoolGeometry, facts: ModelFacts) -> None:
        """Account for the pages of `geometry`; `facts` tell the window that decides when a sliding page is done."""
        self.page_size, self.window = geometry.page_size, facts.sliding_window
        self.encode_chunk = geometry.encode_chunk
        self._longest_row = max(geometry.encode_chunk, facts.canvas_length)
        self._step = geometry.prefix_step or math.lcm(geometry.encode_chunk, geometry.page_size)
        assert self._step % self.page_size == 0, f"prefixes of {self._step} tokens in pages of {self.page_size}"
        self.sliding, self.full = PageGroup(geometry.sliding_pages), PageGroup(geometry.full_pages)

    def digests(self, token_ids: NDArray[np.int64]) -> tuple[bytes, ...]:
        """Digests of a prompt's pages, as far as they can be shared: each of the page's tokens and all before them.

        Tokens are all that the K/V of a text depend on. Where images are served theirs must be digested as well, since
        the tokens of all images are the same.
        """
        sharable = np.ascontiguousarray(token_ids[: len(token_ids) // self._step * self._step], "<i8")
        digests = [b""]
        for begin in range(0, len(sharable), self.page_size):
            page = sharable[begin : begin + self.page_size].tobytes()
            digests.append(blake2b(digests[-1] + page, digest_size=16).digest())
        return tuple(digests[1:])

    def could_fit(self, tokens: int) -> bool:
        """Whether a sequence of `tokens` positions fits into the empty pool."""
        sliding, full = self._needed(tokens)
        return sliding <= self.sliding.size and full <= self.full.size

    def fits(self, tokens: int, digests: tuple[bytes, ...] = (), without: Collection[Sequence] = ()) -> bool:
        """Whether a sequence of `tokens` positions, whose prompt's pages have these digests, fits now.

        Or would fit, were the sequences in `without` released, whose contents could still be shared.

        Of the full layers it needs the pages that it does not share, and those that nobody holds any more must stay.
        Sliding pages are let go one by one, also shared ones, and own ones take their place: each counts in full.
        """
        sliding, full = self._needed(tokens)
        shared = digests[: self.sharable(0, digests)]
        leaving = self.full.only_of(sequence.full for sequence in without)
        kept = sum(self.full.is_kept(digest) or self.full.find(digest) in leaving for digest in shared)
        claimed = self.sliding.claimed - sum(sequence.sliding.claimed for sequence in without)
        unpromised = self.full.unpromised + len(leaving) + sum(sequence.full.promised for sequence in without)
        return sliding <= self.sliding.size - claimed and full - len(shared) + kept <= unpromised

    def reserve(self, tokens: int, digests: tuple[bytes, ...] = ()) -> Sequence:
        """Reserve the pages of a sequence of at most `tokens` positions.

        What the pool holds of its prompt is the sequence's from now on; `Sequence.share` tells how much that is.

        Raises:
            PoolExhausted: they are not free now.
        """
        if not self.fits(tokens, digests):
            raise PoolExhausted(f"{tokens} positions need more pages than are free; wait for a sequence to end")
        sliding, full = self._needed(tokens)
        # A window in a prompt's midst serves who shares just so much of it; the one at its end serves the next turn.
        last_window = self.oldest_page(len(digests) * self.page_size)
        shares = Share(self.sliding, sliding, last_window), Share(self.full, full)
        sequence = Sequence(self, tokens, digests, *shares)
        sequence.share(0)
        return sequence

    def forget(self) -> None:
        """The engine's memory is lost: what it held cannot be shared any more. No sequence may be left."""
        assert self.idle
        self.sliding, self.full = PageGroup(self.sliding.size), PageGroup(self.full.size)

    @property
    def idle(self) -> bool:
        """Whether no page is held or reserved."""
        return self.sliding.idle and self.full.idle

    def sharable(self, first: int, digests: tuple[bytes, ...]) -> int:
        """The page up to which a sequence that has `first` pages in the pool can go on with what others encoded."""
        best, run = first, 0
        for page in range(first, len(digests)):
            if self.full.find(digests[page]) is None:
                break
            run = run + 1 if self.sliding.find(digests[page]) is not None else 0
            end = (page + 1) * self.page_size
            if end % self._step == 0 and run >= page + 1 - max(first, self.oldest_page(end)):
                best = page + 1
        return best

    def oldest_page(self, position: int) -> int:
        """The first page that a sliding layer can see from `position` on."""
        return max(0, position - (self.window - 1)) // self.page_size

    def _needed(self, tokens: int) -> tuple[int, int]:
        """Most pages a sequence holds at a time, `(sliding, full)`."""
        full = -(-tokens // self.page_size)
        # While a row is encoded its first token's window and the row itself are live; at the worst alignment a span of
        # n positions touches (n - 2) // page_size + 2 pages.
        span = self.window - 1 + self._longest_row
        return min(full, (span - 2) // self.page_size + 2), full


class Sequence:
    """The pages of one sequence, which grows at its end."""

    def __init__(self, pool: PagePool, tokens: int, digests: tuple[bytes, ...], sliding: Share, full: Share) -> None:
        self._pool, self._tokens, self._digests = pool, tokens, digests
        self.sliding, self.full = sliding, full
        self._recorded = 0
        """Pages of the prompt that others can find, or that came from them."""

    def share(self, position: int) -> int:
        """Take over what others have encoded of the prompt behind `position`, the end of what is encoded of it already.

        Returns:
            The position up to which everything is in the pool now.
        """
        first, rest = divmod(position, self._pool.page_size)
        last = self._pool.sharable(first, self._digests) if rest == 0 else first
        if last > first:
            end = last * self._pool.page_size
            self.sliding.drop_before(self._pool.oldest_page(end))
            for share in (self.sliding, self.full):
                share.adopt(self._digests[share.end : last])
            self._recorded = last
        return max(position, last * self._pool.page_size)

    def cover(self, start: int, end: int) -> Prefix:
        """Hold the pages for encoding the positions `start <= p < end` and return where everything lies.

        Sliding pages that no token from `start` on can see are given back.

        Args:
            start: end of what is encoded already; never falls from call to call.
            end: past the last position that will be written; `start` where nothing will be.
        """
        assert start <= end <= self._tokens, f"{start} to {end} of {self._tokens} reserved positions"
        size = self._pool.page_size
        self.sliding.drop_before(self._pool.oldest_page(start))
        for share in (self.sliding, self.full):
            share.grow_to(-(-end // size))
        return Prefix(tuple(self.sliding.pages), self.sliding.first * size, tuple(self.full.pages))

    def record(self, end: int) -> None:
        """What `cover` said of the positions before `end` was done: others may share the prompt's pages among them."""
        last = min(len(self._digests), end // self._pool.page_size)
        for page in range(self._recorded, last):
            for share in (self.sliding, self.full):
                share.publish(page, self._digests[page])
        self._recorded = max(self._recorded, last)

    def release(self) -> None:
        """Give back every page and what was reserved; the sequence is not used afterwards."""
        self.sliding.release()
        self.full.release()
