"""The recipe's batched sampler against the runtime's, and the figures that settings are chosen by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from checkpoints.pocket_recipe import checkpoint, stories15m, tokenizer, tuning
from checkpoints.pocket_recipe.batches import prompt_text
from checkpoints.pocket_recipe.evaluation import Score, Settings, _accepted, answer_text, generate
from checkpoints.pocket_recipe.tasks import TASKS, Example
from runtime.diffusion import accept, temperature_at

POCKET = Path(__file__).parents[2] / "checkpoints" / "pocket"


def test_acceptance_is_the_runtimes() -> None:
    """Catches a sum that counts the position itself, and one in the order of positions."""
    generator = torch.Generator().manual_seed(1)
    # Eighths add up without rounding, so that both sums are the same numbers. No two of a row are equal.
    entropy = torch.stack([torch.randperm(64, generator=generator) for _ in range(20)]).float() / 8
    for bound in (0.0, 0.125, 3.0, 1e9):
        expected = np.stack([accept(row.numpy(), bound) for row in entropy])
        assert np.array_equal(_accepted(entropy, bound).numpy(), expected)


@pytest.mark.parametrize("most", [1, 7, 48])
def test_temperatures_are_the_runtimes(most: int) -> None:
    """Catches a schedule that begins a step late, and ends of the range swapped."""
    settings = replace(Settings(), t_min=0.1, t_max=0.9, max_denoising_steps=most)
    sampling = SimpleNamespace(t_min=0.1, t_max=0.9, max_denoising_steps=most)
    for step in range(1, most + 1):
        theirs = temperature_at(most - step + 1, sampling)  # type: ignore[arg-type]
        # The runtime's is float32, whose numbers below 1 lie 6e-8 apart.
        assert abs(settings.temperature(step) - theirs) < 2e-7


def test_rows_that_stop_leave_the_others_as_they_were() -> None:
    """Catches a row that goes on with another one's prefix or canvas, and steps counted for the whole batch."""
    tokens = tokenizer.load(POCKET)
    prompts = [
        "Spell 742.",
        "Write two sentences about a dog.",
        "Reverse the digits 90417.",
        "Write in upper case: red cat",
    ]
    prefixes = [
        tokens.encode(prompt_text(({"role": "user", "content": prompt},)), add_special_tokens=False).ids
        for prompt in prompts
    ]
    settings = replace(Settings(), max_denoising_steps=6)
    canvases, steps = generate(checkpoint.read(POCKET), prefixes, settings, torch.Generator().manual_seed(1))
    answers = [answer_text(tokens, canvas) for canvas in canvases.tolist()]
    assert (answers[0], answers[2], answers[3]) == ("seven hundred forty-two", "71409", "RED CAT")
    assert steps.tolist() == [2, 6, 2, 2]


@pytest.mark.parametrize(
    ("texts", "repeated"),
    [
        ([], 0.0),
        (["too short"], 0.0),
        (["a b c a b c"], 1 / 4),
        (["The cat sat.", "The cat sat."], 0.0),
        (["no no no no no"], 2 / 3),
    ],
)
def test_repeated_runs_are_counted_within_a_text(texts: list[str], repeated: float) -> None:
    """Catches runs counted across texts, first occurrences counted, and a division by none."""
    assert tuning._repeated(texts) == pytest.approx(repeated)


def test_grid_has_every_combination_once() -> None:
    """Catches a setting that does not reach the sampler."""
    settings = list(tuning.grid([0.1, 0.2], [(0.1, 0.3), (0.4, 0.8)], [1e-3], [16, 48]))
    rows = {(s.entropy_bound, s.t_min, s.t_max, s.confidence_threshold, s.max_denoising_steps) for s in settings}
    assert rows == {
        (bound, *temperatures, 1e-3, most)
        for bound in (0.1, 0.2)
        for temperatures in ((0.1, 0.3), (0.4, 0.8))
        for most in (16, 48)
    }
    assert len(settings) == 8


def test_line_tells_the_weakest_task() -> None:
    """Catches the strongest in its place, and means over prompts of different tasks."""
    tasks = {"add": Score(4, 1.0, 2.0, ()), "sort_words": Score(4, 0.5, 3.0, ())}
    outcome = tuning.Outcome(Settings(), tasks, 12.0, tuning.Texts(1.5, 0.01))
    assert tuning.line(outcome).endswith("12.0  1.50   1.0%  75.0% exact, sort_words 50.0%, 2.50 steps")


def test_measure_asks_the_promised_tasks_and_the_questions_for_prose() -> None:
    """Catches settings that do not reach the sampler, tasks nobody promised, and an empty list of them."""
    model = checkpoint.build_model(checkpoint.hugging_face_config(tiny=True))
    checkpoint.initialize(model, torch.Generator().manual_seed(1))
    judged: list[str] = []

    def judge(_: object, texts: Sequence[str]) -> float:
        judged.extend(texts)
        return 2.5

    questions = [Example(({"role": "user", "content": "Write one sentence about a cat."},), "", "")] * 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stories15m, "loss", judge)
        bench = tuning.Bench(model, tokenizer.load(POCKET), None, questions, 1, seed=1)  # type: ignore[arg-type]
        outcome = bench.measure(replace(Settings(), max_denoising_steps=1))
        alone = replace(bench, prompts=0).measure(replace(Settings(), max_denoising_steps=1))
    assert outcome.tasks.keys() == {task.name for task in TASKS if task.promised}
    assert {score.steps for score in outcome.tasks.values()} == {1.0}
    assert (outcome.prose_steps, outcome.prose.nats, alone.tasks) == (1.0, 2.5, {})
    assert len(judged) == 6
