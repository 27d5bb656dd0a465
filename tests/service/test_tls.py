"""Encrypted connections, certificates on both sides, and certificates that are replaced while the server runs."""

from __future__ import annotations

import asyncio
import os
import ssl
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509

from diffusiongemma.v1 import model_pb2, model_pb2_grpc
from service.authentication import CALLER
from service.reloading import UnusableFile
from service.security import SecuritySettings
from service.tls import TlsFiles, server_credentials
from tests.service.certificates import Certificate, make
from tests.service.support import Harness, finished, request, serving

AUTHORITY = make("authority")
SERVER, OTHER_SERVER = make("localhost", AUTHORITY), make("localhost", AUTHORITY)
ALICE = make("alice", AUTHORITY)
STRANGER = make("alice", make("somebody else's authority"))
TRUSTING = grpc.ssl_channel_credentials(AUTHORITY.pem)


def files(directory: Path, mutual: bool = False) -> TlsFiles:
    certificate, key = SERVER.write(directory, "server")
    authority, _ = AUTHORITY.write(directory, "authority")
    return TlsFiles(certificate, key, authority if mutual else None)


def showing(client: Certificate) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(AUTHORITY.pem, client.key_pem, client.pem)


async def code_with(harness: Harness, credentials: grpc.ChannelCredentials | None) -> grpc.StatusCode:
    """How a call over a connection of its own ends."""
    make_channel: Any = grpc.aio.insecure_channel if credentials is None else grpc.aio.secure_channel
    arguments = (harness.address,) if credentials is None else (harness.address, credentials)
    async with make_channel(*arguments, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        stub: Any = model_pb2_grpc.ModelServiceStub(channel)
        call = stub.GetModel(model_pb2.GetModelRequest(), timeout=30)
        with suppress(grpc.aio.AioRpcError):
            await call
        return await call.code()  # type: ignore[no-any-return]


async def test_an_encrypted_stream(tmp_path: Path) -> None:
    security = SecuritySettings(files(tmp_path))
    async with serving(tmp_path, security=security, credentials=TRUSTING) as harness:
        assert await finished(harness.generation.Generate(request("hello"), timeout=30))
        assert await code_with(harness, None) is grpc.StatusCode.UNAVAILABLE
        nobody = grpc.ssl_channel_credentials(make("nobody").pem)
        assert await code_with(harness, nobody) is grpc.StatusCode.UNAVAILABLE


async def test_only_clients_with_a_certificate_are_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a server that asks for certificates and takes any, or none; and a caller that goes by another name."""
    callers = []
    monkeypatch.setattr(
        "service.served.Served.check_model", lambda *_: callers.append((CALLER.get().name, CALLER.get().known))
    )
    async with serving(tmp_path, security=SecuritySettings(files(tmp_path, mutual=True))) as harness:
        assert await code_with(harness, showing(ALICE)) is grpc.StatusCode.OK
        for refused in (TRUSTING, showing(STRANGER), None):
            assert await code_with(harness, refused) is grpc.StatusCode.UNAVAILABLE
    assert callers == [("alice", True)]


def shown_by(harness: Harness) -> x509.Certificate:
    """The certificate of a handshake of today."""
    host, _, port = harness.address.rpartition(":")
    return x509.load_pem_x509_certificate(ssl.get_server_certificate((host, int(port))).encode())


async def test_a_replaced_certificate_is_shown(tmp_path: Path) -> None:
    """New connections see the new one, the stream that stands goes on with the old one."""
    security = SecuritySettings(files(tmp_path))
    answers = {"go": "an answer of several blocks " * 5}
    async with serving(tmp_path, answers, security=security, credentials=TRUSTING) as harness:
        with harness.engine.hold("denoise", 2):
            reading = asyncio.create_task(finished(harness.generation.Generate(request("go"), timeout=60)))
            await harness.runner.submitted()
            assert shown_by(harness) == SERVER.certificate
            replace(tmp_path, OTHER_SERVER)
            assert shown_by(harness) == OTHER_SERVER.certificate
        assert await reading


async def test_half_a_replacement_is_not_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A certificate whose key is not there yet: the old pair serves until the new one is whole; no path is logged."""
    async with serving(tmp_path, security=SecuritySettings(files(tmp_path))) as harness:
        (tmp_path / "server.pem").write_bytes(OTHER_SERVER.pem)
        assert shown_by(harness) == SERVER.certificate
        (tmp_path / "server.key").write_bytes(OTHER_SERVER.key_pem)
        assert shown_by(harness) == OTHER_SERVER.certificate
    told = [(record.getMessage(), vars(record)["fields"]) for record in caplog.records if "fields" in vars(record)]
    assert "kept" in [event for event, _ in told]
    assert str(tmp_path) not in str(told)


def replace(directory: Path, pair: Certificate) -> None:
    """As certificate managers do it: each file under its name at once."""
    for name, content in (("server.pem", pair.pem), ("server.key", pair.key_pem)):
        (directory / "new").write_bytes(content)
        os.replace(directory / "new", directory / name)


@pytest.mark.parametrize("broken", ["no-key", "other-key", "no-certificate", "no-authority", "not-there", "encrypted"])
def test_files_that_cannot_serve_are_told_at_once(tmp_path: Path, broken: str) -> None:
    """Catches a server that starts with them, and then fails at every handshake without a word."""
    made = files(tmp_path, mutual=True)
    match broken:
        case "no-key":
            made.key.write_text("nonsense")
        case "other-key":
            made.key.write_bytes(ALICE.key_pem)
        case "no-certificate":
            made.certificate.write_text("nonsense")
        case "no-authority":
            assert made.client_authority is not None
            made.client_authority.write_text("nonsense")
        case "not-there":
            made.key.unlink()
        case "encrypted":
            made.key.write_bytes(ENCRYPTED_KEY)
    with pytest.raises(UnusableFile):
        server_credentials(made)


ENCRYPTED_KEY = b"""-----BEGIN ENCRYPTED PRIVATE KEY-----
MIHsMFcGCSqGSIb3DQEFDTBKMCkGCSqGSIb3DQEFDDAcBAgAAAAAAAAAAAICCAAw
-----END ENCRYPTED PRIVATE KEY-----
"""
