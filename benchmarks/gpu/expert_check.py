"""The experts' kernels on the GPU against their references in float32, at the released shape."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.gpu.expert_layers import EXPERTS, TOP_K, Layer, random_layer, random_tokens
from plugins_trt.expert_ffn.dispatch import dispatch
from plugins_trt.expert_ffn.kernel import expert_ffn_fp8
from plugins_trt.expert_ffn.tiles import choose_tiles
from plugins_trt.expert_routing import kernel as routing
from plugins_trt.expert_routing import reference as routing_reference
from plugins_trt.gpu import gpu_of

_HALF_UNIT = 2.0**-9
"""Half a unit in the last place of bfloat16, relative."""

_BOUNDS = {"fp8-dynamic": 0.03}
"""Relative error in the Euclidean norm. Three roundings to bfloat16 lie between the kernels and float32: of the hidden
states, of a pair's part, of the sum. With activations rounded to float8 hidden states are not rounded to bfloat16, but
Hopper sums products of 8-bit numbers in about 14 bits: 88 turns of 32 columns may move a state by as much as half a
unit of bfloat16, so that it falls to the neighbouring code, one of 2^4 to 2^3 units of its size away: at most one in
eight does."""


def check(encodings: Sequence[str], generator: torch.Generator) -> Iterator[tuple[str, float, float]]:
    """Yields what was compared, by how much it was off and how much it may be."""
    yield from _routing(generator)
    for tokens, block_rows in ((1, 32), (256, 32), (2048, 32), (2048, 160)):
        name = f"dispatch plan, {tokens} tokens in blocks of {block_rows}: rows out of place"
        yield name, _misplaced(tokens, block_rows, generator), 0.0
    yield "fp8 codes that are widened wrongly", _wrong_codes(), 0.0
    for encoding in encodings:
        layer = random_layer(encoding, generator)
        for tokens in (1, 256, 1000, 2048):
            x, ids, weights = random_tokens(tokens, generator)
            output = layer.operation(x, ids, weights, *layer.tensors)
            bound = _BOUNDS.get(encoding, 3 * _HALF_UNIT)
            yield (
                f"experts in {encoding}, {tokens} tokens: relative error",
                _error(layer, x, ids, weights, output),
                bound,
            )
        yield from _repeated(layer, generator)


def _routing(generator: torch.Generator) -> Iterator[tuple[str, float, float]]:
    for tokens in (1, 256, 8192):
        logits = torch.randn(tokens, EXPERTS, device="cuda", generator=generator)
        scale = 1 + torch.rand(EXPERTS, device="cuda", generator=generator)
        ids, weights = routing.expert_routing(logits, scale, TOP_K)
        expected_ids, expected = routing_reference.expert_routing(logits.double(), scale.double(), TOP_K)
        yield f"routing, {tokens} tokens: ids that differ", float((ids != expected_ids).sum()), 0.0
        yield f"routing, {tokens} tokens: relative error", float(((weights - expected) / expected).abs().max()), 4e-6


def _misplaced(tokens: int, block_rows: int, generator: torch.Generator) -> float:
    """Pairs that are not where a stable sort by expert puts them."""
    _, ids, _ = random_tokens(tokens, generator)
    plan = dispatch(ids, EXPERTS, block_rows)
    used = plan.block_expert >= 0
    rows = plan.rows[used]
    filled = rows < plan.pairs
    order = torch.sort(ids.flatten(), stable=True).indices
    experts = plan.block_expert[used].repeat_interleave(plan.rows.shape[1])[filled.flatten()]
    wrong = (rows[filled] != order).sum() + (experts != ids.flatten()[order]).sum()
    return float(wrong)


def _wrong_codes() -> float:
    """Codes whose product with a state of 1 is off by more than bfloat16's roundings, of all that are numbers.

    One expert of two channels, whose up rows hold every code; each token picks one of them, its gates are 1 and 0.
    """
    bits = torch.arange(256, dtype=torch.uint8, device="cuda")
    codes = torch.where(bits & 0x7F == 0x7F, 0, bits).view(torch.float8_e4m3fn)
    one, zero = torch.ones(256, device="cuda").to(codes.dtype), torch.zeros(256, device="cuda").to(codes.dtype)
    x, scale = torch.eye(256, dtype=torch.bfloat16, device="cuda"), torch.ones(1, 256, device="cuda")
    ids, down = torch.zeros(256, 1, dtype=torch.int64, device="cuda"), torch.stack([one, one], dim=1)[None]
    gate_up = torch.stack([one, zero, codes, codes])[None]
    few = scale[:, :4].contiguous()
    weights = torch.ones(256, 1, dtype=x.dtype, device="cuda")
    output = expert_ffn_fp8(x, ids, weights, gate_up, few, down.contiguous(), scale, dynamic_activations=False)
    expected = 0.8411919906 * codes.float()[:, None]  # gelu_tanh(1)
    return float(((output.float() - expected).abs() > 3 * _HALF_UNIT * expected.abs()).any(dim=1).sum())


def _error(layer: Layer, x: Tensor, ids: Tensor, weights: Tensor, output: Tensor) -> float:
    wide = [tensor.float() if tensor.dtype == torch.bfloat16 else tensor for tensor in layer.tensors]
    parts = zip(*(torch.split(tensor, 256) for tensor in (x, ids, weights)), strict=True)
    expected = torch.cat([layer.reference(some.float(), their, of.float(), *wide) for some, their, of in parts])
    return float((output.float() - expected).norm() / expected.norm())


def _repeated(layer: Layer, generator: torch.Generator) -> Iterator[tuple[str, float, float]]:
    """The same token gives the same bits a second time, and among fewer tokens."""
    x, ids, weights = random_tokens(512, generator)
    tiles = choose_tiles(512 * TOP_K / EXPERTS, layer.weights.encoding, x.element_size(), gpu_of(x.device))
    first, again = (layer.operation(x, ids, weights, *layer.tensors, tiles=tiles) for _ in range(2))
    fewer = layer.operation(x[:100], ids[:100], weights[:100], *layer.tensors, tiles=tiles)
    yield f"experts in {layer.encoding}: values that change when repeated", float((first != again).sum()), 0.0
    yield f"experts in {layer.encoding}: values that change among others", float((first[:100] != fewer).sum()), 0.0
