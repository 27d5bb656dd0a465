"""Logging of the server: one line an event on standard error, `time level logger event key=value ...`.

What happened is the message, a fixed word; what it happened to is in `extra={"fields": {...}}`. Prompts and answers
are never logged.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime


class LogfmtFormatter(logging.Formatter):
    """Formats a record as one line of `key=value` pairs behind time, level, logger and event."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line; a traceback follows on lines of its own."""
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields = getattr(record, "fields", {})
        head = [moment.replace("+00:00", "Z"), record.levelname, record.name, _quoted(record.getMessage())]
        line = " ".join([*head, *(f"{key}={_quoted(str(value))}" for key, value in fields.items())])
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def configure(level: str) -> None:
    """Send the log of `level` and above to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogfmtFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def _quoted(text: str) -> str:
    plain = text.isprintable() and not any(character in text for character in ' ="')
    return text if plain and text else json.dumps(text, ensure_ascii=False)
