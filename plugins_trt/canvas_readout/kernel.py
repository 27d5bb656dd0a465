"""The canvas readout on the GPU: two library products around three passes over the logits.

The products (states with the embedding, softmax weights with the embedding) are plain ones of the full size, which the
GPU's matrix library does best. Between them logits and weights stay in the states' dtype; nothing of the vocabulary's
size is ever float32. The vocabulary is cut into blocks, whose sums give the total and the cumulative distribution at
their borders, so that the candidate is looked for in one block alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

POSITIONS = 512
"""Positions read out at a time: their logits and weights are 537 MB at the released vocabulary, and the products
need no more rows to be bound by the matrix units."""

BLOCK = 4096
"""Tokens of a block of the vocabulary."""

LOG2_E = tl.constexpr(1.4426950408889634)
"""Of the natural logarithm's base: exponentials are taken in base 2, which is one instruction."""


def canvas_readout(
    hidden: Tensor,
    embedding: Tensor,
    temperature: Tensor,
    uniform: Tensor,
    guard: Tensor,
    guarded_ids: Tensor,
    softcap: float,
    embedding_scale: float,
    *,
    at_a_time: int = POSITIONS,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Reduce the vocabulary axis of `R` canvases to what the diffusion loop needs.

    With `p = softmax(logits / temperature)` in float32: the most probable token; the candidate by inverse CDF, the
    first token whose cumulative probability exceeds `uniform` times the total; the entropy of `p`; and the embedding
    expected under `p`. The most probable token is that of the largest logit, as the softcap and the temperature keep
    their order; of several the lowest.

    Args:
        hidden: final normed states, `[R, S, H]`.
        embedding: tied embedding table, `[V, H]`, contiguous, in the states' dtype.
        temperature: of each canvas' denoising step, `[R]` float32, positive.
        uniform: one number in `[0, 1)` a position, `[R, S]` float32.
        guard: canvases whose position 0 must not hold a guarded token, `[R]` bool.
        guarded_ids: the guarded tokens (the end tokens), `[G]` int64.
        softcap: bound of the logits.
        embedding_scale: factor of embedded tokens, `sqrt(H)`.
        at_a_time: most positions whose logits are held at a time, at least one canvas'.

    Returns:
        `(argmax_ids [R, S], candidate_ids [R, S], entropy [R, S], soft_embedding [R, S, H])`: int64 ids, the entropy in
        float32 nats, the embedding in the table's dtype.
    """
    results = _Results.empty(hidden)
    canvases = max(1, at_a_time // max(1, hidden.shape[1]))
    for first in range(0, hidden.shape[0] if hidden.shape[1] else 0, canvases):
        part = slice(first, first + canvases)
        positions = _Positions(hidden[part], temperature[part], uniform[part].contiguous(), guard[part], guarded_ids)
        _read_out(positions, embedding, softcap, embedding_scale, results.of(part))
    return results.argmax_ids, results.candidate_ids, results.entropy, results.soft_embedding


@dataclass(frozen=True)
class _Positions:
    """What is read out at a time."""

    hidden: Tensor
    temperature: Tensor
    uniform: Tensor
    guard: Tensor
    guarded_ids: Tensor


@dataclass(frozen=True)
class _Results:
    """Where the results go."""

    argmax_ids: Tensor
    candidate_ids: Tensor
    entropy: Tensor
    soft_embedding: Tensor

    @classmethod
    def empty(cls, hidden: Tensor) -> _Results:
        ids = torch.empty(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        return cls(ids, torch.empty_like(ids), torch.empty_like(ids, dtype=torch.float32), torch.empty_like(hidden))

    def of(self, part: slice) -> _Results:
        return _Results(self.argmax_ids[part], self.candidate_ids[part], self.entropy[part], self.soft_embedding[part])


def _read_out(
    positions: _Positions, embedding: Tensor, softcap: float, embedding_scale: float, results: _Results
) -> None:
    V, H = embedding.shape
    hidden, temperature = positions.hidden.reshape(-1, H), positions.temperature
    M, S, device = hidden.shape[0], positions.hidden.shape[1], hidden.device
    block = min(BLOCK, triton.next_power_of_2(V))
    blocks = triton.cdiv(V, block)
    sizes = {"V": V, "BLOCK": block, "BLOCKS": triton.next_power_of_2(blocks)}
    logits = hidden @ embedding.T
    weights = torch.empty_like(logits)
    largest, sums, energies = torch.empty(3, M, blocks, dtype=torch.float32, device=device)
    largest_ids = torch.empty(M, blocks, dtype=torch.int32, device=device)
    factors = torch.empty(M, dtype=torch.float32, device=device)
    guarded = positions.guarded_ids.shape[0]
    if guarded:
        block_guarded[(M // S,)](
            logits, positions.guard, positions.guarded_ids, S, V, guarded, triton.next_power_of_2(guarded), num_warps=1
        )
    find_largest[(blocks, M)](logits, largest, largest_ids, V=V, BLOCK=block, num_warps=4)
    # Fusing a multiplication with an addition would give the largest logit itself an exponent other than 0, of 1e-8,
    # which is more than the whole entropy of a position that is sure of its token.
    exponentiate[(blocks, M)](
        logits, temperature, S, largest, weights, sums, energies, softcap, **sizes, num_warps=4, enable_fp_fusion=False
    )  # fmt: skip
    choose[(M,)](
        logits, temperature, S, positions.uniform, largest, largest_ids, sums, energies,
        results.argmax_ids, results.candidate_ids, results.entropy, factors, softcap, embedding_scale,
        blocks, **sizes, num_warps=8,
    )  # fmt: skip
    scale[(M,)](weights @ embedding, factors, results.soft_embedding, H, triton.next_power_of_2(H), num_warps=8)


@triton.jit
def block_guarded(LOGITS, GUARD, GUARDED_IDS, S, V, guarded: tl.constexpr, BLOCK: tl.constexpr):
    """Set the guarded tokens' logits at position 0 of a guarded canvas to -inf."""
    canvas, index = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    applies = tl.where(tl.load(GUARD + canvas).to(tl.int32) != 0, index, guarded) < guarded
    token = tl.load(GUARDED_IDS + index, mask=applies, other=0)
    tl.store(LOGITS + canvas * S * V + token, float("-inf"), mask=applies)


@triton.jit
def _logits_of(LOGITS, row, block, V: tl.constexpr, BLOCK: tl.constexpr):
    """A block's logits in float32, -inf past the vocabulary."""
    token = block * BLOCK + tl.arange(0, BLOCK)
    return tl.load(LOGITS + row.to(tl.int64) * V + token, mask=token < V, other=float("-inf")).to(tl.float32)


@triton.jit
def _shortfall(logits, softcap):
    """`(1 - tanh(x / softcap)) / 2`, as `1 / (1 + exp(2 x / softcap))`.

    A reciprocal by `rsqrt` and exponentials of base 2 are one instruction each, and their units are what these passes
    wait for; both are off by 2^-22 at most.
    """
    root = tl.rsqrt(1.0 + tl.exp2(logits * (2.0 * LOG2_E / softcap)))
    return root * root


@triton.jit
def _weights_of(logits, largest, softcap, temperature):
    """`exp(x - x_max)` of capped logits over the temperature, 0 for one of -inf, and the exponent in base 2."""
    sharpness = 2.0 * LOG2_E * softcap / temperature
    exponent = (_shortfall(largest, softcap) - _shortfall(logits, softcap)) * sharpness
    return tl.where(logits == float("-inf"), 0.0, tl.exp2(exponent)), exponent


@triton.jit
def _first_largest(values, COUNT: tl.constexpr):
    """The largest value and its first index; cheaper than carrying the index through the reduction."""
    largest = tl.max(values, 0)
    return largest, tl.min(tl.where(values == largest, tl.arange(0, COUNT), COUNT - 1), 0)


@triton.jit
def find_largest(LOGITS, LARGEST, LARGEST_IDS, V: tl.constexpr, BLOCK: tl.constexpr):
    """The largest logit of a position in one block, and its first token."""
    block, row, blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    largest, index = _first_largest(_logits_of(LOGITS, row, block, V, BLOCK), BLOCK)
    tl.store(LARGEST + row * blocks + block, largest)
    tl.store(LARGEST_IDS + row * blocks + block, block * BLOCK + index)


@triton.jit
def _largest_of(LARGEST, row, blocks, BLOCKS: tl.constexpr):
    """The largest logit of a position and its block, the first of several."""
    block = tl.arange(0, BLOCKS)
    return _first_largest(tl.load(LARGEST + row * blocks + block, mask=block < blocks, other=float("-inf")), BLOCKS)


@triton.jit
def exponentiate(
    LOGITS, TEMPERATURE, S, LARGEST, WEIGHTS, SUMS, ENERGIES, softcap,
    V: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """A block's unnormalised softmax weights, their sum, and the sum of weights times exponents (in base 2)."""
    # The rows that the largest were found in last come first: their logits are still in the L2 cache.
    block, row, blocks = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1), tl.num_programs(0)
    logits = _logits_of(LOGITS, row, block, V, BLOCK)
    largest, _ = _largest_of(LARGEST, row, blocks, BLOCKS)
    weights, exponent = _weights_of(logits, largest, softcap, tl.load(TEMPERATURE + row // S))
    tl.store(SUMS + row * blocks + block, tl.sum(weights, 0))
    tl.store(ENERGIES + row * blocks + block, tl.sum(weights * exponent, 0))
    token = block * BLOCK + tl.arange(0, BLOCK)
    tl.store(WEIGHTS + row.to(tl.int64) * V + token, weights.to(WEIGHTS.dtype.element_ty), mask=token < V)


@triton.jit
def _first_above(weights, share, COUNT: tl.constexpr):
    """Index of the first weight whose cumulative sum exceeds `share`, that sum without it, and the total.

    Sums of a parallel scan need not grow in rounding, so a weight of 0 is passed over by itself, and `share` is kept
    below the total: the weight found is positive.
    """
    index = tl.arange(0, COUNT)
    cumulative = tl.cumsum(weights, 0)
    reachable = tl.max(tl.where(weights > 0.0, cumulative, 0.0), 0) * (1.0 - 1.1920929e-07)
    found = (cumulative > tl.minimum(share, reachable)) & (weights > 0.0)
    first = tl.min(tl.where(found, index, COUNT - 1), 0)
    return first, tl.sum(tl.where(index == first, cumulative - weights, 0.0), 0)


@triton.jit
def choose(
    LOGITS, TEMPERATURE, S, UNIFORM, LARGEST, LARGEST_IDS, SUMS, ENERGIES,
    ARGMAX_IDS, CANDIDATE_IDS, ENTROPY, FACTORS, softcap, embedding_scale, blocks,
    V: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """From the blocks' sums the numbers of a position, and the factor that its soft embedding still lacks."""
    row = tl.program_id(0)
    every = tl.arange(0, BLOCKS)
    largest, largest_block = _largest_of(LARGEST, row, blocks, BLOCKS)
    tl.store(ARGMAX_IDS + row, tl.load(LARGEST_IDS + row * blocks + largest_block).to(tl.int64))
    sums = tl.load(SUMS + row * blocks + every, mask=every < blocks, other=0.0)
    energies = tl.load(ENERGIES + row * blocks + every, mask=every < blocks, other=0.0)
    total = tl.sum(sums, 0)
    tl.store(ENTROPY + row, (tl.log2(total) - tl.sum(energies, 0) / total) / LOG2_E)
    tl.store(FACTORS + row, embedding_scale / total)
    share = tl.load(UNIFORM + row) * total
    block, before = _first_above(sums, share, BLOCKS)
    logits = _logits_of(LOGITS, row, block, V, BLOCK)
    weights, _ = _weights_of(logits, largest, softcap, tl.load(TEMPERATURE + row // S))
    index, _ = _first_above(weights, share - before, BLOCK)
    tl.store(CANDIDATE_IDS + row, (block * BLOCK + index).to(tl.int64))


@triton.jit
def scale(SUMS, FACTORS, OUT, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """A row of weighted sums of embeddings times its factor."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_H)
    sums = tl.load(SUMS + row * H + column, mask=column < H, other=0.0).to(tl.float32)
    scaled = sums * tl.load(FACTORS + row)
    tl.store(OUT + row * H + column, scaled.to(OUT.dtype.element_ty), mask=column < H)
