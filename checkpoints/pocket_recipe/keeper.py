"""What happens between training steps: the state is saved every minute, the checkpoint written and evaluated."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer

from checkpoints.pocket_recipe import checkpoint
from checkpoints.pocket_recipe.evaluation import Score, Settings, evaluate, report
from checkpoints.pocket_recipe.train import Run, evaluation_model

_EVALUATION_SEED = 20_261_123


class Keeper:
    """Called after every step."""

    def __init__(self, state: Path, out: Path, tokenizer: Tokenizer, every_minutes: float, prompts: int) -> None:
        self.state, self.out, self.tokenizer = state, out, tokenizer
        self.every, self.prompts = 60 * every_minutes, prompts
        self.saved = self.published = time.monotonic()

    def __call__(self, run: Run) -> None:
        """Save or publish when it is time to."""
        now = time.monotonic()
        if now - self.saved > 60:
            run.save(self.state)
            self.saved = time.monotonic()
        if now - self.published > self.every:
            self.publish(run)

    def publish(self, run: Run) -> None:
        """Write the checkpoint from the averaged weights, and its exact match and steps a canvas by task."""
        began = time.monotonic()
        settings = Settings()
        checkpoint.write(self.out, run.config, run.averaged.state_dict(), settings)
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.device.type == "cuda"):
            scores = evaluate(evaluation_model(run), self.tokenizer, settings, self.prompts, _EVALUATION_SEED)
        summary = {"step": run.step, "trained_seconds": run.seconds} | report(scores, settings)
        (self.state.parent / "evaluation.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        print(table(scores), f"evaluated at step {run.step} in {time.monotonic() - began:.0f} s", sep="\n", flush=True)
        self.published = time.monotonic()


def table(scores: dict[str, Score]) -> str:
    """The scores for a terminal: exact match, steps a canvas, a wrong answer."""
    lines = [
        f"{name:<15} {score.exact:7.1%} {score.steps:5.1f}  {score.wrong[:1] or ''}" for name, score in scores.items()
    ]
    count = len(scores)
    exact, steps = (sum(getattr(score, name) for score in scores.values()) / count for name in ("exact", "steps"))
    return "\n".join([*lines, f"{'mean':<15} {exact:7.1%} {steps:5.1f}"])
