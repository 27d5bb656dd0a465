"""From the start of `dgemma serve` to SERVING, and the memory that the server then holds and holds after a request."""

from __future__ import annotations

import contextlib
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from benchmarks.figures import Figure, Setting

SECONDS, MEGABYTES = 2.0, 300.0
"""The bars, for the pocket."""
STARTS = 3
TIMEOUT = 60.0
DGEMMA = str(Path(sys.executable).with_name("dgemma"))


def run(setting: Setting) -> list[Figure]:
    """Medians over a few starts; memory from the last."""
    starts, resident, worked = [], 0.0, 0.0
    for _ in range(STARTS):
        began = time.perf_counter()
        with _server(setting) as (process, address):
            starts.append(time.perf_counter() - began)
            resident = _megabytes(process)
            _generate(address)
            worked = _megabytes(process)
    return [
        Figure("server start to SERVING", statistics.median(starts), "s", most=SECONDS, note=f"{STARTS} starts"),
        Figure("resident when SERVING", resident, "MB", most=MEGABYTES),
        Figure("resident after a request", worked, "MB", most=MEGABYTES),
    ]


@contextlib.contextmanager
def _server(setting: Setting) -> Iterator[tuple[psutil.Process, str]]:
    """A server process and its address, from when it has announced that its services are SERVING."""
    command = [DGEMMA, "serve", str(setting.bundle), "--address", "127.0.0.1:0"]
    command += ["--threads", str(setting.threads), "--log-level", "warning"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            address = re.search(r"127\.0\.0\.1:\d+", line)
            if address is None:
                raise RuntimeError(f"the server did not start; it said {line!r}")
            yield psutil.Process(process.pid), address[0]
        finally:
            process.terminate()
            process.wait(TIMEOUT)


def _generate(address: str) -> None:
    """One block through the command line, so that the server has done all that a server does."""
    command = [DGEMMA, "generate", "--address", address, "--max-tokens", "256", "--steps", "8", "Count to ten."]
    subprocess.run(command, stdout=subprocess.DEVNULL, timeout=TIMEOUT, check=True)


def _megabytes(process: psutil.Process) -> float:
    return float(process.memory_info().rss) / 1e6
