"""The border between the project's errors and gRPC: one table, one status per class of error.

A status carries the error's sentence and `google.rpc` details: always one `ErrorInfo`, and where the error has them
field violations (`BadRequest`) and the time to come again (`RetryInfo`). An error without an entry of its own takes
its nearest base's; an exception from outside the tree is INTERNAL with a correlation id and none of its text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from runtime import errors

DOMAIN = "diffusiongemma.v1"
"""`ErrorInfo.domain`: whose reasons these are."""

DETAILS_KEY = "grpc-status-details-bin"

MAX_STATUS_BYTES = 4096
"""Most bytes of a serialised `google.rpc.Status`. It travels in base64, and its message once more, percent-encoded at
three bytes for one, in trailers that gRPC refuses above 8 kB: RESOURCE_EXHAUSTED would then hide what was wrong."""

MAX_MESSAGE_BYTES = 640
"""Most bytes of a status's message, UTF-8; three times that and 4/3 of the status stay below 8 kB."""

MAX_TEXT_BYTES = 320
"""Most bytes of any other text in a status: a description, a value of the metadata."""


@dataclass(frozen=True)
class Mapped:
    """How one class of errors is told: a code, a reason, and what of the error goes into the details."""

    code: grpc.StatusCode
    reason: str
    metadata: Callable[[Any], Mapping[str, object]] = field(default=lambda _: {})
    """The variables of the message, by name."""
    violations: Callable[[Any], tuple[errors.Violation, ...]] = field(default=lambda _: ())
    retry_after: Callable[[Any], float | None] = field(default=lambda _: None)
    """Seconds."""


TABLE: Mapping[type[errors.DgemmaError], Mapped] = {
    errors.DgemmaError: Mapped(grpc.StatusCode.INTERNAL, "INTERNAL"),
    errors.CheckpointError: Mapped(grpc.StatusCode.FAILED_PRECONDITION, "CHECKPOINT_UNUSABLE"),
    errors.BundleError: Mapped(grpc.StatusCode.FAILED_PRECONDITION, "BUNDLE_UNUSABLE"),
    errors.InvalidRequest: Mapped(
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_REQUEST",
        metadata=lambda error: {"fields": ",".join(violation.field for violation in error.violations)},
        violations=lambda error: error.violations,
    ),
    errors.UnsupportedRequest: Mapped(
        grpc.StatusCode.UNIMPLEMENTED,
        "UNSUPPORTED_REQUEST",
        metadata=lambda error: {"field": error.field},
        violations=lambda error: (errors.Violation(error.field, error.description),),
    ),
    errors.ModelNotFound: Mapped(
        grpc.StatusCode.NOT_FOUND,
        "MODEL_NOT_FOUND",
        metadata=lambda error: {"model": error.model, "served": error.served},
        violations=lambda error: (errors.Violation("model", f"{error.model!r} is not served; {error.served!r} is"),),
    ),
    errors.MessageTooLarge: Mapped(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "MESSAGE_TOO_LARGE",
        metadata=lambda error: {"size": error.size, "limit": error.limit},
    ),
    errors.QueueFull: Mapped(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "QUEUE_FULL",
        metadata=lambda error: {"waiting": error.waiting},
        retry_after=lambda error: error.retry_after,
    ),
    errors.Unauthenticated: Mapped(grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"),
    errors.ClientLimitReached: Mapped(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "CLIENT_LIMIT_REACHED",
        metadata=lambda error: {"limit": error.limit, "value": error.value},
        retry_after=lambda error: error.retry_after,
    ),
    errors.DeadlineTooShort: Mapped(grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_TOO_SHORT"),
    errors.Draining: Mapped(grpc.StatusCode.UNAVAILABLE, "DRAINING"),
    errors.Cancelled: Mapped(grpc.StatusCode.CANCELLED, "CANCELLED"),
    errors.ReaderTooSlow: Mapped(grpc.StatusCode.ABORTED, "READER_TOO_SLOW"),
    errors.SenderTooSlow: Mapped(grpc.StatusCode.ABORTED, "SENDER_TOO_SLOW"),
    errors.EngineFault: Mapped(
        grpc.StatusCode.INTERNAL,
        "ENGINE_FAULT",
        metadata=lambda error: {"correlation_id": error.correlation_id},
    ),
}


def status_of(error: errors.DgemmaError) -> status_pb2.Status:
    """The status that tells a caller of `error`, at most `MAX_STATUS_BYTES` long."""
    mapped = next(TABLE[base] for base in type(error).__mro__ if base in TABLE)
    metadata = {name: _clip(str(value), MAX_TEXT_BYTES) for name, value in mapped.metadata(error).items()}
    status = status_pb2.Status(code=mapped.code.value[0], message=_clip(str(error), MAX_MESSAGE_BYTES))
    _attach(status, error_details_pb2.ErrorInfo(reason=mapped.reason, domain=DOMAIN, metadata=metadata))
    if (seconds := mapped.retry_after(error)) is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(round(seconds * 1e9))
        _attach(status, error_details_pb2.RetryInfo(retry_delay=delay))
    if violations := mapped.violations(error):
        _attach(status, _bad_request(violations, room=MAX_STATUS_BYTES - status.ByteSize() - 64))
    return status


def internal_status(correlation_id: str) -> status_pb2.Status:
    """The status of a fault of the server's own: no text of the exception, only where its log tells more."""
    text = f"the server failed on this call; its log names it {correlation_id}"
    status = status_pb2.Status(code=grpc.StatusCode.INTERNAL.value[0], message=text)
    info = error_details_pb2.ErrorInfo(reason="INTERNAL", domain=DOMAIN, metadata={"correlation_id": correlation_id})
    _attach(status, info)
    return status


def code_of(status: status_pb2.Status) -> grpc.StatusCode:
    """The status's code as gRPC's enum."""
    return next(code for code in grpc.StatusCode if code.value[0] == status.code)


def _attach(status: status_pb2.Status, detail: Message) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)
    status.details.append(packed)


def _bad_request(violations: tuple[errors.Violation, ...], room: int) -> error_details_pb2.BadRequest:
    """As many violations as `room` bytes take, and a last one that counts those left out."""
    bad = error_details_pb2.BadRequest()
    for count, violation in enumerate(violations):
        text = _clip(violation.description, MAX_TEXT_BYTES)
        bad.field_violations.add(field=_clip(violation.field, MAX_TEXT_BYTES), description=text)
        if bad.ByteSize() > room - 128:
            del bad.field_violations[-1]
            bad.field_violations.add(field="", description=f"and {len(violations) - count} more")
            break
    return bad


def _clip(text: str, limit: int) -> str:
    """`text` in at most `limit` bytes of UTF-8, with an ellipsis where it was cut."""
    raw = text.encode(errors="replace")
    return raw.decode() if len(raw) <= limit else raw[: limit - 3].decode(errors="ignore") + "…"
