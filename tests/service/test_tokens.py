"""Bearer tokens over a real socket: whose they are, what is refused, and what changes while the server runs."""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from pathlib import Path
from typing import Any

import grpc
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2_grpc
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from diffusiongemma.v1 import generation_pb2, model_pb2
from service.clients_file import Clients, read_clients
from service.json_web_tokens import JsonWebTokens
from service.quota import ClientLimits
from service.reloading import Reloading, UnusableFile
from service.security import KeySet, Security, SecuritySettings
from tests.service.support import Harness, failure_of, finished, request, serving

TOKEN = "a-token-of-alice"
ISSUER, AUDIENCE = "https://issuer.example", "dgemma"


def digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def clients(directory: Path, text: str | None = None) -> Path:
    path = directory / "clients.toml"
    path.write_text(text if text is not None else f'[clients.alice]\ntoken_sha256 = "{digest(TOKEN)}"\n')
    return path


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


async def code_of(harness: Harness, metadata: Any) -> grpc.StatusCode:
    call = harness.models.GetModel(model_pb2.GetModelRequest(), timeout=30, metadata=metadata)
    return await call.code()  # type: ignore[no-any-return]


async def test_a_token_opens_every_method(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With it calls are answered and logged under the client's name; the token itself is never logged."""
    caplog.set_level("DEBUG")
    async with serving(tmp_path, security=SecuritySettings(clients=clients(tmp_path))) as harness:
        call = harness.generation.Generate(request("hello"), timeout=30, metadata=bearer(TOKEN))
        assert await finished(call)
    fields = [vars(record).get("fields", {}) for record in caplog.records]
    assert {"alice"} == {found["client"] for found in fields if "method" in found}
    assert TOKEN not in caplog.text + str(fields)


@pytest.mark.parametrize(
    "metadata",
    [
        pytest.param((), id="none"),
        pytest.param(bearer("wrong"), id="unknown"),
        pytest.param(bearer(digest(TOKEN)), id="what-the-file-holds"),
        pytest.param((("authorization", f"Basic {TOKEN}"),), id="another-scheme"),
        pytest.param((*bearer(TOKEN), *bearer("wrong")), id="two-tokens"),
        pytest.param((("x-authorization", f"Bearer {TOKEN}"),), id="another-header"),
    ],
)
async def test_without_a_good_token_nothing_is_told(tmp_path: Path, metadata: Any) -> None:
    """Every method but health, and before the message is even read: this one is none."""
    async with serving(tmp_path, security=SecuritySettings(clients=clients(tmp_path))) as harness:
        generate = harness.channel.unary_stream(
            "/diffusiongemma.v1.GenerationService/Generate", request_serializer=bytes, response_deserializer=bytes
        )
        reflection: Any = reflection_pb2_grpc.ServerReflectionStub(harness.channel)
        channelz: Any = channelz_pb2_grpc.ChannelzStub(harness.channel)
        calls = [
            generate(b"\x12\x7fnonsense", metadata=metadata, timeout=30),
            harness.generation.Converse(metadata=metadata, timeout=30),
            harness.generation.CountTokens(generation_pb2.CountTokensRequest(), metadata=metadata, timeout=30),
            harness.models.GetModel(model_pb2.GetModelRequest(), metadata=metadata, timeout=30),
            # Without a message: one that meets the end of its stream makes gRPC's client tell INTERNAL instead of it.
            reflection.ServerReflectionInfo(metadata=metadata, timeout=30),
            channelz.GetServers(channelz_pb2.GetServersRequest(), metadata=metadata, timeout=30),
        ]
        for call in calls:
            failure = await failure_of(call)
            assert (failure.code, failure.reason) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
            assert TOKEN not in failure.message
        health: Any = health_pb2_grpc.HealthStub(harness.channel)
        assert (await health.Check(health_pb2.HealthCheckRequest(), timeout=30)).status == 1
        assert harness.engine.rows == []


async def test_a_stranger_is_refused_before_a_message_is_read(tmp_path: Path) -> None:
    """Catches a server that holds megabytes of whoever sends them: none is ever sent here, and the answer comes."""
    async with serving(tmp_path, security=SecuritySettings(clients=clients(tmp_path))) as harness:
        generate = harness.channel.stream_stream("/diffusiongemma.v1.GenerationService/Generate")
        failure = await failure_of(generate(timeout=30))
    assert failure.code is grpc.StatusCode.UNAUTHENTICATED


async def test_tokens_change_while_the_server_runs(tmp_path: Path) -> None:
    """A new one opens, a withdrawn one does not; a broken file changes nothing, and an empty one opens no door."""
    path = clients(tmp_path)
    async with serving(tmp_path, security=SecuritySettings(clients=path)) as harness:
        assert await code_of(harness, bearer(TOKEN)) is grpc.StatusCode.OK
        clients(tmp_path, f'[clients.bob]\ntoken_sha256 = "{digest("bob")}"\n')
        assert await code_of(harness, bearer(TOKEN)) is grpc.StatusCode.UNAUTHENTICATED
        assert await code_of(harness, bearer("bob")) is grpc.StatusCode.OK
        clients(tmp_path, "nonsense")
        assert await code_of(harness, bearer("bob")) is grpc.StatusCode.OK
        clients(tmp_path, "[clients]\n")
        assert await code_of(harness, bearer("bob")) is grpc.StatusCode.UNAUTHENTICATED
        assert await code_of(harness, ()) is grpc.StatusCode.UNAUTHENTICATED


async def test_tokens_that_were_withdrawn_before_the_first_call_open_no_door(tmp_path: Path) -> None:
    """Catches a server that learns only from a call that tokens are needed."""
    path = clients(tmp_path)
    async with serving(tmp_path, security=SecuritySettings(clients=path)) as harness:
        clients(tmp_path, "[clients]\n")
        assert await code_of(harness, ()) is grpc.StatusCode.UNAUTHENTICATED


async def test_a_fault_of_the_look_up_is_told_without_its_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches exceptions before a handler is found, which gRPC would tell as they are, token and all."""

    def name_of(_: Clients, token: str) -> str | None:
        raise RuntimeError(f"a bug with {token}")

    monkeypatch.setattr(Clients, "name_of", name_of)
    async with serving(tmp_path, security=SecuritySettings(clients=clients(tmp_path))) as harness:
        failure = await failure_of(
            harness.models.GetModel(model_pb2.GetModelRequest(), timeout=30, metadata=bearer(TOKEN))
        )
    assert (failure.code, failure.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert failure.metadata["correlation_id"] in str([vars(record).get("fields") for record in caplog.records])
    assert TOKEN not in failure.message


def test_a_file_that_was_unreadable_is_read_once_it_can_be(tmp_path: Path) -> None:
    """Catches a look at the time of writing alone: access that is given later does not change it."""
    path, fails = clients(tmp_path), False

    def read() -> bytes:
        if fails:
            raise UnusableFile(path, "cannot be read (Permission denied)")
        return path.read_bytes()

    reloading = Reloading([path], read)
    fails = True
    path.write_text("replaced")
    path.chmod(0)
    assert reloading.get() != b"replaced"
    fails = False
    path.chmod(0o600)
    assert reloading.get() == b"replaced"


def test_a_change_within_one_tick_of_the_clock_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a file that is written twice within 4 ms, in equally many bytes, and whose second half is never read."""
    monkeypatch.setattr("service.reloading._stamp", lambda path: (7, 7, 7))
    path, now = tmp_path / "file", [0.0]
    path.write_text("first")
    reads: list[bytes] = []

    def read() -> bytes:
        reads.append(path.read_bytes())
        return reads[-1]

    reloading = Reloading([path], read, clock=lambda: now[0])
    path.write_text("other")
    now[0] = 100.0  # nobody looked meanwhile
    assert reloading.get() == b"other"
    assert reloading.get() == b"other"
    assert reads == [b"first", b"other"], "it is read though nothing has changed"
    path.write_text("never")  # by now a change would show in the stamp
    assert reloading.get() == b"other"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        pytest.param("[clients.alice]\ntoken = 'x'", "token", id="a-token-in-the-clear"),
        pytest.param("[clients.alice]\ntoken_sha256 = 'abc'", "64 hexadecimal", id="no-digest"),
        pytest.param(f"[clients.a]\ntoken_sha256 = '{digest('')}'", "empty", id="the-digest-of-an-unset-variable"),
        pytest.param("[clients.alice]\nmax_concurrent = 0", "at least 1", id="a-limit-of-none"),
        pytest.param("[client.alice]", "client", id="another-table"),
        pytest.param("clients = 3", "clients", id="no-table"),
        pytest.param("[clients.alice", "list of clients", id="no-toml"),
        pytest.param(
            f"[clients.a]\ntoken_sha256 = '{digest('x')}'\n[clients.b]\ntoken_sha256 = '{digest('x').upper()}'",
            "same token",
            id="one-token-for-two",
        ),
    ],
)
def test_a_wrong_file_is_told(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UnusableFile, match=says):
        read_clients(clients(tmp_path, text))


