"""Processes that end without a word: clients and servers under SIGKILL, servers under SIGTERM while they are busy.

The answers are known (`tests.reliability.echo`), so what a successor resumes must complete them to the letter.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpc import StatusCode

from runtime.engines.fake import FACTS
from runtime.events import Committed, Finished
from runtime.request import SamplingOverrides
from service.client import CallFailed, Client
from service.progress import Progress
from service.resuming import generate
from tests.reliability.echo import words
from tests.reliability.server import EchoProcess, echo_server
from tests.service.processes import ROOT

STEP_SECONDS = 0.01
"""Of a denoising call: an answer of nine blocks takes a good third of a second, so that there is a midst to kill in."""
CANVAS, SEED = FACTS.canvas_length, 7
READERS = 8
"""Clients of a server that is killed."""
STREAMS = 3
"""Of a client process."""
TIMEOUT = 120.0
LAST_WRITES = 5.0
"""Seconds past the grace time in which the process must be gone: statuses are written and the engine is closed."""
Tell = Callable[[str], None]


@dataclass
class Kills:
    """What came of it."""

    kills: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether every promise was kept."""
        return not (self.wrong or self.leaks)


def kill_clients(directory: Path, kills: int, seed: int, tell: Tell = lambda _: None) -> Kills:
    """Kill client processes of `STREAMS` streams each; a successor resumes every stream with what the dead one had."""
    result, chance = Kills(), random.Random(seed)
    with echo_server(directory, step_seconds=STEP_SECONDS) as server, Client(server.address) as client:
        for number in range(kills):
            texts = [words(chance, 150, 280) for _ in range(STREAMS)]
            for text, progress, told in _until_killed(server.address, texts, blocks=chance.randint(1, 15)):
                _resume(client, text, progress, told, result)
            result.kills += 1
            if number % 20 == 19:
                tell(f"  {number + 1} clients killed")
        result.leaks = _leaks(server)
    return result


