"""The bundle's tokenizer, as prompts and answers need it: text to ids without control tokens, ids to bytes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import cast

from tokenizers import Tokenizer

from runtime.bundle import TOKENIZER, Bundle
from runtime.errors import BundleError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class Vocabulary:
    """A tokenizer whose control (special) tokens never come out of text and never show in text.

    Shared by all requests and threads; one load of Gemma's 262,144 entries is costly, so share it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Take over `tokenizer`: it is set to encode the spelling of control tokens as ordinary text.

        Raises:
            BundleError: the tokenizer's manner is not Gemma's.
        """
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        added = tokenizer.get_added_tokens_decoder()
        self.control_ids = {token.content: index for index, token in added.items() if token.special}
        """Ids of the control tokens by spelling."""
        self._hidden = frozenset(self.control_ids.values())
        self._tokenizer = tokenizer
        self._bytes: dict[int, bytes] = {}
        self._texts: dict[int, str] = {}
        _check_control_tokens([token for token in added.values() if token.special])
        _check_decoder(tokenizer)

    @classmethod
    def load(cls, bundle: Bundle) -> Vocabulary:
        """Read the bundle's tokenizer.

        Raises:
            BundleError: the file cannot be read, or its manner is not Gemma's.
        """
        path = bundle.path(TOKENIZER)
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise BundleError(f"{path}: is not a tokenizer that can be read ({error})") from error
        return cls(tokenizer)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, taken literally: neither control tokens nor a beginning-of-sequence token."""
        # As a batch, for `encode` keeps the interpreter's lock: 4 MB of text stopped all other threads for 7 s. "Fast"
        # leaves out offsets, which nobody asks for: half the time.
        [encoding] = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        ids: list[int] = encoding.ids
        return ids

    def spelling(self, token_id: int) -> str:
        """A token as the tokenizer spells it, as in `<bos>`; empty for an id that the tokenizer has not."""
        return self._tokenizer.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes that a token adds to a text: none for a control token, perhaps a part of a character."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._read_bytes(token_id)
        return known

    def texts(self, token_ids: Sequence[int]) -> list[str] | None:
        """What each token adds to a text, as `token_bytes`; None where the bytes of one are no whole characters."""
        # Looked up without a call for each: a draft has 256 tokens, and every step may make one.
        texts = list(map(self._texts.get, token_ids))
        if None in texts:
            texts = [self._whole_text(token_id) for token_id in token_ids]
        return None if None in texts else cast("list[str]", texts)

    def _whole_text(self, token_id: int) -> str | None:
        known = self._texts.get(token_id)
        if known is None:
            try:
                known = self._texts[token_id] = self.token_bytes(token_id).decode()
            except UnicodeDecodeError:
                return None
        return known

    def _read_bytes(self, token_id: int) -> bytes:
        spelling = self.spelling(token_id)
        if token_id in self._hidden or not spelling:
            return b""
        if byte := _BYTE_TOKEN.fullmatch(spelling):
            return bytes.fromhex(byte[1])
        return str(self._tokenizer.decoder.decode([spelling])).encode()


def _check_control_tokens(tokens: list[object]) -> None:
    """Control tokens are looked for by their spelling alone, so one that swallows its surroundings is refused."""
    for token in tokens:
        flags = [flag for flag in ("lstrip", "rstrip", "single_word") if getattr(token, flag)]
        if flags or not str(getattr(token, "content", "")).strip():
            raise BundleError(f"{TOKENIZER}: control token {token!r} is matched with {flags}, which is not supported")


def _check_decoder(tokenizer: Tokenizer) -> None:
    """A token's text must not depend on its neighbours, but for bytes that make up a character together."""
    probe, expected = ["▁a", "▁", "b", "<0xC3>", "<0xA9>", "▁c"], " a bé c"
    decoded = tokenizer.decoder.decode(probe) if tokenizer.decoder is not None else None
    if decoded != expected:
        raise BundleError(f"{TOKENIZER}: decodes {probe} to {decoded!r}, not {expected!r}: its decoder is not Gemma's")
