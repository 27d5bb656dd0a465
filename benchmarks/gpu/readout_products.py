"""Ways to multiply softmax weights with the embedding: `python -m benchmarks.gpu.readout_products [--out FILE]`.

The product sums 262144 terms for few results, so that all depends on how its sum is cut into parts. Times the library's
own choice, the library with parts cut by hand, and a Triton kernel that writes parts in float32; errors are relative to
a product in float32.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.gpu.readout import HIDDEN, VOCABULARY
from benchmarks.gpu.timing import graph_seconds


@triton.jit  # type: ignore[untyped-decorator]
def multiply_parts(  # type: ignore[no-untyped-def]
    LEFT, RIGHT, OUT, M, N: tl.constexpr, K: tl.constexpr, steps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`[M, K] @ [K, N]`: one tile, one part of the sum; `OUT` is `[parts, M, N]` float32."""
    tiles = tl.cdiv(M, BLOCK_M)
    row = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) // tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1).to(tl.int64)
    inner = tl.arange(0, BLOCK_K)
    left = LEFT + row.to(tl.int64)[:, None] * K + part * steps * BLOCK_K + inner[None, :]
    right = RIGHT + (part * steps * BLOCK_K + inner)[:, None] * N + column[None, :]
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(tl.minimum(steps, K // BLOCK_K - part * steps)):
        weights = tl.load(left, mask=(row < M)[:, None], other=0.0)
        sums = tl.dot(weights, tl.load(right, mask=(column < N)[None, :], other=0.0), sums)
        left += BLOCK_K
        right += BLOCK_K * N
    out = OUT + (part * M + row)[:, None] * N + column[None, :]
    tl.store(out, sums, mask=(row < M)[:, None] & (column < N)[None, :])


def in_triton(weights: Tensor, embedding: Tensor, rows: int, columns: int, parts: int, stages: int) -> Tensor:
    """The Triton kernel and the sum of its parts."""
    M, K = weights.shape
    N = embedding.shape[1]
    out = torch.empty(parts, M, N, dtype=torch.float32, device=weights.device)
    grid = (triton.cdiv(M, rows) * triton.cdiv(N, columns), parts)
    steps = triton.cdiv(K // 64, parts)
    multiply_parts[grid](weights, embedding, out, M, N, K, steps, rows, columns, 64, num_warps=8, num_stages=stages)
    return out.sum(0)


def in_batches(weights: Tensor, embedding: Tensor, parts: int) -> Tensor:
    """One library product a part, all in one call."""
    left = weights.view(weights.shape[0], parts, -1).transpose(0, 1)
    return torch.bmm(left, embedding.view(parts, -1, embedding.shape[1]), out_dtype=torch.float32).sum(0)


@contextmanager
def _float32_parts() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before


def _with_float32_parts(weights: Tensor, embedding: Tensor) -> Tensor:
    with _float32_parts():
        return weights @ embedding


def _transposed(weights: Tensor, embedding: Tensor) -> Tensor:
    return (embedding.T @ weights.T).T


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "library": torch.mm,
    "library, parts in float32": _with_float32_parts,
    "library, transposed": _transposed,
    **{f"library, {parts} parts": partial(in_batches, parts=parts) for parts in (4, 8, 16)},
    **{
        f"Triton {rows} x {columns}, {parts} parts, {stages} stages": partial(
            in_triton, rows=rows, columns=columns, parts=parts, stages=stages
        )
        for rows, columns, parts, stages in ((128, 256, 6, 3), (128, 256, 6, 4), (256, 128, 6, 4), (128, 256, 12, 4))
    },
}


def measure(M: int) -> list[dict[str, object]]:
    """Times all ways for `M` positions."""
    embedding = torch.randn(VOCABULARY, HIDDEN, dtype=torch.bfloat16, device="cuda") / HIDDEN**0.5
    weights = torch.softmax(2 * torch.randn(M, VOCABULARY, dtype=torch.bfloat16, device="cuda"), -1)
    true = torch.zeros(M, HIDDEN, device="cuda")
    for first in range(0, VOCABULARY, 16384):
        true += weights[:, first : first + 16384].float() @ embedding[first : first + 16384].float()
    rows: list[dict[str, object]] = []
    for name, way in WAYS.items():
        try:
            error = float((way(weights, embedding).float() - true).norm() / true.norm())
            seconds = graph_seconds([partial(way, weights, embedding)] * 2)
        except (RuntimeError, TypeError, triton.runtime.errors.OutOfResources) as failure:
            print(f"{M:4} positions, {name}: {failure}", flush=True)
            continue
        rate = 2 * M * VOCABULARY * HIDDEN / seconds / 1e12
        print(f"{M:4} positions, {name}: {seconds * 1e3:6.3f} ms, {rate:4.0f} TFLOP/s, error {error:.1e}", flush=True)
        rows.append({"positions": M, "way": name, "seconds": seconds, "error": error})
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="file for the figures, as JSON")
    options = parser.parse_args()
    rows = [row for M in (256, 512) for row in measure(M)]
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
