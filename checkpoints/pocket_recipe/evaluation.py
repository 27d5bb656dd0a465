"""Measures exact match and steps a canvas on held-out prompts: the reference's sampler, batched, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from random import Random

import torch
from tokenizers import Tokenizer
from torch import Tensor

from checkpoints.pocket_recipe.batches import CANVAS, prompt_text
from checkpoints.pocket_recipe.passes import Prefix, denoise, encode
from checkpoints.pocket_recipe.tasks import TASKS, Example, Task, correct, draw
from checkpoints.pocket_recipe.tokenizer import END_TOKENS
from export.model import StepModel
from plugins_trt.canvas_readout.reference import canvas_readout


@dataclass(frozen=True)
class Settings:
    """The sampler's settings under the names of `generation_config.json`.

    The defaults are the pocket's, chosen with the recipe's `tune`. Compared with the released model's (0.1 nats, 0.4 to
    0.8, 0.005) candidates are drawn close to the argmax and fewer are accepted together, for the pocket seldom takes
    back what it has accepted.
    """

    max_denoising_steps: int = 48
    entropy_bound: float = 0.02
    t_min: float = 0.05
    t_max: float = 0.2
    stability_threshold: int = 1
    confidence_threshold: float = 1e-3

    def temperature(self, step: int) -> float:
        """What the logits of a step, from 1, are divided by."""
        remaining = (self.max_denoising_steps - step + 1) / self.max_denoising_steps
        return self.t_min + (self.t_max - self.t_min) * remaining


@dataclass(frozen=True)
class Score:
    """Of one task."""

    prompts: int
    exact: float
    steps: float
    wrong: tuple[tuple[str, str, str], ...]
    """A few `(prompt, expected, answer)`."""


@torch.inference_mode()
def generate(
    model: StepModel, prefixes: list[list[int]], settings: Settings, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Denoise one canvas for each prefix: the argmax canvases `[B, 256]` and the steps each took, `[B]`.

    A row that has stopped leaves the batch, so that a slow one does not keep the others busy.
    """
    device, B = model.embed_tokens.weight.device, len(prefixes)
    prefix, rows = _encode(model, prefixes, device), torch.arange(B, device=device)
    done, steps = torch.zeros(B, CANVAS, dtype=torch.int64, device=device), torch.zeros(B, device=device)
    canvas, best, soft = _noise(model, B, generator), torch.full((B, CANVAS), -1, device=device), None
    for step in range(1, settings.max_denoising_steps + 1):
        temperature = settings.temperature(step)
        argmax, candidate, entropy, soft = _read_out(model, canvas, prefix, soft, temperature, generator)
        done[rows], steps[rows] = argmax, float(step)
        left = ~((argmax == best).all(1) & (entropy.mean(1) < settings.confidence_threshold))
        if not left.any():
            break
        canvas = torch.where(_accepted(entropy, settings.entropy_bound), candidate, _noise(model, len(rows), generator))
        rows, canvas, best, soft, prefix = rows[left], canvas[left], argmax[left], soft[left], prefix.select(left)
    return done, steps


def _noise(model: StepModel, rows: int, generator: torch.Generator) -> Tensor:
    size = (rows, CANVAS)
    return torch.randint(model.config.vocab_size, size, generator=generator, device=model.embed_tokens.weight.device)


def _read_out(
    model: StepModel,
    canvas: Tensor,
    prefix: Prefix,
    soft: Tensor | None,
    temperature: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One denoising step's argmax, candidates, entropies and soft embeddings."""
    R, device, config = len(canvas), canvas.device, model.config
    # As in the service, an answer does not begin with its end.
    guard, guarded = torch.ones(R, dtype=torch.bool, device=device), torch.tensor(END_TOKENS, device=device)
    uniform = torch.rand(canvas.shape, generator=generator, device=device)
    hidden = denoise(model, canvas, prefix, soft)
    return canvas_readout(
        hidden,
        model.embed_tokens.weight,
        torch.full((R,), temperature, device=device),
        uniform,
        guard,
        guarded,
        config.final_logit_softcap,
        config.embedding_scale,
    )


def _encode(model: StepModel, prefixes: list[list[int]], device: torch.device) -> Prefix:
    length = torch.tensor([len(prefix) for prefix in prefixes], device=device)
    tokens = torch.zeros(len(prefixes), -(-int(length.max()) // 16) * 16, dtype=torch.int64)
    for row, prefix in zip(tokens, prefixes, strict=True):
        row[: len(prefix)] = torch.tensor(prefix)
    return encode(model, tokens.to(device), length)[1]


def _accepted(entropy: Tensor, bound: float) -> Tensor:
    ordered, order = entropy.sort(1)
    kept = ordered.cumsum(1) - ordered <= bound
    return torch.zeros_like(kept).scatter(1, order, kept)


def answer_text(tokenizer: Tokenizer, canvas: list[int]) -> str:
    """The text before the first end token."""
    ends = [index for index, token in enumerate(canvas) if token in END_TOKENS]
    return tokenizer.decode(canvas[: ends[0]] if ends else canvas)


def evaluate(
    model: StepModel,
    tokenizer: Tokenizer,
    settings: Settings,
    prompts: int,
    seed: int,
    rows: int = 512,
    tasks: Sequence[Task] = TASKS,
) -> dict[str, Score]:
    """Exact match of `prompts` held-out prompts a task."""
    rng = Random(seed)
    asked = [(task.name, draw(task, rng, from_held_out=True)) for task in tasks for _ in range(prompts)]
    # Like lengths together: a batch is as long as its longest prefix.
    prefixes = [tokenizer.encode(prompt_text(example.messages), add_special_tokens=False).ids for _, example in asked]
    order = sorted(range(len(asked)), key=lambda index: len(prefixes[index]))
    generator = torch.Generator(model.embed_tokens.weight.device).manual_seed(seed)
    results: list[tuple[str, Example, str, float]] = []
    for first in range(0, len(order), rows):
        chosen = order[first : first + rows]
        canvases, steps = generate(model, [prefixes[index] for index in chosen], settings, generator)
        for index, canvas, count in zip(chosen, canvases.tolist(), steps.tolist(), strict=True):
            results.append((*asked[index], answer_text(tokenizer, canvas), count))
    return {task.name: _score([result for result in results if result[0] == task.name]) for task in tasks}


def _score(results: list[tuple[str, Example, str, float]]) -> Score:
    right = [correct(example, answer) for _, example, answer, _ in results]
    wrong = [
        (example.messages[-1]["content"], example.expected, answer)
        for (_, example, answer, _), good in zip(results, right, strict=True)
        if not good
    ]
    steps = [count for *_, count in results]
    return Score(len(results), sum(right) / len(right), sum(steps) / len(steps), tuple(wrong[:4]))


def report(scores: dict[str, Score], settings: Settings) -> dict[str, object]:
    """The scores as one JSON object, with their means."""
    count = len(scores)
    return {
        "settings": asdict(settings),
        "mean_exact": sum(score.exact for score in scores.values()) / count,
        "least_exact": min(score.exact for score in scores.values()),
        "mean_steps": sum(score.steps for score in scores.values()) / count,
        "tasks": {name: asdict(score) for name, score in scores.items()},
    }
