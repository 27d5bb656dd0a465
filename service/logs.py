"""Logging of the server: one line an event on standard error, `time level logger event key=value ...`.

What happened is the message, a fixed word; what it happened to is in `extra={"fields": {...}}`. Prompts, answers and
tokens are never logged. An exception is told by its class and where in the program it came from: its text may hold what
a client sent, and a traceback where on this machine the program lies. Both are told at the level `debug` alone.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import UTC, datetime


class LogfmtFormatter(logging.Formatter):
    """Formats a record as one line of `key=value` pairs behind time, level, logger and event."""

    def __init__(self, tracebacks: bool) -> None:
        """Format.

        Args:
            tracebacks: whether an exception's text and traceback follow, on lines of their own.
        """
        super().__init__()
        self._tracebacks = tracebacks

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields = dict(getattr(record, "fields", {}))
        if record.exc_info and record.exc_info[1] is not None:
            fields |= _where(record.exc_info[1])
        head = [moment.replace("+00:00", "Z"), record.levelname, record.name, _quoted(record.getMessage())]
        line = " ".join([*head, *(f"{key}={_quoted(str(value))}" for key, value in fields.items())])
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info and self._tracebacks else line


def configure(level: str) -> None:
    """Send the log of `level` and above to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogfmtFormatter(tracebacks=level == "debug"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def _where(error: BaseException) -> dict[str, str]:
    """Class and origin of an exception: `module:function:line`, innermost first."""
    frames = [
        f"{frame.f_globals.get('__name__', '?')}:{frame.f_code.co_name}:{line}"
        for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    return {"exception": type(error).__name__, "at": ",".join(reversed(frames))}


def _quoted(text: str) -> str:
    plain = text.isprintable() and not any(character in text for character in ' ="')
    return text if plain and text else json.dumps(text, ensure_ascii=False)
