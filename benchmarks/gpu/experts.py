"""The experts' kernels on one GPU: `python -m benchmarks.gpu.experts [--check] [--out FILE]`.

Checks them against float32, or times each product with every candidate tile and then the whole operation with the
tiles that the table chooses, beside the time that reading the weights or multiplying must take. Weights are those of
several layers in turn, so that none is found in the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import triton

from benchmarks.gpu.expert_check import check
from benchmarks.gpu.expert_layers import (
    ENCODINGS,
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    LAYERS,
    TOP_K,
    Layer,
    random_layer,
    random_tokens,
)
from benchmarks.gpu.timing import copy_bandwidth, graph_seconds, matrix_rate, read_bandwidth
from plugins_trt.expert_ffn.dispatch import dispatch
from plugins_trt.expert_ffn.kernel import gated_states, weighted_parts
from plugins_trt.expert_ffn.tiles import Product, Tiles, choose_tiles
from plugins_trt.gpu import Gpu, gpu_of

ROTATED = 3
"""Layers whose weights are read in turn; one of them is many times the L2 cache already."""


@dataclass(frozen=True)
class Candidate:
    """One product in one tile size for one encoding."""

    encoding: str
    product: str
    block_rows: int
    tile: Product


_TILES = {
    # Weight rows, depth, warps, stages, for blocks of at most so many rows; depth in columns of bfloat16.
    32: (
        [(64, 64, 4, 3), (64, 64, 4, 4), (64, 64, 4, 5), (64, 128, 4, 3), (64, 128, 8, 3), (128, 64, 8, 3),
         (128, 64, 8, 4)],
        [(128, 64, 4, 3), (128, 64, 4, 4), (128, 64, 4, 5), (128, 64, 8, 4), (64, 64, 4, 5), (256, 64, 8, 3),
         (256, 64, 8, 4)],
    ),
    64: (
        [(64, 64, 4, 3), (64, 64, 4, 4), (64, 64, 8, 3), (128, 64, 8, 3)],
        [(128, 64, 4, 3), (128, 64, 4, 4), (128, 64, 8, 4), (256, 64, 8, 3)],
    ),
    128: (
        [(64, 64, 4, 3), (64, 64, 8, 3), (64, 64, 8, 4), (128, 64, 8, 3)],
        [(128, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 4), (256, 64, 8, 3)],
    ),
    256: ([(64, 64, 8, 3)], [(128, 64, 8, 3)]),
}  # fmt: skip

BLOCK_ROWS = {256: (16, 32), 2048: (64, 128), 8192: (128, 256), 1024: (32, 64), 512: (32, 64), 4096: (128, 256)}
"""Block sizes to try by number of tokens, the most telling numbers first."""


def candidates(encoding: str, block_rows: int) -> list[Candidate]:
    """Tile sizes worth a try for one block size; 8-bit and 4-bit weights are read twice as many columns at a time."""
    deeper = 1 if encoding == "bf16" else 2
    products = zip(
        ("gate_up", "down"), next(tiles for most, tiles in _TILES.items() if block_rows <= most), strict=True
    )
    return [
        Candidate(encoding, product, block_rows, Product(rows, depth * deeper, warps, stages))
        for product, tiles in products
        for rows, depth, warps, stages in tiles
    ]


def run(candidate: Candidate, layers: Sequence[Layer], tokens: int, generator: torch.Generator) -> float:
    """Seconds a layer of one product."""
    x, ids, weights = random_tokens(tokens, generator)
    plan = dispatch(ids, EXPERTS, candidate.block_rows)
    if candidate.product == "gate_up":
        calls = [partial(gated_states, x, plan, layer.weights, candidate.tile, TOP_K) for layer in layers]
    else:
        shape = (plan.rows.numel(), INTERMEDIATE)
        hidden = torch.randn(shape, dtype=x.dtype, device="cuda", generator=generator)
        calls = [partial(weighted_parts, hidden, plan, layer.weights, candidate.tile, weights) for layer in layers]
    return graph_seconds(calls)


def compile_all(wanted: Sequence[Candidate], jobs: int) -> None:
    """Fill Triton's cache from several processes; this one has not touched the GPU yet, so it may fork."""
    shares = [wanted[index::jobs] for index in range(jobs)]
    with ProcessPoolExecutor(jobs, mp_context=get_context("fork")) as pool:
        list(pool.map(_compile, shares))


def _compile(share: Sequence[Candidate]) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    for encoding in {candidate.encoding for candidate in share}:
        layers = [random_layer(encoding, generator)]
        for candidate in share:
            if candidate.encoding == encoding:
                _attempt(candidate, layers, 64, generator)


def _attempt(candidate: Candidate, layers: Sequence[Layer], tokens: int, generator: torch.Generator) -> float | None:
    """Seconds, or nothing where the tile does not fit this GPU."""
    try:
        return run(candidate, layers, tokens, generator)
    except triton.runtime.errors.OutOfResources:
        return None


