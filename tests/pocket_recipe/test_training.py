"""The training loop at a size that a CPU trains in seconds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import torch

from checkpoints.pocket_recipe import checkpoint, tokenizer
from checkpoints.pocket_recipe.batches import Batch, Bucket, Material, make_batch
from checkpoints.pocket_recipe.evaluation import Settings
from checkpoints.pocket_recipe.objective import PROPOSED_SHARE, Belief, _belief, corrupt, draw_candidates, propose
from checkpoints.pocket_recipe.train import Plan, Run, evaluation_model

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


def test_warm_start_begins_where_the_published_weights_are(material: Material, tmp_path: Path) -> None:
    """Catches weights that reach the model and not its average, and momentum of another run."""
    trained, fresh = _run(3), _run(3)
    for batch in _batches(material, 0, 3):
        trained.train_step(batch)
    checkpoint.write(tmp_path, trained.config, trained.averaged.state_dict(), Settings())
    fresh.warm_start(checkpoint.read(tmp_path).state_dict())
    published = evaluation_model(trained).state_dict()
    for model in (fresh.model, fresh.averaged):
        for name, value in model.state_dict().items():
            assert torch.equal(value, published[name]), name
    assert fresh.step == 0
    assert not any(optimizer.state for optimizer in fresh.optimizers)


def test_candidates_replace_what_a_step_would_accept_and_nothing_else() -> None:
    """Catches candidates where the step was unsure, over noise, and in every row."""
    generator = torch.Generator().manual_seed(1)
    clean = torch.full((400, 30), 7)
    noised = corrupt(clean, 4096, generator)
    entropy = torch.full((400, 30), 0.0)
    entropy[:, 10:] = 1.0  # no bound is above
    nines = torch.eye(10)[9].expand(400, 30, 10)
    belief = Belief(torch.empty(0), nines, entropy)
    shown = propose(noised, belief, generator)
    replaced = shown != noised.canvas
    assert torch.equal(shown[noised.noisy], noised.canvas[noised.noisy])
    assert not replaced[:, 10:].any()
    rows = (replaced | noised.noisy)[:, :10].all(1) & ~noised.noisy[:, :10].all(1)
    others = ~replaced.any(1)
    assert torch.equal(rows | others, torch.ones(400, dtype=torch.bool)), "a row shows its candidates or does not"
    eligible = ~noised.noisy[:, :10].all(1)
    # Half of the rows, and 400 of them stray by 5 standard deviations less than once in a million.
    share = rows[eligible].double().mean().item()
    assert abs(share - PROPOSED_SHARE) < 5 * (0.25 / int(eligible.sum())) ** 0.5


def test_candidates_follow_the_distribution() -> None:
    """Catches an inverse of the cumulative distribution that is off by one token."""
    hidden, embedding = torch.zeros(1, 4, 2), torch.zeros(5, 2)
    uniform = torch.tensor([[0.0, 0.19, 0.21, 0.999]])
    belief = _belief(hidden, embedding, torch.ones(1, 1, 1), 30.0, 1.0)
    assert draw_candidates(belief.probabilities, uniform).tolist() == [[0, 0, 1, 4]], "five equal tokens"
    torch.testing.assert_close(belief.entropy, torch.full((1, 4), 5.0).log())


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
