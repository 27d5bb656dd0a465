"""Between the engine's thread and a reader: nothing that counts is lost, and no draft is old."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import Draining
from runtime.events import Committed, Draft, Event
from service.mailbox import MAX_UNREAD, Mailbox


def draft(block: int, step: int) -> Draft:
    accepted, entropy = np.zeros(4, np.bool_), np.zeros(4, np.float32)
    return Draft(block, step, np.arange(4), "text", (1, 1, 1, 1), accepted, entropy, 0.5)


def committed(block: int) -> Committed:
    return Committed(block, np.arange(4), "text", 3, True)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@given(st.lists(st.sampled_from(["draft", "commit", "get"]), max_size=60))
def test_like_a_list_with_one_draft(acts: list[str]) -> None:
    """Against a plain model: commits in order, each once; a draft only if it is the newest and its block is open."""

    async def run() -> None:
        mailbox = Mailbox(0.0)
        kept: list[Event] = []
        newest: Draft | None = None
        block = step = 0
        for act in acts:
            if act == "draft":
                step += 1
                newest = draft(block, step)
                mailbox.put(newest)
            elif act == "commit":
                event = committed(block)
                block, step, newest = block + 1, 0, None
                kept.append(event)
                mailbox.put(event)
            elif kept or newest:
                expected: Event | None
                if kept:
                    expected = kept.pop(0)
                else:
                    expected, newest = newest, None
                assert await asyncio.wait_for(mailbox.get(), 5) is expected

    asyncio.run(run())


async def test_get_waits_for_another_thread() -> None:
    mailbox = Mailbox()
    waiting = asyncio.create_task(mailbox.get())
    await asyncio.sleep(0)
    assert not waiting.done()
    event = committed(0)
    threading.Thread(target=mailbox.put, args=(event,)).start()
    assert await asyncio.wait_for(waiting, 5) is event


async def test_nothing_is_lost_between_two_threads() -> None:
    """Catches a wake-up that is missed between looking and waiting."""
    mailbox = Mailbox(0.0)
    count = 3000

    def fill() -> None:
        for index in range(count):
            mailbox.put(draft(index, 1))
            mailbox.put(committed(index))

    thread = threading.Thread(target=fill)
    thread.start()
    blocks = []
    while len(blocks) < count:
        event = await asyncio.wait_for(mailbox.get(), 10)
        if isinstance(event, Committed):
            blocks.append(event.block_index)
        else:
            assert isinstance(event, Draft)
            assert event.block_index == len(blocks)
    assert blocks == list(range(count))
    thread.join()


async def test_an_error_comes_after_what_was_before_it() -> None:
    mailbox = Mailbox()
    mailbox.put(committed(0))
    mailbox.put(Draining("gone"))
    assert isinstance(await mailbox.get(), Committed)
    with pytest.raises(Draining):
        await mailbox.get()


async def test_drafts_are_wanted_as_often_as_asked() -> None:
    clock = Clock()
    mailbox = Mailbox(0.5, clock)
    assert mailbox.wants_draft()
    mailbox.put(draft(0, 1))
    clock.now = 0.4
    assert not mailbox.wants_draft()
    clock.now = 0.5
    assert mailbox.wants_draft()
    assert not Mailbox(None, clock).wants_draft()


async def test_a_full_mailbox_parks_until_it_is_read() -> None:
    """Catches a generation that fills memory for a client that does not read, and one that is never taken up again."""
    clock, woken = Clock(), []
    mailbox = Mailbox(0.0, clock)
    mailbox.wake = lambda: woken.append(clock.now)
    for block in range(MAX_UNREAD):
        assert mailbox.ready()
        mailbox.put(committed(block))
        mailbox.put(draft(block + 1, 1))
    assert mailbox.seconds_parked == 0
    assert not mailbox.ready()
    clock.now = 5.0
    assert not mailbox.ready()
    assert mailbox.seconds_parked == 5.0
    await mailbox.get()
    assert woken == [5.0]
    assert mailbox.seconds_parked == 0
    assert mailbox.ready()
    await mailbox.get()
    assert woken == [5.0]  # it was not parked


async def test_who_gave_its_memory_back_comes_again_for_more_than_one_block() -> None:
    """Catches a generation that is encoded anew for every block that its slow reader reads."""
    clock, woken = Clock(), []
    mailbox = Mailbox(0.0, clock)
    mailbox.wake = lambda: woken.append(clock.now)
    for block in range(MAX_UNREAD):
        mailbox.put(committed(block))
    for read in range(MAX_UNREAD // 2):
        clock.now += 1.0
        assert not mailbox.caught_up(), "it could make so few blocks"
        await mailbox.get()
        assert len(woken) == read + 1
    assert mailbox.caught_up()
    assert mailbox.seconds_parked == 0.0
    await mailbox.get()
    mailbox.put(committed(MAX_UNREAD))
    assert mailbox.caught_up()


def test_putting_after_the_loop_has_ended_does_nothing() -> None:
    """Catches an exception on the engine's thread, which serves other requests."""
    mailbox = asyncio.run(_make())
    mailbox.put(committed(0))


async def _make() -> Mailbox:
    return Mailbox()
