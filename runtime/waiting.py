"""The queue in front of the engine: by priority, clients in turn, each client's requests as they came.

Where one too many waits, the client that has most of them loses its newest, so that no client can fill the queue for
others: who has less than its share always finds a place, and who is alone may have all of them.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from typing import Generic, TypeVar

from runtime.ticket import Priority, Ticket

T = TypeVar("T")


class WaitingLine(Generic[T]):
    """Tickets that wait. A client that sends many requests delays its own ones, not those of others."""

    def __init__(self) -> None:
        self._clients: dict[Priority, OrderedDict[str, deque[Ticket[T]]]] = {level: OrderedDict() for level in Priority}
        """Of each priority the clients that wait, the next one first."""
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Ticket[T]]:
        """Every ticket, in no order to rely on."""
        return (ticket for clients in self._clients.values() for line in clients.values() for ticket in line)

    def append(self, ticket: Ticket[T]) -> None:
        """Queue a ticket behind its client's others."""
        self._line(ticket).append(ticket)
        self._size += 1

    def put_back(self, ticket: Ticket[T]) -> None:
        """Queue a ticket that was active before, ahead of its client's others."""
        self._line(ticket).appendleft(ticket)
        self._size += 1

    def head(self, priority: Priority) -> Ticket[T] | None:
        """The ticket of this priority whose turn it is."""
        line = next(iter(self._clients[priority].values()), None)
        return None if line is None else line[0]

    def take(self, ticket: Ticket[T]) -> None:
        """Take out a head, whose client then goes behind the others."""
        self.remove(ticket)
        clients = self._clients[ticket.priority]
        if ticket.client in clients:
            clients.move_to_end(ticket.client)

    def crowded_out(self) -> Ticket[T]:
        """Whose place it is not, of the tickets that have never been admitted: there must be one.

        The newest of the client that has most tickets here, BATCH before INTERACTIVE; of clients that have equally
        many BATCH goes before INTERACTIVE too, and the newest before the others.
        """
        waiting = Counter(ticket.client for ticket in self)
        newest = (line[-1] for clients in self._clients.values() for line in clients.values())
        candidates = (ticket for ticket in newest if not ticket.begun)
        return max(candidates, key=lambda ticket: (waiting[ticket.client], -ticket.priority, ticket.number))

    def remove(self, ticket: Ticket[T]) -> None:
        """Take out a ticket that will not be served."""
        clients = self._clients[ticket.priority]
        line = clients[ticket.client]
        line.remove(ticket)
        self._size -= 1
        if not line:
            del clients[ticket.client]

    def _line(self, ticket: Ticket[T]) -> deque[Ticket[T]]:
        return self._clients[ticket.priority].setdefault(ticket.client, deque())
