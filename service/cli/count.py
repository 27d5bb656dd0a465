"""`dgemma count`."""

from __future__ import annotations

import click

from service.cli.connection import connected
from service.cli.options import prompt_text, timeout_option
from service.cli.target import Target, target_options


@click.command("count")
@click.argument("prompt", required=False)
@target_options
@timeout_option(30.0)
def command(prompt: str | None, target: Target, timeout: float) -> None:
    """Count the tokens of PROMPT, or of what is piped in, as the server would render it."""
    text = prompt_text(prompt)
    with connected(target) as client:
        click.echo(client.count_tokens(text, timeout=timeout))
