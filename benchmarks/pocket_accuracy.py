"""`python -m benchmarks.pocket_accuracy --seed N`: exact match of the pocket checkpoint's tasks through the service.

Prompts are drawn from the held-out side of each task and asked with default settings and seeds of their own, as any
client would: single questions over `Generate`, second turns over `Converse`, with the first turn as its history.
Tasks that the checkpoint's card does not promise are measured too, and marked.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import click

from benchmarks.servers import serving
from checkpoints.pocket_recipe.tasks import TASKS, Example, correct, draw
from runtime.events import Committed, Event, Finished
from runtime.prompt import Message, Role
from runtime.request import SamplingOverrides
from service.cli.columns import echo_columns
from service.client import Client

TIMEOUT = 300.0
"""Seconds an answer; far more than one takes."""
ROLES = {"system": Role.SYSTEM, "user": Role.USER, "assistant": Role.MODEL}
PROMISED = frozenset(task.name for task in TASKS if task.promised)
SHOWN, LONGEST = 3, 200
"""Wrong answers that are shown a task, and their characters."""


@dataclass(frozen=True)
class Answer:
    """What came back for one prompt."""

    task: str
    prompt: str
    expected: str
    text: str
    right: bool
    steps: int
    blocks: int


@dataclass(frozen=True)
class Score:
    """Of one task, or of all."""

    prompts: int
    exact: float
    """Share of right answers."""
    steps_per_canvas: float


@click.command()
@click.option("--seed", type=int, required=True, help="Draws prompts and the requests' seeds.")
@click.option("--prompts", type=click.IntRange(min=1), default=50, show_default=True, help="Of each task.")
@click.option("--task", "names", multiple=True, type=click.Choice([task.name for task in TASKS]), help="Some tasks.")
@click.option("--bundle", type=click.Path(path_type=Path), default=Path("build/pocket"), show_default=True)
@click.option("--address", help="Ask this running server instead of starting one for the bundle.")
@click.option("--threads", default=0, show_default=True, help="Of the server that is started.")
@click.option("--concurrency", type=click.IntRange(min=1), default=4, show_default=True, help="Requests at a time.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write scores and wrong answers to this file.")
def main(
    seed: int,
    prompts: int,
    names: tuple[str, ...],
    bundle: Path,
    address: str | None,
    threads: int,
    concurrency: int,
    path: Path | None,
) -> None:
    """Measure exact match and steps a canvas on held-out prompts."""
    rng = Random(seed)
    asked = [
        (task.name, draw(task, rng, from_held_out=True), rng.getrandbits(63))
        for task in TASKS
        if not names or task.name in names
        for _ in range(prompts)
    ]
    with ExitStack() as stack:
        where = address or stack.enter_context(serving(bundle, threads)).address
        client = stack.enter_context(Client(where))
        model = client.model(timeout=TIMEOUT).name
        pool = stack.enter_context(ThreadPoolExecutor(concurrency))
        answers = list(pool.map(lambda question: ask(client, *question), asked))
    scores = {name: score([answer for answer in answers if answer.task == name]) for name, _, _ in asked}
    show(scores, answers)
    if path is not None:
        path.write_text(json.dumps(report(model, seed, scores, answers), indent=2, ensure_ascii=False) + "\n")


def ask(client: Client, task: str, example: Example, seed: int) -> Answer:
    """Ask one question and look at the answer."""
    *history, question = (Message(ROLES[message["role"]], message["content"]) for message in example.messages)
    sampling = SamplingOverrides(seed=seed)
    events: list[Event] = []
    if history:
        with client.converse(history, sampling, timeout=TIMEOUT) as conversation:
            conversation.start_turn(question.text)
            conversation.half_close()
            events = [event for _, event in conversation if isinstance(event, Committed | Finished)]
    else:
        events = list(client.generate(question.text, sampling, timeout=TIMEOUT))
    text = "".join(event.text for event in events if isinstance(event, Committed))
    finished = events[-1]
    assert isinstance(finished, Finished)
    usage = finished.usage
    right = correct(example, text)
    return Answer(task, question.text, example.expected, text, right, usage.denoising_steps, usage.blocks)


def score(answers: Sequence[Answer]) -> Score:
    """The scores of some answers."""
    steps, blocks = sum(answer.steps for answer in answers), sum(answer.blocks for answer in answers)
    return Score(len(answers), sum(answer.right for answer in answers) / len(answers), steps / blocks)


def show(scores: dict[str, Score], answers: Sequence[Answer]) -> None:
    """Print a row a task, the promised ones together, and some wrong answers."""
    rows = {name if name in PROMISED else f"{name} (not promised)": row for name, row in scores.items()}
    promised = [answer for answer in answers if answer.task in PROMISED]
    if promised:
        rows["promised tasks"] = score(promised)
    echo_columns(
        [("task", f"{'prompts':>7} {'exact':>7} {'steps a canvas':>15}")]
        + [(name, f"{row.prompts:7} {row.exact:7.1%} {row.steps_per_canvas:15.2f}") for name, row in rows.items()]
    )
    least = min(PROMISED & scores.keys(), key=lambda name: scores[name].exact, default=None)
    if least is not None:
        click.echo(f"least exact of the promised: {least}, {scores[least].exact:.1%}")
    for name in scores:
        for answer in wrong(name, answers)[:SHOWN]:
            click.echo(f"{name}: {answer.prompt!r} -> {answer.text[:LONGEST]!r}, not {answer.expected!r}")


def wrong(task: str, answers: Sequence[Answer]) -> list[Answer]:
    """A task's wrong answers."""
    return [answer for answer in answers if answer.task == task and not answer.right]


def report(model: str, seed: int, scores: dict[str, Score], answers: Sequence[Answer]) -> dict[str, Any]:
    """Everything as one JSON object."""
    return {
        "model": model,
        "seed": seed,
        "all": asdict(score(answers)),
        "tasks": {name: asdict(row) | {"promised": name in PROMISED} for name, row in scores.items()},
        "wrong": [asdict(answer) for answer in answers if not answer.right],
    }


if __name__ == "__main__":
    main()
