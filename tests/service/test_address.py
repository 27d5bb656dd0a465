"""Addresses that cannot be listened on are told as such, before gRPC is asked."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from service.address import AddressTaken, check_free, stays_here


@pytest.mark.parametrize(
    ("address", "says"),
    [
        pytest.param("nonsense", "host:port", id="no-port"),
        pytest.param(":50051", "host:port", id="no-host"),
        pytest.param("127.0.0.1:65536", "65535", id="a-port-that-grpc-takes-modulo"),
        pytest.param("127.0.0.1:http", "65535", id="a-port-in-letters"),
        pytest.param("host.invalid:50051", "no address", id="unknown-host"),
        pytest.param("192.0.2.1:50051", "assign", id="another-machine"),
        pytest.param(f"unix:{'x' * 200}", "long", id="path-too-long"),
    ],
)
def test_what_is_no_address_is_told(address: str, says: str) -> None:
    with pytest.raises(AddressTaken, match=says):
        check_free(address)


@pytest.mark.parametrize("address", ["127.0.0.1:0", "localhost:0", "0.0.0.0:0"])
def test_a_free_address_is_free(address: str) -> None:
    check_free(address)


@pytest.mark.parametrize(
    ("address", "here"),
    [
        ("127.0.0.1:1", True),
        ("127.9.9.9:1", True),
        ("localhost:1", True),
        ("[::1]:1", True),
        ("unix:/a:b", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("example.com:1", False),
        ("localhost.example.com:1", False),
        ("127.example.com:1", False),
        ("10.0.0.1:1", False),
    ],
)
def test_what_stays_on_this_machine(address: str, here: bool) -> None:
    """Catches a name that only looks like one's own, to which a token would travel in the clear."""
    assert stays_here(address) == here


def test_one_taken_address_of_a_name_is_enough() -> None:
    """Catches a server that listens on ::1 alone, since another program has 127.0.0.1 of the same localhost."""
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(AddressTaken, match="another program"):
        check_free(f"localhost:{other.getsockname()[1]}")


def test_a_path_is_free_until_a_program_listens(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    check_free(f"unix:{path}")
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        check_free(f"unix:{path}")  # left by a program that was killed
        other.listen()
        with pytest.raises(AddressTaken, match="another program"):
            check_free(f"unix:{path}")
