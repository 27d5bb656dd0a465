"""The training loop: resumes where it was stopped, saves as it goes, and keeps to a budget of minutes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from checkpoints.pocket_recipe.batches import BUCKETS, SOURCES, Batch, Batches, Bucket, Material
from checkpoints.pocket_recipe.checkpoint import build_model, hugging_face_config, initialize
from checkpoints.pocket_recipe.muon import Muon, optimizers, orthogonalize
from checkpoints.pocket_recipe.objective import Clean, Losses, Objective, _belief, _head_loss
from export.model import StepModel


@dataclass(frozen=True)
class Plan:
    """What a run does. Its length is in steps, which makes a run repeatable, or in seconds, which makes it punctual."""

    steps: int | None = None
    seconds: float | None = None
    learning_rate: float = 1.5e-3
    warm_up: int = 200
    """Steps."""
    decay_share: float = 0.45
    """The last part of the run, over which the learning rate falls to zero."""
    average: float = 0.998
    """Decay of the weights' moving average, which is what is exported."""
    seed: int = 1
    tiny: bool = False

    def progress(self, step: int, seconds: float) -> float:
        """How much of the run is done, 0 to 1."""
        if self.steps is not None:
            return step / self.steps
        assert self.seconds is not None
        return min(1.0, seconds / self.seconds)

    def rate(self, step: int, progress: float) -> float:
        """Learning rate of a step: warm-up, constant, linear decay (Hu et al. 2024)."""
        return self.learning_rate * max(0.0, min(1.0, (step + 1) / self.warm_up, (1 - progress) / self.decay_share))

    def shares(self, progress: float) -> dict[str, float]:
        """Shares of the buckets: mostly short canvases first, mostly full ones while the rate decays."""
        if progress < 1 - self.decay_share:
            return {"short": 0.56, "full": 0.4, "continued": 0.04}
        return {"short": 0.33, "full": 0.61, "continued": 0.06}


def buckets(tiny: bool) -> dict[str, Bucket]:
    """The batch shapes, with a few rows each for tests of the recipe."""
    if not tiny:
        return BUCKETS
    return {name: Bucket(name, 4, bucket.prefix, bucket.canvas, bucket.shares) for name, bucket in BUCKETS.items()}


