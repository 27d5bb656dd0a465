"""Times every candidate tile of the experts' two products, each alone."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context

import torch
import triton

from benchmarks.gpu.expert_layers import (
    EXPERTS,
    INTERMEDIATE,
    TOP_K,
    Layer,
    random_layer,
    random_tokens,
)
from benchmarks.gpu.timing import graph_seconds
from plugins_trt.expert_ffn.dispatch import DispatchPlan, dispatch
from plugins_trt.expert_ffn.kernel import States, gated_states, hidden_buffer, weighted_parts
from plugins_trt.expert_ffn.tiles import Product
from plugins_trt.quantized_linear.kernel import quantize_rows


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
"""Of encodings that are widened."""

_STRAIGHT_TILES = {
    # Of encodings that the matrix units multiply as they are; float8 wants whole groups of 128 hidden channels.
    "bf16": {
        32: (
            [(128, 64, 8, 4), (128, 64, 8, 5), (64, 64, 4, 5), (64, 64, 4, 6), (64, 128, 4, 3), (64, 128, 4, 4),
             (128, 128, 8, 3)],
            [(128, 64, 4, 5), (128, 64, 4, 6), (128, 64, 8, 6), (64, 64, 4, 6), (64, 128, 4, 4), (128, 128, 4, 3),
             (256, 64, 8, 4)],
        ),
        96: (
            [(128, 64, 8, 3), (128, 64, 8, 4), (64, 64, 4, 3), (64, 64, 4, 4)],
            [(256, 64, 8, 3), (256, 64, 8, 4), (128, 64, 4, 4), (128, 64, 8, 4)],
        ),
        192: (
            [(128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 2), (64, 64, 4, 3), (64, 64, 8, 3)],
            [(256, 64, 8, 3), (256, 64, 8, 4), (128, 64, 4, 3), (128, 64, 4, 4), (128, 64, 8, 4)],
        ),
    },
    "fp8-dynamic": {
        32: (
            [(128, 128, 8, 3), (128, 128, 8, 4), (128, 128, 8, 5), (128, 256, 8, 2), (128, 256, 8, 3),
             (128, 128, 4, 3)],
            [(128, 128, 4, 3), (128, 128, 4, 4), (128, 128, 4, 5), (64, 128, 4, 5), (128, 128, 8, 4),
             (256, 128, 8, 3), (128, 64, 4, 6)],
        ),
        96: (
            [(128, 128, 8, 3), (128, 128, 8, 4), (128, 256, 8, 2)],
            [(128, 128, 8, 3), (128, 128, 8, 4), (64, 128, 4, 4), (128, 128, 4, 3)],
        ),
        192: (
            [(128, 128, 8, 3), (128, 128, 8, 4), (128, 256, 8, 2)],
            [(128, 128, 8, 3), (128, 128, 8, 4), (64, 128, 4, 3), (64, 128, 4, 4), (64, 128, 8, 4), (128, 128, 4, 3)],
        ),
    },
}  # fmt: skip

_OTHERS = {("int4", 32): [Candidate("int4", "down", 32, Product(128, 64, 4, 4, registers=128))]}
"""Candidates that do not come of the tables, by encoding and block size."""

BLOCK_ROWS = {256: (16, 32), 2048: (64, 128), 8192: (128, 256), 1024: (32, 64), 512: (32, 64), 4096: (128, 256)}
"""Block sizes to try by number of tokens, the most telling numbers first."""

_STRAIGHT_BLOCK_ROWS = {
    256: (16, 32), 2048: (128, 160, 192), 8192: (128, 160, 192), 1024: (64, 96), 512: (32, 48), 4096: (128, 160, 192)
}  # fmt: skip


def block_sizes(encoding: str, tokens: int) -> tuple[int, ...]:
    """Block sizes to try."""
    return (_STRAIGHT_BLOCK_ROWS if encoding in _STRAIGHT_TILES else BLOCK_ROWS)[tokens]


def candidates(encoding: str, block_rows: int) -> list[Candidate]:
    """Tile sizes worth a try for one block size; widened weights are read twice as many columns at a time."""
    straight = _STRAIGHT_TILES.get(encoding)
    table, deeper = (straight, 1) if straight else (_TILES, 2)
    products = zip(("gate_up", "down"), next(tiles for most, tiles in table.items() if block_rows <= most), strict=True)
    of_tables = [
        Candidate(encoding, product, block_rows, Product(rows, depth * deeper, warps, stages))
        for product, tiles in products
        for rows, depth, warps, stages in tiles
    ]
    return of_tables + _OTHERS.get((encoding, block_rows), [])


def run(candidate: Candidate, layers: Sequence[Layer], tokens: int, generator: torch.Generator) -> float:
    """Seconds a layer of one product."""
    x, ids, weights = random_tokens(tokens, generator)
    states = States(*quantize_rows(x)) if layers[0].weights.dynamic_activations else States(x)
    plan = dispatch(ids, EXPERTS, candidate.block_rows)
    if candidate.product == "gate_up":
        return graph_seconds(
            [partial(gated_states, states, plan, layer.weights, candidate.tile, TOP_K) for layer in layers]
        )
    hidden = _hidden(states, plan, generator)
    return graph_seconds(
        [partial(weighted_parts, hidden, plan, layer.weights, candidate.tile, weights, x.dtype) for layer in layers]
    )


def _hidden(states: States, plan: DispatchPlan, generator: torch.Generator) -> States:
    """Random hidden states, encoded as `states` are: a product of zeros is faster."""
    hidden = hidden_buffer(plan, INTERMEDIATE, states)
    normal = torch.randn(hidden.values.shape, device="cuda", generator=generator)
    hidden.values.copy_(normal if hidden.scale is None else normal * 64)
    if hidden.scale is not None:
        hidden.scale.fill_(1 / 64)
    return hidden


def compile_all(encodings: Sequence[str], tokens: Sequence[int], jobs: int) -> None:
    """Fill Triton's cache with all candidates from several processes; to be called before this one touches the GPU,
    for they are forked."""
    wanted = [
        one
        for encoding in encodings
        for rows in sorted({rows for count in tokens for rows in block_sizes(encoding, count)})
        for one in candidates(encoding, rows)
    ]
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
    except (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError):
        return None


def tune(layers: Mapping[str, Sequence[Layer]], tokens: Sequence[int], deadline: float) -> Iterator[dict[str, object]]:
    """Times the candidates, at as many numbers of tokens as there is time for; prints the best ones."""
    generator = torch.Generator("cuda").manual_seed(1)
    for count in sorted(tokens, key=list(BLOCK_ROWS).index):
        for encoding in layers:
            if time.monotonic() > deadline:
                print(f"no time for {count} tokens in {encoding}", flush=True)
                continue
            wanted = [one for size in block_sizes(encoding, count) for one in candidates(encoding, size)]
            yield from _compare(wanted, layers[encoding], count, generator)


def _compare(
    wanted: Sequence[Candidate], layers: Sequence[Layer], tokens: int, generator: torch.Generator
) -> list[dict[str, object]]:
    timed = [(_attempt(one, layers, tokens, generator), one) for one in wanted]
    for product in ("gate_up", "down"):
        best = sorted((seconds, str(one)) for seconds, one in timed if seconds and one.product == product)
        for seconds, one in best[:4]:
            print(f"  {tokens:5} tokens {seconds * 1e6:8.1f} us  {one}", flush=True)
    return [{"tokens": tokens, "seconds": seconds, **asdict(one)} for seconds, one in timed]
