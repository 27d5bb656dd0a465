"""`config.json` and `generation_config.json`: spellings, defaults, complaints."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import DiffusionGemmaConfig

from benchmarks.large_export import RELEASED
from export.config import parse_config, read_config
from export.generation_config import read_generation_defaults
from runtime.bundle import GenerationDefaults
from runtime.errors import CheckpointError


def test_both_spellings_mean_the_same() -> None:
    """The older one names `global_head_dim`; the reference rewrites it as `per_layer_config`."""
    raw = copy.deepcopy(RELEASED)
    raw["vision_config"] = {"model_type": "gemma4_vision", "num_hidden_layers": 1, "hidden_size": 16}
    newer = json.loads(DiffusionGemmaConfig(**copy.deepcopy(raw)).to_json_string())
    assert "05" in newer["text_config"]["per_layer_config"], "the reference pads layer numbers with zeros"
    assert "global_head_dim" not in newer["text_config"]
    assert parse_config(newer) == parse_config(raw)


def test_the_released_shape() -> None:
    config = parse_config(RELEASED)
    full = [index for index, layer in enumerate(config.layers) if not layer.sliding]
    assert full == [5, 11, 17, 23, 29]
    assert (config.layers[0].kv_heads, config.layers[0].head_dim, config.layers[0].rotary_fraction) == (8, 256, 1.0)
    assert (config.layers[5].kv_heads, config.layers[5].head_dim, config.layers[5].rotary_fraction) == (2, 512, 0.25)


Change = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        pytest.param(lambda raw: raw.update(model_type="llama"), "model_type is 'llama'", id="another model"),
        pytest.param(lambda raw: raw.pop("text_config"), "text_config is missing", id="no text model"),
        pytest.param(lambda raw: raw.update(canvas_length=0), "canvas_length is 0", id="no canvas"),
        pytest.param(lambda raw: raw["text_config"].update(hidden_size="2816"), "hidden_size is '2816'", id="a string"),
        pytest.param(lambda raw: raw["text_config"].update(num_experts=True), "num_experts is True", id="a boolean"),
        pytest.param(lambda raw: raw["text_config"].update(top_k_experts=129), "top_k_experts is 129", id="too many"),
        pytest.param(lambda raw: raw["text_config"].update(rms_norm_eps=float("nan")), "rms_norm_eps", id="not finite"),
        pytest.param(lambda raw: raw["text_config"].update(attention_bias=True), "attention_bias", id="biases"),
        pytest.param(lambda raw: raw["text_config"].update(layer_types=[]), "each of the 30 layers", id="no types"),
        pytest.param(
            lambda raw: raw["text_config"].update(use_bidirectional_attention="all"),
            "use_bidirectional",
            id="no causality",
        ),
        pytest.param(
            lambda raw: raw["text_config"].update(num_attention_heads=9), "9 heads", id="heads that do not divide"
        ),
        pytest.param(
            lambda raw: raw["text_config"].update(per_layer_config={"5": {"head_dim": 512}}),
            "heads of \\[256, 512\\]",
            id="head sizes that differ within a type",
        ),
        pytest.param(
            lambda raw: raw["text_config"]["rope_parameters"]["full_attention"].update(rope_type="yarn"),
            "rope_type is 'yarn'",
            id="another rotation",
        ),
    ],
)
def test_wrong_configs_are_refused(change: Change, complaint: str) -> None:
    raw = copy.deepcopy(RELEASED)
    change(raw)
    with pytest.raises(CheckpointError, match=complaint):
        parse_config(raw)


@pytest.mark.parametrize(("content", "complaint"), [("{", "is not JSON"), ("[]", "JSON object")])
def test_unreadable_configs_are_refused(tmp_path: Path, content: str, complaint: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=complaint):
        read_config(tmp_path)


RELEASED_DEFAULTS = GenerationDefaults(
    max_denoising_steps=48,
    entropy_bound=0.1,
    t_min=0.4,
    t_max=0.8,
    stability_threshold=1,
    confidence_threshold=0.005,
    end_token_ids=(1, 106, 50),
    pad_token_id=0,
    bos_token_id=2,
)


def read(directory: Path, generation: dict[str, Any] | None, text: dict[str, Any] | None = None) -> GenerationDefaults:
    (directory / "config.json").write_text(json.dumps({"text_config": text or {}}))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return read_generation_defaults(directory, vocab_size=200)


@pytest.mark.parametrize(
    "generation",
    [
        pytest.param(None, id="no file"),
        pytest.param({}, id="an empty file"),
        pytest.param({"t_min": None, "sampler_config": None, "eos_token_id": None}, id="nulls, as the reference saves"),
    ],
)
def test_what_is_left_open_takes_the_released_values(tmp_path: Path, generation: dict[str, Any] | None) -> None:
    assert read(tmp_path, generation) == RELEASED_DEFAULTS


def test_all_values_are_read(tmp_path: Path) -> None:
    values = {
        "max_denoising_steps": 7,
        "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.3},
        "t_min": 0.0,
        "t_max": 1,
        "stability_threshold": 0,
        "confidence_threshold": 0.5,
        "eos_token_id": 9,
        "pad_token_id": 3,
        "bos_token_id": 4,
        "max_new_tokens": 256,
    }
    assert read(tmp_path, values) == GenerationDefaults(7, 0.3, 0.0, 1.0, 0, 0.5, (9,), 3, 4)


def test_token_ids_come_from_the_model_where_generation_leaves_them_open(tmp_path: Path) -> None:
    defaults = read(tmp_path, {"eos_token_id": None}, {"eos_token_id": 5, "pad_token_id": 6, "bos_token_id": 7})
    assert (defaults.end_token_ids, defaults.pad_token_id, defaults.bos_token_id) == ((5,), 6, 7)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"max_denoising_steps": 0}, "max_denoising_steps is 0"),
        ({"max_denoising_steps": 4.5}, "max_denoising_steps is 4.5"),
        ({"t_min": 0.8, "t_max": 0.4}, "t_max is 0.4"),
        ({"confidence_threshold": -1}, "confidence_threshold is -1"),
        ({"eos_token_id": [1, 200]}, "eos_token_id holds 200"),
        ({"eos_token_id": "1"}, "eos_token_id holds '1'"),
        ({"pad_token_id": 200}, "pad_token_id is 200"),
        ({"sampler_config": {"_cls_name": "OtherConfig"}}, "sampler_config is 'OtherConfig'"),
        ({"sampler_config": 3}, "sampler_config is 3"),
        ({"sampler_config": {"entropy_bound": True}}, "entropy_bound is True"),
    ],
)
def test_wrong_values_are_refused(tmp_path: Path, values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        read(tmp_path, values)
