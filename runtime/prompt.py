"""Conversations to token ids with the checkpoint's chat template, in which text stays text.

Control tokens of a prompt come from the template alone. The characters that control tokens begin and end with are
replaced in every message by private characters before the template is rendered, so that no spelling, concatenation or
trimming of texts can form a control token; when the template's own control tokens have been found they are put back.
So a template that looks for control tokens inside texts, to cut thoughts out of past answers, finds none: answers are
told without control tokens, and what a user types is text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import islice

import jinja2
import numpy as np
from numpy.typing import NDArray

from runtime.bundle import CHAT_TEMPLATE, Bundle
from runtime.chat_template import ChatTemplate
from runtime.errors import BundleError, InvalidRequest, Violation
from runtime.vocabulary import Vocabulary

MAX_VIOLATIONS = 64
"""Most that one error tells of a conversation: a message of 4 MB can hold 400,000 wrong ones."""

_PRIVATE_USE = (*range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE))


class Role(Enum):
    """Who speaks; the value is what chat templates call it."""

    SYSTEM = "system"
    USER = "user"
    MODEL = "assistant"


@dataclass(frozen=True)
class Message:
    """One message of a conversation."""

    role: Role
    text: str
    """May be empty only for the model, whose answer may have been."""


class PromptBuilder:
    """Builds prompts for one bundle; safe to share between threads."""

    def __init__(self, bundle: Bundle, vocabulary: Vocabulary) -> None:
        """Read the bundle's chat template and try it on small conversations.

        Raises:
            BundleError: the template cannot be read, does not render a user's message, or writes a message's text into
                the middle of a control token.
        """
        self._vocabulary, self._facts = vocabulary, bundle.manifest.model
        self._bos_token_id = bundle.manifest.generation.bos_token_id
        spellings = sorted(vocabulary.control_ids, key=len, reverse=True)
        self._control_tokens = re.compile("(" + "|".join(map(re.escape, spellings)) + ")" if spellings else "((?!))")
        self._guarded = {spelling[end] for spelling in spellings for end in (0, -1)}
        self._source = _read_template(bundle)
        self._template = _compile(bundle, self._source, vocabulary)
        self._probe(bundle)

    def conversation(self, messages: Sequence[Message], field: str = "messages") -> NDArray[np.int64]:
        """Token ids of a conversation up to the point where the answer begins, `[n >= 1]`.

        Raises:
            InvalidRequest: wrong roles or texts, or the template refuses them; violations name places under `field`.
        """
        violations = tuple(islice(_violations(messages, field), MAX_VIOLATIONS))
        if violations:
            raise InvalidRequest(*violations)
        shield = self._shield([message.text for message in messages], field)
        try:
            rendered = self._render(messages, shield)
        except jinja2.TemplateError as error:
            description = f"cannot be put into the checkpoint's chat template: {error}"
            raise InvalidRequest(Violation(field, description)) from error
        return _array(self._encode(rendered, shield, field))

    def text(self, text: str, field: str = "text") -> NDArray[np.int64]:
        """Token ids of bare text behind a beginning-of-sequence token, without the template, `[n >= 2]`.

        Raises:
            InvalidRequest: the text is empty or no valid Unicode.
        """
        complaint = _text_complaint(text)
        if complaint is not None:
            raise InvalidRequest(Violation(field, complaint))
        return _array([self._bos_token_id, *self._literal(text, field)])

    def token_ids(self, ids: Sequence[int], field: str = "ids") -> NDArray[np.int64]:
        """Ready token ids, checked, `[n >= 1]`.

        Raises:
            InvalidRequest: there is none, or one (the first is named) is not in the vocabulary.
        """
        if not len(ids):
            raise InvalidRequest(Violation(field, "holds no token id; give at least one"))
        most = self._facts.vocab_size - 1
        wrong = next((index for index, token_id in enumerate(ids) if not 0 <= token_id <= most), None)
        if wrong is not None:
            raise InvalidRequest(Violation(f"{field}[{wrong}]", f"is {ids[wrong]}; it must be from 0 to {most}"))
        return _array(ids)

    def _render(self, messages: Sequence[Message], shield: _Shield) -> str:
        return self._template.render(
            [{"role": message.role.value, "content": shield.raise_over(message.text)} for message in messages]
        )

    def _encode(self, rendered: str, shield: _Shield, field: str) -> Iterator[int]:
        for index, piece in enumerate(self._control_tokens.split(rendered)):
            if index % 2:
                yield self._vocabulary.control_ids[piece]
            elif piece:
                yield from self._literal(shield.lower_from(piece), field)

    def _literal(self, text: str, field: str) -> list[int]:
        ids = self._vocabulary.encode(text)
        forged = set(ids) & set(self._vocabulary.control_ids.values())
        if forged:
            names = ", ".join(sorted(map(self._vocabulary.spelling, forged)))
            raise InvalidRequest(
                Violation(field, f"holds text that this tokenizer cannot tell from {names}; reword it")
            )
        return ids

    def _shield(self, texts: Sequence[str], field: str) -> _Shield:
        """Private characters for those that control tokens begin or end with."""
        used = set().union(*texts)
        guarded = used & self._guarded
        free = (chr(code) for code in _PRIVATE_USE if chr(code) not in used and chr(code) not in self._source)
        private = list(islice(free, len(guarded)))
        if len(private) < len(guarded):
            raise InvalidRequest(Violation(field, f"uses {len(used)} different characters; leave out the private ones"))
        return _Shield(dict(zip(guarded, private, strict=True)))

    def _probe(self, bundle: Bundle) -> None:
        mark = next(chr(code) for code in _PRIVATE_USE if chr(code) not in self._source)
        user, model, system = (Message(role, mark) for role in (Role.USER, Role.MODEL, Role.SYSTEM))
        where = bundle.path(CHAT_TEMPLATE)
        for messages in ([user], [user, model, user], [system, user]):
            try:
                rendered = self._render(messages, _Shield({}))
            except jinja2.TemplateError as error:
                if len(messages) == 1:
                    raise BundleError(f"{where}: does not render a user's message: {error}") from error
                continue  # a template may refuse system messages; those requests will be told
            if mark not in rendered:
                raise BundleError(f"{where}: leaves out what the user says")
            for place in re.finditer(mark, rendered):
                self._check_place(rendered[: place.start()], rendered[place.end() :], where)

    def _check_place(self, before: str, after: str, where: object) -> None:
        """Text between these two must not complete a control token by its inner characters alone."""
        for spelling in self._vocabulary.control_ids:
            for head in range(1, len(spelling)):
                tails = (spelling[tail:] for tail in range(head, len(spelling)))
                if before.endswith(spelling[:head]) and after.startswith(tuple(tails)):
                    raise BundleError(f"{where}: writes a message's text into the middle of {spelling}")


class _Shield:
    """Characters replaced one for one, and back."""

    def __init__(self, private: dict[str, str]) -> None:
        self._raise = str.maketrans(private)
        self._lower = str.maketrans({replacement: character for character, replacement in private.items()})

    def raise_over(self, text: str) -> str:
        return text.translate(self._raise)

    def lower_from(self, text: str) -> str:
        return text.translate(self._lower)


def _read_template(bundle: Bundle) -> str:
    path = bundle.path(CHAT_TEMPLATE)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path}: cannot be read ({error})") from error


def _compile(bundle: Bundle, source: str, vocabulary: Vocabulary) -> ChatTemplate:
    defaults = bundle.manifest.generation
    tokens = {
        "bos_token": vocabulary.spelling(defaults.bos_token_id),
        "eos_token": vocabulary.spelling(defaults.end_token_ids[0]) if defaults.end_token_ids else "",
        "pad_token": vocabulary.spelling(defaults.pad_token_id),
    }
    try:
        return ChatTemplate(source, {**tokens, "tools": None, "documents": None})
    except jinja2.TemplateError as error:
        raise BundleError(f"{bundle.path(CHAT_TEMPLATE)}: is not a template: {error}") from error


def _violations(messages: Sequence[Message], field: str) -> Iterator[Violation]:
    if not messages:
        yield Violation(field, "holds no message; give at least a user's")
    previous = None
    for index, message in enumerate(messages):
        complaint = _role_complaint(previous, message.role, last=index == len(messages) - 1)
        if complaint is not None:
            yield Violation(f"{field}[{index}].role", complaint)
        complaint = _text_complaint(message.text, may_be_empty=message.role is Role.MODEL)
        if complaint is not None:
            yield Violation(f"{field}[{index}].parts", complaint)
        previous = message.role


def _role_complaint(previous: Role | None, role: Role, last: bool) -> str | None:
    if role is Role.SYSTEM and previous is not None:
        return "is system; a system message may only come first"
    if role is Role.MODEL and previous is not Role.USER:
        return "is model; a model's message must follow a user's"
    if role is Role.USER and previous is Role.USER:
        return "is user; a user's message must not follow another one, join them"
    if last and role is not Role.USER:
        return f"is {role.name.lower()}; a conversation must end with a user's message"
    return None


def _text_complaint(text: str, may_be_empty: bool = False) -> str | None:
    if not text and not may_be_empty:
        return "holds no text; give at least one character"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"is not valid Unicode at character {error.start}"
    return None


def _array(ids: Iterator[int] | Sequence[int]) -> NDArray[np.int64]:
    return np.fromiter(ids, dtype=np.int64)
