"""What is logged, and what never is."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

from service.client import CallFailed
from service.logs import LogfmtFormatter
from tests.service.processes import ROOT, fake_server

SECRET = "a text that somebody had in mind"


def record_of(error: Exception) -> logging.LogRecord:
    try:
        raise error
    except Exception:
        return logging.LogRecord("service.x", logging.ERROR, __file__, 1, "fault", (), sys.exc_info())


def test_an_exception_is_told_without_text_and_path() -> None:
    line = LogfmtFormatter(tracebacks=False).format(record_of(ValueError(SECRET)))
    assert "exception=ValueError" in line
    assert f"at={__name__}:record_of:" in line
    assert SECRET not in line
    assert "/" not in line
    assert "\n" not in line


def test_all_of_it_is_told_where_it_was_asked_for() -> None:
    told = LogfmtFormatter(tracebacks=True).format(record_of(ValueError(SECRET)))
    assert SECRET in told
    assert __file__ in told


def test_values_stay_on_their_line() -> None:
    """Catches a client's name or a method that forges a line of the log."""
    record = logging.LogRecord("service.x", logging.INFO, __file__, 1, "call", (), None)
    record.fields = {"client": 'x\n2026 ERROR "forged" a=b', "empty": ""}
    line = LogfmtFormatter(tracebacks=False).format(record)
    assert "\n" not in line
    assert line.endswith(r'client="x\n2026 ERROR \"forged\" a=b" empty=""')


@pytest.mark.parametrize("level", ["info", "debug"])
def test_a_server_logs_neither_prompt_nor_path_unless_asked(tmp_path: Path, level: str) -> None:
    """A fault whose text repeats the prompt, as a library's might."""
    with fake_server(tmp_path, fault=f"cannot work on {SECRET}", log=level) as server:
        with pytest.raises(CallFailed) as caught:
            list(server.client.generate(SECRET, timeout=60))
        server.process.terminate()
        assert server.exit_code() == 0
        log = server.log()
    assert caught.value.metadata["correlation_id"] in log
    assert (SECRET in log) == (level == "debug")
    assert (str(ROOT) in log) == (level == "debug")
    assert str(tmp_path) not in log
