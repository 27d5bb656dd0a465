"""Directories that appear whole or not at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
