"""A directory that appears whole or not at all."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

_LOCK = ".lock"


@contextmanager
def staged_directory(target: Path) -> Iterator[Path]:
    """A temporary directory beside `target` that takes its place when the block ends well.

    Until then nothing at `target` changes. An error removes the temporary; what a killed process left behind is removed
    by the next one that stages the same target. Everything is on disk before the rename. Of two that stage the same
    target at once, the one that ends last wins.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        with _alone_in(target.parent):
            _remove_stale(target)
            staging = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
            held.callback(shutil.rmtree, staging, ignore_errors=True)
            lock = held.enter_context((staging / _LOCK).open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield staging
        staging.chmod(0o755)
        _sync(staging)
        with _alone_in(target.parent):
            _replace(staging, target)


def _prefix(target: Path) -> str:
    return f".{target.name}.partial-"


@contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """Let nobody else sweep or rename here meanwhile: a directory that is not yet locked, or that lies between two
    renames, looks as if its process had been killed."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _replace(staging: Path, target: Path) -> None:
    """Put `staging` at `target`; what was there goes where the staging directory was, to be removed as a stale one."""
    (staging / _LOCK).unlink()
    _sync_path(staging)
    if target.exists():
        aside = Path(f"{staging}-replaced")
        target.rename(aside)
        staging.rename(target)
        shutil.rmtree(aside)
    else:
        staging.rename(target)
    _sync_path(target.parent)


def _remove_stale(target: Path) -> None:
    for path in target.parent.glob(f"{glob.escape(_prefix(target))}*"):
        if path.name.endswith("-replaced") and not target.exists():
            # Killed between the two renames: the old content is still the only whole one.
            path.rename(target)
        elif not _in_use(path):
            shutil.rmtree(path, ignore_errors=True)


def _in_use(staging: Path) -> bool:
    """Whether a live process holds the staging directory's lock."""
    try:
        with (staging / _LOCK).open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _sync(directory: Path) -> None:
    for path in directory.iterdir():
        _sync_path(path)
    _sync_path(directory)


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
