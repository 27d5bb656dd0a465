"""What one client may have at a time and in a minute, however many connections it opens.

Tokens are counted as they are spent: a prompt's when it is queued, with what a resumed answer has committed before, or
once it is counted, where nothing else is asked; an answer's block by block. A client whose tokens are spent is refused
until enough time has passed; what it has under way goes on, into debt if need be, so that no answer is cut and no
request needs a guess of its length. Over time the rate is kept exactly.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from runtime.errors import ClientLimitReached

MAX_REMEMBERED = 1024
"""Clients whose accounts are kept before those that are at rest are forgotten."""

RETRY_CONCURRENCY = 1.0
"""Seconds; when one of a client's own requests will end is the client's to know."""


@dataclass(frozen=True)
class ClientLimits:
    """None: no limit."""

    max_concurrent: int | None = None
    """Generations under way, those in the queue included."""
    tokens_per_minute: int | None = None
    """Tokens of prompts and answers; a minute's worth may be spent at once."""


class Account:
    """What one client has under way and may still spend."""

    def __init__(self, limits: ClientLimits, now: float) -> None:
        self.limits, self.open = limits, 0
        self._level, self._updated = float(limits.tokens_per_minute or 0), now
        """Tokens left, of which there are never more than a minute's worth; below zero: debt."""

    def update(self, limits: ClientLimits, now: float) -> None:
        """Let the tokens of the time that passed come in, up to the limits that now are in force."""
        minute = limits.tokens_per_minute
        if minute is None or self.limits.tokens_per_minute is None:
            self._level = float(minute or 0)
        else:
            self._level = min(minute, self._level + minute / 60 * (now - self._updated))
        self.limits, self._updated = limits, now

    def check_concurrent(self) -> None:
        """Raise `ClientLimitReached` where no more generations may be begun."""
        limits = self.limits
        if limits.max_concurrent is not None and self.open >= limits.max_concurrent:
            raise ClientLimitReached("max_concurrent", limits.max_concurrent, RETRY_CONCURRENCY)

    def check_tokens(self) -> None:
        """Raise `ClientLimitReached` where no tokens are left."""
        limits = self.limits
        if limits.tokens_per_minute is not None and self._level <= 0:
            wait = (1 - self._level) * 60 / limits.tokens_per_minute
            raise ClientLimitReached("tokens_per_minute", limits.tokens_per_minute, wait)

    def spend(self, tokens: int) -> None:
        """Count tokens."""
        self._level -= tokens

    @property
    def at_rest(self) -> bool:
        """Whether forgetting it would change nothing."""
        minute = self.limits.tokens_per_minute
        return not self.open and (minute is None or self._level >= minute)


class Quotas:
    """The accounts of all clients. Belongs to the event loop's thread."""

    def __init__(self, limits_of: Callable[[str], ClientLimits], clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with no accounts.

        Args:
            limits_of: the limits of a client, by its name; may change.
            clock: seconds, monotonic.
        """
        self._limits_of, self._clock = limits_of, clock
        self._accounts: dict[str, Account] = {}
        self._forget_at = MAX_REMEMBERED

    @contextmanager
    def generation(self, client: str) -> Iterator[Account]:
        """A generation of a client, under way for the time of the block, and the account that pays for it.

        Raises:
            ClientLimitReached: the client has too much under way, or has spent its tokens.
        """
        account = self.spender(client)
        account.check_concurrent()
        account.open += 1
        try:
            yield account
        finally:
            account.open -= 1

    def spender(self, client: str) -> Account:
        """The account of a client that has tokens left, for what is no generation.

        Raises:
            ClientLimitReached: it has none.
        """
        account = self._account(client)
        account.check_tokens()
        return account

    def _account(self, client: str) -> Account:
        limits, now = self._limits_of(client), self._clock()
        if client not in self._accounts:
            if len(self._accounts) >= self._forget_at:
                self._forget(now)
            self._accounts[client] = Account(limits, now)
        account = self._accounts[client]
        account.update(limits, now)
        return account

    def _forget(self, now: float) -> None:
        for account in self._accounts.values():
            account.update(account.limits, now)
        self._accounts = {name: account for name, account in self._accounts.items() if not account.at_rest}
        self._forget_at = max(MAX_REMEMBERED, 2 * len(self._accounts))
