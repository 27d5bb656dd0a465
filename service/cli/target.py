"""The options that tell which server to call, and how to show who calls."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from service.address import stays_here
from service.cli.exits import Failure
from service.cli.options import DEFAULT_ADDRESS

if TYPE_CHECKING:
    from service.channel import Credentials  # gRPC takes longer to import than `--help` should

FILE = click.Path(dir_okay=False, path_type=Path)
TOKEN = "DGEMMA_TOKEN"

_OPTIONS: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("--address", {"default": DEFAULT_ADDRESS, "show_default": True}, "The server's address: host:port, or unix:path."),
    ("--tls", {"is_flag": True}, "Encrypt; the server's certificate must be of an authority that everybody trusts."),
    ("--tls-ca", {"type": FILE}, "Encrypt; the server's certificate must be of one of these authorities (PEM)."),
    ("--tls-cert", {"type": FILE}, "Encrypt, and show this certificate (PEM); needs --tls-key."),
    ("--tls-key", {"type": FILE}, "The certificate's key (PEM)."),
    ("--token-file", {"type": FILE}, f"File with the bearer token, which may also be given in {TOKEN}."),
)


@dataclass(frozen=True)
class Target:
    """The server to call."""

    address: str
    credentials: Credentials


def target_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that make up `target`, which the function is given as one argument."""

    @wraps(function)
    def collected(*arguments: Any, **options: Any) -> Any:
        values = {name: options.pop(name) for name, _ in map(_names, _OPTIONS)}
        return function(*arguments, target=_target(**values), **options)

    wrapped: Callable[..., Any] = collected
    for option in reversed(_OPTIONS):
        name, variable = _names(option)
        flag, settings, text = option
        wrapped = click.option(flag, name, envvar=variable, help=text, **settings)(wrapped)
    return wrapped


def _names(option: tuple[str, dict[str, Any], str]) -> tuple[str, str]:
    """What click calls an option, and its variable in the environment."""
    name = option[0].removeprefix("--").replace("-", "_")
    return name, f"DGEMMA_{name.upper()}"


def _target(
    address: str, tls: bool, tls_ca: Path | None, tls_cert: Path | None, tls_key: Path | None, token_file: Path | None
) -> Target:
    from service.channel import Credentials

    if (tls_cert is None) != (tls_key is None):
        raise click.UsageError("--tls-cert and --tls-key go together")
    encrypted = tls or tls_ca is not None or tls_cert is not None
    token = _token(token_file)
    if token is not None and not encrypted and not stays_here(address):
        raise click.UsageError(f"a token would travel to {address} unencrypted; add --tls or --tls-ca")
    return Target(address, Credentials(encrypted, tls_ca, tls_cert, tls_key, token))


def _token(file: Path | None) -> str | None:
    if file is None:
        return os.environ.get(TOKEN, "").strip() or None
    try:
        token = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"the token cannot be read: {error}") from error
    if not (token and token.isascii() and token.isprintable()):
        raise Failure(f"{file} holds no token: one line of printable ASCII is wanted")
    return token