def test_limits_come_from_the_file_or_are_everybodys(tmp_path: Path) -> None:
    text = "[clients.alice]\nmax_concurrent = 2\n[clients.bob]\ntokens_per_minute = 7\n"
    security = Security(SecuritySettings(clients=clients(tmp_path, text), limits=ClientLimits(5, 50)))
    assert security.limits_of("alice") == ClientLimits(2, 50)
    assert security.limits_of("bob") == ClientLimits(5, 7)
    assert security.limits_of("carol") == ClientLimits(5, 50)


# JSON Web Tokens

RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
KEYS: dict[str, Any] = {"RS256": RSA, "ES256": ec.generate_private_key(ec.SECP256R1())}
KEYS["EdDSA"] = ed25519.Ed25519PrivateKey.generate()
PUBLIC: dict[str, Any] = {"RS256": RSAAlgorithm, "ES256": ECAlgorithm, "EdDSA": OKPAlgorithm}


def key_set(directory: Path, *algorithms: str) -> Path:
    """The public keys, each named like its algorithm."""
    keys = []
    for algorithm in algorithms or PUBLIC:
        public = json.loads(PUBLIC[algorithm].to_jwk(KEYS[algorithm].public_key()))
        keys.append({**public, "kid": algorithm, "alg": algorithm, "use": "sig"})
    path = directory / "jwks.json"
    path.write_text(json.dumps({"keys": keys}))
    return path


