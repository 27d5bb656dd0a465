"""Canvas attention on one GPU: `python -m benchmarks.gpu.attention [--check | --tune] [--out FILE]`.

Checks it in bfloat16 at the released shape against float32, or times each layer type over prefixes, batches and prompt
chunks beside the time that reading the K/V or multiplying must take. K/V are those of several layers in turn, so that
none is found in the cache.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import triton
from torch import Tensor

from benchmarks.gpu.timing import copy_bandwidth, graph_seconds, matrix_rate
from plugins_trt.canvas_attention import kernel, reference
from plugins_trt.canvas_attention.kernel import Tiles, canvas_attention

HEADS, WINDOW, CANVAS = 16, 1024, 256
LAYERS = {"sliding": 25, "full": 5}
KV_HEADS = {"sliding": 8, "full": 2}
HEAD_DIM = {"sliding": 256, "full": 512}

ROTATED_BYTES = 256 << 20
"""K/V that are read in turn: several times the L2 cache."""


@dataclass(frozen=True)
class Rows:
    """A call: `batch` rows of `tokens` tokens behind prefixes of `prefix` tokens."""

    layer: str
    prefix: int
    batch: int = 1
    tokens: int = CANVAS
    causal: bool = False
    uneven: bool = False
    """Whether later rows have shorter prefixes."""
    rising: bool = False
    """Whether scores grow over the prefix, by far more than from tile to tile a scale may lag behind."""
    page: int = 256
    """Tokens of a page."""

    @property
    def name(self) -> str:
        return (
            f"{self.layer:7} {self.batch} x {self.tokens:4} {'prompt' if self.causal else 'canvas'}, "
            f"prefix {self.prefix:6}{f', pages of {self.page}' if self.page != Rows.page else ''}"
        )


def random_call(rows: Rows, generator: torch.Generator) -> list[Tensor]:
    """Arguments of `canvas_attention`; slots that hold no token are NaN."""
    B, S, D, kv_heads, page = rows.batch, rows.tokens, HEAD_DIM[rows.layer], KV_HEADS[rows.layer], rows.page
    draw = partial(torch.randn, dtype=torch.bfloat16, device="cuda", generator=generator)
    start = torch.tensor([rows.prefix // (1 + b if rows.uneven else 1) for b in range(B)], device="cuda")
    positions = start[:, None] + torch.arange(S, device="cuda")
    kv_end = positions + 1 if rows.causal else (start[:, None] + S).expand(B, S).contiguous()
    sliding = rows.layer == "sliding"
    lowest = positions if rows.causal else start[:, None].expand(B, S)
    kv_start = (lowest - WINDOW + 1).clamp(min=0) if sliding else torch.zeros_like(kv_end)
    base = (start - WINDOW + 1).clamp(min=0) // page * page if sliding else torch.zeros_like(start)
    pages = math.ceil(int((start - base).max()) / page)
    table = torch.randperm(B * pages, device="cuda").view(B, pages)
    pools = [draw(max(1, B * pages), page, kv_heads, D) for _ in range(2)]
    for b in range(B if pages else 0):
        beyond = torch.arange(pages * page, device="cuda") >= start[b] - base[b]
        for pool in pools:
            pool[table[b]] = pool[table[b]].masked_fill(beyond.view(pages, page, 1, 1), torch.nan)
    if rows.rising:
        pools[0][table] *= torch.linspace(0.25, 8, pages, device="cuda").to(pools[0].dtype).view(-1, 1, 1, 1)
    # Scores with a standard deviation of 3: neither flat nor one key alone.
    query = 3 / D**0.5 * draw(B, S, HEADS, D)
    own = [draw(B, S, kv_heads, D) for _ in range(2)]
    return [query, *own, *pools, table, base, start, kv_start, kv_end]


def error_of(arguments: list[Tensor], scratch_bytes: int) -> tuple[float, float]:
    """Largest error against the reference in float32, and the bound that roundings explain.

    Weights, splits and the result are each rounded to bfloat16, relatively by 2^-9 at most, and weights add up to 1; a
    float32 score of `D` terms is off by less than `D * 2^-24` times the sum of their magnitudes.
    """
    got = canvas_attention(*arguments, scratch_bytes=scratch_bytes)
    wide = [x.nan_to_num().float() if x.is_floating_point() else x for x in arguments]
    true = reference.canvas_attention(*wide)
    query, key, key_pool = wide[0], wide[1], wide[3]
    largest_key = max(float(keys.norm(dim=-1).max()) for keys in (key, key_pool))
    magnitude = float(query.norm(dim=-1).max()) * largest_key
    values = max(float(wide[2].abs().max()), float(wide[4].abs().max()))
    return float((got - true).abs().max()), (3 * 2**-9 + 2 * query.shape[3] * 2**-24 * magnitude) * values


CHECKS = [
    Rows("sliding", 0),
    Rows("sliding", 100),
    Rows("sliding", 5000),
    Rows("sliding", 3000, batch=3, uneven=True),
    Rows("sliding", 1500, tokens=512, causal=True),
    Rows("sliding", 0, tokens=4096, causal=True),
    Rows("sliding", 700, tokens=77, causal=True),
    Rows("full", 0),
    Rows("full", 1000),
    Rows("full", 8205),
    Rows("full", 3000, batch=3, uneven=True),
    Rows("full", 300, tokens=512, causal=True),
    Rows("full", 700, tokens=77, causal=True),
    Rows("full", 65536),
    Rows("full", 20000, rising=True),
    Rows("sliding", 5000, rising=True),
    Rows("sliding", 5000, page=64),
    Rows("full", 8205, page=64),
    Rows("full", 3000, batch=3, uneven=True, page=64),
]


def check() -> list[dict[str, object]]:
    """Compares every call of `CHECKS`, those of full layers in chunks too."""
    results = []
    for rows in CHECKS:
        arguments = random_call(rows, torch.Generator("cuda").manual_seed(rows.prefix))
        for scratch in (kernel.SCRATCH_BYTES, 8 << 20) if rows.layer == "full" else (kernel.SCRATCH_BYTES,):
            error, bound = error_of(arguments, scratch)
            failed = not error <= bound
            print(
                f"{'FAILED' if failed else 'ok':6} {rows.name} (scratch {scratch >> 20} MB): "
                f"{error:.2e} (at most {bound:.2e})",
                flush=True,
            )
            results.append({**asdict(rows), "scratch": scratch, "error": error, "bound": bound, "failed": failed})
    return results


TIMED = [
    *(Rows(layer, prefix) for layer in LAYERS for prefix in (0, 1024, 8192, 65536, 262144 - CANVAS)),
    *(Rows(layer, 1024, batch) for layer in LAYERS for batch in (2, 4, 8, 16)),
    *(Rows(layer, prefix, tokens=2048, causal=True) for layer in LAYERS for prefix in (0, 6144)),
    *(Rows(layer, 0, tokens=8192, causal=True) for layer in LAYERS),
    *(Rows("full", prefix, page=64) for prefix in (8192, 262144 - CANVAS)),
]  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """What the GPU does at most, measured in the same run."""

    copy: float
    matrix: float


def measure(rows: Rows, limits: Limits, replays: int = 5) -> dict[str, object]:
    """Median time of a call, and the floor: its bytes at the copy's rate or its operations at the product's."""
    arguments = random_call(rows, torch.Generator("cuda").manual_seed(1))
    seen = arguments[9] - arguments[8]
    operations = 4 * HEADS * HEAD_DIM[rows.layer] * int(seen.sum())
    keys = int((arguments[9].amax(1) - arguments[8].amin(1)).sum())
    read = 2 * 2 * keys * KV_HEADS[rows.layer] * HEAD_DIM[rows.layer] + 2 * 2 * arguments[0].numel()
    cached = arguments[3].nbytes + arguments[4].nbytes
    copies = min(LAYERS[rows.layer], max(1, ROTATED_BYTES // cached))
    calls = [partial(canvas_attention, *arguments)]
    for _ in range(copies - 1):
        pools = [arguments[3].clone(), arguments[4].clone()]
        calls.append(partial(canvas_attention, *arguments[:3], *pools, *arguments[5:]))
    seconds = graph_seconds(calls, replays)
    floor = max(read / limits.copy, operations / limits.matrix)
    return {**asdict(rows), "seconds": seconds, "floor": floor, "bytes": read, "operations": operations}


def line(rows: Rows, row: dict[str, object]) -> str:
    """One measured call in words."""
    seconds, floor = float(str(row["seconds"])), float(str(row["floor"]))
    operations, read = float(str(row["operations"])), float(str(row["bytes"]))
    return (
        f"{rows.name}: {seconds * 1e6:9.1f} us a layer (floor {floor * 1e6:8.1f}), {LAYERS[rows.layer]:2} layers "
        f"{seconds * LAYERS[rows.layer] * 1e3:7.3f} ms, {read / seconds / 1e9:6.0f} GB/s, "
        f"{operations / seconds / 1e12:5.0f} TFLOP/s"
    )


FUSED = [
    Tiles(rows, keys, 256, 256, warps, stages, resident)
    for rows, keys, warps, stages, resident in (
        (128, 32, 8, 4, 1), (128, 64, 8, 2, 1), (128, 32, 8, 3, 1), (64, 32, 4, 2, 2), (64, 64, 4, 2, 1),
    )
]  # fmt: skip
WIDE = [
    (
        Tiles(rows, keys, 64, columns, warps, stages, resident),
        Tiles(rows, keys, step, columns, last_warps, last_stages, last_resident),
    )
    for rows, keys, warps, stages, resident, step, columns, last_warps, last_stages, last_resident in (
        (128, 256, 8, 4, 1, 64, 256, 8, 4, 1), (128, 256, 8, 4, 1, 32, 256, 8, 7, 1),
        (128, 128, 4, 3, 2, 64, 256, 8, 4, 1), (128, 128, 4, 3, 2, 32, 256, 8, 8, 1),
        (128, 256, 8, 4, 1, 32, 128, 4, 6, 2), (128, 128, 8, 4, 1, 64, 256, 8, 4, 1),
    )
]  # fmt: skip
"""The first of each are those of the tables, and of the wide ones the second too: those of long prefixes."""

TUNED: list[tuple[Rows, Sequence[Tiles | tuple[Tiles, Tiles]]]] = [
    (Rows("full", 262144 - CANVAS), WIDE),
    (Rows("sliding", 1024), FUSED),
    (Rows("sliding", 1024, batch=8), FUSED),
    (Rows("full", 1024), WIDE),
    (Rows("full", 1024, batch=8), WIDE),
    (Rows("sliding", 0, tokens=2048, causal=True), FUSED),
    (Rows("full", 6144, tokens=2048, causal=True), WIDE),
]
"""What candidates are timed at, the most telling first."""

TUNING_SECONDS = 75.0
"""After which no more candidates are begun; one takes 5 s at most."""


@contextmanager
def tiles_of(candidate: Tiles | tuple[Tiles, Tiles]) -> Iterator[None]:
    """The kernel with other tiles than its tables say."""
    name = "fused_tiles" if isinstance(candidate, Tiles) else "wide_tiles"
    with patch.object(kernel, name, lambda *_, **__: candidate):
        yield


def tune(limits: Limits) -> list[dict[str, object]]:
    """Times the candidates at a few calls, each kernel apart too."""
    results: list[dict[str, object]] = []
    deadline = time.monotonic() + TUNING_SECONDS
    for rows, candidates in TUNED:
        for candidate in candidates:
            if time.monotonic() > deadline:
                print(f"{rows.name}: no time left", flush=True)
                return results
            try:
                with tiles_of(candidate):
                    row = measure(rows, limits, replays=3)
                    row["kernels"] = kernel_microseconds(rows)
            except triton.runtime.errors.OutOfResources as error:
                print(f"{candidate}: {error}")
                continue
            print(f"{line(rows, row)}  {row['kernels']}  {_in_short(candidate)}", flush=True)
            results.append({**row, "tiles": str(candidate)})
            torch.cuda.empty_cache()
    return results


def kernel_microseconds(rows: Rows, calls: int = 3) -> dict[str, float]:
    """Time that a call spends in each kernel, all its launches together; with overlap, waiting is counted in."""
    arguments = random_call(rows, torch.Generator("cuda").manual_seed(1))
    canvas_attention(*arguments)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            canvas_attention(*arguments)
        torch.cuda.synchronize()
    times = {event.key: event.device_time_total / calls for event in profile.key_averages()}
    return {name: round(microseconds, 1) for name, microseconds in times.items() if microseconds}


def _in_short(candidate: Tiles | tuple[Tiles, Tiles]) -> str:
    each: tuple[Tiles, ...] = (candidate,) if isinstance(candidate, Tiles) else candidate
    return ", ".join(
        f"{t.rows}x{t.keys} step {t.step} columns {t.columns} warps {t.warps} stages {t.stages} resident {t.resident}"
        for t in each
    )


def main() -> int:
    """Command line; 1 where a check fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with float32 in place of timing")
    parser.add_argument("--tune", action="store_true", help="time candidate tiles")
    parser.add_argument("--out", type=Path, help="file for the figures, as JSON")
    options = parser.parse_args()
    begin = time.monotonic()
    print(f"torch {torch.__version__}, Triton {triton.__version__}, {torch.cuda.get_device_name()}", flush=True)
    result = check() if options.check else _timed(options.tune)
    print(f"{time.monotonic() - begin:.0f} s")
    if options.out:
        options.out.write_text(json.dumps(result, indent=1))
    return int(any(row.get("failed") for row in result))


def _timed(tuning: bool) -> list[dict[str, object]]:
    limits = Limits(copy_bandwidth(), matrix_rate())
    print(f"copies {limits.copy / 1e12:.2f} TB/s, products {limits.matrix / 1e12:.0f} TFLOP/s", flush=True)
    if tuning:
        return tune(limits)
    results = []
    for rows in TIMED:
        results.append(measure(rows, limits))
        print(line(rows, results[-1]), flush=True)
        torch.cuda.empty_cache()
    return results


if __name__ == "__main__":
    raise SystemExit(main())
