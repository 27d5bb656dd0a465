"""`make soak`: many open streams at once for minutes; none is lost, and the server's memory does not grow.

A stream that ends is followed by another one at once. With the fake engine every answer is known; with a bundle, equal
requests must have equal answers. Memory is the server process' resident set, once a second; its slope is that of the
least-squares line through the last half.
"""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import grpc
import numpy as np
import psutil

from diffusiongemma.v1 import generation_pb2_grpc, options_pb2
from tests.reliability.echo import words
from tests.reliability.grammar import Numbers, Turn
from tests.reliability.server import echo_server
from tests.service.support import request

BAR = 1.0
"""MB a minute."""
STREAMS_PER_CONNECTION = 100
"""The server takes 128."""
OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)
TIMEOUT = 600.0
FAKE_TOKENS = 224
TEXTS = 300
"""Different ones: the tokeniser remembers up to 10,000 words, and without a vocabulary of words each text is one. With
ever new texts memory grew by 8 kB a stream until it had those."""
POCKET_PROMPTS = (
    "Spell 742.",
    "Sort these words: window, banana, lamp, cherry, garden",
    "Write as JSON: Anna is 31 and lives in Oslo.",
    "What is 17 + 25?",
)
Ask = tuple[str, int, str | None]
"""A prompt, its seed, and the answer if it is known."""


