"""`python -m benchmarks.precision`: what each precision of the weights costs the pocket checkpoint.

Every precision answers the same held-out prompts of the promised tasks, with the operations' references, on any device:
exact match of each task and steps a canvas, for low precision that needs more steps is no gain. Beside them, how far
one denoising step of a random canvas lies from the same step in float32.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from random import Random

import click
import torch
from tokenizers import Tokenizer
from torch import Tensor

from checkpoints.pocket_recipe.batches import prompt_text
from checkpoints.pocket_recipe.evaluation import Score, Settings, evaluate
from checkpoints.pocket_recipe.passes import denoise, encode
from checkpoints.pocket_recipe.tasks import TASKS, draw
from export.checkpoint import Checkpoint, open_checkpoint
from export.model import StepModel
from export.quantized_model import load_quantized_model
from export.verification import load_model
from export.weights import Precision
from plugins_trt.expert_ffn.reference import expert_ffn_fp8
from plugins_trt.operations import REFERENCE, Operations
from plugins_trt.quantized_linear.reference import linear_fp8
from runtime.bundle import GenerationDefaults

Load = Callable[[Checkpoint], StepModel]


def operations(coded_linears: bool, coded_experts: bool) -> Operations:
    """The references, with 8-bit activations in the linears and in the experts or not."""
    return replace(
        REFERENCE,
        linear_fp8=partial(linear_fp8, dynamic_activations=coded_linears),
        expert_ffn_fp8=partial(expert_ffn_fp8, dynamic_activations=coded_experts),
    )


def quantized(precision: Precision, coded_linears: bool, coded_experts: bool) -> Load:
    """How a quantised precision's model is loaded."""
    return partial(load_quantized_model, precision=precision, operations=operations(coded_linears, coded_experts))


VARIANTS: dict[str, Load] = {
    "float32": partial(load_model, dtype=torch.float32),
    "bfloat16": partial(load_model, dtype=torch.bfloat16),
    "fp8, weights alone": quantized(Precision.FP8, False, False),
    "fp8, activations of linears too": quantized(Precision.FP8, True, False),
    "fp8, all activations too": quantized(Precision.FP8, True, True),
    "int4 experts, fp8 linears": quantized(Precision.INT4, True, False),
}
"""How each precision's model is loaded; the first is the yardstick."""
PROMISED = tuple(task for task in TASKS if task.promised)
"""The others take the sampler to its last step and tell nothing of precision."""


@dataclass(frozen=True)
class StepError:
    """How far one denoising step lies from the yardstick's."""

    states: float
    """Of the final states, relative to their root mean square."""
    argmax: float
    """Share of positions whose likeliest token is another."""


@dataclass(frozen=True)
class Result:
    """Of one precision."""

    exact: float
    """Share of right answers."""
    steps_per_canvas: float
    step_error: StepError
    tasks: dict[str, Score]
    seconds: float


