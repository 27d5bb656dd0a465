"""The training loop at a size that a CPU trains in seconds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import torch

from checkpoints.pocket_recipe import tokenizer
from checkpoints.pocket_recipe.batches import Batch, Bucket, Material, make_batch
from checkpoints.pocket_recipe.train import Plan, Run

POCKET = Path(__file__).parents[2] / "checkpoints" / "pocket"
BUCKET = Bucket("short", 4, 48, 24, {"small_talk": 1.0})


@pytest.fixture(scope="module")
def material() -> Material:
    return Material(tokenizer.load(POCKET), [], [])


def _run(steps: int) -> Run:
    return Run(Plan(steps=steps, tiny=True, warm_up=5, learning_rate=6e-3), torch.device("cpu"))


def _batches(material: Material, first: int, last: int) -> Iterator[Batch]:
    return (make_batch(material, BUCKET, Random(step)) for step in range(first, last))


def test_loss_falls_on_a_few_memorable_answers(material: Material) -> None:
    """Catches a gradient that does not flow, noise that leaves no signal and an optimizer that climbs."""
    run = _run(60)
    losses = [run.train_step(batch).rows.mean().item() for batch in _batches(material, 0, 60)]
    # ln 4096 = 8.3 nats is chance; five fixed replies are learned far below half of it or training is broken.
    assert losses[0] > 6.0
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0]


def test_resumed_run_continues_as_though_it_had_not_stopped(material: Material, tmp_path: Path) -> None:
    """Catches state that is not saved: momentum, moments, the average, the step that seeds the noise."""
    straight, stopped, resumed = _run(6), _run(6), _run(6)
    for batch in _batches(material, 0, 6):
        straight.train_step(batch)
    for batch in _batches(material, 0, 3):
        stopped.train_step(batch)
    stopped.save(tmp_path / "state.pt")
    resumed.resume(tmp_path / "state.pt")
    for batch in _batches(material, 3, 6):
        resumed.train_step(batch)
    assert resumed.step == straight.step == 6
    for (name, ours), theirs in zip(
        resumed.averaged.state_dict().items(), straight.averaged.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name
