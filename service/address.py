"""Where a server listens: whether an address is free, looked at before gRPC is asked, whose refusal fills a screen."""

from __future__ import annotations

import errno
import ipaddress
import socket

from runtime.errors import DgemmaError

UNIX = "unix:"
"""What the address of a socket in the file system begins with."""


MAX_PORT = 65535


class AddressTaken(DgemmaError):
    """The server cannot listen on its address."""

    def __init__(self, address: str, why: str) -> None:
        super().__init__(f"cannot listen on {address}: {why}; choose another one with --address")


def check_free(address: str) -> None:
    """Look whether a server could listen on `address`, `host:port` or `unix:path`.

    Raises:
        AddressTaken: another program listens there, or the address is none of this machine.
    """
    if address.startswith(UNIX):
        _check_unix(address)
    else:
        _check_tcp(address)


def stays_here(address: str) -> bool:
    """Whether only programs on this machine can be at both ends of a connection to `address`."""
    host = address.rpartition(":")[0].strip("[]")
    if address.startswith(UNIX) or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, which whoever answers for it can send anywhere
        return False


def with_port(address: str, port: int) -> str:
    """The address with the port that it really got; a path has none."""
    return address if address.startswith(UNIX) else f"{address.rpartition(':')[0]}:{port}"


def _check_unix(address: str) -> None:
    """gRPC would take the name away from a program that listens there; a name that a killed one left is free."""
    with socket.socket(socket.AF_UNIX) as client:
        client.setblocking(False)
        try:
            reached = client.connect_ex(address.removeprefix(UNIX)) in (0, errno.EAGAIN)  # EAGAIN: its queue is full
        except OSError as error:  # a path that is too long for a socket
            raise AddressTaken(address, str(error)) from error
    if reached:
        raise AddressTaken(address, "another program does")


def _check_tcp(address: str) -> None:
    """One address of the name that is taken is enough: gRPC would listen on the others, beside another program."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > MAX_PORT:  # gRPC would take a port modulo 65536
        raise AddressTaken(address, f"it must be host:port with a port up to {MAX_PORT}, or unix:path")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise AddressTaken(address, f"it is no address ({error})") from error
    failures = [failure for family, kind, _, _, place in found if (failure := _bind_failure(family, kind, place))]
    taken = any(failure.errno == errno.EADDRINUSE for failure in failures)
    if taken or len(failures) == len(found):
        raise AddressTaken(address, "another program does" if taken else str(failures[0].strerror))


def _bind_failure(family: int, kind: int, place: object) -> OSError | None:
    try:
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)  # type: ignore[arg-type]  # as getaddrinfo returned it
    except OSError as error:
        return error
    return None
