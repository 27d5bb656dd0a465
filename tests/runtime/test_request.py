"""Sampling parameters: what takes a default, and one violation for each wrong value."""

from __future__ import annotations

import math
from typing import Any

import pytest

from runtime.bundle import GenerationDefaults, ModelFacts
from runtime.errors import InvalidRequest
from runtime.request import (
    DEFAULT_OUTPUT_TOKENS,
    MAX_DENOISING_STEPS,
    MAX_SEED,
    MAX_STOP_STRING_LENGTH,
    MAX_STOP_STRINGS,
    SamplingOverrides,
    output_room,
)

DEFAULTS = GenerationDefaults(
    max_denoising_steps=48,
    entropy_bound=0.1,
    t_min=0.4,
    t_max=0.8,
    stability_threshold=1,
    confidence_threshold=0.005,
    end_token_ids=(1,),
    pad_token_id=0,
    bos_token_id=2,
)
FACTS = ModelFacts("m", 61, 8, canvas_length=256, sliding_window=8, max_position=1000, layers=())
ROOM = 512


def test_defaults_are_the_checkpoints() -> None:
    parameters = SamplingOverrides(seed=7).resolve(DEFAULTS, ROOM)
    assert (parameters.seed, parameters.max_output_tokens) == (7, ROOM)
    for name in ("max_denoising_steps", "entropy_bound", "t_min", "t_max", "stability_threshold"):
        assert getattr(parameters, name) == getattr(DEFAULTS, name)
    assert parameters.confidence_threshold == DEFAULTS.confidence_threshold
    assert (parameters.end_token_guard, parameters.stop_strings) == (True, ())
    assert SamplingOverrides().resolve(DEFAULTS, 10**6).max_output_tokens == DEFAULT_OUTPUT_TOKENS


def test_absent_seed_is_drawn() -> None:
    seeds = {SamplingOverrides().resolve(DEFAULTS, ROOM).seed for _ in range(8)}
    assert len(seeds) == 8
    assert all(0 <= seed <= MAX_SEED for seed in seeds)


def test_falsy_values_are_values() -> None:
    """0 and False must not fall back to the defaults."""
    overrides = SamplingOverrides(
        seed=0, entropy_bound=0.0, stability_threshold=0, confidence_threshold=0.0, end_token_guard=False
    )
    parameters = overrides.resolve(replace_defaults(stability_threshold=3), ROOM)
    assert (parameters.seed, parameters.entropy_bound, parameters.stability_threshold) == (0, 0.0, 0)
    assert (parameters.confidence_threshold, parameters.end_token_guard) == (0.0, False)


def replace_defaults(**values: Any) -> GenerationDefaults:
    names = DEFAULTS.__struct_fields__
    return GenerationDefaults(**({name: getattr(DEFAULTS, name) for name in names} | values))


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ({"seed": -1}, "seed"),
        ({"seed": MAX_SEED + 1}, "seed"),
        ({"max_output_tokens": 0}, "max_output_token_count"),
        ({"max_output_tokens": ROOM + 1}, "max_output_token_count"),
        ({"max_denoising_steps": 0}, "diffusion.max_denoising_step_count"),
        ({"max_denoising_steps": MAX_DENOISING_STEPS + 1}, "diffusion.max_denoising_step_count"),
        ({"entropy_bound": -0.1}, "diffusion.entropy_bound"),
        ({"entropy_bound": math.inf}, "diffusion.entropy_bound"),
        ({"entropy_bound": math.nan}, "diffusion.entropy_bound"),
        ({"t_min": 0.0}, "diffusion.temperature_min"),
        ({"t_min": math.nan}, "diffusion.temperature_min"),
        ({"t_max": math.inf}, "diffusion.temperature_max"),
        ({"t_min": 0.9}, "diffusion.temperature_min"),  # above the checkpoint's t_max
        ({"t_max": 0.3}, "diffusion.temperature_min"),  # below the checkpoint's t_min
        ({"stability_threshold": -1}, "diffusion.stability_threshold"),
        ({"stability_threshold": MAX_DENOISING_STEPS + 1}, "diffusion.stability_threshold"),
        ({"confidence_threshold": -1.0}, "diffusion.confidence_threshold"),
        ({"confidence_threshold": math.nan}, "diffusion.confidence_threshold"),
        ({"stop_strings": ("a", "")}, "stop_sequences[1]"),
        ({"stop_strings": ("x" * (MAX_STOP_STRING_LENGTH + 1),)}, "stop_sequences[0]"),
        ({"stop_strings": ("x",) * (MAX_STOP_STRINGS + 1)}, "stop_sequences"),
        ({"stop_strings": ("",) * 100_000}, "stop_sequences"),  # one violation, not one for each of them
    ],
)
def test_wrong_value_is_named(overrides: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingOverrides(**overrides).resolve(DEFAULTS, ROOM)
    assert [violation.field for violation in caught.value.violations] == [field]


@pytest.mark.parametrize(
    "overrides",
    [
        {"seed": MAX_SEED, "max_output_tokens": ROOM, "max_denoising_steps": MAX_DENOISING_STEPS},
        {"t_min": 0.5, "t_max": 0.5},  # a level schedule
        {"stop_strings": ("x" * MAX_STOP_STRING_LENGTH,) * MAX_STOP_STRINGS},
        {"stability_threshold": MAX_DENOISING_STEPS},
    ],
)
def test_limits_belong_to_the_range(overrides: dict[str, Any]) -> None:
    parameters = SamplingOverrides(**overrides).resolve(DEFAULTS, ROOM)
    assert all(getattr(parameters, name) == value for name, value in overrides.items())


def test_all_wrong_values_come_in_one_error() -> None:
    wrong = SamplingOverrides(seed=-1, entropy_bound=math.nan, t_min=-1.0, stop_strings=("",))
    with pytest.raises(InvalidRequest) as caught:
        wrong.resolve(DEFAULTS, ROOM)
    fields = {violation.field for violation in caught.value.violations}
    assert fields == {"seed", "diffusion.entropy_bound", "diffusion.temperature_min", "stop_sequences[0]"}
    assert "nan" in str(caught.value)


@pytest.mark.parametrize(("prompt_tokens", "room"), [(1, 768), (232, 768), (233, 512), (744, 256)])
def test_room_is_whole_canvases(prompt_tokens: int, room: int) -> None:
    """744 + 256 is the last that fits into 1000; 233 leaves 767, one token short of three canvases."""
    assert output_room(FACTS, prompt_tokens) == room


@pytest.mark.parametrize(
    ("prompt_tokens", "words"), [(0, "at least one"), (745, "at most 744"), (10**6, "at most 744")]
)
def test_prompt_without_room_is_refused(prompt_tokens: int, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        output_room(FACTS, prompt_tokens, field="token_ids.ids")
    assert caught.value.violations[0].field == "token_ids.ids"
