"""The sampling values a checkpoint recommends, from its `generation_config.json`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from runtime.bundle import GenerationDefaults
from runtime.errors import CheckpointError

_RELEASED: dict[str, Any] = {
    "max_denoising_steps": 48,
    "entropy_bound": 0.1,
    "t_min": 0.4,
    "t_max": 0.8,
    "stability_threshold": 1,
    "confidence_threshold": 0.005,
    "eos_token_id": [1, 106, 50],
    "pad_token_id": 0,
    "bos_token_id": 2,
}
"""Values of the released checkpoint, for those a checkpoint leaves open."""


def read_generation_defaults(directory: Path, vocab_size: int) -> GenerationDefaults:
    """Read `generation_config.json`.

    Token ids it leaves open come from `config.json`, all else it leaves open from the released checkpoint.

    Raises:
        CheckpointError: a value is of the wrong type or out of its range, or the sampler is not the entropy-bound one.
    """
    path = directory / "generation_config.json"
    raw = _read_object(path) if path.exists() else {}
    text = _read_object(directory / "config.json").get("text_config", {})
    ids = {name: text.get(name) for name in ("eos_token_id", "pad_token_id", "bos_token_id")}
    values = _RELEASED | _set(ids) | _set(raw) | _set(_sampler(path, raw.get("sampler_config")))
    return _checked(path, values, vocab_size)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: is not JSON ({error})") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return raw


def _set(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name in _RELEASED and value is not None}


def _sampler(path: Path, raw: Any) -> dict[str, Any]:
    if raw is None:
        return {}
    kind = raw.get("_cls_name", "EntropyBoundSamplerConfig") if isinstance(raw, dict) else raw
    if kind != "EntropyBoundSamplerConfig":
        raise CheckpointError(f"{path}: sampler_config is {kind!r}; only EntropyBoundSamplerConfig is known")
    return dict(raw)


def _checked(path: Path, values: dict[str, Any], vocab_size: int) -> GenerationDefaults:
    def number(name: str, least: float, most: float = math.inf, kind: type = float) -> Any:
        value = values[name]
        if type(value) not in (int, kind) or not least <= value <= most or math.isinf(value):
            raise CheckpointError(f"{path}: {name} is {value!r}; it must be a {kind.__name__} from {least} to {most}")
        return kind(value)

    ends = values["eos_token_id"]
    ends = ends if isinstance(ends, list) else [ends]
    for end in ends:
        if type(end) is not int or not 0 <= end < vocab_size:
            raise CheckpointError(
                f"{path}: eos_token_id holds {end!r}; ids of this vocabulary are 0 to {vocab_size - 1}"
            )
    t_min = number("t_min", 0.0)
    return GenerationDefaults(
        max_denoising_steps=number("max_denoising_steps", 1, kind=int),
        entropy_bound=number("entropy_bound", 0.0),
        t_min=t_min,
        t_max=number("t_max", t_min),
        stability_threshold=number("stability_threshold", 0, kind=int),
        confidence_threshold=number("confidence_threshold", 0.0),
        end_token_ids=tuple(ends),
        pad_token_id=number("pad_token_id", 0, vocab_size - 1, kind=int),
        bos_token_id=number("bos_token_id", 0, vocab_size - 1, kind=int),
    )
