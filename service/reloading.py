"""What was read from files, read again when one has changed: certificates and tokens are replaced while in service."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from runtime.errors import DgemmaError

T = TypeVar("T")

logger = logging.getLogger(__name__)

Stamp = tuple[tuple[int, int, int], ...]

SETTLED = 2.0
"""Seconds after which a stamp is believed: two writes within one tick of a file system's clock, 4 ms here and 2 s at
most, leave the same one, where size and inode are the same."""


class UnusableFile(DgemmaError):
    """A file that the server was told to use cannot be."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path}: {why}")
        self.path, self.why = path, why


class Reloading(Generic[T]):
    """A value made of files. Safe to use from any thread.

    Whether they changed is looked at at every `get`, which costs microseconds; where they have changed lately their
    contents are compared. Files that become unusable, as a certificate does whose key has not been written yet, leave
    the last good value in force.
    """

    def __init__(
        self, paths: Sequence[Path], read: Callable[[], T], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Read for the first time.

        Args:
            paths: the files.
            read: makes the value of them; raises `UnusableFile`.
            clock: seconds, monotonic.

        Raises:
            UnusableFile: they cannot be used.
        """
        self._paths, self._read, self._clock = tuple(paths), read, clock
        self._lock = threading.Lock()
        self._stamp, self._stamped, self._settled = self._look(), clock(), False
        self._contents = self._digest()
        self._value = read()

    def get(self) -> T:
        """The value of the files as they are now."""
        with self._lock:
            if self._changed():
                self._reload()
            return self._value

    def _changed(self) -> bool:
        """Whether they have changed since this was asked last.

        They are looked at before they are read: what is written meanwhile is found the next time.
        """
        stamp, now = self._look(), self._clock()
        if stamp == self._stamp and self._settled:
            return False
        before = self._stamp, self._contents
        if stamp != self._stamp:
            self._stamp, self._stamped = stamp, now
        self._settled = now - self._stamped >= SETTLED
        self._contents = self._digest()
        # Another stamp is enough: access that was given changes what cannot be told from the contents.
        return before != (self._stamp, self._contents)

    def _digest(self) -> bytes:
        """Of what the files hold; those that cannot be read count as empty."""
        digest = hashlib.sha256()
        for path in self._paths:
            try:
                content = path.read_bytes()
            except OSError:
                content = b""
            digest.update(len(content).to_bytes(8) + content)
        return digest.digest()

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
