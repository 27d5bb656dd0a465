"""Contract and runtime say the same: every event, every value of every enum, every setting, there and back."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusiongemma.v1 import generation_pb2, options_pb2, prompt_pb2
from runtime.errors import InvalidRequest
from runtime.events import Committed, Draft, Event, Finished, FinishReason, Started, Usage
from runtime.prompt import Message, Role
from runtime.request import SamplingOverrides, SamplingParameters
from runtime.ticket import Priority
from service import mapping
from service.delivery import Delivery

SAMPLING = SamplingParameters(
    seed=2**63 - 1,
    max_output_tokens=17,
    max_denoising_steps=9,
    entropy_bound=0.25,
    t_min=0.3,
    t_max=0.9,
    stability_threshold=2,
    confidence_threshold=0.01,
    end_token_guard=False,
    stop_strings=("a", "é😀"),
)
DELIVERY = Delivery(0.125, Priority.BATCH)
"""No default in it."""
USAGE = Usage(5, 6, 2, 11, 0.5, 0.25, 1.0)


def there_and_back(event: Event) -> Event:
    """The event as a client gets it, through bytes."""
    response = generation_pb2.GenerateResponse(**mapping.event_proto(event, DELIVERY))
    found = mapping.event_of(generation_pb2.GenerateResponse.FromString(response.SerializeToString()))
    assert found is not None
    return found


@pytest.mark.parametrize(
    "event",
    [
        Started("pocket", SAMPLING, 256, 12),
        *(Finished(reason, None, USAGE) for reason in mapping.FINISH_REASONS),
        Finished(FinishReason.STOP_STRING, "é😀", USAGE),
    ],
)
def test_events_without_arrays_survive(event: Event) -> None:
    assert there_and_back(event) == event


def test_a_commit_survives() -> None:
    event = Committed(3, np.array([0, 1, 262_143], np.int64), "text é", 7, True)
    found = there_and_back(event)
    assert isinstance(found, Committed)
    np.testing.assert_array_equal(found.token_ids, event.token_ids)
    assert replace(found, token_ids=event.token_ids) == event


@given(st.integers(1, 300), st.randoms(use_true_random=False))
def test_a_draft_survives(length: int, random: Any) -> None:
    """Bits and tokens exactly, entropies to half a step of the contract, up to where it saturates."""
    rng = np.random.default_rng(random.randrange(2**32))
    entropy = (rng.random(length) * 12).astype(np.float32)
    event = Draft(
        block_index=1,
        step=2,
        token_ids=rng.integers(0, 262_144, length // 2),
        text="text",
        token_text_lengths=(4,),
        accepted=rng.random(length) < 0.5,
        entropy=entropy,
        temperature=0.7,
    )
    message = mapping.event_proto(event, DELIVERY)["draft"]
    assert len(message.accepted_bitmap) == math.ceil(length / 8)
    assert message.mean_entropy == pytest.approx(float(entropy.astype(np.float64).mean()), rel=1e-9)
    found = there_and_back(event)
    assert isinstance(found, Draft)
    np.testing.assert_array_equal(found.token_ids, event.token_ids)
    np.testing.assert_array_equal(found.accepted, event.accepted)
    assert np.abs(found.entropy - np.minimum(entropy, 255 / 32)).max() <= 1 / 64
    assert (found.block_index, found.step, found.text, found.token_text_lengths, found.temperature) == (
        event.block_index,
        event.step,
        event.text,
        event.token_text_lengths,
        event.temperature,
    )


def test_every_value_of_every_enum_is_mapped() -> None:
    """Catches a value that was added on one side alone."""
    reasons = set(mapping.FINISH_REASONS.values()) | {generation_pb2.FINISH_REASON_UNSPECIFIED}
    assert reasons == set(generation_pb2.FinishReason.values())
    assert set(mapping.FINISH_REASONS) | {FinishReason.OTHER} == set(FinishReason)
    assert set(mapping.ROLES.values()) | {prompt_pb2.ROLE_UNSPECIFIED} == set(prompt_pb2.Role.values())
    assert set(mapping.ROLES) == set(Role)
    assert set(mapping.PRIORITIES.values()) | {options_pb2.PRIORITY_UNSPECIFIED} == set(options_pb2.Priority.values())
    assert set(mapping.PRIORITIES) == set(Priority)


@pytest.mark.parametrize("mode", options_pb2.DraftMode.values())
def test_every_draft_mode_is_understood(mode: options_pb2.DraftMode) -> None:
    options = options_pb2.GenerationOptions(drafts=options_pb2.DraftOptions(mode=mode))
    wanted = mapping.delivery_of(options, floor=0.04).draft_interval
    assert wanted == (0.04 if mode == options_pb2.DRAFT_MODE_ON else None)


@pytest.mark.parametrize("priority", options_pb2.Priority.values())
def test_every_priority_is_understood(priority: options_pb2.Priority) -> None:
    options = options_pb2.GenerationOptions(priority=priority)
    wanted = mapping.delivery_of(options, floor=0.0).priority
    assert wanted == (Priority.BATCH if priority == options_pb2.PRIORITY_BATCH else Priority.INTERACTIVE)


def test_what_a_newer_server_sends_is_survived() -> None:
    """An unknown reason is told as such, an unknown kind of event is skipped."""
    newer = generation_pb2.GenerateResponse()
    newer.finished.finish_reason = 99  # type: ignore[assignment]
    found = mapping.event_of(newer)
    assert isinstance(found, Finished)
    assert found.reason is FinishReason.OTHER
    # Field 9 of the oneof, of a kind that does not exist yet.
    assert mapping.event_of(generation_pb2.GenerateResponse.FromString(b"\x4a\x02\x08\x01")) is None


def test_every_setting_survives() -> None:
    """Catches a setting that is not carried over: each is set to a value that is no default."""
    overrides = SamplingOverrides(**{field.name: getattr(SAMPLING, field.name) for field in fields(SAMPLING)})
    sent = mapping.overrides_proto(overrides, DELIVERY)
    received = options_pb2.GenerationOptions.FromString(sent.SerializeToString())
    assert mapping.overrides_of(received) == overrides
    assert mapping.delivery_of(received, floor=0.01) == DELIVERY
    echoed = mapping.options_proto(SAMPLING, DELIVERY)
    assert mapping.delivery_of(echoed, floor=0.01) == DELIVERY
    assert mapping.sampling_of(echoed) == SAMPLING
    assert mapping.overrides_of(echoed) == overrides


def test_settings_that_are_not_given_stay_so() -> None:
    """Catches a default of protobuf taken for a value: an absent temperature is not 0."""
    assert mapping.overrides_of(options_pb2.GenerationOptions()) == SamplingOverrides()
    assert mapping.overrides_of(mapping.overrides_proto(SamplingOverrides(), Delivery())) == SamplingOverrides()


@pytest.mark.parametrize("name", [field.name for field in fields(SamplingOverrides) if field.name != "stop_strings"])
def test_settings_of_zero_are_values(name: str) -> None:
    zero = False if name == "end_token_guard" else 0
    overrides = SamplingOverrides(**{name: zero})
    assert getattr(mapping.overrides_of(mapping.overrides_proto(overrides, Delivery())), name) == zero


@given(st.lists(st.builds(Message, st.sampled_from(Role), st.text()), max_size=5))
def test_messages_survive(messages: list[Message]) -> None:
    """Any text; an empty one only where an answer may have been empty."""
    sent = [mapping.message_proto(message) for message in messages]
    if any(not message.text and message.role is not Role.MODEL for message in messages):
        with pytest.raises(InvalidRequest):
            mapping.messages_of(sent, "messages")
    else:
        assert mapping.messages_of(sent, "messages") == messages


def test_parts_are_joined_with_nothing_between() -> None:
    parts = [prompt_pb2.ContentPart(text=text) for text in ("a", " b", "c")]
    assert mapping.text_of(parts, "parts") == "a bc"


@given(st.floats(0, 1e6))
def test_durations_survive_to_the_nanosecond(seconds: float) -> None:
    assert mapping.seconds_of(mapping.duration_proto(seconds), "x") == pytest.approx(seconds, abs=1e-9, rel=1e-15)
