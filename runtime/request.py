"""A request as the runtime takes it, and the limits of its values."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import GenerationDefaults, ModelFacts
from runtime.errors import InvalidRequest, Violation

T = TypeVar("T")

MAX_SEED = 2**63 - 1
MAX_DENOISING_STEPS = 256
"""For one canvas: more than five times the released default."""
DEFAULT_OUTPUT_TOKENS = 4096
"""Where a request names no limit and the context leaves more: an answer that runs away ends within minutes."""
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-3, 1e3
"""Logits are bounded by the softcap (30): divided by less than 1e-3 their differences drown in float32's spacing, and
above 1e3 every token is as likely as any other."""
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_LENGTH = 256
"""Characters."""


@dataclass(frozen=True)
class SamplingParameters:
    """Everything that decides a generation's tokens beside the prompt."""

    seed: int
    max_output_tokens: int
    max_denoising_steps: int
    entropy_bound: float
    """Nats."""
    t_min: float
    t_max: float
    stability_threshold: int
    """Steps."""
    confidence_threshold: float
    """Nats, mean over the canvas."""
    end_token_guard: bool = True
    """No end token at position 0 of the first canvas: terse prompts else denoise to an empty answer."""
    stop_strings: tuple[str, ...] = ()


@dataclass(frozen=True)
class SamplingOverrides:
    """What a request sets of its sampling parameters; None takes the default."""

    seed: int | None = None
    max_output_tokens: int | None = None
    max_denoising_steps: int | None = None
    entropy_bound: float | None = None
    t_min: float | None = None
    t_max: float | None = None
    stability_threshold: int | None = None
    confidence_threshold: float | None = None
    end_token_guard: bool | None = None
    stop_strings: tuple[str, ...] = ()

    def resolve(self, defaults: GenerationDefaults, room: int) -> SamplingParameters:
        """Fill in the checkpoint's defaults and check every value.

        A seed that is not set is drawn at random; `max_output_tokens` becomes all of `room`, at most
        `DEFAULT_OUTPUT_TOKENS`. A lone bound of the temperature schedule meets the checkpoint's other one.

        Args:
            defaults: the checkpoint's own sampling values.
            room: most tokens that fit behind the prompt, at least 1 (see `output_room`).

        Raises:
            InvalidRequest: one violation for each wrong value; fields are named as in the contract's GenerationOptions.
        """
        parameters = SamplingParameters(
            seed=secrets.randbits(63) if self.seed is None else self.seed,
            max_output_tokens=_or(self.max_output_tokens, min(room, DEFAULT_OUTPUT_TOKENS)),
            max_denoising_steps=_or(self.max_denoising_steps, defaults.max_denoising_steps),
            entropy_bound=_or(self.entropy_bound, defaults.entropy_bound),
            t_min=_or(self.t_min, defaults.t_min),
            t_max=_or(self.t_max, defaults.t_max),
            stability_threshold=_or(self.stability_threshold, defaults.stability_threshold),
            confidence_threshold=_or(self.confidence_threshold, defaults.confidence_threshold),
            end_token_guard=_or(self.end_token_guard, True),
            stop_strings=self.stop_strings,
        )
        violations = tuple(_violations(parameters, room))
        if violations:
            raise InvalidRequest(*violations)
        return parameters


@dataclass(frozen=True)
class GenerationRequest:
    """One answer to generate; checked, so that nothing behind it can refuse its values."""

    model: str
    prompt_ids: NDArray[np.int64]
    """`[n >= 1]`."""
    sampling: SamplingParameters
    drafts: bool = False
    """Whether drafts of the open block are wanted."""
    committed_ids: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """Blocks that an earlier stream of this request has committed, `[blocks * canvas_length]`: the answer goes on."""


def output_room(facts: ModelFacts, prompt_tokens: int, field: str = "prompt") -> int:
    """Most tokens an answer may have: the whole canvases that fit behind the prompt.

    A canvas occupies its whole length whatever is kept of it, so positions that do not hold a whole one are lost.

    Raises:
        InvalidRequest: the prompt is empty or leaves no room for a canvas; the violation names `field`.
    """
    room = (facts.max_position - prompt_tokens) // facts.canvas_length * facts.canvas_length
    if prompt_tokens < 1:
        raise InvalidRequest(Violation(field, "holds no token; give at least one"))
    if room < 1:
        most = facts.max_position - facts.canvas_length
        raise InvalidRequest(Violation(field, f"holds {prompt_tokens} tokens; at most {most} fit, shorten it"))
    return room


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def _violations(parameters: SamplingParameters, room: int) -> Iterator[Violation]:
    ranges: tuple[tuple[str, float, float, float], ...] = (
        ("seed", parameters.seed, 0, MAX_SEED),
        ("max_output_token_count", parameters.max_output_tokens, 1, room),
        ("diffusion.max_denoising_step_count", parameters.max_denoising_steps, 1, MAX_DENOISING_STEPS),
        ("diffusion.entropy_bound", parameters.entropy_bound, 0, math.inf),
        ("diffusion.temperature_min", parameters.t_min, MIN_TEMPERATURE, MAX_TEMPERATURE),
        ("diffusion.temperature_max", parameters.t_max, MIN_TEMPERATURE, MAX_TEMPERATURE),
        ("diffusion.stability_threshold", parameters.stability_threshold, 0, MAX_DENOISING_STEPS),
        ("diffusion.confidence_threshold", parameters.confidence_threshold, 0, math.inf),
    )
    wrong = [
        Violation(name, _range(value, least, most))
        for name, value, least, most in ranges
        if not (math.isfinite(value) and least <= value <= most)
    ]
    yield from wrong
    if not any(violation.field.startswith("diffusion.temperature") for violation in wrong):
        yield from _schedule_violations(parameters)
    yield from _stop_string_violations(parameters.stop_strings)


def _range(value: float, least: float, most: float) -> str:
    limit = f"at least {least} and finite" if most == math.inf else f"from {least} to {most}"
    return f"is {value}; it must be {limit}"


def _schedule_violations(parameters: SamplingParameters) -> Iterator[Violation]:
    if parameters.t_min > parameters.t_max:
        description = f"is {parameters.t_min}; it must not be above temperature_max, {parameters.t_max}"
        yield Violation("diffusion.temperature_min", description)


def _stop_string_violations(stop_strings: tuple[str, ...]) -> Iterator[Violation]:
    if len(stop_strings) > MAX_STOP_STRINGS:
        yield Violation("stop_sequences", f"holds {len(stop_strings)} texts; at most {MAX_STOP_STRINGS} are allowed")
        return  # a message of 4 MB can hold two million of them, which are not looked at
    for index, text in enumerate(stop_strings):
        if not 1 <= len(text) <= MAX_STOP_STRING_LENGTH:
            limit = f"from 1 to {MAX_STOP_STRING_LENGTH} are allowed"
            yield Violation(f"stop_sequences[{index}]", f"holds {len(text)} characters; {limit}")
