"""Bearer tokens that an identity provider has signed (JWT), checked against its public keys (JWKS)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from runtime.errors import Unauthenticated
from service.reloading import Reloading, UnusableFile, read_bytes

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
"""Signatures alone: with a shared secret (HS256) whoever checks a token could make one, and `none` signs nothing."""

LEEWAY = 30
"""Seconds by which the clocks of issuer and server may differ."""


class JsonWebTokens:
    """Tells whose a JWT is, by its `sub`. It must be signed by a key of the set, for this audience, by this issuer."""

    def __init__(self, key_set: Path, issuer: str, audience: str) -> None:
        """Read the key set, which is read again when it changes.

        Raises:
            UnusableFile: it is no key set, or the package that reads it is not installed.
        """
        self._issuer, self._audience = issuer, audience
        self._keys = Reloading([key_set], lambda: _read_keys(key_set))

    def subject_of(self, token: str) -> str:
        """The token's subject.

        Raises:
            Unauthenticated: the token is none of the issuer's, or has expired.
        """
        import jwt

        try:
            key = self._key(jwt.get_unverified_header(token).get("kid"))
            claims = jwt.decode(
                token,
                key.key,
                algorithms=[key.algorithm_name],
                issuer=self._issuer,
                audience=self._audience,
                leeway=LEEWAY,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except jwt.PyJWTError as error:
            # The class's name tells what is wrong; its text may repeat what the token holds.
            raise Unauthenticated(f"the bearer token is refused ({type(error).__name__}); get another one") from error
        return str(claims["sub"])

    def _key(self, key_id: str | None) -> Any:
        """The key of that id; where the token names none, the only one."""
        keys = self._keys.get()
        if key_id is None and len(keys) == 1:
            return next(iter(keys.values()))
        if key_id not in keys:
            raise Unauthenticated("the bearer token is signed by no key of this server's key set; get another one")
        return keys[key_id]


def _read_keys(path: Path) -> dict[str | None, Any]:
    """Keys that sign, by their id."""
    try:
        import jwt
    except ImportError as error:
        raise UnusableFile(path, "needs a package that is not installed: pip install 'dgemma[jwt]'") from error
    try:
        found = jwt.PyJWKSet.from_dict(json.loads(read_bytes(path))).keys
    except (ValueError, AttributeError, TypeError, jwt.PyJWTError) as error:
        raise UnusableFile(path, f"is no key set ({error})") from error
    keys = {key.key_id: key for key in found if key.algorithm_name in ALGORITHMS}
    if not keys:
        raise UnusableFile(path, f"holds no public key for any of {', '.join(ALGORITHMS)}")
    return keys
