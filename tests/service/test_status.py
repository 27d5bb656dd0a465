"""Every error of the tree has its status, and every status fits into the trailers that carry it."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from runtime import errors
from runtime.errors import Violation
from service.status import MAX_STATUS_BYTES, TABLE, internal_status, status_of

CLASSES = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, errors.DgemmaError)]

EXAMPLES: dict[type[errors.DgemmaError], tuple[errors.DgemmaError, grpc.StatusCode, str]] = {
    errors.DgemmaError: (errors.DgemmaError("x"), grpc.StatusCode.INTERNAL, "INTERNAL"),
    errors.CheckpointError: (
        errors.CheckpointError("x"),
        grpc.StatusCode.FAILED_PRECONDITION,
        "CHECKPOINT_UNUSABLE",
    ),
    errors.BundleError: (errors.BundleError("x"), grpc.StatusCode.FAILED_PRECONDITION, "BUNDLE_UNUSABLE"),
    errors.InvalidRequest: (
        errors.InvalidRequest(Violation("options.seed", "is -1")),
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_REQUEST",
    ),
    errors.UnsupportedRequest: (
        errors.UnsupportedRequest("parts[0].image", "no vision"),
        grpc.StatusCode.UNIMPLEMENTED,
        "UNSUPPORTED_REQUEST",
    ),
    errors.ModelNotFound: (errors.ModelNotFound("a", "b"), grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"),
    errors.MessageTooLarge: (
        errors.MessageTooLarge(5, 4),
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "MESSAGE_TOO_LARGE",
    ),
    errors.QueueFull: (errors.QueueFull(4, 2.5), grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL"),
    errors.Unauthenticated: (errors.Unauthenticated("x"), grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"),
    errors.ClientLimitReached: (
        errors.ClientLimitReached("max_concurrent", 4, 2.5),
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "CLIENT_LIMIT_REACHED",
    ),
    errors.DeadlineTooShort: (
        errors.DeadlineTooShort("x"),
        grpc.StatusCode.DEADLINE_EXCEEDED,
        "DEADLINE_TOO_SHORT",
    ),
    errors.Draining: (errors.Draining("x"), grpc.StatusCode.UNAVAILABLE, "DRAINING"),
    errors.Cancelled: (errors.Cancelled("x"), grpc.StatusCode.CANCELLED, "CANCELLED"),
    errors.ReaderTooSlow: (errors.ReaderTooSlow("x"), grpc.StatusCode.ABORTED, "READER_TOO_SLOW"),
    errors.SenderTooSlow: (errors.SenderTooSlow("x"), grpc.StatusCode.ABORTED, "SENDER_TOO_SLOW"),
    errors.EngineFault: (errors.EngineFault("abc"), grpc.StatusCode.INTERNAL, "ENGINE_FAULT"),
}
"""What each class is told as, written down a second time: a slip in the table shows as a difference."""


def details_of(status: status_pb2.Status) -> dict[str, list[object]]:
    """The status's details by type, unpacked."""
    kinds = (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo)
    found: dict[str, list[object]] = {}
    for packed in status.details:
        [kind] = [kind for kind in kinds if packed.Is(kind.DESCRIPTOR)]
        message = kind()
        packed.Unpack(message)
        found.setdefault(kind.__name__, []).append(message)
    return found


@pytest.mark.parametrize("cls", CLASSES)
def test_every_class_has_an_entry_of_its_own(cls: type[errors.DgemmaError]) -> None:
    """Catches a new error that would be told as its base."""
    assert cls in TABLE
    error, code, reason = EXAMPLES[cls]
    status = status_of(error)
    [info] = details_of(status)["ErrorInfo"]
    assert (status.code, info.reason) == (code.value[0], reason)  # type: ignore[attr-defined]
    assert status.message == str(error)


def test_reasons_are_unique_and_upper_snake() -> None:
    """Catches two classes that a client could not tell apart."""
    reasons = [mapped.reason for mapped in TABLE.values()]
    assert len(set(reasons)) == len(reasons)
    assert all(reason.replace("_", "").isalpha() and reason.isupper() for reason in reasons)


def test_a_subclass_without_an_entry_takes_its_base() -> None:
    class Local(errors.QueueFull):
        pass

    assert status_of(Local(1, 1.0)).code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]


def test_variables_of_the_message_are_in_the_details() -> None:
    details = details_of(status_of(errors.QueueFull(4, 2.5)))
    assert details["ErrorInfo"][0].metadata == {"waiting": "4"}  # type: ignore[attr-defined]
    assert details["RetryInfo"][0].retry_delay.ToMilliseconds() == 2500  # type: ignore[attr-defined]
    details = details_of(status_of(errors.InvalidRequest(Violation("a.b", "is 3"), Violation("c", "is 4"))))
    violations = details["BadRequest"][0].field_violations  # type: ignore[attr-defined]
    assert [(violation.field, violation.description) for violation in violations] == [("a.b", "is 3"), ("c", "is 4")]


def test_violations_that_do_not_fit_are_counted() -> None:
    """Catches the cap cutting silently: 1000 wrong token ids must not read as 7."""
    many = tuple(Violation(f"token_ids.ids[{index}]", "is -1; ids start at 0 " * 5) for index in range(1000))
    bad = details_of(status_of(errors.InvalidRequest(*many)))["BadRequest"][0]
    shown = bad.field_violations  # type: ignore[attr-defined]
    assert shown[-1].description == f"and {1000 - (len(shown) - 1)} more"
    assert shown[0].field == "token_ids.ids[0]"


text = st.text(max_size=3000)
makers: list[Callable[..., st.SearchStrategy[errors.DgemmaError]]] = [
    lambda: st.lists(st.builds(Violation, text, text), max_size=40).map(lambda found: errors.InvalidRequest(*found)),
    lambda: st.builds(errors.UnsupportedRequest, text, text),
    lambda: st.builds(errors.ModelNotFound, text, text),
    lambda: st.builds(errors.EngineFault, text),
    lambda: st.builds(errors.Draining, text),
]


@given(st.one_of([make() for make in makers]))
def test_any_status_fits_into_the_trailers(error: errors.DgemmaError) -> None:
    """Catches a long text that makes gRPC replace the status by RESOURCE_EXHAUSTED, whatever its letters cost.

    The trailers hold the message percent-encoded and the status in base64.
    """
    status = status_of(error)
    serialised = status.SerializeToString()
    assert len(serialised) <= MAX_STATUS_BYTES
    assert 3 * len(status.message.encode()) + 4 * (len(serialised) + 2) // 3 < 8000
    found = details_of(status)
    assert len(found["ErrorInfo"]) == 1
    assert all(len(messages) == 1 for messages in found.values())


def test_a_fault_of_our_own_tells_only_where_to_look() -> None:
    status = internal_status("0123456789ab")
    assert status.code == grpc.StatusCode.INTERNAL.value[0]
    assert details_of(status)["ErrorInfo"][0].metadata == {"correlation_id": "0123456789ab"}  # type: ignore[attr-defined]