@dataclass
class Soak:
    """What came of it."""

    streams: int
    ended: Counter[str] = field(default_factory=Counter)
    """Streams by how they ended; all but `finished` are lost."""
    open: int = 0
    peak: int = 0
    """Most streams that had started and not ended at a time."""
    samples: list[tuple[float, float]] = field(default_factory=list)
    """Seconds, and MB of resident memory."""
    answers: dict[tuple[str, int], str] = field(default_factory=dict)

    @property
    def lost(self) -> int:
        """Streams that ended in another way than with their whole answer."""
        return sum(self.ended.values()) - self.ended["finished"]

    @property
    def slope(self) -> float:
        """MB a minute over the last half."""
        seconds, megabytes = np.array(self.samples[len(self.samples) // 2 :]).T
        return float(np.polyfit(seconds, megabytes, 1)[0]) * 60

    def expected(self, ask: Ask, text: str) -> bool:
        """Whether this is the answer that is known, or that the same request had before."""
        prompt, seed, answer = ask
        return text == (answer if answer is not None else self.answers.setdefault((prompt, seed), text))


async def soak(address: str, process: psutil.Process, asks: Iterator[Ask], streams: int, seconds: float) -> Soak:
    """Keep `streams` streams open for so long."""
    result, until = Soak(streams), time.monotonic() + seconds
    all_open = asyncio.Barrier(streams)
    async with AsyncExitStack() as stack:
        channels = [
            await stack.enter_async_context(grpc.aio.insecure_channel(address, options=OWN_CONNECTION))
            for _ in range(-(-streams // STREAMS_PER_CONNECTION))
        ]
        stubs = [generation_pb2_grpc.GenerationServiceStub(channel) for channel in channels]

        async def reader(stub: Any) -> None:
            barrier: asyncio.Barrier | None = all_open
            while time.monotonic() < until:
                await _stream(stub, next(asks), result, barrier)
                barrier = None

        async def sample() -> None:
            began = time.monotonic()
            while True:
                result.samples.append((time.monotonic() - began, process.memory_info().rss / 1e6))
                await asyncio.sleep(1)

        sampling = asyncio.create_task(sample())
        await asyncio.gather(*(reader(stubs[number % len(stubs)]) for number in range(streams)))
        sampling.cancel()
    return result


async def _stream(stub: Any, ask: Ask, result: Soak, all_open: asyncio.Barrier | None) -> None:
    """One stream; before it goes on behind its first event it waits for `all_open`."""
    prompt, seed, _ = ask
    options = options_pb2.GenerationOptions(seed=seed, max_output_token_count=FAKE_TOKENS)
    turn, numbers, ended = Turn(), Numbers(), "lost without a status"
    try:
        async for response in stub.Generate(request(prompt, options=options, drafts=seed % 2 == 0), timeout=TIMEOUT):
            numbers.take(response)
            turn.take(response)
            if response.HasField("started"):
                result.open += 1
                result.peak = max(result.peak, result.open)
                if all_open is not None:
                    await all_open.wait()
        if turn.finished is not None:
            ended = "finished" if result.expected(ask, turn.text) else "another answer"
    except grpc.aio.AioRpcError as error:
        ended = f"{error.code().name}: {error.details()}"
    finally:
        result.open -= turn.started is not None
        result.ended[ended] += 1


def echoes(chance: random.Random) -> Iterator[Ask]:
    """Requests of the fake engine, of one block to seven."""
    texts = [words(chance, 10, 200) for _ in range(TEXTS)]
    while True:
        text = chance.choice(texts)
        yield text, chance.randrange(1 << 30), text


def tasks(chance: random.Random) -> Iterator[Ask]:
    """Requests of the pocket."""
    while True:
        yield chance.choice(POCKET_PROMPTS), chance.randrange(8), None


@contextmanager
def fake_server(directory: Path, streams: int) -> Iterator[tuple[str, int, Callable[[], Sequence[str]]]]:
    """Address and process id of a server of the fake engine, and what it leaks."""
    with echo_server(directory, size={"active": streams, "waiting": streams}) as server:
        yield server.address, server.process.pid, lambda: server.accounts()["leaks"]


@contextmanager
def bundle_server(bundle: Path, streams: int) -> Iterator[tuple[str, int, Callable[[], Sequence[str]]]]:
    """The same of `dgemma serve`, whose leaks nobody but its memory tells."""
    command = [sys.executable, "-c", "from service.cli import main; main()", "serve", str(bundle)]
    options = ["--address", "127.0.0.1:0", "--max-active", str(streams), "--log-level", "error"]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[-1], process.pid, list
        finally:
            process.terminate()


@click.command()
@click.option("--streams", default=1000, show_default=True, help="Open at once on the fake engine; 0: none.")
@click.option("--bundle", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Soaked as well.")
@click.option("--bundle-streams", default=64, show_default=True, help="Open at once on the bundle.")
@click.option("--minutes", default=5.0, show_default=True, help="Of each soak.")
@click.option("--seed", type=int, default=None, help="Of what is asked; drawn and printed where it is not given.")
def main(streams: int, bundle: Path | None, bundle_streams: int, minutes: float, seed: int | None) -> None:
    """Keep many streams open and watch memory; exits with 1 where a stream is lost or memory grows."""
    seed = random.randrange(1 << 31) if seed is None else seed
    click.echo(f"seed {seed}")
    good = True
    if streams:
        with tempfile.TemporaryDirectory() as directory, fake_server(Path(directory), streams) as server:
            good = _told("fake engine", server, echoes, streams, minutes, seed)
    if bundle is not None:
        with bundle_server(bundle, bundle_streams) as server:
            good &= _told(bundle.name, server, tasks, bundle_streams, minutes, seed)
    sys.exit(not good)


def _told(name: str, server: Any, asks: Any, streams: int, minutes: float, seed: int) -> bool:
    address, process_id, leaks = server
    process = psutil.Process(process_id)
    result = asyncio.run(soak(address, process, asks(random.Random(seed)), streams, minutes * 60))
    total, left = sum(result.ended.values()), leaks()
    memory = [megabytes for _, megabytes in result.samples]
    click.echo(
        f"{name}: {total} streams, at most {result.peak} open at once, {result.lost} lost; resident at first and after "
        f"each tenth {', '.join(f'{memory[(len(memory) - 1) * tenth // 10]:.0f}' for tenth in range(11))} MB; "
        f"slope over the last half {result.slope:+.2f} MB/min (bar < {BAR})"
    )
    for ended, count in result.ended.items():
        if ended != "finished":
            click.echo(f"  {count} x {ended}")
    for leak in left:
        click.echo(f"  left behind: {leak}")
    return not (result.lost or left) and result.peak == streams and result.slope < BAR


if __name__ == "__main__":
    main()
