"""Server processes for tests: over the fake engine, with a client for each."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.channel import Credentials
from service.client import PLAIN, Client

ROOT = Path(__file__).parent.parent.parent


@dataclass
class ServerProcess:
    """A running server."""

    process: subprocess.Popen[str]
    address: str
    client: Client

    def release(self) -> None:
        """Open the engine's gate."""
        assert self.process.stdin is not None
        self.process.stdin.write("release\n")
        self.process.stdin.flush()

    def exit_code(self) -> int:
        """Wait for the end."""
        return self.process.wait(timeout=60)

    def log(self) -> str:
        """Standard error, after the end."""
        assert self.process.stderr is not None
        return self.process.stderr.read()


@contextmanager
def fake_server(directory: Path, credentials: Credentials = PLAIN, **options: Any) -> Iterator[ServerProcess]:
    """Start a server and wait for it to tell its address, which it does once it is SERVING."""
    command = [sys.executable, "-m", "tests.service.fake_server", str(directory), json.dumps(options)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            if not address:
                process.wait(timeout=60)
                yield ServerProcess(process, "", Client("unused:1"))
                return
            with Client(address, credentials) as client:
                yield ServerProcess(process, address, client)
        finally:
            process.kill()
