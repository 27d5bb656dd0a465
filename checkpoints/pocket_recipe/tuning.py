"""What sampler settings do to a checkpoint: exact match and steps of the tasks, steps and sense of its prose.

Tasks want a strict sampler, since their answers are wrong or right; prose wants one that accepts many tokens a step,
since none of them is certain. Prose has no right answer: it is judged by the model that told the training stories, as
nats a token, and by how much of it repeats. Texts of that model's own give both figures a measure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from random import Random

import torch
from tokenizers import Tokenizer

from checkpoints.pocket_recipe import prose, stories15m
from checkpoints.pocket_recipe.batches import prompt_text
from checkpoints.pocket_recipe.evaluation import Score, Settings, answer_text, evaluate, generate
from checkpoints.pocket_recipe.stories15m import StoryModel
from checkpoints.pocket_recipe.tasks import TASKS, Example
from export.model import StepModel

PROMISED = tuple(task for task in TASKS if task.promised)


@dataclass(frozen=True)
class Texts:
    """How good some texts are."""

    nats: float
    """Mean loss of a token under the story model."""
    repeated: float
    """Share of runs of three words that the same text has had before."""


@dataclass(frozen=True)
class Outcome:
    """What one choice of settings gives."""

    settings: Settings
    tasks: dict[str, Score]
    prose_steps: float
    prose: Texts


HEADER = f"{'bound':>7} {'temperature':>11} {'confident':>9} {'most':>4}  {'steps':>5} {'nats':>5} {'again':>6}  tasks"


def prose_line(name: str, texts: Texts, steps: str = "") -> str:
    """A row of the table under `HEADER`, without tasks."""
    return f"{name:<34}  {steps:>5} {texts.nats:5.2f} {texts.repeated:6.1%}"


def line(outcome: Outcome) -> str:
    """A row of the table: the settings, prose, then the tasks' exact match, the lowest one's, their steps."""
    s, scores = outcome.settings, outcome.tasks
    temperature = f"{s.t_min:g} to {s.t_max:g}"
    head = f"{s.entropy_bound:7g} {temperature:>11} {s.confidence_threshold:9g} {s.max_denoising_steps:4}"
    text = prose_line(head, outcome.prose, f"{outcome.prose_steps:.1f}")
    if not scores:
        return text
    exact, steps = (sum(getattr(score, name) for score in scores.values()) / len(scores) for name in ("exact", "steps"))
    least = min(scores, key=lambda name: scores[name].exact)
    return f"{text}  {exact:.1%} exact, {least} {scores[least].exact:.1%}, {steps:.2f} steps"


def openings(judge: StoryModel, count: int, seed: int) -> list[Example]:
    """Questions for the first sentences of stories that no training has seen, and those sentences."""
    rng, generator = Random(seed), torch.Generator(judge.weights["norm"].device).manual_seed(seed)
    stories = stories15m.sample(judge, [prose.beginning(rng) for _ in range(count)], generator)
    return [prose.opening(rng, stories) for _ in range(count)]


def grid(bounds: Sequence[float], temperatures: Sequence[tuple[float, float]], confidences: Sequence[float],
         steps: Sequence[int]) -> Iterator[Settings]:  # fmt: skip
    """Every combination."""
    for bound, (t_min, t_max), confidence, most in product(bounds, temperatures, confidences, steps):
        yield replace(
            Settings(),
            entropy_bound=bound,
            t_min=t_min,
            t_max=t_max,
            confidence_threshold=confidence,
            max_denoising_steps=most,
        )


@dataclass(frozen=True)
class Bench:
    """A checkpoint and what it is asked."""

    model: StepModel
    tokenizer: Tokenizer
    judge: StoryModel
    questions: Sequence[Example]
    """For prose."""
    prompts: int
    """Of each promised task."""
    seed: int
    rows: int = 32
    """Denoised at once."""

    def measure(self, settings: Settings) -> Outcome:
        """Ask everything under some settings."""
        asked = PROMISED if self.prompts else ()
        tasks = evaluate(self.model, self.tokenizer, settings, self.prompts, self.seed, self.rows, asked)
        texts, steps = self.write(settings)
        return Outcome(settings, tasks, steps, appraise(self.judge, texts))

    def write(self, settings: Settings) -> tuple[list[str], float]:
        """Answers to the questions for prose, and their mean steps."""
        prefixes = [
            self.tokenizer.encode(prompt_text(question.messages), add_special_tokens=False).ids
            for question in self.questions
        ]
        generator = torch.Generator(self.model.embed_tokens.weight.device).manual_seed(self.seed)
        canvases, steps = generate(self.model, prefixes, settings, generator)
        return [answer_text(self.tokenizer, canvas) for canvas in canvases.tolist()], steps.mean().item()


def appraise(judge: StoryModel, texts: Sequence[str]) -> Texts:
    """Judge some texts together."""
    return Texts(stories15m.loss(judge, texts), _repeated(texts))


def _repeated(texts: Sequence[str]) -> float:
    seen = total = 0
    for text in texts:
        words = text.lower().split()
        runs = list(zip(words, words[1:], words[2:], strict=False))
        seen, total = seen + len(runs) - len(set(runs)), total + len(runs)
    return seen / total if total else 0.0