class Run:
    """Model, moving average, optimizers and step; what a saved state holds."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.plan, self.device, self.step, self.seconds = plan, device, 0, 0.0
        self.config = hugging_face_config(plan.tiny)
        self.model = build_model(self.config)
        initialize(self.model, torch.Generator().manual_seed(plan.seed))
        self.model.to(device)
        self.averaged = build_model(self.config).to(device)
        self.averaged.load_state_dict(self.model.state_dict())
        self.optimizers = optimizers(self.model)
        self.objective = Objective(self.model)
        # Shared with the processes that make batches.
        self.shared_progress = torch.zeros(()).share_memory_()  # type: ignore[no-untyped-call]

    def warm_start(self, weights: dict[str, Tensor]) -> None:
        """Begin with weights of an earlier run, as published; steps, rates and optimizers begin anew."""
        for model in (self.model, self.averaged):
            model.load_state_dict(weights)

    @property
    def progress(self) -> float:
        """How much of the plan is done, 0 to 1."""
        return self.plan.progress(self.step, self.seconds)

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        return self.plan.rate(self.step, self.progress)

    def compile(self) -> None:
        """Compile layers one by one: six share two graphs, so that starting takes seconds instead of minutes."""
        torch._dynamo.config.recompile_limit = 64
        for layer in self.model.layers:
            layer.compile(dynamic=False)
        self.objective = Objective(
            self.model, torch.compile(_head_loss, dynamic=False), torch.compile(_belief, dynamic=False)
        )
        for optimizer in self.optimizers:
            if isinstance(optimizer, Muon):
                optimizer.orthogonalize = torch.compile(orthogonalize, dynamic=False)

    def train_step(self, batch: Batch) -> Losses:
        """One optimizer step; its randomness follows from the seed and the step alone."""
        generator = torch.Generator(self.device).manual_seed(self.plan.seed * 1_000_003 + self.step)
        clean = Clean(*(self._on_device(array) for array in (batch.prefix, batch.length, batch.canvas)))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            losses = self.objective(clean, generator, self_condition=self.step % 2 == 1)
        losses.total.backward()  # type: ignore[no-untyped-call]
        self._update()
        self.step += 1
        return losses

    def _on_device(self, array: Any) -> Tensor:
        tensor = torch.from_numpy(np.asarray(array))
        return tensor.to(self.device, non_blocking=True).long()

    def _update(self) -> None:
        parameters: list[Tensor] = list(self.model.parameters())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.rate * group["share"]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(self.plan.average, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            averaged: list[Tensor] = list(self.averaged.parameters())
            torch._foreach_lerp_(averaged, parameters, 1 - decay)

    def save(self, path: Path) -> None:
        """Write the state; a reader sees the old one or the new one whole."""
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        unfinished = path.with_suffix(".unfinished")
        torch.save(state, unfinished)
        os.replace(unfinished, path)

    def resume(self, path: Path) -> None:
        """Carry on from a saved state."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.step, self.seconds = state["step"], state["seconds"]
        self.model.load_state_dict(state["model"])
        self.averaged.load_state_dict(state["averaged"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def loader(run: Run, material: Material, workers: int) -> Iterator[tuple[str, Batch]]:
    """Batches from the run's step on, made ahead of time by `workers` processes."""
    plan, progress = run.plan, run.shared_progress

    def shares(step: int) -> dict[str, float]:
        return plan.shares(plan.progress(step, 0.0) if plan.steps else progress.item())

    dataset = Batches(material, buckets(plan.tiny), shares, plan.seed)
    options: dict[str, Any] = {"prefetch_factor": 6, "multiprocessing_context": "fork"} if workers else {}
    steps: Any = range(run.step, plan.steps or 1_000_000)
    # Arrays travel as they are: collating would copy them once more.
    return iter(DataLoader(dataset, batch_size=None, sampler=steps, num_workers=workers, collate_fn=_as_is, **options))  # type: ignore[arg-type]


def _as_is(item: Any) -> Any:
    return item


class Meter:
    """Mean losses by source and throughput since the last report."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.sums = torch.zeros(len(SOURCES), 2, device=self.device)
        self.next_token, self.steps, self.waited, self.began = (
            torch.zeros((), device=self.device),
            0,
            0.0,
            time.monotonic(),
        )

    def add(self, losses: Losses, sources: Any, waited: float) -> None:
        """Count one step; nothing here waits for the device."""
        index = torch.from_numpy(sources).to(self.device, non_blocking=True)
        self.sums.index_add_(0, index, torch.stack((losses.rows, torch.ones_like(losses.rows)), 1).float())
        self.next_token += losses.next_token
        self.steps += 1
        self.waited += waited

    def line(self, step: int, rate: float) -> str:
        """One line of the log."""
        totals, counts = self.sums.T.tolist()
        means = (
            f"{name} {total / count:.3f}" for name, total, count in zip(SOURCES, totals, counts, strict=True) if count
        )
        seconds = time.monotonic() - self.began
        speed = (
            f"{self.steps / seconds:.2f} steps/s {sum(counts) / seconds:.0f} rows/s waited {self.waited / seconds:.0%}"
        )
        return f"step {step} lr {rate:.2e} {speed} next {self.next_token.item() / self.steps:.3f} | {' '.join(means)}"


def train(run: Run, source: Iterator[tuple[str, Batch]], deadline: float, after_step: Callable[[Run], None]) -> None:
    """Train until the plan is done or `time.monotonic()` passes the deadline."""
    meter = Meter(run.device)
    while run.progress < 1 and time.monotonic() < deadline:
        asked = time.monotonic()
        name, batch = next(source)
        fetched = time.monotonic()
        with torch.compiler.set_stance("default" if BUCKETS[name].compiled else "force_eager"):
            losses = run.train_step(batch)
        meter.add(losses, batch.sources, fetched - asked)
        if run.step % 100 == 0 or run.plan.tiny:
            print(meter.line(run.step, run.rate), flush=True)
            meter.reset()
        run.seconds += time.monotonic() - asked
        run.shared_progress.fill_(run.progress)
        after_step(run)


def evaluation_model(run: Run) -> StepModel:
    """The averaged weights as the checkpoint stores them, rounded to bfloat16."""
    model = build_model(run.config).to(run.device)
    rounded = {name: value.bfloat16().float() for name, value in run.averaged.state_dict().items()}
    model.load_state_dict(rounded)
    return model
