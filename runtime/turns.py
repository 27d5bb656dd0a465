"""Which requests share the next engine call, of those that are active.

A call is of one kind: chunks are encoded, or canvases denoised. Three rules, in this order:

1. INTERACTIVE requests lead three calls of four while they have something to do, BATCH requests the fourth; and three
   of four encode calls while they have something to encode, since those are few where many canvases are open.
2. After an encode call every canvas of the leader's priority or above that could be denoised then is denoised once
   before the next encode call: a long prompt delays an open canvas by at most one call of `encode_tokens` a step.
3. Clients take turns, and each client's requests do, by when they were last served. Free places of a call go to
   requests of the other priority.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import chain, zip_longest
from typing import Generic, TypeVar

from runtime.ticket import Priority, Ticket

T = TypeVar("T")

INTERACTIVE_CALLS = 3
"""Calls that INTERACTIVE requests lead before BATCH requests lead one: a third more time for who is watching."""

DENOISE = 0
"""As a need: one denoising step. Any other need is a number of tokens to encode."""


class Turns(Generic[T]):
    """Remembers who was served."""

    def __init__(self, encode_tokens: int) -> None:
        """Encode calls of several rows hold at most `encode_tokens` tokens together."""
        self._encode_tokens = encode_tokens
        self._calls = self._passed_over = self._encodes_passed_over = 0
        """Calls made; and since BATCH requests last led one, calls and encode calls that they would have led."""
        self._owed: set[Ticket[T]] = set()
        """Tickets whose canvases are denoised before the next encode call."""
        self._clients: dict[str, int] = {}
        """Each client's last turn, while it has an active ticket."""

    def choose(
        self, active: Collection[Ticket[T]], need: Callable[[Ticket[T]], int | None], rows: int
    ) -> list[Ticket[T]]:
        """The tickets of the next call, all of one kind; none where no ticket can go on.

        Args:
            active: the tickets.
            need: what a ticket needs: tokens to encode, `DENOISE`, or None where it cannot go on.
            rows: most tickets of a call, at least 1.
        """
        needs = {ticket: wanted for ticket in active if (wanted := need(ticket)) is not None}
        self._owed = {ticket for ticket in self._owed if needs.get(ticket) == DENOISE}
        self._clients = {ticket.client: self._clients.get(ticket.client, 0) for ticket in active}
        for leader in self._leaders(needs):
            encode = self._encodes(needs, leader)
            if encode is not None:
                return self._serve(needs, self._call(needs, leader, encode, rows), leader)
        return []

    def _leaders(self, needs: Mapping[Ticket[T], int]) -> list[Priority]:
        due = self._passed_over >= INTERACTIVE_CALLS
        return sorted({ticket.priority for ticket in needs}, reverse=not due)

    def _encodes(self, needs: Mapping[Ticket[T], int], leader: Priority) -> bool | None:
        """Whether the call that `leader` would lead encodes (True) or denoises; None where it must not encode yet."""
        own = [wanted for ticket, wanted in needs.items() if ticket.priority == leader]
        owed = any(ticket.priority >= leader for ticket in self._owed)
        if leader in _encoders(needs) and not owed and not self._leaves_encoding(needs, leader):
            return True
        return False if DENOISE in own else None

    def _leaves_encoding(self, needs: Mapping[Ticket[T], int], leader: Priority) -> bool:
        """Whether BATCH requests lead, and the next encode call is one of the INTERACTIVE ones' three."""
        contested = leader == Priority.BATCH and Priority.INTERACTIVE in _encoders(needs)
        return contested and self._encodes_passed_over < INTERACTIVE_CALLS

    def _call(self, needs: Mapping[Ticket[T], int], leader: Priority, encode: bool, rows: int) -> list[Ticket[T]]:
        """As many as a call holds; the first one always fits."""
        fitting = [ticket for ticket, wanted in needs.items() if (wanted != DENOISE) == encode]
        first, *others = sorted(self._in_turn(fitting), key=lambda ticket: ticket.priority != leader)
        chosen, tokens = [first], needs[first]
        for ticket in others:
            if len(chosen) < rows and tokens + needs[ticket] <= self._encode_tokens:
                chosen.append(ticket)
                tokens += needs[ticket]
        return chosen

    def _serve(self, needs: Mapping[Ticket[T], int], chosen: list[Ticket[T]], leader: Priority) -> list[Ticket[T]]:
        """Remember who was served and who is owed a step."""
        leads = leader == Priority.BATCH
        self._passed_over = 0 if leads or all(ticket.priority == leader for ticket in needs) else self._passed_over + 1
        if needs[chosen[0]] != DENOISE:
            self._encodes_passed_over = 0 if leads else self._encodes_passed_over + (Priority.BATCH in _encoders(needs))
            self._owed = {ticket for ticket, wanted in needs.items() if wanted == DENOISE}
        self._owed.difference_update(chosen)
        self._calls += 1
        for ticket in chosen:
            ticket.turn = self._clients[ticket.client] = self._calls
        return chosen

    def _in_turn(self, tickets: Iterable[Ticket[T]]) -> list[Ticket[T]]:
        """Clients in turn, the one that was served the longest ago first; likewise the tickets of each client."""
        by_client: dict[str, list[Ticket[T]]] = defaultdict(list)
        for ticket in sorted(tickets, key=lambda ticket: ticket.turn):
            by_client[ticket.client].append(ticket)
        clients = sorted(by_client, key=self._clients.__getitem__)
        rounds = zip_longest(*(by_client[client] for client in clients))
        return [ticket for ticket in chain.from_iterable(rounds) if ticket is not None]


def _encoders(needs: Mapping[Ticket[T], int]) -> set[Priority]:
    """The priorities that have something to encode."""
    return {ticket.priority for ticket, wanted in needs.items() if wanted != DENOISE}
