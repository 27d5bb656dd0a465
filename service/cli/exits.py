"""How the program ends when it does not end well: exit codes, and the exception that carries one."""

from __future__ import annotations

import click

FAILED, REFUSED, UNAVAILABLE, TOO_LATE, INTERRUPTED = 1, 3, 4, 5, 130
"""Exit codes; click itself ends with 2 for a wrong command line, and shells tell SIGINT by 130."""

HELP = f"""
\b
Exit codes:
    0  it went well
    {FAILED}  it failed, for a reason that the message tells
    2  the command line is wrong
    {REFUSED}  the server refused the request: change it
    {UNAVAILABLE}  the server cannot be reached, is busy or shuts down: try again
    {TOO_LATE}  the deadline passed
  {INTERRUPTED}  interrupted
"""


class Failure(click.ClickException):
    """Ends the program with a sentence on standard error."""

    def __init__(self, message: str, exit_code: int = FAILED) -> None:
        super().__init__(message)
        vars(self)["exit_code"] = exit_code  # click declares it for the class
