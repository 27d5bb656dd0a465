"""The FP8 linear layer on one GPU: `python -m benchmarks.gpu.linear`.

The products of the released model's dense layers, those of one input joined (query, key and value; gate and up) as the
engine does, at the rows of one canvas and of eight. Compared: PyTorch's bfloat16 product, PyTorch's scaled
8-bit product, and this project's kernel in both variants over several tiles. Calls rotate over copies of the weight
that together exceed the L2 cache several times, are recorded in one CUDA graph, and are timed with CUDA events.
`--check` compares with the reference in float32 instead.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import click
import torch
import triton
from torch import Tensor

from benchmarks.gpu.timing import graph_seconds, matrix_rate, read_bandwidth
from plugins_trt.quantized_linear import kernel, reference
from plugins_trt.quantized_linear.kernel import Tile

SHAPES = {
    "sliding query, key, value": (8192, 2816),
    "gate, up": (4224, 2816),
    "sliding output": (2816, 4096),
    "down": (2816, 2112),
    "full query, key": (9216, 2816),
    "full output": (2816, 8192),
}
"""Channels and depth of each product, those that occur most often first."""
ROWS = (256, 2048)
ROTATED_BYTES = 400 << 20
"""Of weight copies together, several times an H200's L2 cache of 50 MB."""
TILES = {
    True: [
        Tile(64, 128, 128, 1, 4, 4, exact=False),
        Tile(64, 128, 128, 1, 4, 4),
        Tile(64, 128, 128, 2, 4, 4, exact=False),
        Tile(64, 64, 128, 1, 4, 4, exact=False),
        Tile(64, 64, 256, 1, 4, 4, exact=False),
        Tile(64, 64, 128, 2, 4, 4, exact=False),
        Tile(128, 128, 128, 1, 8, 4, exact=False),
        Tile(128, 128, 128, 1, 8, 4),
        Tile(128, 256, 128, 1, 8, 3, exact=False),
        Tile(64, 128, 128, 1, 4, 6, exact=False),
        Tile(64, 256, 128, 1, 8, 4, exact=False),
        Tile(64, 128, 256, 1, 4, 3, exact=False),
        Tile(64, 128, 128, 3, 4, 4, exact=False),
        Tile(64, 128, 128, 4, 4, 4, exact=False),
        Tile(64, 256, 128, 2, 8, 4, exact=False),
        Tile(64, 256, 128, 4, 8, 4, exact=False),
        Tile(128, 128, 128, 2, 8, 4, exact=False),
        Tile(128, 128, 128, 4, 8, 4, exact=False),
        Tile(128, 128, 256, 1, 8, 3, exact=False),
    ],
    False: [
        Tile(64, 128, 64, 1, 4, 4),
        Tile(64, 256, 64, 2, 8, 4),
        Tile(128, 128, 64, 1, 8, 4),
        Tile(128, 256, 64, 1, 8, 4),
    ],
}
"""Candidates by whether the activations are 8-bit floats too."""


@dataclass(frozen=True)
class Timing:
    """One timed product."""

    shape: str
    rows: int
    variant: str
    microseconds: float
    floor: float
    """Microseconds that reading the weight, or doing the products, takes at the measured rates."""


@dataclass(frozen=True)
class Rates:
    """What the device reaches, measured in this run."""

    bytes_per_second: float
    bf16: float
    """Operations a second of a large bfloat16 product."""
    fp8: float


@dataclass(frozen=True)
class Layer:
    """One layer's operands: copies of the weight in both formats, and the activations in both."""

    x: Tensor
    wide: list[Tensor]
    codes: list[Tensor]
    scale: Tensor


