"""The file that names a server's clients: their tokens, by digest, and their limits.

    [clients.alice]
    token_sha256 = "5e88..."      # of the token, in hexadecimal: printf %s "$TOKEN" | sha256sum
    max_concurrent = 4
    tokens_per_minute = 60_000

    [clients."ci@example.com"]    # a JWT's subject, or the common name of a certificate: limits alone
    max_concurrent = 1

No token stands in it, so that who reads it cannot use it. The digest is a plain one: it protects tokens that were drawn
at random (`openssl rand -hex 32`), not words.
"""

from __future__ import annotations

import hashlib
import tomllib
from dataclasses import dataclass
from pathlib import Path

import msgspec

from service.quota import ClientLimits
from service.reloading import UnusableFile, read_bytes

_OF_NOTHING = hashlib.sha256(b"").hexdigest()


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    token_sha256: str | None = None
    max_concurrent: int | None = None
    tokens_per_minute: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_concurrent", "tokens_per_minute"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1, or be left out")
        if self.token_sha256 is not None and not _is_digest(self.token_sha256):
            raise ValueError("token_sha256 must be the 64 hexadecimal digits that `printf %s TOKEN | sha256sum` prints")
        if self.token_sha256 is not None and self.token_sha256.lower() == _OF_NOTHING:
            raise ValueError(
                "token_sha256 is that of an empty text; the variable that should hold the token was not set"
            )


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    clients: dict[str, _Entry]


@dataclass(frozen=True)
class Clients:
    """Clients by token and by name."""

    names: dict[bytes, str]
    """By the SHA-256 of the token."""
    limits: dict[str, ClientLimits]

    def name_of(self, token: str) -> str | None:
        """Whose token it is; None: nobody's.

        How long the look-up takes tells nothing of a token: what is compared is its digest, which nobody can steer.
        """
        return self.names.get(hashlib.sha256(token.encode()).digest())


def read_clients(path: Path) -> Clients:
    """Read the file.

    Raises:
        UnusableFile: it cannot be read, or says something that is not known.
    """
    try:
        found = msgspec.convert(tomllib.loads(read_bytes(path).decode()), _File).clients
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise UnusableFile(path, f"is no list of clients ({error})") from error
    names: dict[bytes, str] = {}
    for name, entry in found.items():
        if entry.token_sha256 is None:
            continue
        digest = bytes.fromhex(entry.token_sha256)
        if digest in names:
            raise UnusableFile(path, f"gives {names[digest]!r} and {name!r} the same token")
        names[digest] = name
    return Clients(names, {name: ClientLimits(e.max_concurrent, e.tokens_per_minute) for name, e in found.items()})


def _is_digest(text: str) -> bool:
    return len(text) == 64 and all(letter in "0123456789abcdefABCDEF" for letter in text)