@click.command()
@click.option(
    "--checkpoint", "directory", type=click.Path(exists=True, path_type=Path), default=Path("checkpoints/pocket")
)
@click.option("--prompts", type=click.IntRange(min=1), default=8, show_default=True, help="Of each task.")
@click.option("--seed", default=0, show_default=True, help="Draws prompts and noise.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--rows", default=16, show_default=True, help="Canvases denoised together.")
@click.option("--only", multiple=True, type=click.Choice(list(VARIANTS)), help="Some precisions; float32 always runs.")
@click.option("--out", type=click.Path(path_type=Path), help="Write every score to this file as JSON.")
def main(
    directory: Path, prompts: int, seed: int, device: str, rows: int, only: tuple[str, ...], out: Path | None
) -> None:
    """Compare precisions on the pocket checkpoint's exact-match tasks."""
    checkpoint = open_checkpoint(directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    settings = sampler_settings(checkpoint.generation)
    results: dict[str, Result] = {}
    yardstick: tuple[Tensor, Tensor] | None = None
    for name, load in VARIANTS.items():
        if yardstick is not None and only and name not in only:
            continue
        model = load(checkpoint).to(device)
        step = one_step(model, tokenizer, seed)
        yardstick = step if yardstick is None else yardstick
        begin = time.monotonic()
        scores = evaluate(model, tokenizer, settings, prompts, seed, rows, PROMISED)
        results[name] = summarise(scores, step_error(step, yardstick), time.monotonic() - begin)
        click.echo(f"{name}: {results[name].seconds:.0f} s")
    show(results, prompts, device)
    if out is not None:
        out.write_text(json.dumps({name: asdict(result) for name, result in results.items()}, indent=2))


def sampler_settings(defaults: GenerationDefaults) -> Settings:
    """The checkpoint's own sampler settings."""
    return Settings(
        max_denoising_steps=defaults.max_denoising_steps,
        entropy_bound=defaults.entropy_bound,
        t_min=defaults.t_min,
        t_max=defaults.t_max,
        stability_threshold=defaults.stability_threshold,
        confidence_threshold=defaults.confidence_threshold,
    )


@torch.inference_mode()
def one_step(model: StepModel, tokenizer: Tokenizer, seed: int) -> tuple[Tensor, Tensor]:
    """Final states `[B, S, H]` float32 and likeliest tokens `[B, S]` of random canvases after a prompt of each task."""
    rng, config = Random(seed), model.config
    texts = [prompt_text(draw(task, rng, from_held_out=True).messages) for task in PROMISED]
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    device = model.embed_tokens.weight.device
    tokens = torch.zeros(len(ids), max(map(len, ids)), dtype=torch.int64)
    for row, prompt in zip(tokens, ids, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    _, prefix = encode(model, tokens.to(device), torch.tensor([len(prompt) for prompt in ids], device=device))
    generator = torch.Generator().manual_seed(seed)
    canvas = torch.randint(config.vocab_size, (len(ids), config.canvas_length), generator=generator)
    states = denoise(model, canvas.to(device), prefix, None).float()
    return states, (states @ model.embed_tokens.weight.float().T).argmax(-1)


def step_error(step: tuple[Tensor, Tensor], yardstick: tuple[Tensor, Tensor]) -> StepError:
    """How far the states and tokens of one step lie from the yardstick's."""
    (states, ids), (wanted, wanted_ids) = step, yardstick
    relative = (states - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
    return StepError(relative.item(), (ids != wanted_ids).float().mean().item())


def summarise(scores: dict[str, Score], error: StepError, seconds: float) -> Result:
    """One precision's result."""
    exact, steps = (
        sum(values) / len(scores) for values in zip(*((s.exact, s.steps) for s in scores.values()), strict=True)
    )
    return Result(exact, steps, error, scores, seconds)


def show(results: dict[str, Result], prompts: int, device: str) -> None:
    """Print a row a precision, then a row a task."""
    count = prompts * len(PROMISED)
    click.echo(f"{len(PROMISED)} promised tasks, {prompts} prompts each, on {device}; +- is a standard error")
    click.echo(f"{'precision':34} {'exact':>15} {'steps a canvas':>15} {'states off by':>14} {'argmax differs':>15}")
    for name, result in results.items():
        spread = math.sqrt(result.exact * (1 - result.exact) / count)
        click.echo(
            f"{name:34} {result.exact:7.1%} +- {spread:4.1%} {result.steps_per_canvas:15.2f} "
            f"{result.step_error.states:14.2%} {result.step_error.argmax:15.2%}"
        )
    click.echo(f"\n{'exact (steps) by task':28}" + "".join(f" {name[:18]:>18}" for name in results))
    for task in next(iter(results.values())).tasks:
        cells = "".join(
            f" {result.tasks[task].exact:10.0%} ({result.tasks[task].steps:4.1f})" for result in results.values()
        )
        click.echo(f"{task:28}{cells}")


if __name__ == "__main__":
    main()
