"""Failures of calls as sentences, with what their details name."""

from __future__ import annotations

from grpc import StatusCode

from runtime.errors import DgemmaError
from service.cli.exits import FAILED, REFUSED, TOO_LATE, UNAVAILABLE, Failure
from service.client import CallFailed

EXIT_CODES = {
    StatusCode.INVALID_ARGUMENT: REFUSED,
    StatusCode.NOT_FOUND: REFUSED,
    StatusCode.UNIMPLEMENTED: REFUSED,
    StatusCode.FAILED_PRECONDITION: REFUSED,
    StatusCode.UNAUTHENTICATED: REFUSED,
    StatusCode.OUT_OF_RANGE: REFUSED,
    StatusCode.RESOURCE_EXHAUSTED: UNAVAILABLE,
    StatusCode.UNAVAILABLE: UNAVAILABLE,
    StatusCode.DEADLINE_EXCEEDED: TOO_LATE,
}


def failure_of(error: DgemmaError) -> Failure:
    """How the program ends for an error of the project's tree."""
    if not isinstance(error, CallFailed):
        return Failure(str(error))
    exit_code = EXIT_CODES.get(error.code, FAILED)
    if error.reason == "MESSAGE_TOO_LARGE":
        exit_code = REFUSED
    return Failure(sentence_of(error), exit_code)


def sentence_of(error: CallFailed) -> str:
    """What a failed call tells, over as many lines as it names fields."""
    if error.violations:
        lines = [f"  {violation.field or '...'}: {violation.description}" for violation in error.violations]
        return "\n".join([f"the server refused the request ({error.code.name}):", *lines])
    match error.code:
        case StatusCode.UNAVAILABLE if not error.reason:
            hint = "is it running, is --address right, and do both sides encrypt or neither?"
            return f"the server cannot be reached ({error.message}); {hint}"
        case StatusCode.DEADLINE_EXCEEDED:
            return f"the deadline passed ({error.message}); give more time with --timeout"
        case StatusCode.UNAUTHENTICATED:
            return f"{error.message}; give a token with --token-file (UNAUTHENTICATED)"
        case StatusCode.CANCELLED:
            return "the call was cancelled"
    again = "" if error.retry_after is None else f"; try again in {error.retry_after:.1f} s"
    named = error.message if again and "try again" in error.message else f"{error.message}{again}"
    return f"{named} ({error.code.name})"
