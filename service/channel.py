"""A client's connection: encrypted or not, and what shows who calls."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import grpc

from service.reloading import read_bytes

CHANNEL_OPTIONS = (
    # A server that vanished is noticed within 30 s, in the silence of a block without drafts too. The server allows
    # pings every 10 s.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
)


@dataclass(frozen=True)
class Credentials:
    """What a client shows and asks for."""

    tls: bool = False
    """Whether to encrypt, which makes the server show a certificate."""
    authority: Path | None = None
    """Certificates (PEM) of the authorities that may have signed the server's; None: those that gRPC brings along."""
    certificate: Path | None = None
    """The client's own (PEM), where the server asks for one."""
    key: Path | None = None
    token: str | None = field(default=None, repr=False)
    """The bearer token, where the server asks for one."""

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes along with every call."""
        return () if self.token is None else (("authorization", f"Bearer {self.token}"),)


def open_channel(address: str, credentials: Credentials) -> grpc.Channel:
    """A channel to a server.

    Raises:
        UnusableFile: a certificate or key cannot be read.
    """
    if not credentials.tls:
        return grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
    files = (credentials.authority, credentials.key, credentials.certificate)
    authority, key, certificate = (None if path is None else read_bytes(path) for path in files)
    encrypted = grpc.ssl_channel_credentials(authority, key, certificate)
    return grpc.secure_channel(address, encrypted, options=CHANNEL_OPTIONS)
