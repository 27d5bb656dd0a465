"""How an answer is wanted, beside what it is: nothing here changes a token."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.ticket import Priority


@dataclass(frozen=True)
class Delivery:
    """Of one generation."""

    draft_interval: float | None = None
    """Least seconds between two drafts; None: no drafts."""
    priority: Priority = Priority.INTERACTIVE
