"""The options of `dgemma serve` that secure it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

FILE = click.Path(dir_okay=False, path_type=Path)

_OPTIONS = (
    ("--tls-cert", FILE, "Encrypt with this certificate (PEM); needs --tls-key."),
    ("--tls-key", FILE, "The certificate's key (PEM)."),
    ("--tls-client-ca", FILE, "Serve only clients whose certificate one of these authorities (PEM) has signed."),
    ("--clients", FILE, "TOML file of clients: digests of their bearer tokens, and their limits."),
    ("--jwks", FILE, "Key set of an identity provider, whose JSON Web Tokens are then taken as bearer tokens."),
    ("--jwt-issuer", str, "Who must have issued a JSON Web Token; needed with --jwks."),
    ("--jwt-audience", str, "Whom a JSON Web Token must be meant for; needed with --jwks."),
    (
        "--client-max-concurrent",
        click.IntRange(min=1),
        "Most generations of one client at a time. Without tokens and client certificates a client is a machine.",
    ),
    (
        "--client-tokens-per-minute",
        click.IntRange(min=1),
        "Most tokens of one client's prompts and answers, over time; a minute's worth may be spent at once.",
    ),
)


def security_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that make up `security`, which the function is given as one argument: what makes the settings.

    They are made in the command, for what they are made of takes long to import.
    """

    @wraps(function)
    def collected(*arguments: Any, **options: Any) -> Any:
        names = [flag.removeprefix("--").replace("-", "_") for flag, *_ in _OPTIONS]
        values = {name: options.pop(name) for name in names}
        _check_together(values, ("tls_cert", "tls_key"))
        _check_together(values, ("jwks", "jwt_issuer", "jwt_audience"))
        if values["tls_client_ca"] is not None and values["tls_cert"] is None:
            raise click.UsageError("--tls-client-ca needs --tls-cert and --tls-key")
        return function(*arguments, security=values, **options)

    wrapped: Callable[..., Any] = collected
    for flag, kind, text in reversed(_OPTIONS):
        wrapped = click.option(flag, type=kind, help=text)(wrapped)
    return wrapped


def security_settings(values: dict[str, Any]) -> Any:
    """`SecuritySettings` of what the options gave."""
    from service.quota import ClientLimits
    from service.security import KeySet, SecuritySettings
    from service.tls import TlsFiles

    tls = keys = None
    if values["tls_cert"] is not None:
        tls = TlsFiles(values["tls_cert"], values["tls_key"], values["tls_client_ca"])
    if values["jwks"] is not None:
        keys = KeySet(values["jwks"], values["jwt_issuer"], values["jwt_audience"])
    limits = ClientLimits(values["client_max_concurrent"], values["client_tokens_per_minute"])
    return SecuritySettings(tls, values["clients"], keys, limits)


def _check_together(values: dict[str, Any], names: tuple[str, ...]) -> None:
    """Options that need each other."""
    missing = [name for name in names if values[name] is None]
    if missing and len(missing) < len(names):
        flags = ["--" + name.replace("_", "-") for name in names]
        raise click.UsageError(f"{', '.join(flags)} go together; {flags[names.index(missing[0])]} is missing")