def _until_killed(address: str, texts: Sequence[str], blocks: int) -> Iterator[tuple[str, Progress, str]]:
    """Of each stream its prompt, how far it had come when its client was killed, and what of the answer it had."""
    told: dict[str, list[str]] = {text: [] for text in texts}
    progress = {text: Progress() for text in texts}
    command = [sys.executable, "-m", "tests.reliability.kills", address, json.dumps(texts)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for count, line in enumerate(process.stdout, 1):
            said = json.loads(line)
            progress[said["prompt"]].blocks.append(said["token_ids"])
            told[said["prompt"]].append(said["text"])
            if count == blocks:
                break
        process.kill()
    yield from ((text, progress[text], "".join(told[text])) for text in texts)


def _resume(client: Client, text: str, progress: Progress, told: str, result: Kills) -> None:
    """Complete an answer as a client does that knows its first blocks alone."""
    ids = [token for block in progress.blocks for token in block if len(block) == CANVAS]
    try:
        sampling = SamplingOverrides(seed=SEED, max_output_tokens=300)
        events = list(client.generate(text, sampling, committed_ids=ids, timeout=TIMEOUT))
    except CallFailed as error:
        result.wrong.append(f"resuming behind {len(progress.blocks)} blocks: {error}")
        return
    known = len(ids) // CANVAS
    new = "".join(event.text for event in events if isinstance(event, Committed))
    # ASCII answers without stop sequences: a block's text is its tokens', nothing is held back over its border.
    whole = told[: known * CANVAS] + new
    ended = isinstance(events[-1], Finished)
    if whole != text or not ended:
        result.wrong.append(f"resumed behind {known} blocks: {whole!r} in place of {text!r}")
    result.outcomes["resumed in the midst" if known else "begun anew"] += 1


def kill_servers(directory: Path, kills: int, seed: int, tell: Tell = lambda _: None) -> Kills:
    """Kill a server in the midst of many answers and start another one in its place, again and again.

    Clients go on as `service.resuming` has them; each answer is read over as many servers as it takes.
    """
    result, chance = Kills(), random.Random(seed)
    address, options = f"unix:{directory}/socket", {"step_seconds": 3 * STEP_SECONDS}
    with ExitStack() as servers, ThreadPoolExecutor(READERS) as pool:
        server = servers.enter_context(echo_server(directory, address=address, **options))
        readers = _Readers(address, result)
        servers.callback(readers.stop)
        reading = [pool.submit(readers.read, random.Random(f"{seed}/{number}")) for number in range(READERS)]
        for number in range(kills):
            # Everybody is in the midst of an answer by then: each has nine blocks at most.
            readers.wait_blocks(chance.randint(READERS, 5 * READERS))
            server.process.kill()
            server.process.wait()
            result.kills += 1
            server = servers.enter_context(echo_server(directory, address=address, **options))
            if number % 10 == 9:
                tell(f"  {number + 1} servers killed")
        readers.stop()
        for each in reading:
            each.result()
        result.leaks = _leaks(server)
    return result


class _Readers:
    """Clients that read one answer after the other, and how many blocks they have had in all."""

    def __init__(self, address: str, result: Kills) -> None:
        self._address, self._result, self._over = address, result, False
        self._blocks, self._changed = 0, threading.Condition()

    def stop(self) -> None:
        """Have everybody end with the answer that is being read."""
        self._over = True

    def wait_blocks(self, more: int) -> None:
        """Wait until so many more blocks have come.

        Raises:
            TimeoutError: they did not.
        """
        with self._changed:
            enough = self._blocks + more
            if not self._changed.wait_for(lambda: self._blocks >= enough, TIMEOUT):
                raise TimeoutError(f"no {more} blocks came in {TIMEOUT} s")

    def read(self, chance: random.Random) -> None:
        """Read until `stop`; a stream that never began is begun again by its user."""
        with Client(self._address) as client:
            while not self._over:
                counted, text = _Counted(client), words(chance, 100, 280)
                try:
                    self._check(text, self._answer(counted, text), counted.streams)
                except CallFailed as error:
                    if error.code is not StatusCode.UNAVAILABLE:
                        self._result.wrong.append(str(error))
                    self._result.outcomes["never began"] += 1
                    client.wait_serving(TIMEOUT)

    def _answer(self, client: Any, text: str) -> str:
        told = []
        sampling = SamplingOverrides(max_output_tokens=300)
        for event in generate(client, text, sampling, draft_interval=0.0, timeout=TIMEOUT):
            if isinstance(event, Committed):
                told.append(event.text)
                with self._changed:
                    self._blocks += 1
                    self._changed.notify_all()
        return "".join(told)

    def _check(self, text: str, whole: str, streams: int) -> None:
        if whole != text:
            self._result.wrong.append(f"{whole!r} in place of {text!r} over {streams} streams")
        self._result.outcomes["whole at once" if streams == 1 else "whole after it broke"] += 1


class _Counted:
    """A client that counts its streams."""

    def __init__(self, client: Client) -> None:
        self._client, self.streams = client, 0

    def generate(self, *arguments: Any, **options: Any) -> Any:
        self.streams += 1
        return self._client.generate(*arguments, **options)


def terminate(directory: Path, streams: int, grace: float, seed: int) -> Kills:
    """SIGTERM while `streams` answers are read, with less grace than they need.

    Every stream ends with its whole answer or with UNAVAILABLE, and the process with exit code 0 within the grace time.
    """
    result, chance = Kills(), random.Random(seed)
    with echo_server(directory, grace=grace, step_seconds=10 * STEP_SECONDS) as server:
        begun = threading.Barrier(streams + 1)
        with ThreadPoolExecutor(streams) as readers:
            texts = [words(chance, 20, 280) for _ in range(streams)]
            reading = [readers.submit(_ended, server.address, text, begun) for text in texts]
            begun.wait(TIMEOUT)
            time.sleep(chance.uniform(0.0, 0.5))
            terminated = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            code = server.process.wait(grace + TIMEOUT)
            seconds = time.monotonic() - terminated
            for each in reading:
                result.outcomes[each.result()] += 1
    result.kills = 1
    result.wrong = [ended for ended in result.outcomes if ended not in ("finished", "DRAINING")]
    if code != 0 or seconds > grace + LAST_WRITES:
        result.wrong.append(f"the process ended with {code} after {seconds:.1f} s, {grace} s were allowed")
    return result


def _ended(address: str, text: str, begun: threading.Barrier) -> str:
    """How a stream ended: `finished` with its whole answer, or its status' reason."""
    with Client(address) as client:
        events = client.generate(text, SamplingOverrides(max_output_tokens=300), timeout=TIMEOUT)
        begun.wait(TIMEOUT)
        told: list[str] = []
        try:
            for event in events:
                if isinstance(event, Committed):
                    told.append(event.text)
        except CallFailed as error:
            return error.reason or f"{error} without a reason"
    return "finished" if "".join(told) == text else f"{''.join(told)!r} in place of {text!r}"


def _leaks(server: EchoProcess) -> list[str]:
    """What the server still holds a while after its last stream."""
    until = time.monotonic() + 10
    while (left := server.accounts()["leaks"]) and time.monotonic() < until:
        time.sleep(0.05)
    return list(left)


def client() -> None:
    """`ADDRESS TEXTS_AS_JSON`: the process to be killed; prints every block of every stream as a line of JSON."""
    address, texts = sys.argv[1], json.loads(sys.argv[2])
    lock = threading.Lock()

    def read(text: str) -> None:
        sampling = SamplingOverrides(seed=SEED, max_output_tokens=300)
        for event in channel.generate(text, sampling, draft_interval=0.0, timeout=TIMEOUT):
            if isinstance(event, Committed):
                line = {"prompt": text, "token_ids": event.token_ids.tolist(), "text": event.text}
                with lock:
                    print(json.dumps(line), flush=True)

    with Client(address) as channel, ThreadPoolExecutor(len(texts)) as readers:
        list(readers.map(read, texts))


if __name__ == "__main__":
    client()
