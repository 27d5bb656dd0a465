"""What is measured of generations that ended, and what it says of the next one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from runtime.events import Usage
from runtime.request import SamplingParameters
from service.pace import REMEMBERED, REMEMBERED_SECONDS, Pace, fewest_steps

SAMPLING = SamplingParameters(
    seed=1,
    max_output_tokens=100,
    max_denoising_steps=48,
    entropy_bound=0.1,
    t_min=0.4,
    t_max=0.8,
    stability_threshold=1,
    confidence_threshold=0.005,
)


def usage(steps: int, seconds: float) -> Usage:
    return Usage(10, 100, 1, steps, 0.0, 5.0, seconds)


def test_nothing_is_refused_before_anything_was_measured() -> None:
    pace = Pace()
    assert pace.least_seconds(SAMPLING) == 0
    pace.learn(usage(0, 1.0))  # resumed behind its last block, which tells nothing of steps
    assert pace.least_seconds(SAMPLING) == 0


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        pytest.param({}, 2, id="settled-at-the-second-step"),
        pytest.param({"stability_threshold": 3}, 4, id="must-stay-longer"),
        pytest.param({"stability_threshold": 0}, 1, id="need-not-stay"),
        pytest.param({"max_denoising_steps": 1}, 1, id="may-make-one"),
        pytest.param({"confidence_threshold": 0.0}, 48, id="never-sure"),
    ],
)
def test_the_fewest_steps_of_a_block(changes: dict[str, float], steps: int) -> None:
    """As the diffusion loop ends it; catches a bound above what a request can need, which refuses what would go."""
    assert fewest_steps(replace(SAMPLING, **changes)) == steps  # type: ignore[arg-type]


def test_the_fastest_of_late_counts() -> None:
    """A crowd makes steps slow; when it has gone, its measurements are soon gone too."""
    pace = Pace()
    for seconds in (10.0, 2.0, 4.0):
        pace.learn(usage(10, seconds))
    assert pace.least_seconds(SAMPLING) == pytest.approx(2 * 0.2)
    for _ in range(REMEMBERED):
        pace.learn(usage(10, 30.0))
    assert pace.least_seconds(SAMPLING) == pytest.approx(2 * 3.0)


def test_what_has_everybody_refused_is_forgotten() -> None:
    """Catches an idle server that refuses for ever, by steps of a crowd that left: nothing new is measured."""
    now = 0.0
    pace = Pace(lambda: now)
    pace.learn(usage(10, 100.0))
    now = REMEMBERED_SECONDS
    assert pace.least_seconds(SAMPLING) == pytest.approx(2 * 10.0)
    now += 1.0
    assert pace.least_seconds(SAMPLING) == 0
