"""A message that cannot be read ends in an error that says where, whatever its bytes are."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from diffusiongemma.v1 import generation_pb2, options_pb2, prompt_pb2
from runtime.errors import InvalidRequest, MessageTooLarge
from service.wire import MAX_EXPLAINED_FIELDS, parse

Request = generation_pb2.GenerateRequest
LIMIT = 1 << 20
MARK = "@@@@"
"""Replaced on the wire by bytes that are no UTF-8; of the same length, so that no length on the way changes."""


def conversation(*texts: str) -> prompt_pb2.Conversation:
    role = prompt_pb2.ROLE_USER
    return prompt_pb2.Conversation(
        messages=[prompt_pb2.Message(role=role, parts=[prompt_pb2.ContentPart(text=text)]) for text in texts]
    )


@pytest.mark.parametrize(
    ("message", "field"),
    [
        pytest.param(Request(model=MARK), "model", id="top-level"),
        pytest.param(
            Request(conversation=conversation("fine", f"ab{MARK}")),
            "conversation.messages[1].parts[0].text",
            id="nested",
        ),
        pytest.param(
            Request(
                token_ids=prompt_pb2.TokenIds(ids=[1, 300]),
                options=options_pb2.GenerationOptions(seed=5, stop_sequences=["é", MARK]),
            ),
            "options.stop_sequences[1]",
            id="behind-varints-and-packed-numbers",
        ),
        pytest.param(
            Request(
                options=options_pb2.GenerationOptions(
                    diffusion=options_pb2.DiffusionOptions(entropy_bound=0.5), stop_sequences=[MARK]
                )
            ),
            "options.stop_sequences[0]",
            id="behind-a-double",
        ),
    ],
)
def test_text_that_is_no_utf8_is_named(message: Request, field: str) -> None:
    raw = message.SerializeToString().replace(MARK.encode(), b"\xff\xfe\xc3\x28")
    with pytest.raises(DecodeError):  # what the bare parser says
        Request.FromString(raw)
    with pytest.raises(InvalidRequest) as caught:
        parse(Request, raw, LIMIT)
    [violation] = caught.value.violations
    assert violation.field == field
    assert "UTF-8" in violation.description


@pytest.mark.parametrize("raw", [b"\x12\x05\x0a", b"\xff" * 12, b"\x0b", b"\x12"])
def test_bytes_that_are_no_message_are_refused(raw: bytes) -> None:
    with pytest.raises(InvalidRequest, match=r"diffusiongemma\.v1\.GenerateRequest"):
        parse(Request, raw, LIMIT)


def test_the_limit_is_the_last_size_that_is_read() -> None:
    message = Request(model="x" * 100)
    raw = message.SerializeToString()
    assert parse(Request, raw, len(raw)) == message
    with pytest.raises(MessageTooLarge) as caught:
        parse(Request, raw, len(raw) - 1)
    assert (caught.value.size, caught.value.limit) == (len(raw), len(raw) - 1)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(raw: bytes) -> None:
    """Catches an exception out of the search for the field, which gRPC would answer with a bare UNKNOWN."""
    try:
        expected = Request.FromString(raw)
    except DecodeError:
        with pytest.raises(InvalidRequest):
            parse(Request, raw, LIMIT)
    else:
        found = parse(Request, raw, LIMIT)
        assert found == expected or found != found  # a NaN equals nothing


@given(st.text(), st.lists(st.integers(0, 2**31 - 1)), st.data())
def test_one_broken_byte_is_found(text: str, ids: list[int], data: st.DataObject) -> None:
    """A message of ours with one byte changed is read as protobuf reads it, or refused; never anything else."""
    message = Request(model=text, token_ids=prompt_pb2.TokenIds(ids=ids), options={"stop_sequences": [text]})
    raw = bytearray(message.SerializeToString())
    if raw:
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        expected = Request.FromString(bytes(raw))
    except DecodeError:
        with pytest.raises(InvalidRequest):
            parse(Request, bytes(raw), LIMIT)
    else:
        assert parse(Request, bytes(raw), LIMIT) == expected


@pytest.mark.parametrize("nested", [False, True])
def test_only_so_many_fields_are_looked_at(nested: bool) -> None:
    """Catches a message of 4 MB that takes seconds to explain while every stream waits: the bad text lies behind."""
    few, many = (_bad_text_behind(fields, nested) for fields in (MAX_EXPLAINED_FIELDS // 4, MAX_EXPLAINED_FIELDS))
    for raw, field in ((few, "model"), (many, "")):
        with pytest.raises(InvalidRequest) as caught:
            parse(Request, raw, LIMIT)
        [violation] = caught.value.violations
        assert violation.field == field


def _bad_text_behind(fields: int, nested: bool) -> bytes:
    """A request with a model that is no UTF-8 behind many fields, of its own or of its conversation."""
    message = conversation(*["x"] * (fields // 3)).SerializeToString() if nested else b""
    unknown = b"\x78\x01" * (0 if nested else fields)  # a varint
    request = Request(conversation=prompt_pb2.Conversation.FromString(message)) if nested else Request()
    return unknown + request.SerializeToString() + Request(model=MARK).SerializeToString().replace(b"@@@@", b"\xff" * 4)
