"""Many users of the pocket at once: tokens a second, times to the first draft and block, and who waits for whom.

A server process answers the same mixed requests, one in four of them a story, for 1, 8 and 32 clients at a time, and
`transformers` does so in static batches of 8: padded to one length, in lockstep until the last row has converged.
Then requests come at random at half the rate that 8 clients reach, and at last one interactive user asks tasks while
`SATURATING` batch users keep the engine busy.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.curves import write_curves
from benchmarks.figures import Figure, Setting, Unavailable
from benchmarks.load import STORY_EVERY, Answered, Question, ask, poisson, questions, saturated, tokens_per_second
from benchmarks.servers import serving
from runtime.bundle import Bundle, GenerationDefaults
from runtime.prompt import Message, PromptBuilder, Role
from runtime.ticket import Priority
from runtime.vocabulary import Vocabulary
from service.client import Client

CONCURRENT = (1, 8, 32)
LEAST_ROUNDS = 2 * max(CONCURRENT)
"""Requests: with fewer than a crowd, or just as many, it has thinned out for most of the time."""
LOCKSTEP = 8
"""Rows of the reference's batches."""
LOCKSTEP_BATCHES = 2
"""Of the reference at most: each has the same share of stories, and takes a minute or so."""
SATURATING = 8
SHARE_OF_CAPACITY = 0.5
LEAST_RATIO, MOST_DELAY = 3.0, 2.0