def signed(algorithm: str = "ES256", key: Any = None, kid: str | None = None, **changes: Any) -> str:
    """A good token, but for `changes` of its claims: those that are None are left out."""
    claims = {"sub": "ci@example.com", "iss": ISSUER, "aud": AUDIENCE, "exp": time.time() + 600, **changes}
    held = {name: value for name, value in claims.items() if value is not None}
    return jwt.encode(held, key or KEYS[algorithm], algorithm, headers={"kid": kid or algorithm})


@pytest.fixture
def verifier(tmp_path: Path) -> JsonWebTokens:
    return JsonWebTokens(key_set(tmp_path), ISSUER, AUDIENCE)


@pytest.mark.parametrize("algorithm", PUBLIC)
async def test_a_signed_token_opens(tmp_path: Path, algorithm: str) -> None:
    """Beside tokens of the file, whose limits hold for its subject too."""
    settings = SecuritySettings(clients=clients(tmp_path), key_set=KeySet(key_set(tmp_path), ISSUER, AUDIENCE))
    async with serving(tmp_path, security=settings) as harness:
        for good in (signed(algorithm), TOKEN):
            assert await code_of(harness, bearer(good)) is grpc.StatusCode.OK
        for bad in (signed(algorithm, exp=time.time() - 60), "a.b.c", "nonsense"):
            assert await code_of(harness, bearer(bad)) is grpc.StatusCode.UNAUTHENTICATED