@click.command()
@click.option("--check", is_flag=True, help="Compare with the reference in float32, time nothing.")
@click.option("--seconds", default=40.0, show_default=True, help="No further product is timed after this long.")
@click.option("--rows", "some_rows", multiple=True, type=int, default=ROWS, show_default=True, help="To time.")
@click.option("--shown", default=8, show_default=True, help="Variants to print of a product, the fastest ones.")
@click.option("--out", type=click.Path(path_type=Path), help="Write every timing to this file as JSON.")
def main(check: bool, seconds: float, some_rows: tuple[int, ...], shown: int, out: Path | None) -> None:
    """Check or time the FP8 linear layer at the released model's shapes."""
    if not torch.cuda.is_available():
        raise click.ClickException("no CUDA device here")
    click.echo(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    if check:
        check_all()
        return
    end = time.monotonic() + seconds
    rates = measure_rates()
    click.echo(
        f"reads {rates.bytes_per_second / 1e12:.2f} TB/s, products: bfloat16 {rates.bf16 / 1e12:.0f} TFLOP/s, "
        f"8-bit {rates.fp8 / 1e12:.0f} TFLOP/s"
    )
    compile_all()
    timings: list[Timing] = []
    for rows in some_rows:
        for shape in SHAPES:
            if time.monotonic() > end:
                click.echo(f"{shape}, {rows} rows: not timed, {seconds:g} s are over")
                continue
            timings += time_shape(shape, rows, rates, shown)
    if out is not None:
        out.write_text(json.dumps({"rates": asdict(rates), "timings": [asdict(row) for row in timings]}, indent=2))


def check_all() -> None:
    """Print how far each variant's products, and the activations' codes, lie from their references.

    The reference's codes come from the CPU, which divides exactly: where a number lies half-way between two codes, a
    scale that is off by its last bit decides otherwise.
    """
    # The engine leaves quantising to the compiler, which must make the same codes.
    compiled_rows = torch.compile(reference.quantize_rows)
    for shape, (channels, depth) in SHAPES.items():
        for rows in (1, *ROWS):
            layer = make_layer(channels, depth, rows, copies=1)
            codes, row_scale = kernel.quantize_rows(layer.x)
            exact_codes, exact_scale = reference.quantize_rows(layer.x.cpu())
            differ = (codes.cpu().float() != exact_codes.float()).sum() + (row_scale.cpu() != exact_scale).sum()
            wrong = f"codes that differ: {int(differ)}, {verdict(not differ)}"
            compiled_codes, compiled_scale = compiled_rows(layer.x)
            differ = (compiled_codes.cpu().float() != exact_codes.float()).sum()
            differ += (compiled_scale.cpu() != exact_scale).sum()
            wrong += f"; compiled: {int(differ)}, {verdict(not differ)}"
            for dynamic, x in ((False, layer.x.float()), (True, codes.float() * row_scale[:, None])):
                expected = reference.linear_fp8(x, layer.codes[0], layer.scale, dynamic_activations=False)
                actual = kernel.linear_fp8(layer.x, layer.codes[0], layer.scale, dynamic).float()
                error = ((actual - expected).square().mean() / expected.square().mean()).sqrt().item()
                # Rounding the result to bfloat16 is off by 2^-9 of it at most, and float32 sums add next to nothing. A
                # Hopper matrix unit adds 32 products of 8-bit floats at a time and cuts the sum off after about 14 bits
                # (DeepSeek-AI 2024, "DeepSeek-V3", section 3.5.2); rounding to 8 bits itself is off by 4% here.
                bound = 2.0**-9 + (depth / 32 * 2.0**-14 if dynamic else 0.0)
                wrong += f"; {'8-bit' if dynamic else 'weight-only'} {error:.2e}, {verdict(error <= bound)}"
            click.echo(f"{shape}, {rows} rows: {wrong}")


def verdict(good: bool | Tensor) -> str:
    """How a line that was checked ends."""
    return "ok" if good else "WRONG"


def make_layer(channels: int, depth: int, rows: int, copies: int | None = None) -> Layer:
    """Random operands on the device."""
    device = torch.device("cuda")
    copies = copies or max(2, ROTATED_BYTES // (channels * depth))
    x = torch.randn(rows, depth, device=device, dtype=torch.bfloat16)
    wide = [torch.randn(channels, depth, device=device, dtype=torch.bfloat16) for _ in range(copies)]
    codes = [(weight * 50).to(torch.float8_e4m3fn) for weight in wide]
    return Layer(x, wide, codes, torch.rand(channels, device=device) / 100)


def time_shape(shape: str, rows: int, rates: Rates, shown: int) -> list[Timing]:
    """Time every variant of one product and print a line for each of the `shown` fastest and for what is chosen."""
    channels, depth = SHAPES[shape]
    layer = make_layer(channels, depth, rows)
    operations = 2 * rows * channels * depth
    timings = []
    for variant, run in variants(layer):
        stored = channels * depth * (2 if "bfloat16" in variant else 1)
        rate = rates.bf16 if "bfloat16" in variant or "weight-only" in variant else rates.fp8
        floor = max(stored / rates.bytes_per_second, operations / rate) * 1e6
        try:
            microseconds = graph_seconds([partial(run, i) for i in range(len(layer.codes))]) * 1e6
        except Exception as error:
            click.echo(f"{shape}, {rows} rows, {variant}: failed: {type(error).__name__}: {str(error)[:200]}")
            continue
        timings.append(Timing(shape, rows, variant, microseconds, floor))
    ranked = sorted(timings, key=lambda timing: timing.microseconds)
    for timing in (timing for i, timing in enumerate(ranked) if i < shown or "chosen" in timing.variant):
        rate = operations / timing.microseconds / 1e6
        click.echo(
            f"{shape}, {rows} rows: {timing.microseconds:6.2f} us, floor {timing.floor:5.2f}, {rate:4.0f} TFLOP/s, "
            f"{timing.variant}"
        )
    return timings


def variants(layer: Layer) -> Iterator[tuple[str, Callable[[int], object]]]:
    """Name of each variant and what runs it on copy `i`."""
    x, wide, codes, scale = layer.x, layer.wide, layer.codes, layer.scale
    x_codes, x_scale = kernel.quantize_rows(x)
    yield "torch bfloat16", lambda i: x @ wide[i].T
    yield (
        "torch scaled 8-bit, activations quantised before",
        lambda i: scaled_mm(x_codes, x_scale, codes[i], scale),
    )
    yield "quantising the activations alone", lambda i: kernel.quantize_rows(x)
    yield "kernel as chosen, 8-bit", lambda i: kernel.linear_fp8(x, codes[i], scale, True)
    yield "kernel as chosen, weight-only", lambda i: kernel.linear_fp8(x, codes[i], scale, False)
    for tile in TILES[True]:
        yield f"8-bit {tile}", partial(multiply, x_codes, x_scale, layer, tile)
    for tile in TILES[False]:
        yield f"weight-only {tile}", partial(multiply, x, None, layer, tile)


def compile_all() -> None:
    """Compile every tile at once, for most of the time would go there; what fails here is reported when it is timed."""

    def run(depth: int, dynamic: bool, tile: Tile) -> None:
        layer = make_layer(tile.weights, depth, ROWS[0], copies=1)
        x, x_scale = kernel.quantize_rows(layer.x) if dynamic else (layer.x, None)
        with suppress(Exception):
            multiply(x, x_scale, layer, tile, 0)

    depths = {depth for _, depth in SHAPES.values()}
    with ThreadPoolExecutor(8) as threads:
        for depth, (dynamic, tiles) in itertools.product(depths, TILES.items()):
            for tile in tiles:
                threads.submit(run, depth, dynamic, tile)


def multiply(x: Tensor, x_scale: Tensor | None, layer: Layer, tile: Tile, copy: int) -> Tensor:
    """The kernel's product alone, by one tile."""
    return kernel.multiply(x, x_scale, layer.codes[copy], layer.scale, layer.x.dtype, tile)


def scaled_mm(x_codes: Tensor, x_scale: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """PyTorch's own product of 8-bit floats with a scale a row and a channel."""
    product: Tensor = torch._scaled_mm(
        x_codes,
        codes.T,
        scale_a=x_scale[:, None],
        scale_b=scale[None, :],
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return product


def measure_rates() -> Rates:
    """The device's read bandwidth and matrix rates on random data."""
    size = 8192
    codes = torch.randn(size, size, device="cuda").to(torch.float8_e4m3fn)
    ones = torch.ones(size, device="cuda")
    fp8 = 2 * size**3 / graph_seconds([lambda: scaled_mm(codes, ones, codes, ones)] * 4)
    return Rates(read_bandwidth(), matrix_rate(), fp8)


if __name__ == "__main__":
    main()
