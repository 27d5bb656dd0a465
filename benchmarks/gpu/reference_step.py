"""The reference, `transformers` in eager mode, with random weights of the released shape on the GPU."""

from __future__ import annotations

import itertools
import statistics
import time
from typing import Any

import torch

from export.config import ModelConfig


def time_reference(config: ModelConfig, prefix: int, steps: int) -> dict[str, Any]:
    """Medians of a denoising step with its sampling, bf16, batch 1, by its own `generate`; tries its experts'
    implementations and keeps the fastest.

    Returns:
        Milliseconds a step by experts' implementation, and `step_ms`, the best of them.
    """
    model = _model(config)
    prompt = torch.randint(200, config.vocab_size, (1, prefix), device="cuda")
    found: dict[str, Any] = {}
    for experts in ("grouped_mm", "batched_mm", "eager"):
        try:
            model.set_experts_implementation(experts)
            milliseconds = _steps(model, prompt, steps if experts == "grouped_mm" else min(steps, 4))
        except Exception as error:
            print(f"  {experts}: {type(error).__name__}: {error}", flush=True)
            continue
        found[experts] = milliseconds
        print(f"  {experts}: {milliseconds:.2f} ms a step", flush=True)
    found["step_ms"] = min(found.values())
    return found


def _model(config: ModelConfig) -> Any:
    from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion, DiffusionGemmaTextConfig

    # transformers leaves some of its classes without types.
    text = DiffusionGemmaTextConfig(  # type: ignore[call-arg]
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=len(config.layers),
        layer_types=["sliding_attention" if layer.sliding else "full_attention" for layer in config.layers],
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
        global_head_dim=512,
        num_global_key_value_heads=2,
        max_position_embeddings=config.max_position,
        sliding_window=config.sliding_window,
        num_experts=config.experts,
        top_k_experts=config.top_k_experts,
        moe_intermediate_size=config.expert_intermediate_size,
    )
    vision = {
        "model_type": "gemma4_vision", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64, "position_embedding_size": 64,
    }  # fmt: skip
    whole = DiffusionGemmaConfig(text_config=text, vision_config=vision, canvas_length=config.canvas_length)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = DiffusionGemmaForBlockDiffusion(whole)
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            _randomise(name, tensor)
    model.train(False)
    return model


def _randomise(name: str, tensor: torch.Tensor) -> None:
    """As `RandomWeights`: a token's own embedding decides its experts, attention scores are of unit spread."""
    if tensor.dim() > 1:
        tensor.normal_(0, 1.0 if name.endswith("router.proj.weight") else float(tensor.shape[-1]) ** -0.5)
    elif name.endswith("q_norm.weight"):
        tensor.fill_(float(tensor.shape[0]) ** -0.5)
    elif name.endswith(("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")):
        tensor.fill_(0.3)
    else:
        tensor.fill_(1.0)


class _Enough(Exception):
    """Enough steps were timed."""


def _steps(model: Any, prompt: torch.Tensor, steps: int) -> float:
    """Median milliseconds between two steps' begins, after three that warm up."""
    from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
        DiffusionGemmaGenerationConfig,
        EntropyBoundSamplerConfig,
    )

    generation = DiffusionGemmaGenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=model.config.canvas_length,
        max_denoising_steps=48,
        sampler_config=EntropyBoundSamplerConfig(entropy_bound=0.1),
        t_min=0.4,
        t_max=0.8,
        stability_threshold=1,
        confidence_threshold=1e-30,
        eos_token_id=[1],
        pad_token_id=0,
    )
    begins: list[float] = []
    plain = type(model)._denoising_step

    def timed(*arguments: Any, **keywords: Any) -> Any:
        torch.cuda.synchronize()
        begins.append(time.perf_counter())
        if len(begins) == steps + 4:
            raise _Enough
        return plain(model, *arguments, **keywords)

    model._denoising_step = timed
    try:
        with torch.inference_mode():
            model.generate(prompt, generation_config=generation)
    except _Enough:
        pass
    finally:
        del model._denoising_step
    periods = [(after - before) * 1e3 for before, after in itertools.pairwise(begins)]
    return statistics.median(periods[3:])
