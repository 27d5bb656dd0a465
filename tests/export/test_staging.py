"""Directories that appear whole or not at all."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from export.staging import staged_directory


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def fail_while_staging(target: Path) -> None:
    with staged_directory(target) as staging:
        (staging / "new").touch()
        raise RuntimeError


def test_it_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with staged_directory(target) as staging:
        (staging / "a").write_text("1")
        assert not target.exists()
    assert names(target) == ["a"]
    assert names(target.parent) == ["out"]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with staged_directory(target) as staging:
        (staging / "old").touch()
    with pytest.raises(RuntimeError):
        fail_while_staging(target)
    assert names(target) == ["old"]
    assert names(tmp_path) == ["out"]


def test_it_replaces_the_whole_directory(tmp_path: Path) -> None:
    target = tmp_path / "out"
    for name in ("old", "new"):
        with staged_directory(target) as staging:
            (staging / name).touch()
    assert names(target) == ["new"]
    assert names(tmp_path) == ["out"]


KILLED = """
import os, sys
from pathlib import Path
from export.staging import staged_directory
with staged_directory(Path(sys.argv[1])) as staging:
    (staging / "half").touch()
    print(staging, flush=True)
    {}
"""


def test_what_a_killed_process_leaves_is_no_target_and_is_swept_up(tmp_path: Path) -> None:
    target = tmp_path / "out"
    subprocess.run([sys.executable, "-c", KILLED.format("os._exit(9)"), str(target)], check=False)
    assert not target.exists()
    assert len(names(tmp_path)) == 1
    with staged_directory(target):
        pass
    assert names(tmp_path) == ["out"]


def test_another_process_at_work_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "out"
    command = [sys.executable, "-c", KILLED.format("sys.stdin.read()"), str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        theirs = Path(other.stdout.readline().strip())
        with staged_directory(target):
            assert (theirs / "half").exists()
        other.communicate("")
    assert names(tmp_path) == ["out"]
    assert names(target) == ["half"]


def test_a_kill_between_the_two_renames_of_a_replacement_loses_nothing(tmp_path: Path) -> None:
    target = tmp_path / "out"
    aside = tmp_path / ".out.partial-xyz-replaced"
    aside.mkdir()
    (aside / "old").touch()
    with pytest.raises(RuntimeError):
        fail_while_staging(target)
    assert names(target) == ["old"]
    assert names(tmp_path) == ["out"]


def test_one_that_starts_in_the_same_instant_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a sweep between a staging directory's creation and its lock."""
    target, make = tmp_path / "out", tempfile.mkdtemp
    second = threading.Thread(target=stage, args=(target, "second"))

    def make_and_let_another_begin(**arguments: Any) -> str:
        monkeypatch.undo()
        directory: str = make(**arguments)
        second.start()
        second.join(0.2)  # It waits for us; were it not to, it would be done by then.
        return directory

    monkeypatch.setattr(tempfile, "mkdtemp", make_and_let_another_begin)
    stage(target, "first")
    second.join()
    assert names(target) in (["first"], ["second"])
    assert names(tmp_path) == ["out"]


def test_one_that_ends_in_the_same_instant_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a sweep, or a second replacement, between the two renames of a replacement."""
    target, rename = tmp_path / "out", Path.rename
    stage(target, "old")
    second = threading.Thread(target=stage, args=(target, "second"))

    def rename_and_let_another_begin(path: Path, to: Path) -> Path:
        monkeypatch.undo()
        renamed = rename(path, to)
        second.start()
        second.join(0.2)
        return renamed

    monkeypatch.setattr(Path, "rename", rename_and_let_another_begin)
    stage(target, "first")
    second.join()
    assert names(target) == ["second"]
    assert names(tmp_path) == ["out"]


def test_many_at_once_leave_one_whole_directory(tmp_path: Path) -> None:
    """Catches whatever else two of them do to each other; sixteen threads start and end together."""
    target, barrier = tmp_path / "out", threading.Barrier(16)

    def stage_together(name: str) -> None:
        barrier.wait()
        stage(target, name)

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(stage_together, map(str, range(16))))
    assert len(names(target)) == 1
    assert names(tmp_path) == ["out"]


def stage(target: Path, name: str) -> None:
    with staged_directory(target) as staging:
        (staging / name).touch()
