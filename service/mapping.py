"""The contract's messages to the runtime's values, and back: one function each way for each of them.

Only here do protobuf messages and the runtime meet. What a message alone can tell to be wrong is refused here (a role
that is none, a part without content, a picture); ranges are the runtime's matter (`runtime.request`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from google.protobuf.duration_pb2 import Duration
from numpy.typing import NDArray

from diffusiongemma.v1 import generation_pb2, options_pb2, prompt_pb2
from runtime.bundle import GenerationDefaults
from runtime.errors import InvalidRequest, UnsupportedRequest, Violation
from runtime.events import Committed, Draft, Event, Finished, FinishReason, Started, Usage
from runtime.prompt import Message, Role
from runtime.request import DEFAULT_OUTPUT_TOKENS, SamplingOverrides, SamplingParameters
from runtime.ticket import Priority
from service.delivery import Delivery

ROLES = {
    Role.SYSTEM: prompt_pb2.ROLE_SYSTEM,
    Role.USER: prompt_pb2.ROLE_USER,
    Role.MODEL: prompt_pb2.ROLE_MODEL,
}
PRIORITIES = {
    Priority.INTERACTIVE: options_pb2.PRIORITY_INTERACTIVE,
    Priority.BATCH: options_pb2.PRIORITY_BATCH,
}
FINISH_REASONS = {
    FinishReason.END_TOKEN: generation_pb2.FINISH_REASON_END_TOKEN,
    FinishReason.STOP_STRING: generation_pb2.FINISH_REASON_STOP_SEQUENCE,
    FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
}

MAX_DURATION_SECONDS = 315_576_000_000
"""10,000 years: the most that `google.protobuf.Duration` allows, though its field holds more."""

ENTROPY_STEPS = 32
"""Steps a nat in which `BlockDraft.position_entropies` counts."""


# Prompts


def text_of(parts: Sequence[prompt_pb2.ContentPart], field: str) -> str:
    """The parts' texts, joined.

    Raises:
        InvalidRequest: no part, or one without content; named below `field`.
        UnsupportedRequest: a picture.
    """
    if not parts:
        raise InvalidRequest(Violation(field, "is empty; give at least one part"))
    for index, part in enumerate(parts):
        if part.HasField("image"):
            raise UnsupportedRequest(f"{field}[{index}].image", "this model has no vision; send text alone")
        if not part.text:
            raise InvalidRequest(
                Violation(f"{field}[{index}]", "has no content; give a text of at least one character")
            )
    return "".join(part.text for part in parts)


def messages_of(messages: Sequence[prompt_pb2.Message], field: str) -> list[Message]:
    """The messages with their texts; their order is not looked at.

    Raises:
        InvalidRequest: a role that is none, or a message without content; named below `field`.
        UnsupportedRequest: a picture.
    """
    return [_message_of(message, f"{field}[{index}]") for index, message in enumerate(messages)]


def _message_of(message: prompt_pb2.Message, field: str) -> Message:
    for role, value in ROLES.items():
        if message.role == value:
            # An answer may have been empty, and is then replayed as it was.
            empty = role is Role.MODEL and not message.parts
            return Message(role, "" if empty else text_of(message.parts, f"{field}.parts"))
    known = ", ".join(prompt_pb2.Role.Name(value) for value in ROLES.values())
    raise InvalidRequest(Violation(f"{field}.role", f"is {message.role}; it must be one of {known}"))


def message_proto(message: Message) -> prompt_pb2.Message:
    """A message with one part of text; with none where the text is empty."""
    parts = [prompt_pb2.ContentPart(text=message.text)] if message.text else []
    return prompt_pb2.Message(role=ROLES[message.role], parts=parts)


# Options


def overrides_of(options: options_pb2.GenerationOptions) -> SamplingOverrides:
    """The sampling values that the options set."""
    diffusion = options.diffusion
    return SamplingOverrides(
        seed=options.seed if options.HasField("seed") else None,
        max_output_tokens=options.max_output_token_count if options.HasField("max_output_token_count") else None,
        max_denoising_steps=(
            diffusion.max_denoising_step_count if diffusion.HasField("max_denoising_step_count") else None
        ),
        entropy_bound=diffusion.entropy_bound if diffusion.HasField("entropy_bound") else None,
        t_min=diffusion.temperature_min if diffusion.HasField("temperature_min") else None,
        t_max=diffusion.temperature_max if diffusion.HasField("temperature_max") else None,
        stability_threshold=diffusion.stability_threshold if diffusion.HasField("stability_threshold") else None,
        confidence_threshold=diffusion.confidence_threshold if diffusion.HasField("confidence_threshold") else None,
        end_token_guard=diffusion.end_token_guard if diffusion.HasField("end_token_guard") else None,
        stop_strings=tuple(options.stop_sequences),
    )


def delivery_of(options: options_pb2.GenerationOptions, floor: float) -> Delivery:
    """How the answer is wanted, drafts at most every `floor` seconds.

    Raises:
        InvalidRequest: a mode or priority that is none, or a duration that is negative or out of protobuf's range.
    """
    wanted = options.priority or options_pb2.PRIORITY_INTERACTIVE
    for priority, value in PRIORITIES.items():
        if wanted == value:
            return Delivery(_draft_interval_of(options, floor), priority)
    known = ", ".join(options_pb2.Priority.keys())
    raise InvalidRequest(Violation("priority", f"is {options.priority}; it must be one of {known}"))


def _draft_interval_of(options: options_pb2.GenerationOptions, floor: float) -> float | None:
    drafts = options.drafts
    if drafts.mode not in options_pb2.DraftMode.values():
        known = ", ".join(options_pb2.DraftMode.keys())
        raise InvalidRequest(Violation("drafts.mode", f"is {drafts.mode}; it must be one of {known}"))
    interval = seconds_of(drafts.min_draft_interval, "drafts.min_draft_interval")
    return max(interval, floor) if drafts.mode == options_pb2.DRAFT_MODE_ON else None


def options_proto(sampling: SamplingParameters, delivery: Delivery) -> options_pb2.GenerationOptions:
    """The settings in force, every field set."""
    mode = options_pb2.DRAFT_MODE_OFF if delivery.draft_interval is None else options_pb2.DRAFT_MODE_ON
    drafts = options_pb2.DraftOptions(mode=mode, min_draft_interval=duration_proto(delivery.draft_interval or 0.0))
    return options_pb2.GenerationOptions(
        max_output_token_count=sampling.max_output_tokens,
        seed=sampling.seed,
        diffusion=options_pb2.DiffusionOptions(
            max_denoising_step_count=sampling.max_denoising_steps,
            entropy_bound=sampling.entropy_bound,
            temperature_min=sampling.t_min,
            temperature_max=sampling.t_max,
            stability_threshold=sampling.stability_threshold,
            confidence_threshold=sampling.confidence_threshold,
            end_token_guard=sampling.end_token_guard,
        ),
        stop_sequences=sampling.stop_strings,
        drafts=drafts,
        priority=PRIORITIES[delivery.priority],
    )


def overrides_proto(overrides: SamplingOverrides, delivery: Delivery) -> options_pb2.GenerationOptions:
    """Options that set what `overrides` sets, for an answer that is wanted so."""
    options = options_pb2.GenerationOptions(
        max_output_token_count=overrides.max_output_tokens,
        seed=overrides.seed,
        diffusion=options_pb2.DiffusionOptions(
            max_denoising_step_count=overrides.max_denoising_steps,
            entropy_bound=overrides.entropy_bound,
            temperature_min=overrides.t_min,
            temperature_max=overrides.t_max,
            stability_threshold=overrides.stability_threshold,
            confidence_threshold=overrides.confidence_threshold,
            end_token_guard=overrides.end_token_guard,
        ),
        stop_sequences=overrides.stop_strings,
        priority=PRIORITIES[delivery.priority],
    )
    if delivery.draft_interval is not None:
        options.drafts.mode = options_pb2.DRAFT_MODE_ON
        options.drafts.min_draft_interval.CopyFrom(duration_proto(delivery.draft_interval))
    return options


def sampling_of(options: options_pb2.GenerationOptions) -> SamplingParameters:
    """The settings in force that `options_proto` told."""
    diffusion = options.diffusion
    return SamplingParameters(
        seed=options.seed,
        max_output_tokens=options.max_output_token_count,
        max_denoising_steps=diffusion.max_denoising_step_count,
        entropy_bound=diffusion.entropy_bound,
        t_min=diffusion.temperature_min,
        t_max=diffusion.temperature_max,
        stability_threshold=diffusion.stability_threshold,
        confidence_threshold=diffusion.confidence_threshold,
        end_token_guard=diffusion.end_token_guard,
        stop_strings=tuple(options.stop_sequences),
    )


def defaults_proto(defaults: GenerationDefaults, room: int) -> options_pb2.GenerationOptions:
    """The settings of a generation that names none, where `room` tokens fit; without a seed, which each draws anew."""
    sampling = SamplingOverrides(seed=0).resolve(defaults, min(room, DEFAULT_OUTPUT_TOKENS))
    options = options_proto(sampling, Delivery())
    options.ClearField("seed")
    return options


# Events


def event_proto(event: Event, delivery: Delivery) -> dict[str, Any]:
    """The event as the one field of a response's `oneof event`, ready to be handed to the response's constructor."""
    match event:
        case Started():
            return {"started": _started_proto(event, delivery)}
        case Draft():
            return {"draft": _draft_proto(event)}
        case Committed():
            return {"committed": _committed_proto(event)}
        case Finished():
            return {"finished": _finished_proto(event)}


def event_of(response: generation_pb2.GenerateResponse | generation_pb2.ConverseResponse) -> Event | None:
    """The event of a response; None for a kind that this version does not know, and for a turn's cancellation."""
    match response.WhichOneof("event"):
        case "started":
            return _started_of(response.started)
        case "draft":
            return _draft_of(response.draft)
        case "committed":
            return _committed_of(response.committed)
        case "finished":
            return _finished_of(response.finished)
    return None


