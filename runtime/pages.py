"""Pages of one group: counted references, an index by content, and which unreferenced page goes first."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable


class PageGroup:
    """A page is free, or held by shares, or kept: nobody holds it, but its content can be found by its digest.

    Kept pages are taken where no free one is left: first those of slight worth, in the order they were let go, then the
    others, the least recently used first (2Q: Johnson and Shasha 1994). A page that was found again proved its worth.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.held = self.promised = 0
        """Pages counted once for every share that holds them, and pages that shares may still take."""
        # The page that was let go last is taken first: memory that was never written takes none, and what was just
        # written is in the caches.
        self._free = list(reversed(range(size)))
        self._references = [0] * size
        self._slight: OrderedDict[int, None] = OrderedDict()
        self._worthy: OrderedDict[int, None] = OrderedDict()
        self._pages: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}
        self._found: set[int] = set()
        """Pages with a content that was found by its digest."""

    @property
    def claimed(self) -> int:
        """Pages that shares hold or may still take; those that several hold are counted for each."""
        return self.held + self.promised

    @property
    def unpromised(self) -> int:
        """Pages that nobody holds or may still take."""
        return len(self._free) + len(self._slight) + len(self._worthy) - self.promised

    @property
    def idle(self) -> bool:
        """Whether no share is left."""
        return self.claimed == 0 and self.unpromised == self.size

    def find(self, digest: bytes) -> int | None:
        """The page with this content."""
        return self._pages.get(digest)

    def is_kept(self, digest: bytes) -> bool:
        """Whether the page with this content is there and nobody holds it."""
        page = self._pages.get(digest)
        return page is not None and self._references[page] == 0

    def only_of(self, shares: Iterable[Share]) -> set[int]:
        """The pages that nobody but these shares holds."""
        held = Counter(page for share in shares for page in share.pages)
        return {page for page, times in held.items() if times == self._references[page]}

    def take(self) -> int:
        """A page without content, held once."""
        page = self._free.pop() if self._free else self._evict()
        self._references[page] = 1
        self.held += 1
        return page

    def hold(self, page: int) -> None:
        """Hold a page that was found once more."""
        if self._references[page] == 0:
            (self._slight if page in self._slight else self._worthy).pop(page)
        self._found.add(page)
        self._references[page] += 1
        self.held += 1

    def drop(self, page: int, slight: bool) -> None:
        """Hold a page once less; `slight` says that it is worth little unless it was found before."""
        self.held -= 1
        self._references[page] -= 1
        if self._references[page] == 0:
            if page not in self._digests:
                self._free.append(page)
            else:
                (self._slight if slight and page not in self._found else self._worthy)[page] = None

    def publish(self, page: int, digest: bytes) -> None:
        """Let a page be found, unless another one has the same content."""
        if digest not in self._pages:
            self._pages[digest], self._digests[page] = page, digest

    def _evict(self) -> int:
        page, _ = (self._slight or self._worthy).popitem(last=False)
        del self._pages[self._digests.pop(page)]
        self._found.discard(page)
        return page


class Share:
    """What one sequence may take of a group, and the run of pages it holds now."""

    def __init__(self, group: PageGroup, promised: int, worthy_from: int = 0) -> None:
        """May take `promised` pages; those before `worthy_from` of the sequence are of slight worth to others."""
        self._group, self.promised, self._worthy_from = group, promised, worthy_from
        group.promised += promised
        self.first = 0
        """Which page of the sequence `pages[0]` is, counted from position 0."""
        self.pages: deque[int] = deque()

    @property
    def claimed(self) -> int:
        """Pages that it holds or may still take."""
        return len(self.pages) + self.promised

    @property
    def end(self) -> int:
        """The page of the sequence behind the last one held."""
        return self.first + len(self.pages)

    def drop_before(self, first: int) -> None:
        """Give back the pages before `first`; as many may be taken again."""
        while self.pages and self.first < first:
            self._group.drop(self.pages.popleft(), self.first < self._worthy_from)
            self._promise(1)
            self.first += 1
        if not self.pages:
            self.first = max(self.first, first)

    def grow_to(self, end: int) -> None:
        """Take pages up to `end`."""
        while self.end < end:
            assert self.promised > 0
            self.pages.append(self._group.take())
            self._promise(-1)

    def adopt(self, digests: Iterable[bytes]) -> None:
        """Go on with the pages of these contents, which the group has."""
        for digest in digests:
            page = self._group.find(digest)
            assert page is not None
            assert self.promised > 0
            self._group.hold(page)
            self._promise(-1)
            self.pages.append(page)

    def publish(self, page: int, digest: bytes) -> None:
        """Let a page of the sequence be found by its content, if it is still held."""
        if self.first <= page < self.end:
            self._group.publish(self.pages[page - self.first], digest)

    def release(self) -> None:
        """Give back everything, the end of the sequence first: it is of no use without what is before it."""
        while self.pages:
            self._group.drop(self.pages.pop(), self.end < self._worthy_from)
        self._promise(-self.promised)

    def _promise(self, pages: int) -> None:
        self.promised += pages
        self._group.promised += pages
