"""The pocket's shape, and writing it as a Hugging Face checkpoint directory."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from checkpoints.pocket_recipe.batches import CANVAS
from checkpoints.pocket_recipe.evaluation import Settings
from checkpoints.pocket_recipe.operations import TRAINING
from checkpoints.pocket_recipe.tokenizer import CONTROL_IDS, END_TOKENS, EOS, PAD, VOCABULARY_SIZE
from export.config import parse_config
from export.model import StepModel
from plugins_trt.operations import Operations

_LAYERS = ["sliding_attention", "sliding_attention", "full_attention"]


def hugging_face_config(tiny: bool = False) -> dict[str, Any]:
    """`config.json`: 12.3 M parameters, or with `tiny` a shape for tests of the recipe."""
    width = 32 if tiny else 256
    text = {
        "model_type": "diffusion_gemma_text",
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 3 if tiny else 6,
        "layer_types": _LAYERS * (1 if tiny else 2),
        "num_attention_heads": 2 if tiny else 8,
        "num_key_value_heads": 2 if tiny else 4,
        "head_dim": 16 if tiny else 32,
        "global_head_dim": 32 if tiny else 64,
        "num_global_key_value_heads": 1 if tiny else 2,
        "sliding_window": 256,
        "num_experts": 16,
        "top_k_experts": 4,
        "moe_intermediate_size": 16 if tiny else 96,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "final_logit_softcapping": 30.0,
        "initializer_range": 0.02,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "use_bidirectional_attention": "vision",
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": CONTROL_IDS["<bos>"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
        },
    }
    return {
        "architectures": ["DiffusionGemmaForBlockDiffusion"],
        "model_type": "diffusion_gemma",
        "canvas_length": CANVAS,
        "dtype": "bfloat16",
        "boi_token_id": CONTROL_IDS["<|image>"],
        "eoi_token_id": CONTROL_IDS["<image|>"],
        "image_token_id": CONTROL_IDS["<|image|>"],
        "tie_word_embeddings": True,
        "text_config": text,
        "vision_config": _VISION,
    }


# The reference always builds a vision tower. The pocket has none: this is the smallest, and its weights are not stored.
_VISION = {
    "model_type": "gemma4_vision",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "position_embedding_size": 8,
}


def build_model(raw_config: dict[str, Any], operations: Operations = TRAINING) -> StepModel:
    """A fresh model whose layer scalars train too."""
    model = StepModel(parse_config(raw_config), operations)
    for layer in model.layers:
        for name in ("layer_scalar", "encoder_layer_scalar"):
            scalar = layer._buffers.pop(name)
            assert scalar is not None
            layer.register_parameter(name, nn.Parameter(scalar))
    return model


def initialize(model: StepModel, generator: torch.Generator) -> None:
    """Normal matrices of standard deviation 0.02, embeddings of half the residual stream's unit, ones elsewhere.

    The padding token's embedding is drawn like any other: the gradient of a zero vector explodes through the RMSNorms.
    """
    embedding_std = 0.5 / model.config.embedding_scale
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                std = embedding_std if "embed_tokens" in name else 0.02
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def generation_config(settings: Settings) -> dict[str, Any]:
    """`generation_config.json`."""
    values = asdict(settings)
    bound = values.pop("entropy_bound")
    return {
        "max_new_tokens": 1024,
        "bos_token_id": CONTROL_IDS["<bos>"],
        "eos_token_id": list(END_TOKENS),
        "pad_token_id": PAD,
        "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": bound},
        **values,
    }


def write(directory: Path, config: dict[str, Any], weights: dict[str, Tensor], settings: Settings) -> None:
    """Write `config.json`, `generation_config.json` and `model.safetensors` (bfloat16), the weights last and whole."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, value in (("config.json", config), ("generation_config.json", generation_config(settings))):
        (directory / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    tensors = {
        _stored_name(name): value.detach().to("cpu", torch.bfloat16).contiguous() for name, value in weights.items()
    }
    unfinished = directory / "model.safetensors.unfinished"
    save_file(tensors, unfinished, {"format": "pt"})
    os.replace(unfinished, directory / "model.safetensors")


def read(directory: Path) -> StepModel:
    """The model of a directory that `write` wrote, in float32."""
    model = build_model(json.loads((directory / "config.json").read_text(encoding="utf-8")))
    stored = load_file(directory / "model.safetensors")
    model.load_state_dict({name: stored[_stored_name(name)].float() for name in model.state_dict()})
    return model


def _stored_name(parameter: str) -> str:
    # The same as the exporter's, which would bring the serving dependencies onto the training machine.
    if parameter.endswith(".encoder_layer_scalar"):
        return "model.encoder.language_model." + parameter.replace(".encoder_layer_scalar", ".layer_scalar")
    return f"model.decoder.{parameter}"
