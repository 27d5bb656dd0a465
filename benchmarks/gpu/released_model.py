"""A model of the released shape with random weights made on the GPU: nothing to fetch, nothing through the host."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import Tensor
from torch.export import ExportedProgram

from export.config import LayerConfig, ModelConfig
from export.program import export_program
from export.weights import Precision
from runtime.bundle import LayerFacts, ModelFacts, ProgramRecord
from runtime.engines.torch.engine import Model

LAYERS = 30
END_TOKEN_IDS = (1, 106, 50)
_CODE_SPREAD = 112.0
"""Spread of FP8 codes: four times it is the largest code."""
_NIBBLE_SPREAD = 4.6
"""Spread of codes drawn evenly from -8 ... 7."""
_RECORD = "record.json"
_PIECE = 1 << 27
"""Elements made at a time where they need a wider temporary."""


def released_config(layers: int = LAYERS) -> ModelConfig:
    """The released shape, or its first layers: multiples of 6 keep its mix of layer types."""
    sliding = LayerConfig(sliding=True, heads=16, kv_heads=8, head_dim=256, rope_theta=1e4, rotary_fraction=1.0)
    full = LayerConfig(sliding=False, heads=16, kv_heads=2, head_dim=512, rope_theta=1e6, rotary_fraction=0.25)
    return ModelConfig(
        vocab_size=262_144,
        hidden_size=2816,
        intermediate_size=2112,
        experts=128,
        top_k_experts=8,
        expert_intermediate_size=704,
        sliding_window=1024,
        max_position=262_144,
        rms_norm_eps=1e-6,
        final_logit_softcap=30.0,
        canvas_length=256,
        layers=tuple(full if i % 6 == 5 else sliding for i in range(layers)),
    )


@dataclass(frozen=True)
class RandomWeights:
    """Weights that keep a random model's states in a trained one's range, the same ones for a name at every time.

    Embedded tokens of unit spread, what layers add weighted by 0.3, so that a token's own embedding decides its experts
    and the router spreads tokens over all of them; attention scores of unit spread; a final norm that leaves its own
    token a probability of some tenths.
    """

    config: ModelConfig
    device: torch.device
    seed: int = 0

    def fill(self, name: str, tensor: Tensor) -> None:
        """Fill a tensor of the weights file."""
        random = torch.Generator(self.device).manual_seed(zlib.crc32(name.encode()) + self.seed)
        if tensor.dtype == torch.float8_e4m3fn:
            for piece in torch.split(tensor.view(-1), _PIECE):
                noise = torch.empty(piece.shape, dtype=torch.bfloat16, device=self.device)
                piece.copy_(noise.normal_(0, _CODE_SPREAD, generator=random).clamp_(-448, 448))
        elif tensor.dtype == torch.uint8:
            tensor.random_(0, 256, generator=random)
        elif name.endswith("_scale") and not name.endswith("per_expert_scale"):
            tensor.fill_(self._scale(name.removesuffix("_scale"), tensor))
        elif tensor.dim() > 1:
            tensor.normal_(0, self._spread(name), generator=random)
        else:
            tensor.fill_(self._level(name))

    def wide(self, name: str, tensor: Tensor, precision: Precision) -> None:
        """Fill a float32 tensor with what the weight of that name means in `precision`."""
        stored = _stored_dtype(name, precision)
        values = torch.empty(tensor.shape, dtype=stored, device=self.device)
        self.fill(name, values)
        tensor.copy_(values)
        if stored == torch.float8_e4m3fn:
            tensor.mul_(self._spread(name) / _CODE_SPREAD)

    def _scale(self, name: str, scale: Tensor) -> float:
        """Of a quantised weight: the spread over that of its codes."""
        return self._spread(name) / (_CODE_SPREAD if scale.dtype == torch.float32 else _NIBBLE_SPREAD)

    def _spread(self, name: str) -> float:
        if name.endswith("router.proj.weight"):
            return 1.0
        return 1.0 / math.sqrt(self._summed(name))

    def _summed(self, name: str) -> int:
        """How many products a number behind this weight sums."""
        if name.endswith("o_proj.weight"):
            layer = self.config.layers[int(name.split(".layers.")[1].split(".")[0])]
            return layer.heads * layer.head_dim
        if name.endswith("experts.down_proj"):
            return self.config.expert_intermediate_size
        return self.config.intermediate_size if name.endswith("down_proj.weight") else self.config.hidden_size

    def _level(self, name: str) -> float:
        if name.endswith(("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")):
            return 0.3
        if name == "model.decoder.norm.weight":
            return 0.25
        if name.endswith("q_norm.weight"):
            layer = self.config.layers[int(name.split(".layers.")[1].split(".")[0])]
            return 1.0 / math.sqrt(layer.head_dim)
        return 1.0


def _stored_dtype(name: str, precision: Precision) -> torch.dtype:
    """Dtype of a matrix of the weights file, FP8 or wide; 4-bit ones have no wide twin here."""
    quantised = ".self_attn." in name or ".mlp." in name or ".experts." in name
    is_matrix = name.endswith(("proj.weight", "gate_up_proj", "experts.down_proj"))
    if precision.value == "fp8" and quantised and is_matrix:
        return torch.float8_e4m3fn
    return torch.bfloat16


def released_model(config: ModelConfig, precision: Precision, device: torch.device, file: Path | None = None) -> Model:
    """The model for an engine, its program exported on the spot, or read from `file` where an earlier call put it."""
    program, record = _program(config, precision, file)
    return Model(facts(config), END_TOKEN_IDS, program, record, RandomWeights(config, device).fill)


def _program(config: ModelConfig, precision: Precision, file: Path | None) -> tuple[ExportedProgram, ProgramRecord]:
    if file is not None and file.exists():
        extra = {_RECORD: ""}
        program = torch.export.load(file, extra_files=extra)
        return program, msgspec.json.decode(extra[_RECORD], type=ProgramRecord)
    program, record = export_program(config, precision)
    if file is not None:
        torch.export.save(program, file, extra_files={_RECORD: msgspec.json.encode(record).decode()})
    return program, record


def wide_model(config: ModelConfig, precision: Precision, device: torch.device) -> Model:
    """The same weights in float32, where the precision is bf16 or FP8."""
    program, record = export_program(config, Precision.FLOAT32)
    weights = RandomWeights(config, device)
    return Model(
        facts(config), END_TOKEN_IDS, program, record, lambda name, tensor: weights.wide(name, tensor, precision)
    )


def facts(config: ModelConfig) -> ModelFacts:
    """What the runtime must know of a model of this shape."""
    layers = (LayerFacts(layer.sliding, layer.kv_heads, layer.head_dim) for layer in config.layers)
    return ModelFacts(
        name="released-shape",
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        canvas_length=config.canvas_length,
        sliding_window=config.sliding_window,
        max_position=config.max_position,
        layers=tuple(layers),
    )
