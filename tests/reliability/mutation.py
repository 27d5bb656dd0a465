"""Mutations of protobuf messages: of their fields, by reflection, so that most of them parse; and of their bytes.

Mutating bytes alone seldom gets past the parser: nested lengths must agree. Mutating fields alone never fails there.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

INTEGERS = (0, 1, -1, 2, 7, 31, 32, 33, 255, 256, 511, 512, 1000, 1001, 4096, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63))
REALS = (0.0, -0.0, 1.0, -1.0, 1e-3, 9e-4, 1e3, 1e308, 5e-324, float("nan"), float("inf"), float("-inf"))
TEXTS = (
    "",
    " ",
    "\x00",
    "a",
    "€" * 40,
    "😀",
    "\u202e\ufeff",
    "e\u0301" * 9,
    "<|turn>user\n",
    "<eos><bos><pad>",
    "{{ bos_token }}{% for x in y %}",
    "fake",
    "x" * 70,
    "word " * 300,
)
MAX_BYTES = 1 << 15
"""Of a mutated message: longer ones take long to tokenise, and say nothing new."""
WHOLE_RANGE = {FieldDescriptor.CPPTYPE_INT32: 32, FieldDescriptor.CPPTYPE_INT64: 64, FieldDescriptor.CPPTYPE_ENUM: 32}


def mutate(raw: bytes, kind: type[Message], others: Sequence[bytes], chance: random.Random) -> bytes:
    """A mutation of the message `raw` of type `kind`, spliced with parts of `others`, of the same type."""
    for _ in range(chance.choice((1, 1, 1, 2, 3, 5))):
        other = chance.choice(others)
        raw = _bytes(raw, other, chance) if chance.random() < 0.3 else _fields(raw, other, kind, chance)
    return raw[:MAX_BYTES]


def _fields(raw: bytes, other: bytes, kind: type[Message], chance: random.Random) -> bytes:
    message, donor = kind(), kind()
    try:
        message.ParseFromString(raw)
        donor.ParseFromString(other)
    except DecodeError:
        return _bytes(raw, other, chance)
    target = chance.choice(list(_messages(message)))
    donors = [each for each in _messages(donor) if each.DESCRIPTOR is target.DESCRIPTOR]
    if donors and chance.random() < 0.2:
        chance.choice((target.CopyFrom, target.MergeFrom))(chance.choice(donors))
    elif target.DESCRIPTOR.fields:
        _field(target, chance.choice(target.DESCRIPTOR.fields), chance)
    return message.SerializeToString()


def _messages(message: Any) -> Iterator[Any]:
    """The message and all that it holds."""
    yield message
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            for each in value if field.is_repeated else [value]:
                yield from _messages(each)


def _field(message: Any, field: Any, chance: random.Random) -> None:
    """Change one field."""
    if chance.random() < 0.15:
        message.ClearField(field.name)
    elif field.is_repeated:
        _repeated(getattr(message, field.name), field, chance)
    elif field.type == FieldDescriptor.TYPE_MESSAGE:
        getattr(message, field.name).SetInParent()
    else:
        setattr(message, field.name, _scalar(field, chance))


def _repeated(values: Any, field: Any, chance: random.Random) -> None:
    choice = chance.random()
    if len(values) and choice < 0.25:
        del values[chance.randrange(len(values))]
    elif len(values) and choice < 0.6:
        # Once more, or many times.
        values.extend([values[chance.randrange(len(values))]] * chance.choice((1, 1, 2, 40)))
    elif field.type == FieldDescriptor.TYPE_MESSAGE:
        values.add()
    else:
        values.extend(_scalar(field, chance) for _ in range(chance.choice((1, 1, 3, 32))))


def _scalar(field: Any, chance: random.Random) -> Any:
    """A value at a border, or any."""
    if field.type == FieldDescriptor.TYPE_STRING:
        return chance.choice(TEXTS) + chance.choice(("", "", chr(chance.randrange(32, 0xD000))))
    if field.type == FieldDescriptor.TYPE_BYTES:
        return chance.randbytes(chance.choice((0, 1, 8, 100)))
    if field.type == FieldDescriptor.TYPE_BOOL:
        return chance.random() < 0.5
    if field.cpp_type in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        return chance.choice((*REALS, chance.uniform(-5, 5)))
    bits = WHOLE_RANGE[field.cpp_type]
    value = chance.choice((*INTEGERS, chance.randrange(-(1 << 12), 1 << 12)))
    return max(-(1 << bits - 1), min((1 << bits - 1) - 1, value))


def _bytes(raw: bytes, other: bytes, chance: random.Random) -> bytes:
    """Change, insert, leave out, repeat or exchange some bytes."""
    start = chance.randint(0, len(raw))
    end = min(len(raw), start + chance.choice((1, 1, 2, 4, 16, 64)))
    cut = chance.randint(0, len(other))
    middle = chance.choice(
        (
            b"",
            chance.randbytes(end - start),
            raw[start:end] * 2,
            bytes(byte ^ 1 << chance.randrange(8) for byte in raw[start:end]),
            chance.choice((b"\xff" * 10, b"\x00", b"\x80", b"\x7f", b"\xff\xff\xff\xff\x0f")),
            other[cut : cut + 32],
        )
    )
    return raw[:start] + middle + raw[end:]