def _started_proto(event: Started, delivery: Delivery) -> generation_pb2.GenerationStarted:
    return generation_pb2.GenerationStarted(
        model=event.model,
        options=options_proto(event.sampling, delivery),
        prompt_token_count=event.prompt_token_count,
        canvas_length=event.canvas_length,
    )


def _started_of(message: generation_pb2.GenerationStarted) -> Started:
    return Started(message.model, sampling_of(message.options), message.canvas_length, message.prompt_token_count)


def _draft_proto(event: Draft) -> generation_pb2.BlockDraft:
    entropies = np.clip(np.rint(event.entropy * ENTROPY_STEPS), 0, 255).astype(np.uint8)
    return generation_pb2.BlockDraft(
        block_index=event.block_index,
        step=event.step,
        token_ids=event.token_ids.tolist(),
        text=event.text,
        token_text_lengths=event.token_text_lengths,
        accepted_bitmap=np.packbits(event.accepted, bitorder="little").tobytes(),
        position_entropies=entropies.tobytes(),
        mean_entropy=float(event.entropy.mean(dtype=np.float64)),
        temperature=event.temperature,
    )


def _draft_of(message: generation_pb2.BlockDraft) -> Draft:
    entropy = np.frombuffer(message.position_entropies, np.uint8).astype(np.float32) / np.float32(ENTROPY_STEPS)
    bitmap = np.frombuffer(message.accepted_bitmap, np.uint8)
    return Draft(
        block_index=message.block_index,
        step=message.step,
        token_ids=np.array(message.token_ids, np.int64),
        text=message.text,
        token_text_lengths=tuple(message.token_text_lengths),
        accepted=np.unpackbits(bitmap, count=len(entropy), bitorder="little").astype(np.bool_),
        entropy=entropy,
        temperature=message.temperature,
    )


