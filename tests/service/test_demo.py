"""The demo as it runs in a pipe, over the fake engine: questions, drafts, blocks, and an end by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import demo
from benchmarks.servers import ServerProcess
from tests.service.processes import fake_server


def test_the_demo_shows_drafts_turning_into_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"Spell 742.": "seven hundred and forty-two", demo.QUESTIONS[1]: "apple, banana, cherry, fig, pear"}

    @contextmanager
    def serving(bundle: Path, threads: int) -> Iterator[ServerProcess]:
        with fake_server(bundle, answers=answers, paced=True) as server:
            yield ServerProcess(server.process, server.address)

    monkeypatch.setattr(demo, "serving", serving)
    result = CliRunner().invoke(demo.main, ["--bundle", str(tmp_path)])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].startswith("fake is SERVING on 127.0.0.1:")
    assert [line for line in lines if line.startswith("> ")] == [f"> {question}" for question in demo.QUESTIONS]
    assert any(line.startswith("  block 0 step  1") and "accepted" in line for line in lines)
    assert "  block 0 committed after 4 steps  seven hundred and forty-two" in lines
    assert lines[-1] == "the server drained after SIGTERM and exited with 0"
