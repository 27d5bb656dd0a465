"""Server processes for the demo and the benchmarks."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DGEMMA = str(Path(sys.executable).with_name("dgemma"))
STOP_TIMEOUT = 60.0
"""Seconds."""


class ServerFailed(Exception):
    """A server did not start."""


@dataclass(frozen=True)
class ServerProcess:
    """A running `dgemma serve`."""

    process: subprocess.Popen[str]
    address: str

    def stop(self) -> int:
        """End it with SIGTERM; its exit code."""
        self.process.terminate()
        return self.process.wait(STOP_TIMEOUT)


@contextlib.contextmanager
def serving(bundle: Path, threads: int, *options: str) -> Iterator[ServerProcess]:
    """Serve a bundle on a free port for the time of the block, from when its services are SERVING.

    `options` are further ones of `dgemma serve`.

    Raises:
        ServerFailed: it ended instead; it has said why on standard error.
    """
    command = [DGEMMA, "serve", str(bundle), "--address", "127.0.0.1:0", "--threads", str(threads), *options]
    with subprocess.Popen([*command, "--log-level", "warning"], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise ServerFailed(f"the server did not start; it ended with {process.wait(STOP_TIMEOUT)}")
            yield ServerProcess(process, line.split()[-1])
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(STOP_TIMEOUT)
