"""A server process over the echoing engine: `python -m tests.reliability.server DIRECTORY OPTIONS_AS_JSON`.

It announces its address on standard output, and answers every line on standard input with a line of JSON: how many
requests it has, and what would be a leak if there were none.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from service import logs
from service.lifetime import serve
from service.served import Served
from tests.reliability.echo import Size, echoing, leaks
from tests.service.processes import ROOT

Options = dict[str, Any]


def main() -> None:
    """Serve until a signal comes."""
    directory, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    logs.configure("error")
    size = Size(**options.get("size", {}))

    def load() -> Served:
        served = echoing(directory, size, step_seconds=options.get("step_seconds", 0.0))

        def answer() -> None:
            for _ in sys.stdin:
                print(json.dumps({**asdict(served.runner.load), "leaks": leaks(served.runner)}), flush=True)

        threading.Thread(target=answer, daemon=True).start()
        return served

    address = options.get("address", "127.0.0.1:0")
    asyncio.run(serve(address, load, options.get("grace", 30.0), lambda bound: print(bound, flush=True)))


@dataclass
class EchoProcess:
    """A running server."""

    process: subprocess.Popen[str]
    address: str

    def accounts(self) -> dict[str, Any]:
        """Its `Load` by field, and its `leaks`."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        told: dict[str, Any] = json.loads(self.process.stdout.readline())
        return told


@contextmanager
def echo_server(directory: Path, **options: Any) -> Iterator[EchoProcess]:
    """Start a server and wait until it is SERVING; it is killed when the block is left."""
    command = [sys.executable, "-m", "tests.reliability.server", str(directory), json.dumps(options)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            if not address:
                raise RuntimeError(f"the server did not start; it ended with {process.wait(60)}")
            yield EchoProcess(process, address)
        finally:
            process.kill()


if __name__ == "__main__":
    main()
