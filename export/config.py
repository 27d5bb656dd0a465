"""The facts of a checkpoint's `config.json` that the model definition needs, in either of its two spellings."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import CheckpointError


@dataclass(frozen=True)
class LayerConfig:
    """One layer's attention."""

    sliding: bool
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float
    rotary_fraction: float
    """Share of a head's frequencies that rotate, 0 to 1."""


@dataclass(frozen=True)
class ModelConfig:
    """The text backbone's shape."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    experts: int
    top_k_experts: int
    expert_intermediate_size: int
    sliding_window: int
    max_position: int
    rms_norm_eps: float
    final_logit_softcap: float
    canvas_length: int
    layers: tuple[LayerConfig, ...]

    @property
    def embedding_scale(self) -> float:
        """Factor of embedded tokens, `sqrt(hidden_size)`."""
        return math.sqrt(self.hidden_size)


def read_config(directory: Path) -> ModelConfig:
    """Read `config.json` of a Hugging Face checkpoint directory.

    Raises:
        CheckpointError: the file is absent, is not JSON, lacks a value or asks for something this model has not.
    """
    path = directory / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); is this a checkpoint directory?") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: is not JSON ({error})") from error
    return parse_config(raw, str(path))


def parse_config(raw: Any, where: str = "config.json") -> ModelConfig:
    """Read a parsed `config.json`; `where` names it in messages. Raises CheckpointError as `read_config` does."""
    if not isinstance(raw, dict):
        raise CheckpointError(f"{where}: must hold a JSON object")
    reader = _Reader(raw, where)
    reader.require("model_type", {"diffusion_gemma"})
    text = reader.section("text_config")
    text.require("hidden_activation", {"gelu_pytorch_tanh"})
    text.require("attention_bias", {False}, default=False)
    text.require("tie_word_embeddings", {True}, default=True)
    text.require("use_bidirectional_attention", {None, "vision"}, default=None)
    return ModelConfig(
        vocab_size=text.integer("vocab_size"),
        hidden_size=text.integer("hidden_size"),
        intermediate_size=text.integer("intermediate_size"),
        experts=text.integer("num_experts"),
        top_k_experts=text.integer("top_k_experts", most=text.integer("num_experts")),
        expert_intermediate_size=text.integer("moe_intermediate_size"),
        sliding_window=text.integer("sliding_window"),
        max_position=text.integer("max_position_embeddings"),
        rms_norm_eps=text.number("rms_norm_eps"),
        final_logit_softcap=text.number("final_logit_softcapping", default=30.0),
        canvas_length=reader.integer("canvas_length"),
        layers=_layers(text),
    )


def _layers(text: _Reader) -> tuple[LayerConfig, ...]:
    types = text.value("layer_types")
    count = text.integer("num_hidden_layers")
    if not isinstance(types, list) or len(types) != count or set(types) - {"sliding_attention", "full_attention"}:
        raise text.error("layer_types", f"must name each of the {count} layers sliding_attention or full_attention")
    if types[-1] != "full_attention":
        raise text.error("layer_types", "must end with full_attention")
    layers = tuple(_layer(text, index, kind) for index, kind in enumerate(types))
    for sliding in (True, False):
        # The layers of a type share one table of rotation frequencies, so also the reference gives them one head size.
        sizes = sorted({layer.head_dim for layer in layers if layer.sliding == sliding})
        if len(sizes) > 1:
            raise text.error(
                "per_layer_config", f"gives layers of one type heads of {sizes}; it must give them one size"
            )
    return layers


def _layer(text: _Reader, index: int, kind: str) -> LayerConfig:
    shape = _layer_shape(text, index, kind)
    rope = text.section("rope_parameters").section(kind)
    rope_type = rope.require("rope_type", {"default", "proportional"})
    heads, kv_heads = text.integer("num_attention_heads"), shape["num_key_value_heads"]
    if heads % kv_heads or shape["head_dim"] % 2:
        raise text.error(
            "num_key_value_heads", f"layer {index}: {heads} heads of {shape['head_dim']} over {kv_heads} K/V heads"
        )
    fraction = rope.number("partial_rotary_factor", default=1.0)
    if rope_type == "default" and fraction != 1.0:
        raise rope.error("partial_rotary_factor", "is only known for rope_type proportional")
    return LayerConfig(
        sliding=kind == "sliding_attention",
        heads=heads,
        kv_heads=kv_heads,
        head_dim=shape["head_dim"],
        rope_theta=rope.number("rope_theta"),
        rotary_fraction=fraction,
    )


def _layer_shape(text: _Reader, index: int, kind: str) -> dict[str, int]:
    """Head sizes of a layer: newer configs override them per layer, older ones by `global_*` for full layers."""
    shape = {name: text.integer(name) for name in ("head_dim", "num_key_value_heads")}
    if text.raw.get("per_layer_config") is not None:
        return shape | _overrides(text.section("per_layer_config"), index, shape)
    if kind == "full_attention":
        # The reference's defaults of the older spelling: heads of 512, as many K/V heads as the sliding layers.
        shape["head_dim"] = text.integer("global_head_dim", default=512)
        if text.raw.get("num_global_key_value_heads") is not None:
            shape["num_key_value_heads"] = text.integer("num_global_key_value_heads")
    return shape


def _overrides(layers: _Reader, index: int, shape: dict[str, int]) -> dict[str, int]:
    """What the newer spelling says of one layer; its keys are layer numbers, padded with zeros to equal length."""
    names = [name for name in layers.raw if name.isdecimal() and int(name) == index]
    layer = layers.section(names[0]) if names else _Reader({}, layers.where)
    for name in layer.raw.keys() - shape.keys():
        raise layer.error(name, f"cannot differ between layers here; only {sorted(shape)} can")
    return {name: layer.integer(name) for name in layer.raw}


@dataclass(frozen=True)
class _Reader:
    """One JSON object with its place, so that every complaint says where."""

    raw: dict[str, Any]
    where: str

    def error(self, name: str, complaint: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {name} is {self.raw.get(name)!r}; it {complaint}")

    def value(self, name: str, default: Any = ...) -> Any:
        if name not in self.raw and default is ...:
            raise CheckpointError(f"{self.where}: {name} is missing")
        return self.raw.get(name, default)

    def section(self, name: str) -> _Reader:
        value = self.value(name)
        if not isinstance(value, dict):
            raise self.error(name, "must be an object")
        return _Reader(value, f"{self.where}: {name}")

    def require(self, name: str, allowed: set[Any], default: Any = ...) -> Any:
        value = self.value(name, default)
        if isinstance(value, list | dict) or value not in allowed:
            raise self.error(name, f"must be one of {sorted(map(str, allowed))}")
        return value

    def integer(self, name: str, default: Any = ..., most: int = 1 << 40) -> int:
        value = self.value(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise self.error(name, f"must be an integer from 1 to {most}")
        return value

    def number(self, name: str, default: Any = ...) -> float:
        value = self.value(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise self.error(name, "must be a positive number")
        return float(value)
