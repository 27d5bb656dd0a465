"""Answers that survive their streams: where one breaks, the next one goes on behind the last block that came."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

from grpc import StatusCode

from runtime.events import Event
from runtime.request import SamplingOverrides
from runtime.ticket import Priority
from service.client import CallFailed, Client, Prompt
from service.progress import Progress

FIRST_DELAY, LONGEST_DELAY = 0.1, 5.0
"""Seconds between two tries: a server that was restarted is soon found, one that is away is not besieged."""

BROKEN = (StatusCode.UNAVAILABLE, StatusCode.ABORTED, StatusCode.RESOURCE_EXHAUSTED)
"""How a stream ends that may be resumed: the connection was lost or the server ends, this reader was too slow; and how
a server ends one that it has no room for at the moment."""


class Retries:
    """Waits before a broken answer is asked for again, and says when it is no use."""

    def __init__(self, timeout: float, sleep: Callable[[float], None] | None = None) -> None:
        """Give up `timeout` seconds from now."""
        self._deadline, self._sleep = time.monotonic() + timeout, sleep or time.sleep
        self._delay = FIRST_DELAY

    @property
    def remaining(self) -> float:
        """Seconds left."""
        return max(0.0, self._deadline - time.monotonic())

    def went_on(self) -> None:
        """Something came: the next break is another one."""
        self._delay = FIRST_DELAY

    def wait(self, error: CallFailed, begun: bool) -> None:
        """Wait until it is worth trying again.

        Args:
            error: how the stream ended.
            begun: whether there is something to lose: what never began is for the user to begin again.

        Raises:
            CallFailed: `error`, where trying again is no use, or no time is left.
        """
        # With chance, so that the clients of a server that has gone do not come back all at once.
        delay = error.retry_after or self._delay * random.uniform(0.5, 1.0)
        resumable = error.code in BROKEN and error.reason != "MESSAGE_TOO_LARGE"
        if not begun or not resumable or delay >= self.remaining:
            raise error
        self._delay = min(2 * self._delay, LONGEST_DELAY)
        self._sleep(delay)


def generate(
    client: Client,
    prompt: Prompt,
    sampling: SamplingOverrides | None = None,
    *,
    draft_interval: float | None = None,
    priority: Priority = Priority.INTERACTIVE,
    timeout: float,
    guard: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[Event]:
    """The events of one answer, as `Client.generate` has them, over as many streams as it takes.

    Args:
        client: asks the server, or whichever stands behind its address by then.
        prompt: what is asked.
        sampling: settings.
        draft_interval: least seconds between two drafts; None for no drafts.
        priority: who goes first where there is not room for all.
        timeout: seconds for the whole answer.
        guard: entered while a call is made.

    Raises:
        CallFailed: the first stream did not begin, or the answer ended badly and cannot be resumed.
    """
    progress, retries = Progress(), Retries(timeout)
    while True:
        with guard():
            events = client.generate(
                prompt,
                progress.sampling or sampling,
                draft_interval=draft_interval,
                priority=priority,
                committed_ids=progress.committed_ids,
                timeout=retries.remaining,
            )
        try:
            for event in events:
                retries.went_on()
                if progress.take(event):
                    yield event
            return
        except CallFailed as error:
            retries.wait(error, begun=progress.started is not None)
        finally:
            events.cancel()
