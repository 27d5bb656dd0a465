"""The written checkpoint against the reference implementation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from checkpoints.pocket_recipe import checkpoint
from checkpoints.pocket_recipe.evaluation import Settings
from checkpoints.pocket_recipe.operations import TRAINING
from checkpoints.pocket_recipe.passes import denoise, encode
from export.model import StepModel
from plugins_trt.canvas_readout.reference import softcapped_logits


def _random_model(seed: int) -> StepModel:
    """Every parameter off its initial value, as bfloat16 keeps it, so that each one shows in the logits."""
    config = checkpoint.hugging_face_config(tiny=True)
    model = checkpoint.build_model(config, TRAINING)
    generator = torch.Generator().manual_seed(seed)
    checkpoint.initialize(model, generator)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_((parameter + (noise if parameter.ndim == 1 else 0.0)).bfloat16().float())
    return model


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[StepModel, Path]:
    model, directory = _random_model(3), tmp_path_factory.mktemp("pocket")
    checkpoint.write(directory, checkpoint.hugging_face_config(tiny=True), model.state_dict(), Settings())
    return model, directory


@torch.inference_mode()
def test_reference_loads_the_checkpoint_and_gives_the_same_logits(written: tuple[StepModel, Path]) -> None:
    """Catches a misnamed or unstored weight, the two passes' scalars swapped, padding or masks of training leaking."""
    from transformers import DiffusionGemmaForBlockDiffusion

    model, directory = written
    reference = DiffusionGemmaForBlockDiffusion.from_pretrained(directory, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(4096, (length,), generator=generator) for length in (7, 300)]
    canvases = torch.randint(4096, (2, 256), generator=generator)
    padded = torch.zeros(2, 304, dtype=torch.int64)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    _, prefix = encode(model, padded, torch.tensor([7, 300]))
    first = denoise(model, canvases, prefix, None)
    logits = _logits(model, first)
    soft = torch.softmax(logits, -1) @ model.embed_tokens.weight * model.config.embedding_scale
    second = _logits(model, denoise(model, canvases, prefix, soft))
    for index, prompt in enumerate(prompts):
        row, canvas = slice(index, index + 1), canvases[index : index + 1]
        expected = reference(input_ids=prompt[None], decoder_input_ids=canvas).logits
        # float32 sums of at most 64 terms over three layers, amplified by norms: 1e-4 is three orders above what
        # they differ by, and two below what any dropped weight or wrongly masked position changes.
        torch.testing.assert_close(logits[row], expected, rtol=0, atol=1e-4)
        expected = reference(input_ids=prompt[None], decoder_input_ids=canvas, self_conditioning_logits=expected).logits
        torch.testing.assert_close(second[row], expected, rtol=0, atol=1e-4)


def _logits(model: StepModel, hidden: Tensor) -> Tensor:
    return softcapped_logits(hidden, model.embed_tokens.weight, model.config.final_logit_softcap)


def test_reference_reads_the_generation_defaults(written: tuple[StepModel, Path]) -> None:
    """Catches a sampler the reference does not know, and names it would drop."""
    from transformers import DiffusionGemmaForBlockDiffusion

    loaded = DiffusionGemmaForBlockDiffusion.from_pretrained(written[1]).generation_config
    settings = Settings()
    assert loaded.sampler_config.entropy_bound == settings.entropy_bound
    for name in ("max_denoising_steps", "t_min", "t_max", "stability_threshold", "confidence_threshold"):
        assert getattr(loaded, name) == getattr(settings, name)
