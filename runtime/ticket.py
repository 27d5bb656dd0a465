"""A request on its way through the scheduler: what it asks for, and what it holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Generic, TypeVar

from runtime.errors import DgemmaError
from runtime.pool import Sequence

T = TypeVar("T")


class Priority(IntEnum):
    """Who is served first; the scheduler says what is left for the others."""

    BATCH = 0
    """Work that nobody watches."""
    INTERACTIVE = 1


class State(Enum):
    """Where a ticket is."""

    WAITING = "waiting"
    ACTIVE = "active"
    """It holds pages and a canvas slot."""
    SUSPENDED = "suspended"
    """Its reader is too slow: it holds nothing and waits to be resumed."""
    DONE = "done"


@dataclass(eq=False)
class Ticket(Generic[T]):
    """One request; the scheduler alone changes it."""

    work: T
    tokens: int
    """Positions to reserve: prompt and whole canvases."""
    submitted: float
    """Seconds on the scheduler's clock, like the other times."""
    deadline: float | None = None
    digests: tuple[bytes, ...] = ()
    """Of the prompt's pages that may be shared; see `PagePool.digests`."""
    client: str = ""
    priority: Priority = Priority.INTERACTIVE
    state: State = State.WAITING
    number: int = 0
    """In the order of submission."""
    ending: DgemmaError | None = None
    """Why the next sweep takes it out; it is in no queue any more."""
    begun: bool = False
    """Whether it was ever admitted."""
    turn: int = 0
    """Number of its last turn; 0 before its first."""
    idle_since: float | None = None
    """Since when it is active and cannot go on."""
    pages: Sequence = field(init=False)
    """While it is active."""
    slot: int = field(init=False)
    """The engine's canvas slot, while it is active."""
