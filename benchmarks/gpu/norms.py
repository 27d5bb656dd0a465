"""Norms and rotation of the heads on one GPU: `python -m benchmarks.gpu.norms [--out FILE]`.

Checks the kernel in bfloat16 at the released shape against float64, and times it beside what `torch.compile` makes of
the reference.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu.timing import graph_seconds
from plugins_trt.head_norm import kernel, reference

HEADS, EPS = 16, 1e-6
SHAPES = {"sliding": (25, 8, 256), "full": (5, 2, 512)}
"""Layers, K/V heads and head size."""

Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float]


def random_arguments(layer: str, batch: int) -> Arguments:
    """Projections of `batch` canvases, slices of one product as an engine makes them."""
    _, kv_heads, head_dim = SHAPES[layer]
    sizes = [HEADS, kv_heads] + [kv_heads] * (layer == "sliding")
    joined = torch.randn(batch, 256, sum(sizes), head_dim, dtype=torch.bfloat16, device="cuda")
    parts = torch.split(joined, sizes, dim=2)
    weights = torch.randn(2, head_dim, dtype=torch.bfloat16, device="cuda")
    angles = 100 * torch.rand(batch, 256, head_dim // 2, device="cuda")
    turn = angles.cos().bfloat16(), angles.sin().bfloat16()
    return parts[0], parts[1], parts[-1], weights[0], weights[1], *turn, EPS


def error_of(arguments: Arguments) -> float:
    """Largest error in units of bfloat16's rounding of the result and a few of float32's."""
    got = kernel.head_norm(*arguments)
    true = reference.head_norm(*(x.double() if isinstance(x, Tensor) else x for x in arguments))  # type: ignore[arg-type]
    allowed = (2**-9 * other.abs() + 2**-16 * other.abs().max() for other in true)
    return max(
        float(((one.double() - other).abs() / bound).max())
        for one, other, bound in zip(got, true, allowed, strict=True)
    )


def measure(layer: str, batch: int) -> dict[str, object]:
    """Error, and median times of kernel and compiled reference."""
    arguments = random_arguments(layer, batch)
    compiled = torch.compile(reference.head_norm, dynamic=False)
    kernel_seconds = graph_seconds([partial(kernel.head_norm, *arguments)] * 20)
    compiled_seconds = graph_seconds([partial(compiled, *arguments)] * 20)
    error, layers = error_of(arguments), SHAPES[layer][0]
    print(
        f"{'FAILED' if not error <= 1 else 'ok':6} {layer:7} {batch} canvases: {kernel_seconds * 1e6:6.1f} us a layer, "
        f"compiled reference {compiled_seconds * 1e6:6.1f} us; {layers} layers "
        f"{kernel_seconds * layers * 1e3:6.3f} ms, "
        f"compiled {compiled_seconds * layers * 1e3:6.3f} ms",
        flush=True,
    )
    return {
        "layer": layer, "batch": batch, "seconds": kernel_seconds, "compiled": compiled_seconds,
        "error": error, "failed": not error <= 1,
    }  # fmt: skip


def main() -> int:
    """Command line; 1 where a check fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="file for the figures, as JSON")
    options = parser.parse_args()
    result = [measure(layer, batch) for layer in SHAPES for batch in (1, 8)]
    if options.out:
        options.out.write_text(json.dumps(result, indent=1))
    return int(any(row["failed"] for row in result))


if __name__ == "__main__":
    raise SystemExit(main())