def test_the_subject_is_the_client(verifier: JsonWebTokens) -> None:
    assert verifier.subject_of(signed()) == "ci@example.com"
    assert verifier.subject_of(signed(aud=["others", AUDIENCE])) == "ci@example.com"
    assert verifier.subject_of(signed(exp=time.time() - 10)) == "ci@example.com"  # within what clocks may differ


def unsigned() -> str:
    return jwt.encode({"sub": "root", "iss": ISSUER, "aud": AUDIENCE, "exp": time.time() + 600}, None, "none")


def confused() -> str:
    """Signed with a public key as if it were a shared secret, which a careless reader verifies with the same."""
    head, claims, _ = signed("RS256").split(".")
    head = jwt.utils.base64url_encode(b'{"alg":"HS256","kid":"RS256","typ":"JWT"}').decode()
    public = RSA.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    signature = hmac.digest(public, f"{head}.{claims}".encode(), "sha256")
    return f"{head}.{claims}.{jwt.utils.base64url_encode(signature).decode()}"


@pytest.mark.parametrize(
    "token",
    [
        pytest.param(lambda: signed(exp=time.time() - 60), id="expired"),
        pytest.param(lambda: signed(exp=None), id="for-ever"),
        pytest.param(lambda: signed(nbf=time.time() + 600), id="not-yet"),
        pytest.param(lambda: signed(aud="others"), id="for-others"),
        pytest.param(lambda: signed(aud=None), id="for-anybody"),
        pytest.param(lambda: signed(iss="https://elsewhere.example"), id="by-others"),
        pytest.param(lambda: signed(sub=None), id="of-nobody"),
        pytest.param(lambda: signed(key=ec.generate_private_key(ec.SECP256R1())), id="another-key"),
        pytest.param(lambda: signed(kid="RS256"), id="the-key-of-another-algorithm"),
        pytest.param(lambda: signed(kid="unknown"), id="unknown-key"),
        pytest.param(lambda: signed()[:-4] + "AAAA", id="changed-signature"),
        pytest.param(lambda: signed().replace(".", "", 1), id="two-parts"),
        pytest.param(unsigned, id="unsigned"),
        pytest.param(confused, id="public-key-as-secret"),
        pytest.param(lambda: "", id="empty"),
    ],
)
async def test_a_bad_token_is_refused(tmp_path: Path, token: Any) -> None:
    settings = SecuritySettings(key_set=KeySet(key_set(tmp_path), ISSUER, AUDIENCE))
    async with serving(tmp_path, security=settings) as harness:
        assert await code_of(harness, bearer(token())) is grpc.StatusCode.UNAUTHENTICATED


def test_a_key_set_changes_while_it_is_used(tmp_path: Path) -> None:
    verifier = JsonWebTokens(key_set(tmp_path, "ES256"), ISSUER, AUDIENCE)
    assert verifier.subject_of(signed())
    key_set(tmp_path, "EdDSA")
    assert verifier.subject_of(signed("EdDSA"))
    with pytest.raises(Exception, match="key set"):
        verifier.subject_of(signed())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        pytest.param("nonsense", "no key set", id="no-json"),
        pytest.param("{}", "no key set", id="no-keys"),
        pytest.param("[]", "no key set", id="a-list"),
        pytest.param(
            json.dumps({"keys": [{"kty": "oct", "k": "c2VjcmV0", "kid": "x", "alg": "HS256"}]}),
            "holds no",
            id="secrets",
        ),
    ],
)
def test_a_wrong_key_set_is_told(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "jwks.json"
    path.write_text(text)
    with pytest.raises(UnusableFile, match=says):
        JsonWebTokens(path, ISSUER, AUDIENCE)
