"""The router's product and choice on one GPU: `python -m benchmarks.gpu.routing`, about 20 s.

Compared: PyTorch's product and this project's choice in two kernels or three, and this project's own product with
several tiles. Calls rotate over the weights of 30 layers and are recorded in one CUDA graph. `--check` compares with
float64 instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import click
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.timing import graph_seconds
from plugins_trt.expert_routing import kernel
from plugins_trt.expert_routing.kernel import Tile

EXPERTS, HIDDEN, TOP_K, LAYERS = 128, 2816, 8, 30
TOKENS = (16, 256, 512, 1024, 2048)
TILES = [
    kernel.TILE,
    Tile(tokens=32, columns=256, depth=128, warps=4, stages=2),
    Tile(tokens=32, columns=128, depth=64, warps=4, stages=2),
    Tile(tokens=16, columns=256, depth=64, warps=4, stages=4),
    Tile(tokens=64, columns=256, depth=64, warps=4, stages=4),
    Tile(tokens=64, columns=512, depth=64, warps=4, stages=4),
    Tile(tokens=128, columns=512, depth=64, warps=8, stages=4),
]


@click.command()
@click.option("--check", is_flag=True, help="Compare with float64, time nothing.")
def main(check: bool) -> None:
    """Check or time the router at the released model's shape."""
    if not torch.cuda.is_available():
        raise click.ClickException("no CUDA device here")
    for tokens in TOKENS:
        x, weights, scale = operands(tokens)
        if check:
            click.echo(f"{tokens} tokens: {checked(x, weights[0], scale)}")
            continue
        for name, run in variants(x, weights, scale):
            microseconds = graph_seconds([partial(run, weight) for weight in weights]) * 1e6
            click.echo(f"{tokens} tokens, {name}: {microseconds:.2f} us")


def operands(tokens: int) -> tuple[Tensor, list[Tensor], Tensor]:
    """States, a router for each layer, and factors of the experts."""
    x = torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
    weights = [torch.randn(EXPERTS, HIDDEN, device="cuda", dtype=torch.bfloat16) / HIDDEN**0.5 for _ in range(LAYERS)]
    return x, weights, torch.rand(EXPERTS, device="cuda", dtype=torch.bfloat16) + 0.5


def variants(x: Tensor, weights: list[Tensor], scale: Tensor) -> Iterator[tuple[str, Callable[[Tensor], object]]]:
    """Name of each variant and what runs it on a layer's weight."""
    yield "product of the library alone", lambda weight: F.linear(x, weight)
    yield "library, then choice", lambda weight: kernel.expert_routing(F.linear(x, weight), scale, TOP_K)
    for tile in TILES:
        own = partial(own_product, x, scale, tile)
        yield f"own product, then choice, {tile}", own


def own_product(x: Tensor, scale: Tensor, tile: Tile, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The choice from this project's own product, however many tokens there are."""
    return kernel.choose(kernel.partial_logits(x, weight, tile), scale, TOP_K, x.dtype)


def checked(x: Tensor, weight: Tensor, scale: Tensor) -> str:
    """How many ids are wrong where logits are apart, and how far weights are off, for every tile."""
    logits = x.double() @ weight.double().T
    magnitude = x.double().abs() @ weight.double().abs().T
    # A float32 sum of 2816 products (Higham 2002, section 4.2), then one rounding to bfloat16.
    margin = 2 * (HIDDEN * 2.0**-24 * magnitude + 2.0**-9 * logits.abs()).amax(1)
    order = logits.sort(dim=1, descending=True).indices[:, : TOP_K + 1]
    apart = (-logits.gather(1, order).diff(dim=1)).amin(1) > margin
    wrong, off = 0, 0.0
    for tile in TILES:
        ids, chosen_weights = own_product(x, scale, tile, weight)
        wrong += int((ids[apart] != order[apart, :TOP_K]).sum())
        oracle = torch.softmax(logits.gather(1, ids), 1) * scale.double()[ids]
        bound = (2 * margin[:, None] + 2.0**-9 + 48 * 2.0**-24) * oracle
        off = max(off, float(((chosen_weights.double() - oracle).abs() / bound).max()))
    verdict = "ok" if wrong == 0 and off <= 1 else "WRONG"
    return f"{int(apart.sum())} tokens apart, ids that differ {wrong}, weights off by {off:.2f} of the bound, {verdict}"


if __name__ == "__main__":
    main()