def tune(jobs: int, deadline: float) -> list[dict[str, object]]:
    """Times every candidate and the table's choice, at as many numbers of tokens as there is time for."""
    sizes = sorted({rows for several in BLOCK_ROWS.values() for rows in several})
    compile_all([one for encoding in ENCODINGS for rows in sizes for one in candidates(encoding, rows)], jobs)
    print(f"compiled; {deadline - time.monotonic():.0f} s left", flush=True)
    generator = torch.Generator("cuda").manual_seed(1)
    layers = {encoding: [random_layer(encoding, generator) for _ in range(ROTATED)] for encoding in ENCODINGS}
    rows: list[dict[str, object]] = []
    for tokens, block_rows in BLOCK_ROWS.items():
        for encoding in ENCODINGS:
            if time.monotonic() > deadline:
                print(f"no time for {tokens} tokens in {encoding}", flush=True)
                continue
            wanted = [one for size in block_rows for one in candidates(encoding, size)]
            rows += _compare(wanted, layers[encoding], tokens, generator)
            rows.append(measure(layers[encoding], tokens))
    return rows


def _compare(
    wanted: Sequence[Candidate], layers: Sequence[Layer], tokens: int, generator: torch.Generator
) -> list[dict[str, object]]:
    timed = [(_attempt(one, layers, tokens, generator), one) for one in wanted]
    for product in ("gate_up", "down"):
        best = sorted((seconds, str(one)) for seconds, one in timed if seconds and one.product == product)
        for seconds, one in best[:4]:
            print(f"  {tokens:5} tokens {seconds * 1e6:8.1f} us  {one}", flush=True)
    return [{"tokens": tokens, "seconds": seconds, **asdict(one)} for seconds, one in timed]


def measure(layers: Sequence[Layer], tokens: int) -> dict[str, object]:
    """Times the whole operation with the tiles of the table."""
    x, ids, weights = random_tokens(tokens, torch.Generator("cuda").manual_seed(2))
    seconds = graph_seconds([partial(layer.operation, x, ids, weights, *layer.tensors) for layer in layers])
    tiles = choose_tiles(tokens * TOP_K / EXPERTS, layers[0].weights.encoding, x.element_size(), gpu_of(x.device))
    return _report(layers[0], tokens, seconds, tiles, ids)


def _report(layer: Layer, tokens: int, seconds: float, tiles: Tiles, ids: torch.Tensor) -> dict[str, object]:
    counts = torch.bincount(ids.flatten(), minlength=EXPERTS)
    operations = 2 * tokens * TOP_K * 3 * INTERMEDIATE * HIDDEN
    read = layer.bytes * float((counts > 0).float().mean())
    print(
        f"{layer.encoding:12} {tokens:5} tokens, rows an expert {int(counts.min())} to {int(counts.max())}: "
        f"{seconds * 1e6:8.1f} us a layer, {seconds * LAYERS * 1e3:6.2f} ms a model, "
        f"{read / seconds / 1e12:5.2f} TB/s, {operations / seconds / 1e12:6.1f} TFLOP/s",
        flush=True,
    )
    return {
        "encoding": layer.encoding, "tokens": tokens, "seconds": seconds, "bytes": read, "operations": operations,
        "rows_per_expert": [int(counts.min()), int(counts.max())], "tiles": asdict(tiles),
    }  # fmt: skip


def main() -> int:
    """Command line; 1 where a check fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with float32 in place of timing")
    parser.add_argument("--apart", action="store_true", help="start no kernel before the one before it has ended")
    parser.add_argument("--table", action="store_true", help="time the table's tiles alone")
    parser.add_argument(
        "--seconds", type=float, default=60, help="time after which no more numbers of tokens are timed"
    )
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 14), help="processes that compile")
    parser.add_argument("--out", type=Path, help="file for the figures, as JSON")
    options = parser.parse_args()
    if options.apart:
        Gpu.overlaps_kernels = property(lambda _: False)  # type: ignore[method-assign, assignment]
    begin = time.monotonic()
    print(f"torch {torch.__version__}, Triton {triton.__version__}", flush=True)
    result, failed = _checked() if options.check else (_timed(options), False)
    print(f"{time.monotonic() - begin:.0f} s")
    if options.out:
        options.out.write_text(json.dumps(result, indent=1))
    return int(failed)


def _checked() -> tuple[list[dict[str, object]], bool]:
    rows, failed = [], False
    for name, value, bound in check(torch.Generator("cuda").manual_seed(0)):
        wrong = not value <= bound
        failed |= wrong
        print(f"{'FAILED' if wrong else 'ok':6} {name}: {value:.2e} (at most {bound:.2e})", flush=True)
        rows.append({"name": name, "value": value, "bound": bound})
    return rows, failed


def _timed(options: argparse.Namespace) -> dict[str, object]:
    rows = _table() if options.table else tune(options.jobs, time.monotonic() + options.seconds)
    limits = {"read": read_bandwidth(), "copy": copy_bandwidth(), "matrix": matrix_rate()}
    print(
        f"{torch.cuda.get_device_name()}: reads {limits['read'] / 1e12:.2f} TB/s, copies {limits['copy'] / 1e12:.2f} "
        f"TB/s, bf16 products {limits['matrix'] / 1e12:.0f} TFLOP/s"
    )
    return {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
            "limits": limits, "rows": rows}  # fmt: skip


def _table() -> list[dict[str, object]]:
    generator, rows = torch.Generator("cuda").manual_seed(1), []
    for encoding in ENCODINGS:
        layers = [random_layer(encoding, generator) for _ in range(ROTATED)]
        rows += [measure(layers, tokens) for tokens in sorted(BLOCK_ROWS)]
    return rows


if __name__ == "__main__":
    sys.exit(main())
