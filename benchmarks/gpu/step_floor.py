"""The least time that a step can take: bytes over the measured bandwidth, or operations over the measured rate."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.gpu.timing import matrix_rate, read_bandwidth
from export.config import ModelConfig
from export.weights import Precision


@dataclass(frozen=True)
class Limits:
    """What the GPU was seen to do, in this run."""

    bandwidth: float
    """Bytes a second, read."""
    matrix_rate: float
    """Operations a second, bf16."""

    def __str__(self) -> str:
        return f"reads {self.bandwidth / 1e12:.2f} TB/s, bf16 products {self.matrix_rate / 1e12:.0f} TFLOP/s"


@dataclass(frozen=True)
class Floor:
    """A step's bytes and operations, and the time of the slower of the two."""

    bytes: float
    operations: float
    milliseconds: float


def measure_limits() -> Limits:
    """Measure the GPU."""
    limits = Limits(read_bandwidth(), matrix_rate())
    torch.cuda.empty_cache()
    return limits


def step_floor(config: ModelConfig, precision: Precision, count: int, prefix: int, limits: Limits) -> Floor:
    """A denoising step of `count` canvases with prefixes of their own: every weight once, every visible K/V once."""
    tokens = count * config.canvas_length
    kv_bytes = count * sum(
        2 * 2 * layer.kv_heads * layer.head_dim * min(prefix, config.sliding_window - 1 if layer.sliding else prefix)
        for layer in config.layers
    )
    read = _weight_bytes(config, precision) + kv_bytes
    # The head's product, and the expected embedding's.
    readout = 2 * 2 * tokens * config.vocab_size * config.hidden_size
    operations = tokens * _token_operations(config) + readout + _attention(config, tokens, prefix, causal=False)
    return Floor(read, operations, max(read / limits.bandwidth, operations / limits.matrix_rate) * 1e3)


def prefill_floor(config: ModelConfig, length: int, limits: Limits) -> Floor:
    """A prompt of `length` tokens, causal, without readout; its arithmetic alone."""
    operations = length * _token_operations(config) + _attention(config, length, 0, causal=True)
    return Floor(0.0, operations, operations / limits.matrix_rate * 1e3)


def _matrices(config: ModelConfig) -> tuple[int, int, int]:
    """Weights of the linear layers, of all experts, and of one token's experts."""
    hidden, linear = config.hidden_size, 0
    for layer in config.layers:
        projections = 2 * layer.heads + (2 if layer.sliding else 1) * layer.kv_heads
        linear += hidden * layer.head_dim * projections + 3 * hidden * config.intermediate_size
    expert = len(config.layers) * 3 * hidden * config.expert_intermediate_size
    return linear, expert * config.experts, expert * config.top_k_experts


def _weight_bytes(config: ModelConfig, precision: Precision) -> float:
    """The embedding is read twice: as head, and for the expected embedding."""
    linear, experts, _ = _matrices(config)
    wide = 2 * config.vocab_size * config.hidden_size + len(config.layers) * config.hidden_size * config.experts
    wide += 3 * config.hidden_size * config.intermediate_size
    linear_bytes, expert_bytes = {"fp8": (1.0, 1.0), "int4": (1.0, 0.5 + 2 / 32)}.get(precision.value, (2.0, 2.0))
    return 2 * wide + linear_bytes * linear + expert_bytes * experts


def _token_operations(config: ModelConfig) -> float:
    linear, _, chosen = _matrices(config)
    return 2.0 * (linear + chosen + len(config.layers) * config.hidden_size * config.experts)


def _attention(config: ModelConfig, tokens: int, prefix: int, causal: bool) -> float:
    """Scores and sums of all layers; a canvas sees its prefix and itself, a causal row half of itself."""
    operations = 0.0
    own = min(tokens, config.canvas_length)
    for layer in config.layers:
        if causal:
            seen = min(tokens / 2, config.sliding_window) if layer.sliding else tokens / 2
        else:
            seen = own + (min(prefix, config.sliding_window - 1) if layer.sliding else prefix)
        operations += 2 * 2 * tokens * seen * layer.heads * layer.head_dim
    return operations
