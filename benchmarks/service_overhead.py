"""What gRPC, scheduling and drafts add to a block: through the service against the loop in this process.

The same request, of a fixed number of steps and one block, goes in turn through a server process, as a client with
drafts sees it, and through the state machine and an engine in this process. Both engines have the same threads; one
rests while the other works.
"""

from __future__ import annotations

import time
from functools import partial

import numpy as np
from numpy.typing import NDArray

from benchmarks.figures import Figure, Setting, milliseconds, quiet_milliseconds
from benchmarks.servers import serving
from runtime.bundle import Bundle
from runtime.engines.onnxruntime import OnnxRuntimeEngine, Options
from runtime.engines.protocol import DenoiseRow, EncodeRow
from runtime.events import Draft, Finished
from runtime.generation import Encode, Generation
from runtime.pool import PagePool
from runtime.request import GenerationRequest, SamplingOverrides
from runtime.vocabulary import Vocabulary
from service.client import Client

PROMPT_TOKENS = 100
STEPS = 12
"""Of the block: about what a trained checkpoint takes."""
WARM_UP = 2
"""Rounds that do not count."""
BAR = 1.05
TIMEOUT = 300.0


def run(setting: Setting) -> list[Figure]:
    """Medians of both, and their ratio."""
    bundle = Bundle(setting.bundle)
    facts = bundle.manifest.model
    prompt = np.random.default_rng(0).integers(facts.vocab_size // 2, size=PROMPT_TOKENS)
    # A threshold of 0 never stops early.
    overrides = SamplingOverrides(
        seed=0, max_output_tokens=facts.canvas_length, max_denoising_steps=STEPS, confidence_threshold=0.0
    )
    alone, served, drafts = [], [], 0
    loop = Loop(bundle, prompt, overrides, setting.threads)
    with serving(setting.bundle, setting.threads) as server, Client(server.address) as client:
        for number in range(WARM_UP + setting.rounds):
            loop_seconds, (service_seconds, drafts) = loop.block(), _request(client, prompt, overrides)
            if number >= WARM_UP:
                alone.append(loop_seconds)
                served.append(service_seconds)
    loop.close()
    ratio = milliseconds(served) / milliseconds(alone)
    quiet = quiet_milliseconds(served), quiet_milliseconds(alone)
    return [
        Figure("block in this process", milliseconds(alone), "ms", note=f"median, {STEPS} steps"),
        Figure("block through the service", milliseconds(served), "ms", note=f"median, {drafts} drafts a block"),
        Figure("service / in process", ratio, "x", most=BAR, note=f"{len(served)} blocks each, in turn"),
        Figure("the same of first deciles", quiet[0] / quiet[1], "x", note=f"{quiet[0]:.1f} / {quiet[1]:.1f} ms"),
    ]


class Loop:
    """The state machine of a request, driven on an engine of this process."""

    def __init__(self, bundle: Bundle, prompt: NDArray[np.int64], overrides: SamplingOverrides, threads: int) -> None:
        manifest = bundle.manifest
        sampling = overrides.resolve(manifest.generation, manifest.model.canvas_length)
        request = GenerationRequest(manifest.model.name, prompt, sampling)
        vocabulary = Vocabulary.load(bundle)
        self._new = partial(Generation, request, manifest.model, manifest.generation, vocabulary)
        self._engine = OnnxRuntimeEngine.load(bundle, Options(threads=threads))
        self._pool = PagePool(self._engine.pool, manifest.model)

    def block(self) -> float:
        """Seconds from the prompt's token ids to the committed block."""
        began = time.perf_counter()
        generation = self._new()
        pages = self._pool.reserve(generation.total_positions)
        generation.start(0.0)
        while not generation.finished:
            call = generation.next_call()
            if isinstance(call, Encode):
                prefix = pages.cover(call.start, call.start + len(call.token_ids))
                self._engine.encode([EncodeRow(call.token_ids, call.start, prefix)])
                generation.encoded(0.0)
            else:
                prefix = pages.cover(call.start, call.start)
                row = DenoiseRow(
                    call.canvas,
                    call.start,
                    prefix,
                    0,
                    call.first_step,
                    call.temperature,
                    call.uniform,
                    call.guard_first,
                )
                [readout] = self._engine.denoise([row])
                generation.denoised(readout, 0.0, draft=False)
        pages.release()
        return time.perf_counter() - began

    def close(self) -> None:
        """Free the engine."""
        self._engine.close()


def _request(client: Client, prompt: NDArray[np.int64], overrides: SamplingOverrides) -> tuple[float, int]:
    """Seconds from the call to its last event, and how many drafts came."""
    began, drafts = time.perf_counter(), 0
    for event in client.generate(prompt.tolist(), overrides, draft_interval=0.0, timeout=TIMEOUT):
        drafts += isinstance(event, Draft)
        if isinstance(event, Finished):
            break
    return time.perf_counter() - began, drafts
