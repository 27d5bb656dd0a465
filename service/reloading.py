"""What was read from files, read again when one has changed: certificates and tokens are replaced while in service."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from runtime.errors import DgemmaError

T = TypeVar("T")

logger = logging.getLogger(__name__)

Stamp = tuple[tuple[int, int, int], ...]


class UnusableFile(DgemmaError):
    """A file that the server was told to use cannot be."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path}: {why}")
        self.path, self.why = path, why


class Reloading(Generic[T]):
    """A value made of files. Safe to use from any thread.

    Whether they changed is looked at at every `get`, which costs microseconds. Files that become unusable, as a
    certificate does whose key has not been written yet, leave the last good value in force.
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[], T]) -> None:
        """Read for the first time.

        Args:
            paths: the files.
            read: makes the value of them; raises `UnusableFile`.

        Raises:
            UnusableFile: they cannot be used.
        """
        self._paths, self._read = tuple(paths), read
        self._lock = threading.Lock()
        self._stamp = self._look()
        self._value = read()

    def get(self) -> T:
        """The value of the files as they are now."""
        with self._lock:
            stamp = self._look()
            if stamp != self._stamp:
                # Looked at before they are read: what is written meanwhile is read the next time.
                self._stamp = stamp
                self._reload()
            return self._value

    def _reload(self) -> None:
        fields = {"files": ",".join(path.name for path in self._paths)}
        try:
            self._value = self._read()
        except UnusableFile as error:
            logger.warning("kept", extra={"fields": {**fields, "why": error.why}})
        else:
            logger.info("reloaded", extra={"fields": fields})

    def _look(self) -> Stamp:
        return tuple(_stamp(path) for path in self._paths)


def read_bytes(path: Path) -> bytes:
    """The contents of a file.

    Raises:
        UnusableFile: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UnusableFile(path, f"cannot be read ({error.strerror})") from error


def _stamp(path: Path) -> tuple[int, int, int]:
    """What differs once a file was written, replaced or made readable; the same for all that cannot be looked at."""
    try:
        found = os.stat(path)
    except OSError:
        return (0, 0, 0)
    return (found.st_ctime_ns, found.st_size, found.st_ino)
