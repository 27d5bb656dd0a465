"""A directory that appears whole or not at all."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LOCK = ".lock"


@contextmanager
def staged_directory(target: Path) -> Iterator[Path]:
    """A temporary directory beside `target` that takes its place when the block ends well.

    Until then nothing at `target` changes. An error removes the temporary; what a killed process left behind is removed
    by the next one that stages the same target. Everything is on disk before the rename.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(target)
    staging = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
    try:
        with (staging / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield staging
            (staging / _LOCK).unlink()
            staging.chmod(0o755)
            _sync(staging)
            _replace(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _prefix(target: Path) -> str:
    return f".{target.name}.partial-"


def _replace(staging: Path, target: Path) -> None:
    """Put `staging` at `target`; what was there goes where the staging directory was, to be removed as a stale one."""
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
