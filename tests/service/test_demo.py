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
    answers = {
        "Spell 742.": "seven hundred and forty-two",
        demo.CONVERSATIONS[1][0]: "banana, cherry, garden, lamp, window",
    }

    @contextmanager
    def serving(bundle: Path, threads: int) -> Iterator[ServerProcess]:
        with fake_server(bundle, answers=answers, paced=True) as server:
            yield ServerProcess(server.process, server.address)

    monkeypatch.setattr(demo, "serving", serving)
    result = CliRunner().invoke(demo.main, ["--bundle", str(tmp_path)])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].startswith("fake is SERVING on 127.0.0.1:")
    assert [line for line in lines if line.startswith("> ")] == [
        f"> {question}" for asked in demo.CONVERSATIONS for question in asked
    ]
    drafts = [line.split("%")[0] for line in lines if "accepted" in line]
    assert [line.split()[:4] for line in drafts[:3]] == [["block", "0", "step", step] for step in ("1", "2", "4")]
    assert "  block 0 committed after 4 steps  seven hundred and forty-two" in lines
    assert lines[-1] == "the server drained after SIGTERM and exited with 0"
