"""The experts' kernels on one GPU: `python -m benchmarks.gpu.experts [--check] [--tune] [--library] [--out FILE]`.

Checks them against float32, or times the operation with the tiles that its table chooses, beside the time that reading
the weights or multiplying must take; with `--tune` also every candidate tile of either product. Weights are those of
several layers in turn, so that none is found in the cache. `--library` times torch's grouped product too.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
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
from benchmarks.gpu.expert_library import library_error, library_ffn, library_products, sorted_pairs
from benchmarks.gpu.expert_tuning import compile_all, tune
from benchmarks.gpu.timing import Limits, graph_seconds
from plugins_trt.expert_ffn.dispatch import dispatch
from plugins_trt.expert_ffn.kernel import sum_of_parts
from plugins_trt.expert_ffn.tiles import choose_tiles
from plugins_trt.expert_routing.kernel import expert_routing
from plugins_trt.gpu import Gpu, gpu_of
from plugins_trt.quantized_linear.kernel import quantize_rows

TOKENS = (256, 512, 1024, 2048, 4096, 8192)

ROTATED = 3
"""Layers whose weights are read in turn; one of them is many times the L2 cache already."""


def measure(layers: Sequence[Layer], tokens: int, limits: Limits) -> dict[str, object]:
    """Times the whole operation with the tiles of the table and prints it beside its floor."""
    x, ids, weights = random_tokens(tokens, torch.Generator("cuda").manual_seed(2))
    seconds = graph_seconds([partial(layer.operation, x, ids, weights, *layer.tensors) for layer in layers])
    layer, counts = layers[0], torch.bincount(ids.flatten(), minlength=EXPERTS)
    operations = 2 * tokens * TOP_K * 3 * INTERMEDIATE * HIDDEN
    read = layer.bytes * float((counts > 0).float().mean())
    floor = max(read / limits.read, operations / limits.matrix)
    print(
        f"{layer.encoding:12} {tokens:5} tokens, rows an expert {int(counts.min()):3} to {int(counts.max()):3}: "
        f"{seconds * 1e6:8.1f} us a layer (floor {floor * 1e6:7.1f}), {seconds * LAYERS * 1e3:6.2f} ms a model, "
        f"{read / seconds / 1e12:5.2f} TB/s, {operations / seconds / 1e12:6.1f} TFLOP/s",
        flush=True,
    )
    tiles = choose_tiles(tokens * TOP_K / EXPERTS, layer.weights.encoding, x.element_size(), gpu_of(x.device))
    return {
        "encoding": layer.encoding, "tokens": tokens, "seconds": seconds, "floor": floor, "bytes": read,
        "operations": operations, "rows_per_expert": [int(counts.min()), int(counts.max())], "tiles": asdict(tiles),
    }  # fmt: skip


def measure_library(layers: Sequence[Layer], tokens: int) -> dict[str, object]:
    """Times the same in bf16 with torch's grouped product."""
    arguments = random_tokens(tokens, torch.Generator("cuda").manual_seed(2))
    error = library_error(layers[0], *arguments)
    seconds = graph_seconds([partial(library_ffn, *arguments, *layer.tensors) for layer in layers])
    x, ids, _ = arguments
    order, ends = sorted_pairs(ids)
    rows = x[order // TOP_K], x[order // TOP_K, :INTERMEDIATE].contiguous(), ends
    products = graph_seconds([partial(library_products, *rows, *layer.tensors) for layer in layers])
    print(
        f"torch grouped_mm {tokens:5} tokens: {seconds * 1e6:8.1f} us a layer, its two products alone "
        f"{products * 1e6:8.1f}; differs from the kernels by {error:.1e}",
        flush=True,
    )
    return {"name": "grouped_mm", "tokens": tokens, "seconds": seconds, "products": products, "error": error}


def measure_small(tokens: int) -> Iterator[dict[str, object]]:
    """Times what stands around the two products."""
    x, ids, _ = random_tokens(tokens, torch.Generator("cuda").manual_seed(2))
    logits, parts = (
        torch.randn_like(x[:, :EXPERTS].contiguous()),
        x.unsqueeze(1).repeat(1, TOP_K, 1),
    )
    for name, call in (
        ("routing", partial(expert_routing, logits, logits[0].contiguous(), TOP_K)),
        ("dispatch", partial(dispatch, ids, EXPERTS, 32)),
        ("sum of parts", partial(sum_of_parts, parts)),
        ("quantised x", partial(quantize_rows, x)),
    ):
        seconds = graph_seconds([call] * 20)
        print(f"{name:12} {tokens:5} tokens: {seconds * 1e6:8.1f} us", flush=True)
        yield {"name": name, "tokens": tokens, "seconds": seconds}


def main() -> int:
    """Command line; 1 where a check fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with float32 in place of timing")
    parser.add_argument(
        "--encodings", nargs="+", choices=ENCODINGS, default=ENCODINGS, help="encodings to check or time"
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="numbers of tokens to time")
    parser.add_argument("--tune", action="store_true", help="time every candidate tile too")
    parser.add_argument("--library", action="store_true", help="time torch's grouped product in bf16 too")
    parser.add_argument("--apart", action="store_true", help="start no kernel before the one before it has ended")
    parser.add_argument("--seconds", type=float, default=60, help="time after which no more candidates are timed")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 14), help="processes that compile")
    parser.add_argument("--out", type=Path, help="file for the figures, as JSON")
    options = parser.parse_args()
    if options.library and "bf16" not in options.encodings:
        parser.error("--library times bf16, which --encodings leaves out")
    if options.apart:
        Gpu.overlaps_kernels = property(lambda _: False)  # type: ignore[method-assign, assignment]
    begin = time.monotonic()
    print(f"torch {torch.__version__}, Triton {triton.__version__}", flush=True)
    result, failed = _checked(options.encodings) if options.check else (_timed(options), False)
    print(f"{time.monotonic() - begin:.0f} s")
    if options.out:
        options.out.write_text(json.dumps(result, indent=1))
    return int(failed)


def _checked(encodings: Sequence[str]) -> tuple[list[dict[str, object]], bool]:
    rows, failed = [], False
    for name, value, bound in check(encodings, torch.Generator("cuda").manual_seed(0)):
        wrong = not value <= bound
        failed |= wrong
        print(f"{'FAILED' if wrong else 'ok':6} {name}: {value:.2e} (at most {bound:.2e})", flush=True)
        rows.append({"name": name, "value": value, "bound": bound})
    return rows, failed


def _timed(options: argparse.Namespace) -> dict[str, object]:
    deadline = time.monotonic() + options.seconds
    if options.tune:
        compile_all(options.encodings, options.tokens, options.jobs)
        print(f"compiled; {deadline - time.monotonic():.0f} s left", flush=True)
    limits = Limits.measured()
    print(f"{torch.cuda.get_device_name()}: {limits}", flush=True)
    generator = torch.Generator("cuda").manual_seed(1)
    layers = {encoding: [random_layer(encoding, generator) for _ in range(ROTATED)] for encoding in options.encodings}
    table = [measure(layers[encoding], tokens, limits) for encoding in options.encodings for tokens in options.tokens]
    library = [measure_library(layers["bf16"], tokens) for tokens in options.tokens if options.library]
    return {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "overlap": not options.apart, "limits": asdict(limits), "table": table,
        "small": [*library, *measure_small(256)],
        "candidates": [*tune(layers, options.tokens, deadline)] if options.tune else [],
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
