"""TLS of a server: its certificate, read again when it is replaced, and which clients' certificates it trusts."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from service.reloading import Reloading, UnusableFile, read_bytes


@dataclass(frozen=True)
class TlsFiles:
    """PEM files."""

    certificate: Path
    """The server's, and those between it and its authority."""
    key: Path
    client_authority: Path | None = None
    """Certificates of authorities: a client must show a certificate of one of them. None: clients show none."""


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Credentials whose files are looked at at every handshake; connections that stand keep what they began with.

    Raises:
        UnusableFile: a file cannot be read, is no PEM, or the key is not the certificate's.
    """
    paths = [path for path in (files.certificate, files.key, files.client_authority) if path is not None]
    configuration = Reloading(paths, lambda: _configuration(files))
    told: list[grpc.ServerCertificateConfiguration] = [configuration.get()]

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        """The configuration where it is another one than was told last: gRPC keeps the old one for None."""
        now = configuration.get()
        if now is told[0]:
            return None
        told[0] = now
        return now

    mutual = files.client_authority is not None
    # The stubs know nothing of the None that gRPC's documentation asks for.
    return grpc.dynamic_ssl_server_credentials(
        told[0],
        fetch,  # type: ignore[arg-type]
        require_client_authentication=mutual,
    )


def _configuration(files: TlsFiles) -> grpc.ServerCertificateConfiguration:
    certificate, key = read_bytes(files.certificate), read_bytes(files.key)
    _check(files)
    authority = None if files.client_authority is None else read_bytes(files.client_authority)
    return grpc.ssl_server_certificate_configuration([(key, certificate)], root_certificates=authority)


def _check(files: TlsFiles) -> None:
    """gRPC would take any bytes, and then fail at every handshake."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(files.certificate, files.key, password=lambda: b"")
    except (OSError, ValueError) as error:
        raise UnusableFile(files.certificate, f"is no certificate for the key {files.key.name} ({error})") from error
    if files.client_authority is not None:
        try:
            context.load_verify_locations(files.client_authority)
        except (OSError, ValueError) as error:
            raise UnusableFile(files.client_authority, f"holds no certificate ({error})") from error
