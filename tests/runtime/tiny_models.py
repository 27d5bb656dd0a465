"""Random models small enough for a test, as the reference's class and as our step model with the same weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion, DiffusionGemmaTextConfig

from export.config import parse_config
from export.model import StepModel

_TINY_VISION = {
    "model_type": "gemma4_vision",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "position_embedding_size": 16,
}
_DECODER = "model.decoder."
_ENCODER_LAYERS = "model.encoder.language_model.layers."


@dataclass(frozen=True)
class TinyShape:
    """What the tests vary of a model."""

    canvas_length: int = 12
    vocab_size: int = 61
    sliding_window: int = 6
    layer_types: tuple[str, ...] = ("sliding_attention", "full_attention")
    embedding_std: float = 1.0
    """Spread of the logits: the larger, the lower the entropies."""
    mixing: float = 1.0
    """Weight of what the layers add to the residual: the smaller, the sooner a canvas settles."""
    text: dict[str, Any] = field(default_factory=dict)


def reference_model(shape: TinyShape, seed: int) -> DiffusionGemmaForBlockDiffusion:
    """A reference model in float64 with random weights of spreads that make entropies vary."""
    text = DiffusionGemmaTextConfig(
        **{
            "vocab_size": shape.vocab_size,
            "hidden_size": 36,  # its root is exact: the reference keeps the embedding scale in float32
            "intermediate_size": 48,
            "num_hidden_layers": len(shape.layer_types),
            "layer_types": list(shape.layer_types),
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "global_head_dim": 16,
            "num_global_key_value_heads": 1,
            "max_position_embeddings": 512,
            "sliding_window": shape.sliding_window,
            "num_experts": 5,
            "top_k_experts": 2,
            "moe_intermediate_size": 16,
            **shape.text,
        }
    )
    config = DiffusionGemmaConfig(
        text_config=text, vision_config=dict(_TINY_VISION), canvas_length=shape.canvas_length, image_token_id=-1
    )
    model = DiffusionGemmaForBlockDiffusion(config).double().eval()
    model.set_experts_implementation("eager")  # the others take no float64
    _randomise(model, shape, torch.Generator().manual_seed(seed))
    return model


def step_model(reference: DiffusionGemmaForBlockDiffusion) -> StepModel:
    """Our model with the reference's weights."""
    weights = {}
    for name, tensor in reference.state_dict().items():
        if name.startswith(_DECODER):
            weights[name.removeprefix(_DECODER)] = tensor
        elif name.startswith(_ENCODER_LAYERS) and name.endswith("layer_scalar"):
            layer = name.removeprefix(_ENCODER_LAYERS).split(".")[0]
            weights[f"layers.{layer}.encoder_layer_scalar"] = tensor
    model = StepModel(parse_config(reference.config.to_dict())).double().eval()
    model.load_state_dict(weights)
    return model


@torch.no_grad()
def _randomise(model: DiffusionGemmaForBlockDiffusion, shape: TinyShape, generator: torch.Generator) -> None:
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() in seen or not tensor.is_floating_point():
            continue
        seen.add(tensor.data_ptr())
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("embed_tokens.weight"):
            tensor.copy_(shape.embedding_std * noise)
        elif tensor.dim() > 1:
            tensor.copy_(noise / tensor.shape[-1] ** 0.5)
        else:  # norms and scales, around one; those behind a layer's parts weigh what it adds
            weight = shape.mixing if ".post_" in name and not name.endswith(("_1.weight", "_2.weight")) else 1.0
            tensor.copy_(weight * (1 + 0.1 * noise))
