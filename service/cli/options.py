"""Options that several commands share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import click

from runtime.request import SamplingOverrides
from service.cli.exits import Failure

Function = TypeVar("Function", bound=Callable[..., Any])

DEFAULT_ADDRESS = "127.0.0.1:50051"

MAX_SECONDS = 10**8
"""Three years."""


class Integer(click.IntRange):
    """An integer that a field of the contract can carry; the range that makes sense is the server's to check."""

    def __init__(self, bits: int) -> None:
        super().__init__(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        self.name = "integer"

    def _describe_range(self) -> str:
        return ""  # what --help would say of the range: nothing that helps


class Seconds(click.FloatRange):
    """A duration; `nan`, `inf` and what overflows gRPC's clock, which click lets pass, are refused."""

    def __init__(self, min_open: bool = False) -> None:
        super().__init__(min=0, min_open=min_open)
        self.name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Check a value."""
        seconds = super().convert(value, param, ctx)
        if not seconds <= MAX_SECONDS:
            self.fail(f"{value} is not a number of seconds up to {MAX_SECONDS}.", param, ctx)
        return seconds


INT32, INT64 = Integer(32), Integer(64)

_SAMPLING = (
    ("seed", "--seed", INT64, "Seed of the random numbers; drawn by the server where it is not given."),
    ("max_output_tokens", "--max-tokens", INT32, "Most tokens to generate."),
    ("max_denoising_steps", "--steps", INT32, "Most denoising steps for one block."),
    ("entropy_bound", "--entropy-bound", float, "Joint entropy that a step may accept, in nats."),
    ("t_min", "--temperature-min", float, "Temperature at the last step."),
    ("t_max", "--temperature-max", float, "Temperature at the first step."),
    ("stability_threshold", "--stability", INT32, "Steps without a change before a block may end early."),
    ("confidence_threshold", "--confidence", float, "Mean entropy below which a block may end early, in nats."),
)


def timeout_option(default: float, what: str = "the answer") -> Callable[[Function], Function]:
    """`--timeout`: seconds until the call's deadline."""
    return click.option(
        "--timeout",
        type=Seconds(min_open=True),
        default=default,
        show_default=True,
        help=f"Seconds to wait for {what} as a whole.",
    )


def sampling_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that make up `sampling`, which the function is given as one argument."""

    @wraps(function)
    def collected(*arguments: Any, stop: tuple[str, ...], end_token_guard: bool | None, **options: Any) -> Any:
        values = {name: options.pop(_parameter(flag)) for name, flag, *_ in _SAMPLING}
        sampling = SamplingOverrides(**values, end_token_guard=end_token_guard, stop_strings=stop)
        return function(*arguments, sampling=sampling, **options)

    wrapped: Callable[..., Any] = click.option(
        "--stop", multiple=True, help="Text at which the answer stops; may be given many times."
    )(collected)
    wrapped = click.option(
        "--end-token-guard/--no-end-token-guard", default=None, help="Forbid an empty answer; on by default."
    )(wrapped)
    for _, flag, kind, text in reversed(_SAMPLING):
        wrapped = click.option(flag, type=kind, default=None, help=text)(wrapped)
    return wrapped


def _parameter(flag: str) -> str:
    """What click calls an option, and its variable in the environment."""
    return flag.removeprefix("--").replace("-", "_")


def prompt_text(argument: str | None) -> str:
    """The prompt from the command line, or from standard input where it is `-` or absent and something is piped."""
    if argument is not None and argument != "-":
        return argument
    if argument is None and sys.stdin.isatty():
        raise click.UsageError("give a prompt, or pipe one in")
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise Failure(f"the prompt on standard input is not UTF-8 at byte {error.start}") from error
