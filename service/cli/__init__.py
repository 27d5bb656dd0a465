"""The command line `dgemma`: one file a command, loaded when it is asked for."""

from __future__ import annotations

import os

# Before gRPC is imported anywhere: its C core tells on standard error of every connection that ends.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

from service.cli.group import main

__all__ = ["main"]
