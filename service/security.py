"""How a server is secured: what it is told on the command line, and what becomes of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import grpc

from service.authentication import Authenticator
from service.clients_file import Clients, read_clients
from service.json_web_tokens import JsonWebTokens
from service.quota import ClientLimits
from service.reloading import Reloading
from service.tls import TlsFiles, server_credentials


@dataclass(frozen=True)
class KeySet:
    """Where JSON Web Tokens come from."""

    path: Path
    """A JWKS file."""
    issuer: str
    audience: str


@dataclass(frozen=True)
class SecuritySettings:
    """What a server is told of its security; by default there is none."""

    tls: TlsFiles | None = None
    clients: Path | None = None
    """See `service.clients_file`."""
    key_set: KeySet | None = None
    limits: ClientLimits = field(default_factory=ClientLimits)
    """Of a client that the file gives none."""


class Security:
    """What becomes of the settings; every file is read again when it changes."""

    def __init__(self, settings: SecuritySettings) -> None:
        """Read the files.

        Raises:
            UnusableFile: one of them cannot be used.
        """
        self._settings, self._clients = settings, _clients(settings.clients)
        self.credentials: grpc.ServerCredentials | None = None
        """None: without encryption."""
        if settings.tls is not None:
            self.credentials = server_credentials(settings.tls)
        keys = settings.key_set
        web_tokens = None if keys is None else JsonWebTokens(keys.path, keys.issuer, keys.audience)
        self.authenticator = Authenticator(self._clients, web_tokens)

    def limits_of(self, client: str) -> ClientLimits:
        """A client's limits: each that its entry in the file leaves out is that of everybody."""
        limits = self._settings.limits
        own = self._clients.get().limits.get(client) if self._clients is not None else None
        if own is None:
            return limits
        return ClientLimits(
            limits.max_concurrent if own.max_concurrent is None else own.max_concurrent,
            limits.tokens_per_minute if own.tokens_per_minute is None else own.tokens_per_minute,
        )


def _clients(path: Path | None) -> Reloading[Clients] | None:
    return None if path is None else Reloading([path], lambda: read_clients(path))
