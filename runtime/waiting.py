"""The queue in front of the engine: by priority, clients in turn, each client's requests as they came."""

from __future__ import annotations

from collections import OrderedDict, deque
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
