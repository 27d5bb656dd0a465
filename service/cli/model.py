"""`dgemma model`."""

from __future__ import annotations

import json

import click
from google.protobuf.json_format import MessageToDict

from service.cli.columns import echo_columns
from service.cli.connection import connected
from service.cli.options import timeout_option
from service.cli.target import Target, target_options


@click.command("model")
@target_options
@timeout_option(30.0)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(target: Target, timeout: float, as_json: bool) -> None:
    """Show what the server serves: the model, its limits, and the settings of a request that names none."""
    with connected(target) as client:
        model = client.model(timeout=timeout)
    values = MessageToDict(model, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    if as_json:
        click.echo(json.dumps(values, indent=2, ensure_ascii=False))
        return
    echo_columns(flattened(values))


def flattened(values: dict[str, object], prefix: str = "") -> list[tuple[str, str]]:
    """Nested values as rows of dotted names."""
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            rows += flattened(value, f"{prefix}{name}.")
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            rows.append((f"{prefix}{name}", shown))
    return rows
