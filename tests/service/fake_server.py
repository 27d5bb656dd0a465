"""A server process over the fake engine: `python -m tests.service.fake_server BUNDLE_DIRECTORY [options as JSON]`.

Lines on standard input steer the engine: `release` opens the gate that `hold` has put up.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec

import service.intake
from service import logs
from service.lifetime import STALL, serve
from service.security import SecuritySettings
from service.served import Served
from tests.service.support import PacedMailbox, make_served


def main() -> None:
    directory = Path(sys.argv[1])
    options: dict[str, Any] = json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
    logs.configure(options.get("log", "info"))
    if options.get("paced"):
        service.intake.Mailbox = PacedMailbox  # type: ignore[misc]

    def load() -> Served:
        if options.get("hold_loading"):
            threading.Event().wait()
        engine, served = make_served(directory, options.get("answers", {}))
        if "hold" in options:
            gate = engine.hold(*options["hold"])
            threading.Thread(target=lambda: (sys.stdin.readline(), gate.release()), daemon=True).start()
        if options.get("die"):

            def turn() -> bool:
                raise RuntimeError("a bug in the runner")

            served.runner._turn = turn  # type: ignore[method-assign]
        if "fault" in options:
            engine.fail("denoise", 1, RuntimeError(options["fault"]))
        for call in range(1, 2000 if "step_seconds" in options else 0):
            engine.before("denoise", call, lambda: time.sleep(options["step_seconds"]))
        return served

    address, grace = options.get("address", "127.0.0.1:0"), options.get("grace", 30.0)
    security = msgspec.convert(options.get("security", {}), SecuritySettings, dec_hook=lambda kind, value: kind(value))
    stall = options.get("stall", STALL)
    asyncio.run(serve(address, load, grace, lambda bound: print(bound, flush=True), security, stall))


if __name__ == "__main__":
    main()
