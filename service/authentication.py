"""Who calls: the client that a bearer token or a certificate names; where neither is needed, the calling machine."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeAlias
from urllib.parse import unquote

import grpc

from runtime.errors import Unauthenticated
from service.clients_file import Clients
from service.json_web_tokens import JsonWebTokens
from service.reloading import Reloading

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

OPEN_METHODS = "/grpc.health.v1.Health/"
"""What probes call, which carry no token. Reflection and channelz tell of other clients, and are not open."""

SCHEME = "bearer "


@dataclass(frozen=True)
class Caller:
    """Who makes a call."""

    name: str
    known: bool
    """Whether it has shown so; an unknown one goes by the address of its machine."""


CALLER: ContextVar[Caller] = ContextVar("caller")
"""Set for the time of a call."""


class Authenticator:
    """Tells who calls. Without clients with tokens and without a key set nobody needs one."""

    def __init__(self, clients: Reloading[Clients] | None = None, web_tokens: JsonWebTokens | None = None) -> None:
        self._clients, self._web_tokens = clients, web_tokens
        self._needs_token = web_tokens is not None or (clients is not None and bool(clients.get().names))

    def by_token(self, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> Caller | None:
        """Who calls by its token; None where none is needed. Belongs to the event loop's thread.

        Raises:
            Unauthenticated: a token is needed, and there is none, or none that is good.
        """
        clients = self._clients.get() if self._clients is not None else None
        # For good, once there was one: a file that has lost its last token opens no door.
        self._needs_token = self._needs_token or (clients is not None and bool(clients.names))
        if method.startswith(OPEN_METHODS) or not self._needs_token:
            return None
        token = _bearer_token(metadata)
        name = clients.name_of(token) if clients is not None else None
        if name is None and self._web_tokens is not None:
            name = self._web_tokens.subject_of(token)
        if name is None:
            raise Unauthenticated("the bearer token is not known here")
        return Caller(name, known=True)


def by_peer(context: Context) -> Caller:
    """Who calls by its certificate, else by its machine."""
    for name in context.auth_context().get("x509_common_name", ()):
        return Caller(name.decode(errors="replace"), known=True)
    return Caller(_machine(str(context.peer())), known=False)


def _machine(peer: str) -> str:
    """Of `ipv4:127.0.0.1:50000`, `ipv6:%5B::1%5D:50000` or `unix:` what all connections of a machine have in common.

    Of IPv6 that is the network of 64 bits: whoever has one address of it has 2^64 of them.
    """
    machine = unquote(peer.rpartition(":")[0])
    family, _, host = machine.partition(":")
    if family != "ipv6":
        return machine
    try:
        address = ipaddress.IPv6Address(host.strip("[]"))
    except ValueError:
        return machine
    if address.ipv4_mapped is not None:
        return f"ipv4:{address.ipv4_mapped}"
    return f"ipv6:{ipaddress.ip_network((address.packed[:8] + bytes(8), 64))}"


def _bearer_token(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    found = [value for key, value in metadata if key == "authorization"]
    if len(found) != 1 or not isinstance(found[0], str) or not found[0].lower().startswith(SCHEME):
        raise Unauthenticated("a bearer token is needed: send one header `authorization: Bearer TOKEN`")
    return found[0][len(SCHEME) :].strip()
