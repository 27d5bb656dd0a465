"""The command line `dgemma`: one file a command, loaded when it is asked for."""

from __future__ import annotations

from service.cli.group import main

__all__ = ["main"]
