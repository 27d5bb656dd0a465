"""The compiled and graphed engine against the operations' references, both against float32, on the GPU."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.canvases import TimedEngine, canvases, encode
from benchmarks.gpu.released_model import released_model, wide_model
from export.config import ModelConfig
from export.weights import Precision
from runtime.engines.protocol import DenoiseRow, Readout
from runtime.engines.torch.engine import Model
from runtime.engines.torch.options import Options
from runtime.engines.torch.program import Rewrites

PROMPTS = (300, 1400)
"""Tokens before each canvas: within the window, and past it."""
SLACK = 2.0
"""The kernels may be this many times as far from float32 as the references in the same precision are: both round the
same products, in another order, and a token may change an expert with either."""


@dataclass(frozen=True)
class Results:
    """What one engine made of the same calls."""

    keys: list[Tensor]
    values: list[Tensor]
    entropy: Tensor
    argmax_ids: Tensor
    candidate_ids: Tensor
    soft_embedding: Tensor


def check(config: ModelConfig, precision: Precision, options: Options) -> bool:
    """Print how far everything is from float32, and say whether an engine is as near as the references."""
    device = torch.device(options.device)
    fast = replace(options, positions=8192, encode_chunk=512)
    plain = replace(
        Options(options.device), page_size=options.page_size, canvas_slots=2, positions=8192, encode_chunk=512, batch=2
    )
    plain = replace(plain, rewrites=Rewrites(merge_products=False, reference=True))
    model = _timed("export", lambda: released_model(config, precision, device))
    results = {"reference": _timed("references", lambda: _run(model, plain))}
    results["engine"] = _timed("compile, capture and run", lambda: _run(model, fast))
    if precision.value == "int4":
        return _compare(results["engine"], results["reference"], None)
    wide = _timed("float32", lambda: _run(wide_model(config, precision, device), plain))
    return _compare(results["engine"], wide, results["reference"])


def _timed(what: str, act):  # type: ignore[no-untyped-def]
    began = time.perf_counter()
    result = act()
    print(f"  {what}: {time.perf_counter() - began:.1f} s", flush=True)
    return result


def _run(model: Model, options: Options) -> Results:
    """Two prompts, then two steps of both canvases together, the second self-conditioned; then one of them alone."""
    engine = TimedEngine(model, options)
    random = np.random.default_rng(0)
    rows = canvases(engine, 2, 0, steps=2, room=4096)
    steps = []
    for canvas, prompt in zip(rows, PROMPTS, strict=True):
        encode(engine, canvas, random.integers(0, engine.facts.vocab_size, prompt), 0, options.encode_chunk)
        canvas.start = prompt
    window, size = engine.facts.sliding_window, engine.pool.page_size
    for step in range(2):
        inputs = [
            DenoiseRow(
                canvas=random.integers(0, engine.facts.vocab_size, engine.facts.canvas_length),
                start=canvas.start,
                prefix=canvas.prefix(canvas.start, window, size),
                slot=canvas.slot,
                first_step=step == 0,
                temperature=0.7,
                uniform=random.random(engine.facts.canvas_length, np.float32),
                guard_first=True,
            )
            for canvas in rows
        ]
        steps += engine.denoise(inputs)
    steps += engine.denoise(inputs[:1])
    results = _results(engine, steps)
    engine.close()
    del engine
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return results


def _results(engine: TimedEngine, steps: list[Readout]) -> Results:
    def stacked(name: str) -> Tensor:
        return torch.from_numpy(np.stack([getattr(step, name) for step in steps]))

    keys, values = ([pool.float().cpu() for pool in pools] for pools in (engine.keys, engine.values))
    states = engine.states[:2].float().cpu()
    return Results(
        [pool[:-1] for pool in keys],
        [pool[:-1] for pool in values],
        stacked("entropy"),
        stacked("argmax_ids"),
        stacked("candidate_ids"),
        states,
    )


def _compare(engine: Results, true: Results, reference: Results | None) -> bool:
    """Print relative RMS errors, of the engine and of the references in the same precision."""
    passed = True
    print(f"  {'':28}{'engine':>12}{'references':>12}")
    for name, got, want, near in _tensors(engine, true, reference):
        error = _relative(got, want)
        bound = _relative(near, want) if near is not None else None
        ok = bool(np.isfinite(error)) and (bound is None or error <= SLACK * bound + 2.0**-12)
        passed &= ok
        print(f"  {name:28}{error:12.5f}{'' if bound is None else f'{bound:12.5f}'}{'' if ok else '  TOO FAR'}")
    for name in ("argmax_ids", "candidate_ids"):
        counts = [
            (getattr(each, name) != getattr(true, name)).float().mean().item()
            for each in (engine, reference)
            if each is not None
        ]
        print(f"  {name + ' that differ':28}" + "".join(f"{share:12.5f}" for share in counts))
    print(f"  check {'passed' if passed else 'FAILED'}", flush=True)
    return passed


def _tensors(engine: Results, true: Results, reference: Results | None):  # type: ignore[no-untyped-def]
    for index in (0, 4, 5, len(true.keys) - 1):
        for name in ("keys", "values"):
            near = None if reference is None else getattr(reference, name)[index]
            yield f"{name} of layer {index}", getattr(engine, name)[index], getattr(true, name)[index], near
    for name in ("entropy", "soft_embedding"):
        near = None if reference is None else getattr(reference, name)
        yield name, getattr(engine, name), getattr(true, name), near


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm().clamp_min(1e-30))
