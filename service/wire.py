"""Reading a client's message: within the size limit, well formed, every string in UTF-8, or one error that says where.

protobuf's own parser only says that a message is bad. gRPC turns that into a bare UNKNOWN, so parsing is done here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar, cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message

from runtime.errors import InvalidRequest, MessageTooLarge, Violation

Parsed = TypeVar("Parsed", bound=Message)

MAX_EXPLAINED_FIELDS = 10_000
"""Fields that are looked at to say which one is wrong, a few microseconds each; a message of 4 MB can hold two million,
and everybody waits while they are looked at."""

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_NOT_WELL_FORMED = "is not a well-formed protobuf message of type {}; send what the generated code serialises"


def parse(kind: type[Parsed], raw: bytes, limit: int) -> Parsed:
    """The message of type `kind` in `raw`.

    Raises:
        MessageTooLarge: it holds more than `limit` bytes.
        InvalidRequest: it is none; names the field where a text is not UTF-8.
    """
    if len(raw) > limit:
        raise MessageTooLarge(len(raw), limit)
    try:
        return kind.FromString(raw)
    except DecodeError as error:
        raise InvalidRequest(_explain(cast(Descriptor, kind.DESCRIPTOR), raw)) from error


def _explain(descriptor: Descriptor, raw: bytes) -> Violation:
    """Which field keeps `raw` from being parsed: the first string that is no UTF-8, else the message as a whole."""
    try:
        for path, text in _strings(descriptor, raw, "", iter(range(MAX_EXPLAINED_FIELDS))):
            try:
                text.decode()
            except UnicodeDecodeError as error:
                return Violation(path, f"is not valid UTF-8 at byte {error.start} of {len(text)}; encode it in UTF-8")
    except _Unexplained:
        pass
    return Violation("", _NOT_WELL_FORMED.format(descriptor.full_name))


class _Unexplained(Exception):
    """The wire format ends in the midst of something, or holds too many fields to look at."""


def _strings(descriptor: Descriptor, raw: bytes, prefix: str, left: Iterator[int]) -> Iterator[tuple[str, bytes]]:
    """Path and bytes of every string field in `raw`, in wire order, those of nested messages among them.

    `left` is taken from once a field.
    """
    seen: dict[int, int] = {}
    for number, value in _length_delimited(raw, left):
        field = descriptor.fields_by_number.get(number)
        if field is None:
            continue
        index = seen[number] = seen.get(number, -1) + 1
        path = f"{prefix}{field.name}[{index}]" if field.is_repeated else f"{prefix}{field.name}"
        if field.type == FieldDescriptor.TYPE_STRING:
            yield path, value
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            yield from _strings(cast(Descriptor, field.message_type), value, f"{path}.", left)


def _length_delimited(raw: bytes, left: Iterator[int]) -> Iterator[tuple[int, bytes]]:
    """Number and value of each length-delimited field on the top level of `raw`."""
    position = 0
    while position < len(raw):
        if next(left, None) is None:
            raise _Unexplained
        key, position = _varint(raw, position)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            _, position = _varint(raw, position)
            continue
        if kind not in (_LENGTH, _FIXED64, _FIXED32):
            raise _Unexplained
        length = {_FIXED64: 8, _FIXED32: 4}.get(kind)
        if length is None:
            length, position = _varint(raw, position)
        if position + length > len(raw):
            raise _Unexplained
        if kind == _LENGTH:
            yield number, raw[position : position + length]
        position += length


def _varint(raw: bytes, position: int) -> tuple[int, int]:
    """Value of the varint at `position`, and the position behind it."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(raw):
            break
        byte = raw[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise _Unexplained