def run(setting: Setting) -> list[Figure]:
    """Everything, on `setting.rounds` requests, and on so many at least that the largest crowd is there for a while.

    Raises:
        Unavailable: there is no checkpoint, or PyTorch or transformers are not installed.
    """
    rounds = max(setting.rounds, LEAST_ROUNDS)
    asked = questions(-(-rounds // LOCKSTEP) * LOCKSTEP)
    options = ("--max-active", str(max(CONCURRENT)))
    with serving(setting.bundle, setting.threads, *options) as server, Client(server.address) as client:
        ask(client, asked[0])  # warm
        ours = {count: tokens_per_second(client, asked, count) for count in CONCURRENT}
        rate = SHARE_OF_CAPACITY * _requests_per_second(client, asked)
        random = poisson(client, asked, rate)
        delay = _interactive(client, asked)
    figures = [Figure(f"tokens/s, {count} at a time", ours[count], "/s", note=_mix(asked)) for count in CONCURRENT]
    figures += [Figure(f"{count} at a time / 1", ours[count] / ours[CONCURRENT[0]], "x") for count in CONCURRENT[1:]]
    figures += _lockstep(setting, asked, ours[LOCKSTEP])
    picture = setting.bundle.with_name(f"{setting.bundle.name}-latency.png")
    return [*figures, *_percentiles(random, rate, picture), *delay]


def _mix(asked: Sequence[Question]) -> str:
    return f"{len(asked)} requests, 1 in {STORY_EVERY} a story"


def _requests_per_second(client: Client, asked: Sequence[Question]) -> float:
    """What 8 clients reach."""
    began = time.perf_counter()
    tokens_per_second(client, asked, LOCKSTEP)
    return len(asked) / (time.perf_counter() - began)


def _percentiles(answers: Sequence[Answered], rate: float, picture: Path) -> list[Figure]:
    """p50 and p95 of every time, and the plot of all."""
    times = {
        "to first draft": [answered.first_draft for answered in answers if answered.first_draft is not None],
        "to first block": [answered.first_block for answered in answers],
        "per block": [answered.per_block for answered in answers],
    }
    title = f"{len(answers)} requests at {rate:.2f} a second on average: share that had it by then"
    write_curves(picture, title, times)
    return [
        Figure(f"random arrivals, {name}, p{share}", 1e3 * float(np.percentile(values, share)), "ms", note=note)
        for name, values in times.items()
        for share, note in ((50, f"{rate:.2f} requests a second, {len(values)} times"), (95, f"plot: {picture}"))
    ]


def _interactive(client: Client, asked: Sequence[Question]) -> list[Figure]:
    """A user's tasks, alone and while batch users read stories."""
    tasks = [question for number, question in enumerate(asked) if number % STORY_EVERY]
    alone = [ask(client, question).done for question in tasks]
    with saturated(client, SATURATING, Priority.BATCH) as read:
        busy = [ask(client, question).done for question in tasks]
        stories = read()
    with saturated(client, SATURATING, Priority.INTERACTIVE):
        equal = [ask(client, question).done for question in tasks]
    unloaded, loaded, unordered = (1e3 * statistics.median(each) for each in (alone, busy, equal))
    crowd = f"beside {SATURATING} batch users, who read {stories} stories meanwhile"
    return [
        Figure("interactive task, alone", unloaded, "ms", note=f"median of {len(tasks)}, to the end"),
        Figure("the same beside batch users", loaded, "ms", note=crowd),
        Figure("beside batch users / alone", loaded / unloaded, "x", most=MOST_DELAY),
        Figure("beside as many of equal priority / alone", unordered / unloaded, "x", note="without priorities"),
    ]


def _lockstep(setting: Setting, asked: Sequence[Question], ours: float) -> list[Figure]:
    """The reference's tokens a second on the same requests, and ours by that."""
    generate = _reference(setting)
    bundle = Bundle(setting.bundle)
    defaults, prompts = bundle.manifest.generation, PromptBuilder(bundle, Vocabulary.load(bundle))
    taken = asked[: LOCKSTEP_BATCHES * LOCKSTEP]
    ids = [prompts.conversation([Message(Role.USER, question.prompt)]) for question in taken]
    batches = [_padded(ids[first : first + LOCKSTEP], defaults.pad_token_id) for first in range(0, len(ids), LOCKSTEP)]
    generate(*_padded(ids[1:2], defaults.pad_token_id), defaults)  # warm
    began = time.perf_counter()
    tokens = sum(_tokens(generate(*batch, defaults), defaults) for batch in batches)
    theirs = tokens / (time.perf_counter() - began)
    return [
        Figure("tokens/s, lockstep batches of the reference", theirs, "/s", note=f"{len(batches)} of {LOCKSTEP} rows"),
        Figure("ours, 8 at a time / reference", ours / theirs, "x", least=LEAST_RATIO),
    ]


def _padded(prompts: Sequence[NDArray[np.int64]], pad: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Token ids `[B, n]`, padded on the left, and which of them are of the prompts, as 0 and 1."""
    longest = max(map(len, prompts))
    ids, mask = np.full((len(prompts), longest), pad), np.zeros((len(prompts), longest), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = prompt, 1
    return ids, mask


def _tokens(canvases: NDArray[np.int64], defaults: GenerationDefaults) -> int:
    """Tokens of the answers `[B, canvas]`, each up to its first end token."""
    ends = np.isin(canvases, defaults.end_token_ids)
    return int(np.where(ends.any(axis=1), ends.argmax(axis=1), canvases.shape[1]).sum())


Generate = Callable[[NDArray[np.int64], NDArray[np.int64], GenerationDefaults], NDArray[np.int64]]


def _reference(setting: Setting) -> Generate:
    """`generate` of the reference, for one canvas `[B, canvas]` behind padded prompts, with the bundle's settings."""
    if setting.checkpoint is None:
        raise Unavailable("the reference needs --checkpoint, the directory that the bundle was made of")
    try:
        import torch
        from transformers import DiffusionGemmaForBlockDiffusion
        from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
            DiffusionGemmaGenerationConfig,
            EntropyBoundSamplerConfig,
        )
        from transformers.utils import logging
    except ImportError as error:
        raise Unavailable(f"the reference needs torch and transformers >= 5.23 ({error})") from error
    torch.set_num_threads(setting.threads)
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model: Any = DiffusionGemmaForBlockDiffusion.from_pretrained(setting.checkpoint, dtype=torch.float32)
    model.train(False)
    # The fastest on a CPU, see `benchmarks.step`.
    model.set_experts_implementation("grouped_mm")

    def generate(ids: NDArray[np.int64], mask: NDArray[np.int64], defaults: GenerationDefaults) -> NDArray[np.int64]:
        config = DiffusionGemmaGenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=model.config.canvas_length,
            max_denoising_steps=defaults.max_denoising_steps,
            sampler_config=EntropyBoundSamplerConfig(entropy_bound=defaults.entropy_bound),
            t_min=defaults.t_min,
            t_max=defaults.t_max,
            stability_threshold=defaults.stability_threshold,
            confidence_threshold=defaults.confidence_threshold,
            eos_token_id=list(defaults.end_token_ids),
            pad_token_id=defaults.pad_token_id,
        )
        torch.manual_seed(0)
        tensors = torch.from_numpy(ids), torch.from_numpy(mask)
        with torch.inference_mode():
            made = model.generate(tensors[0], attention_mask=tensors[1], generation_config=config)
        sequences = made if torch.is_tensor(made) else made.sequences
        canvases: NDArray[np.int64] = sequences[:, ids.shape[1] :].numpy()
        return canvases

    return generate
