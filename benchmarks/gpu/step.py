"""`python -m benchmarks.gpu.step`: the torch engine at the released shape on one GPU, with nothing to fetch.

Random weights are made on the GPU and the program is exported on the spot. Every piece is printed as it is measured; a
piece that fails is told with its traceback and the next one goes on. Needs torch, triton, numpy and msgspec; the
reference also transformers.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.canvases import TimedEngine, canvases, denoise, encode, time_steps
from benchmarks.gpu.reference_step import time_reference
from benchmarks.gpu.released_model import LAYERS, released_config, released_model
from benchmarks.gpu.step_check import check
from benchmarks.gpu.step_floor import Limits, measure_limits, prefill_floor, step_floor
from benchmarks.gpu.timeline import kernels_of, one_layer
from export.weights import Precision
from runtime.engines.torch.options import Options
from runtime.engines.torch.program import Rewrites

PRECISIONS = {"bf16": "bfloat16", "fp8": "fp8", "int4": "int4"}
PIECES = ("step", "protocol", "prefill", "memory", "batches", "prefixes", "profile", "timeline")
"""In the order that they run in whatever the order of `--pieces`: after profiling, the host was seen to take 0.4 ms a
step in place of 0.2."""
_PROTOCOL_STEPS = 16


class Bench:
    """The pieces over one engine; `results` collects what they measured."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.results: dict[str, Any] = {"arguments": vars(arguments), "torch": torch.__version__}
        self.config = released_config(arguments.layers)
        self.precision = Precision(PRECISIONS[arguments.precision])
        self.limits: Limits = measure_limits()
        _say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {self.limits}")
        self.results["limits"] = asdict(self.limits)

    def build(self) -> None:
        """Export, allocate, fill."""
        arguments = self.arguments
        longest = max(arguments.prefix, *arguments.prefixes, *arguments.prefills) + 4096
        batched = max(arguments.batches) * (arguments.prefix + 512)
        options = replace(
            Options.serving("cuda", canvas_slots=max(arguments.batches)),
            positions=max(longest, batched),
            encode_chunk=max(arguments.chunks),
            compiler=None if arguments.eager else "inductor",
            graphs=not arguments.no_graphs,
            beside=not arguments.no_beside,
            rewrites=Rewrites(
                merge_products=not arguments.no_merge,
                take_apart=not arguments.no_apart,
                join_residuals=not arguments.no_join,
            ),
        )
        device, file = torch.device("cuda"), arguments.program
        before = torch.cuda.memory_allocated()
        model = self._timed("export", lambda: released_model(self.config, self.precision, device, file))
        self.engine = self._timed("allocate and fill", lambda: TimedEngine(model, options))
        for tensor in (*self.engine.keys, *self.engine.values):
            tensor.normal_()
        self.pool_bytes = sum(tensor.nbytes for tensor in (*self.engine.keys, *self.engine.values, self.engine.states))
        self.weight_bytes = torch.cuda.memory_allocated() - before - self.pool_bytes
        _say(f"weights {self.weight_bytes / 1e9:.2f} GB, pool {self.pool_bytes / 1e9:.2f} GB")
        # Peaks are counted from here on: what made random weights, or ran before, is not the engine's.
        self.other_bytes = before
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def step(self) -> None:
        """One canvas at `--prefix`, and how the router spread its tokens."""
        self._timed("compile and capture", lambda: time_steps(self.engine, 1, self.arguments.prefix, 1))
        self._steps(1, self.arguments.prefix)
        counts = torch.stack(self.engine.rows_per_expert()).float()
        used = (counts > 0).sum(dim=1)
        spread = {
            "rows_least": int(counts.min()),
            "rows_median": float(counts.median()),
            "rows_most": int(counts.max()),
            "experts_used_least": int(used.min()),
            "experts_used_mean": float(used.float().mean()),
        }
        _say(f"rows per expert: {spread}")
        self.results["routing"] = spread

    def batches(self) -> None:
        """Several canvases at `--prefix`."""
        for count in self.arguments.batches:
            self._steps(count, self.arguments.prefix)

    def prefixes(self) -> None:
        """One canvas behind prefixes of several lengths."""
        for prefix in self.arguments.prefixes:
            self._steps(1, min(prefix, self.config.max_position - self.config.canvas_length))

    def prefill(self) -> None:
        """Prompts, in chunks of each of `--chunks`."""
        for length in self.arguments.prefills:
            for chunk in self.arguments.chunks:
                if chunk == min(self.arguments.chunks) or chunk <= length:
                    self._prefill(length, chunk)

    def _prefill(self, length: int, chunk: int) -> None:
        [canvas] = canvases(self.engine, 1, 0, 1, room=length)
        token_ids = np.random.default_rng(0).integers(0, self.config.vocab_size, length)
        times = [encode(self.engine, canvas, token_ids, 0, chunk) for _ in range(4)]
        floor, milliseconds = prefill_floor(self.config, length, self.limits), statistics.median(times[1:])
        share = floor.operations / (milliseconds / 1e3) / self.limits.matrix_rate
        _say(
            f"prefill {length} by {chunk}: {milliseconds:.1f} ms, {length / milliseconds * 1e3:.0f} tok/s, "
            f"{share:.0%} of the matrix rate (first time {times[0]:.0f} ms)"
        )
        row = {"length": length, "chunk": chunk, "ms": milliseconds, "matrix_share": share}
        self.results.setdefault("prefill", []).append(row)

    def protocol(self) -> None:
        """Random 1024 tokens in, 1024 out, 16 steps a canvas, no convergence."""
        prompt = np.random.default_rng(0).integers(0, self.config.vocab_size, 1024)
        seconds = []
        for _ in range(3):
            torch.cuda.synchronize()
            began = time.perf_counter()
            [canvas] = canvases(self.engine, 1, len(prompt), _PROTOCOL_STEPS, room=2048)
            encode(self.engine, canvas, prompt, 0, self.arguments.chunks[0])
            for block in range(4):
                if block:
                    committed = canvas.loop.argmax
                    encode(self.engine, canvas, committed, canvas.start, len(committed))
                    canvas.start += len(committed)
                canvas.open(block)
                while not canvas.loop.finished:
                    denoise(self.engine, [canvas])
            seconds.append(time.perf_counter() - began)
        rate = 1024 / min(seconds[1:])
        _say(f"protocol 1024 -> 1024, 16 steps: {rate:.0f} tok/s ({min(seconds[1:]):.3f} s; first {seconds[0]:.1f} s)")
        self.results["protocol_tokens_per_second"] = rate

    def profile(self) -> None:
        """Where a step's time goes, by kernel."""
        rows = canvases(self.engine, self.arguments.batch, self.arguments.prefix, 16)
        denoise(self.engine, rows)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            for _ in range(4):
                denoise(self.engine, rows)
            torch.cuda.synchronize()
        table = sorted(
            ((each.device_time_total / 4e3, each.count / 4, each.key) for each in profiler.key_averages()), reverse=True
        )
        total = sum(milliseconds for milliseconds, _, _ in table)
        launches = sum(count for _, count, _ in table)
        layers = len(self.config.layers)
        _say(f"kernels sum to {total:.3f} ms a step, {launches:.0f} launches, {launches / layers:.1f} a layer")
        for milliseconds, count, name in table[:30]:
            _say(f"  {milliseconds:8.4f} ms {milliseconds / total:6.1%} {count:6.0f}x  {name[:110]}")
        self.results["profile"] = [{"ms": ms, "count": count, "kernel": name} for ms, count, name in table]

    def timeline(self) -> None:
        """What runs when, from one layer's experts to the next's, in a sliding and in a full layer."""
        rows = canvases(self.engine, self.arguments.batch, self.arguments.prefix, 8)
        denoise(self.engine, rows)
        kernels = kernels_of(lambda: denoise(self.engine, rows))
        for layer in (index for index in (2, 4) if index + 1 < len(self.config.layers)):
            _say(f"between the experts of layers {layer} and {layer + 1}:")
            for line in one_layer(kernels, layer):
                _say(line)

    def memory(self) -> None:
        """Peaks since the engine was built, of what else was measured and of one user: a prompt of `--prefix` tokens
        and steps behind it. With `--pieces memory` of that user alone."""
        [canvas] = canvases(self.engine, 1, 0, 4, room=self.arguments.prefix + 512)
        token_ids = np.random.default_rng(0).integers(0, self.config.vocab_size, self.arguments.prefix)
        encode(self.engine, canvas, token_ids, 0, self.arguments.chunks[0])
        canvas.start = len(token_ids)
        for _ in range(3):
            denoise(self.engine, [canvas])
        allocated, reserved = (
            count - self.other_bytes for count in (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
        )
        over = reserved - self.weight_bytes - self.pool_bytes
        _say(
            f"peak memory {allocated / 1e9:.2f} GB allocated, {reserved / 1e9:.2f} GB reserved: "
            f"weights + pool + {over / 1e9:.2f} GB"
        )
        self.results["memory"] = {
            "weights": self.weight_bytes,
            "pool": self.pool_bytes,
            "peak_allocated": allocated,
            "peak_reserved": reserved,
        }

    def reference(self) -> None:
        """`transformers` in the same run."""
        step_ms = time_reference(self.config, self.arguments.prefix, self.arguments.steps)
        _say(f"reference: {step_ms}")
        self.results["reference"] = step_ms

    def run(self, name: str, piece: Callable[[], None]) -> bool:
        """Run a piece and survive it; False where it failed."""
        began = time.perf_counter()
        _say(f"== {name}")
        try:
            with torch.no_grad():
                piece()
        except Exception:
            _say(traceback.format_exc())
            self.results.setdefault("failed", []).append(name)
            return False
        finally:
            _say(f"== {name}: {time.perf_counter() - began:.1f} s")
            self._write()
        return True

    def _steps(self, count: int, prefix: int) -> None:
        times = time_steps(self.engine, count, prefix, self.arguments.steps)
        floor = step_floor(self.config, self.precision, count, prefix, self.limits)
        _say(
            f"denoise {count:2} x prefix {prefix:6}: step {times.step:7.3f} ms, device {times.device:7.3f}, "
            f"host {times.host:6.3f}, replayed {times.replay:7.3f}; floor {floor.milliseconds:7.3f} "
            f"({floor.bytes / 1e9:.2f} GB, {floor.operations / 1e12:.2f} TFLOP), x{times.step / floor.milliseconds:.2f}"
        )
        row = {"canvases": count, "prefix": prefix, **asdict(times), "floor_ms": floor.milliseconds}
        self.results.setdefault("steps", []).append(row)

    def _timed(self, what: str, act: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = act()
        torch.cuda.synchronize()
        _say(f"{what}: {time.perf_counter() - began:.1f} s")
        return result

    def _write(self) -> None:
        if self.arguments.out is not None:
            self.arguments.out.write_text(json.dumps(self.results, indent=1, default=str), encoding="utf-8")


def _say(text: str) -> None:
    print(text, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument("--layers", type=int, default=LAYERS, help="6 for a fifth of the model, to try things")
    parser.add_argument("--check", action="store_true", help="compare with the references instead of timing")
    parser.add_argument("--pieces", type=_list(str), default=list(PIECES), help=f"some of {','.join(PIECES)}")
    parser.add_argument("--batch", type=int, default=1, help="canvases of the profile")
    parser.add_argument("--prefix", type=int, default=1024)
    parser.add_argument("--batches", type=_list(int), default=[1, 2, 4, 8, 16])
    parser.add_argument("--prefixes", type=_list(int), default=[0, 1024, 8192, 65536, 262144])
    parser.add_argument("--prefills", type=_list(int), default=[256, 1024, 8192])
    parser.add_argument("--chunks", type=_list(int), default=[4096], help="tokens of an encode row, to try several")
    parser.add_argument("--steps", type=int, default=24, help="timed steps of a median")
    parser.add_argument("--reference", action="store_true", help="measure transformers first")
    parser.add_argument("--program", type=Path, help="file to keep the exported program in, which takes half a minute")
    parser.add_argument("--export-only", action="store_true", help="write --program and end; needs no GPU")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--no-graphs", action="store_true")
    parser.add_argument("--no-merge", action="store_true", help="leave q, k, v and gate, up apart")
    parser.add_argument("--no-apart", action="store_true", help="leave operations whole")
    parser.add_argument("--no-join", action="store_true", help="leave the norms around the residual to the compiler")
    parser.add_argument("--no-beside", action="store_true", help="one stream")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    return parser.parse_args()


def _list(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [kind(part) for part in text.split(",")]


def main() -> None:
    """Run what the command line asks for."""
    arguments = _arguments()
    if arguments.export_only:
        precision = Precision(PRECISIONS[arguments.precision])
        released_model(released_config(arguments.layers), precision, torch.device("cpu"), arguments.program)
        return
    if arguments.check:
        options = Options.serving("cuda", canvas_slots=2)
        if arguments.eager:
            options = replace(options, compiler=None)
        precision = Precision(PRECISIONS[arguments.precision])
        passed = check(released_config(arguments.layers), precision, options)
        raise SystemExit(0 if passed else 1)
    bench = Bench(arguments)
    if arguments.reference:
        bench.run("reference", bench.reference)
        gc.collect()
        torch.cuda.empty_cache()
    if bench.run("build", bench.build):
        for name in (name for name in PIECES if name in arguments.pieces):
            bench.run(name, getattr(bench, name))
    if failed := bench.results.get("failed"):
        raise SystemExit(f"failed: {', '.join(map(str, failed))}")


if __name__ == "__main__":
    main()
