"""All errors of the project, in one tree.

    DgemmaError
    ├── CheckpointError      a checkpoint cannot be exported
    ├── BundleError          a bundle cannot be written or loaded
    ├── InvalidRequest       a request's value is wrong: names the field, the value and the limit
    ├── UnsupportedRequest   a request asks for something this bundle or version has not
    ├── ModelNotFound        a request names a model that is not served
    ├── MessageTooLarge      a message is larger than the server reads
    ├── Unauthenticated      a caller does not show who it is
    ├── QueueFull            too many requests wait; says when to come again
    ├── ClientLimitReached   a client has as much under way, or had as much, as it may; says when to come again
    ├── DeadlineTooShort     a request cannot start before its deadline
    ├── Draining             the server is shutting down
    ├── Cancelled            the caller withdrew the request
    ├── ReaderTooSlow        the caller did not read what it had asked for
    ├── SenderTooSlow        the caller did not send what it had begun to send
    └── EngineFault          the engine failed; carries a correlation id

The service maps each class to one gRPC status (`service/status.py`); a test fails for a class without one.
"""

from __future__ import annotations

from dataclasses import dataclass


class DgemmaError(Exception):
    """Base of all errors that a caller can meet; `str()` is a sentence fit for the caller."""


class CheckpointError(DgemmaError):
    """A checkpoint cannot be exported."""


class BundleError(DgemmaError):
    """A bundle cannot be written or loaded."""


@dataclass(frozen=True)
class Violation:
    """One wrong field of a request."""

    field: str
    """Path of the field in the request, as in `diffusion.entropy_bound`."""
    description: str
    """The value met, the limit, and what to do."""


class InvalidRequest(DgemmaError):
    """A request's values are wrong, each named by a violation."""

    def __init__(self, *violations: Violation) -> None:
        super().__init__("; ".join(f"{violation.field}: {violation.description}" for violation in violations))
        self.violations = violations


class UnsupportedRequest(DgemmaError):
    """A request asks, in `field`, for something this bundle or version has not."""

    def __init__(self, field: str, description: str) -> None:
        super().__init__(f"{field}: {description}")
        self.field, self.description = field, description


class ModelNotFound(DgemmaError):
    """A request names a model that is not served."""

    def __init__(self, model: str, served: str) -> None:
        super().__init__(f"model: {model!r} is not served here; use {served!r} or leave the field empty")
        self.model, self.served = model, served


class MessageTooLarge(DgemmaError):
    """A message is larger than the server reads."""

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(f"the message holds {size} bytes, at most {limit} are read; send less at a time")
        self.size, self.limit = size, limit


class QueueFull(DgemmaError):
    """Too many requests wait."""

    def __init__(self, waiting: int, retry_after: float) -> None:
        super().__init__(f"{waiting} requests already wait; try again in {retry_after:.1f} s")
        self.waiting, self.retry_after = waiting, retry_after


class Unauthenticated(DgemmaError):
    """A caller does not show who it is."""


class ClientLimitReached(DgemmaError):
    """A client has, or had of late, as much as it may."""

    def __init__(self, limit: str, value: int, retry_after: float) -> None:
        super().__init__(f"this client's limit of {limit}, {value}, is reached; try again in {retry_after:.1f} s")
        self.limit, self.value, self.retry_after = limit, value, retry_after


class DeadlineTooShort(DgemmaError):
    """A request's deadline passes before it can start or finish."""


class Draining(DgemmaError):
    """The server is shutting down; another one should be asked."""


class Cancelled(DgemmaError):
    """The caller withdrew the request."""


class ReaderTooSlow(DgemmaError):
    """The caller did not read what it had asked for, so that the request was given up."""


class SenderTooSlow(DgemmaError):
    """The caller did not send in time what it had begun to send."""


class EngineFault(DgemmaError):
    """The engine failed while it worked on a request."""

    def __init__(self, correlation_id: str) -> None:
        super().__init__(f"the engine failed on this request; the server's log names it {correlation_id}")
        self.correlation_id = correlation_id
