"""Rows of names and values in two columns."""

from __future__ import annotations

from collections.abc import Sequence

import click


def echo_columns(rows: Sequence[tuple[str, str]]) -> None:
    """Print the rows, values in line; long ones are left to the terminal, so that a pipe gets whole lines."""
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        click.echo(f"{name:<{width}}  {value}".rstrip())
