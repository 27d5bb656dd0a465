"""The published pocket checkpoint, with its real weights, against the reference implementation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import DiffusionGemmaForBlockDiffusion

from checkpoints.pocket_recipe import checkpoint
from checkpoints.pocket_recipe.evaluation import Settings
from export.config import read_config
from export.model import StepModel
from tests.export.test_model_parity import Case, float64, run_ours, run_reference
from tests.runtime.tiny_models import TinyShape

POCKET = Path(__file__).parents[2] / "checkpoints" / "pocket"
LUCK = 16
"""Largest errors of some thousand numbers that round alike differ by less."""
MOST_BYTES = 28_000_000
"""That the checkpoint may weigh in the repository."""


@pytest.fixture(scope="module")
def reference() -> DiffusionGemmaForBlockDiffusion:
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(POCKET, dtype=torch.float32).eval()
    model.set_experts_implementation("eager")  # the others take no float64
    return model


def test_logits_are_the_references(reference: DiffusionGemmaForBlockDiffusion) -> None:
    """Catches a weight that training made matter and random ones do not show, such as a layer scalar far from 1.

    In float64, which rounds 2^29 times finer than float32: what the reference's own float32 results are off by tells
    how much this model amplifies rounding.
    """
    config = reference.config
    shape = TinyShape(canvas_length=config.canvas_length, vocab_size=config.text_config.vocab_size, sliding_window=256)
    case = Case("a prompt longer than the window", shape, prompt=300, chunk=256, page_size=64)
    model = StepModel(read_config(POCKET))
    model.load_state_dict(checkpoint.read(POCKET).state_dict())
    single, ours = run_reference(reference, case), run_ours(model.double(), case)
    with float64():
        double = run_reference(reference.double(), case)
    assert ours.keys() == double.keys()
    for name, true in double.items():
        rounding = 2.0**-29 * (single[name] - true).abs().max()
        assert (ours[name] - true).abs().max() <= LUCK * rounding, name


def test_generation_defaults_are_the_recipes(reference: DiffusionGemmaForBlockDiffusion) -> None:
    """Catches defaults tuned in one place and not in the other, and names the reference would drop."""
    loaded, settings = reference.generation_config, Settings()
    assert loaded.sampler_config.entropy_bound == settings.entropy_bound
    for name in ("max_denoising_steps", "t_min", "t_max", "stability_threshold", "confidence_threshold"):
        assert getattr(loaded, name) == getattr(settings, name)


def test_checkpoint_stays_small() -> None:
    """Catches a state, a log or unrounded weights published with it."""
    assert sum(path.stat().st_size for path in POCKET.rglob("*") if path.is_file()) <= MOST_BYTES
