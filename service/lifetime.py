"""A server's life: port, bundle, engine, warm-up, SERVING; a signal, NOT_SERVING, drain, engine down, exit.

1. The port is bound: a taken one is told before gigabytes are read. Clients that come early wait.
2. The bundle and its engine load, and one short generation warms it up, so that the first client pays nothing. A
   signal meanwhile ends the server at once.
3. The server starts, its services turn SERVING, and its address is announced.
4. A signal turns them NOT_SERVING. New requests get UNAVAILABLE, open ones may end within the grace time, which a
   second signal ends; what is left then ends with UNAVAILABLE.
5. The engine's thread ends and gives its memory back.

An engine that hangs ends the process too, in the midst of the grace time as well: NOT_SERVING, UNAVAILABLE for
everybody, and an exit code that makes a supervisor start another one.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from runtime.errors import DgemmaError
from runtime.runner import Runner
from service.address import stays_here
from service.security import Security, SecuritySettings
from service.served import Served
from service.server import LAST_CALL, Server, on_own_thread

logger = logging.getLogger(__name__)

LIVENESS_INTERVAL = 1.0
"""Seconds between two looks at the engine's thread: as long as a dead server may call itself SERVING."""

STALL = 300.0
"""Seconds; the slowest call there should be is a chunk of 256 tokens through 25 billion parameters on a few cores."""

OPEN = SecuritySettings()
"""No encryption, no tokens, no limits."""


class EngineDied(DgemmaError):
    """The engine's thread has ended, so that nothing more can be answered."""


class EngineStalled(DgemmaError):
    """A call of the engine does not return. What holds it may hold the process's end up too: leave by `os._exit`."""


class Signals:
    """SIGTERM and SIGINT: the first asks for the server's end, a second one for a quick end."""

    def __init__(self) -> None:
        """Take the signals over; needs a running event loop in the main thread."""
        self.requested, self.hurried = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._receive)

    def _receive(self) -> None:
        (self.hurried if self.requested.is_set() else self.requested).set()


async def serve(
    address: str,
    load: Callable[[], Served],
    grace: float,
    announce: Callable[[str], None] = lambda address: None,
    security: SecuritySettings = OPEN,
    stall: float = STALL,
) -> None:
    """Serve what `load` returns until SIGTERM or SIGINT, then drain.

    Args:
        address: where to listen.
        load: makes what is served, with a runner that is warmed up; called on a thread of its own.
        grace: seconds that open requests have to end after the signal; a second signal ends them.
        announce: told the address once the services are SERVING.
        security: certificates, tokens and limits; by default none.
        stall: seconds that a call of the engine may take.

    Where the signal comes before anything is served `load` still runs when this returns.

    Raises:
        AddressTaken: the address cannot be listened on.
        UnusableFile: a file of the security settings cannot be used.
        BundleError: the bundle cannot be loaded.
        EngineDied: the engine's thread ended; another process should take over.
        EngineStalled: the engine hangs, and clients were sent away; the engine is not closed.
    """
    signals = Signals()
    began = time.monotonic()
    server = Server(address, Security(security))
    _log("bound", address=server.address, encrypted=security.tls is not None)
    if security.tls is None and not stays_here(address):
        logger.warning("unencrypted", extra={"fields": {"why": "prompts, answers and tokens can be read on the way"}})
    served = await _loaded(load, signals.requested)
    if served is None:
        _log("stopped", loaded=False)
        return
    stalled = False
    try:
        await server.start(served)
        _log("serving", address=server.address, model=served.facts.name, seconds=round(time.monotonic() - began, 3))
        announce(server.address)
        ending = asyncio.create_task(_drained(server, served.runner, signals, grace))
        stalled = await _stalls(served.runner, stall, ending)
        if stalled:
            _log("stalled", seconds=stall)
            ending.cancel()
            await server.abandon()
            raise EngineStalled(f"the engine has not returned from a call for {stall:g} s; the process ends")
        await ending
    finally:
        if not stalled:
            await on_own_thread(partial(served.runner.close, LAST_CALL))


async def _loaded(load: Callable[[], Served], requested: asyncio.Event) -> Served | None:
    """What was loaded, or None where the signal came first.

    The thread is a daemon: nobody waits for the rest of a load that nobody wants, of tens of gigabytes perhaps.
    """
    loop, loaded = asyncio.get_running_loop(), asyncio.Event()
    outcome: list[Served | BaseException] = []

    def run() -> None:
        try:
            outcome.append(load())
        except BaseException as error:
            outcome.append(error)
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(loaded.set)

    threading.Thread(target=run, name="loading", daemon=True).start()
    waiting = [asyncio.create_task(event.wait()) for event in (loaded, requested)]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()
    if requested.is_set():
        return None
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


async def _drained(server: Server, runner: Runner, signals: Signals, grace: float) -> None:
    """Wait for a signal, or the end of the engine's thread, which is looked for; then drain."""
    while runner.alive and not signals.requested.is_set():
        with suppress(TimeoutError):
            await asyncio.wait_for(signals.requested.wait(), LIVENESS_INTERVAL)
    _log("draining", grace=grace)
    drained = await server.stop(grace, signals.hurried)
    _log("stopped", drained=drained)
    if not signals.requested.is_set():
        raise EngineDied("the engine's thread ended by itself, which is a bug; the log above tells of it")


async def _stalls(runner: Runner, stall: float, ending: asyncio.Task[None]) -> bool:
    """Watch an engine until its server's end; whether it stands still before."""
    while not ending.done():
        if runner.stalled_for > stall:
            return True
        await asyncio.wait([ending], timeout=LIVENESS_INTERVAL)
    return False


def _log(event: str, **fields: object) -> None:
    logger.info(event, extra={"fields": fields})
