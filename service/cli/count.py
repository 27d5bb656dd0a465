"""`dgemma count`."""

from __future__ import annotations

import click

from service.cli.connection import connected
from service.cli.options import address_option, prompt_text, timeout_option


@click.command("count")
@click.argument("prompt", required=False)
@address_option
@timeout_option(30.0)
def command(prompt: str | None, address: str, timeout: float) -> None:
    """Count the tokens of PROMPT, or of what is piped in, as the server would render it."""
    text = prompt_text(prompt)
    with connected(address) as client:
        click.echo(client.count_tokens(text, timeout=timeout))