def _committed_proto(event: Committed) -> generation_pb2.BlockCommitted:
    return generation_pb2.BlockCommitted(
        block_index=event.block_index,
        token_ids=event.token_ids.tolist(),
        text=event.text,
        step_count=event.step_count,
        converged=event.converged,
    )


def _committed_of(message: generation_pb2.BlockCommitted) -> Committed:
    ids: NDArray[np.int64] = np.array(message.token_ids, np.int64)
    return Committed(message.block_index, ids, message.text, message.step_count, message.converged)


def _finished_proto(event: Finished) -> generation_pb2.GenerationFinished:
    usage = event.usage
    return generation_pb2.GenerationFinished(
        finish_reason=FINISH_REASONS[event.reason],
        stop_sequence=event.stop_string or "",
        usage=generation_pb2.Usage(
            prompt_token_count=usage.prompt_tokens,
            output_token_count=usage.output_tokens,
            block_count=usage.blocks,
            denoising_step_count=usage.denoising_steps,
        ),
        timing=generation_pb2.Timing(
            queue_duration=duration_proto(usage.queue_seconds),
            prefill_duration=duration_proto(usage.prefill_seconds),
            denoising_duration=duration_proto(usage.denoise_seconds),
        ),
    )


def _finished_of(message: generation_pb2.GenerationFinished) -> Finished:
    usage, timing = message.usage, message.timing
    reasons = {value: reason for reason, value in FINISH_REASONS.items()}
    return Finished(
        reasons.get(message.finish_reason, FinishReason.OTHER),
        message.stop_sequence or None,
        Usage(
            prompt_tokens=usage.prompt_token_count,
            output_tokens=usage.output_token_count,
            blocks=usage.block_count,
            denoising_steps=usage.denoising_step_count,
            queue_seconds=timing.queue_duration.ToNanoseconds() / 1e9,
            prefill_seconds=timing.prefill_duration.ToNanoseconds() / 1e9,
            denoise_seconds=timing.denoising_duration.ToNanoseconds() / 1e9,
        ),
    )


# Durations


def duration_proto(seconds: float) -> Duration:
    """Seconds as a Duration, to the nanosecond."""
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


def seconds_of(duration: Duration, field: str) -> float:
    """A duration of a request in seconds.

    Raises:
        InvalidRequest: it is negative, or out of protobuf's range; names `field`.
    """
    if not 0 <= duration.seconds <= MAX_DURATION_SECONDS or not 0 <= duration.nanos < 1_000_000_000:
        met = f"is {duration.seconds} seconds and {duration.nanos} nanoseconds"
        limit = f"from 0 to {MAX_DURATION_SECONDS} seconds, with fewer than 10^9 nanoseconds"
        raise InvalidRequest(Violation(field, f"{met}; it must be {limit}"))
    return duration.seconds + duration.nanos / 1e9
