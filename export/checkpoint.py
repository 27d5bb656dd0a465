"""A Hugging Face checkpoint directory, opened and checked as a whole before anything is read from it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from export.compressed_tensors import Fp8Tensor, assemble, is_compressed
from export.config import ModelConfig, read_config
from export.generation_config import read_generation_defaults
from export.model import StepModel
from export.tensor_file import StoredTensor, WeightTensor, read_header
from runtime.bundle import CHAT_TEMPLATE, TOKENIZER, GenerationDefaults
from runtime.errors import CheckpointError

SINGLE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
_MOST_NAMED = 20
"""Complaints listed before the rest is only counted."""


@dataclass(frozen=True)
class Checkpoint:
    """What an export takes from a checkpoint directory; tensors are read when asked for."""

    directory: Path
    config: ModelConfig
    generation: GenerationDefaults
    tensors: Mapping[str, WeightTensor]
    """The step model's parameters by their name in the checkpoint."""
    skipped: tuple[str, ...]
    """Names of stored tensors that the step model has no use for: the vision tower, tied copies."""
    chat_template: str | None

    @property
    def source_files(self) -> tuple[Path, ...]:
        """The files the checkpoint was read from, in order of their names."""
        texts = ("config.json", "generation_config.json", TOKENIZER, "tokenizer_config.json", CHAT_TEMPLATE, INDEX)
        present = {path for name in texts if (path := self.directory / name).is_file()}
        return tuple(sorted(present | {path for tensor in self.tensors.values() for path in tensor.paths}))


def open_checkpoint(directory: Path) -> Checkpoint:
    """Open a checkpoint directory and check that it holds exactly the tensors its `config.json` calls for.

    Raises:
        CheckpointError: a file is absent or malformed; or tensors are missing, surplus, misshapen, of a dtype that
            is not a plain float, or cut short, all named in one message.
    """
    config = read_config(directory)
    if not (directory / TOKENIZER).is_file():
        raise CheckpointError(f"{directory / TOKENIZER}: is missing; save the tokenizer beside the model")
    stored, faults, lost = _stored_tensors(directory)
    expected, assembled = dict(expected_tensors(config)), dict[str, StoredTensor | Fp8Tensor](stored)
    if is_compressed(directory):
        assembled, broken = assemble(expected, stored)
        faults += [fault for each in broken.values() for fault in each if fault.partition(":")[0] not in lost]
        lost |= broken.keys()
    tensors, skipped, mismatches = _match(expected, assembled, lost)
    _complain(directory, [*faults, *mismatches])
    return Checkpoint(
        directory,
        config,
        read_generation_defaults(directory, config.vocab_size),
        tensors,
        skipped,
        _chat_template(directory),
    )


def stored_name(parameter: str) -> str:
    """Name in the checkpoint of a parameter of the step model."""
    if parameter.endswith(".encoder_layer_scalar"):
        return f"model.encoder.language_model.{parameter.replace('.encoder_layer_scalar', '.layer_scalar')}"
    return f"model.decoder.{parameter}"


def expected_tensors(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor the step model takes from the checkpoint."""
    with torch.device("meta"):
        model = StepModel(config)
    return ((stored_name(name), tuple(tensor.shape)) for name, tensor in model.state_dict().items())


def _stored_tensors(directory: Path) -> tuple[dict[str, StoredTensor], list[str], set[str]]:
    """All tensors of the safetensors files, what is wrong with the files, and the names that unreadable files held."""
    tensors: dict[str, StoredTensor] = {}
    faults: list[str] = []
    lost: set[str] = set()
    for name, held in _tensor_files(directory).items():
        try:
            header = read_header(directory / name)
        except OSError as error:
            faults.append(f"{name}: cannot be read ({error.strerror})")
            lost |= held
        except CheckpointError as error:
            faults.append(str(error).removeprefix(f"{directory}/"))
            lost |= held
        else:
            twice = tensors.keys() & header.keys()
            faults += [f"{each}: stored twice, in {tensors[each].path.name} and {name}" for each in sorted(twice)]
            tensors |= header
    return tensors, faults, lost


def _tensor_files(directory: Path) -> dict[str, set[str]]:
    """The safetensors files by name, and the tensors that the index says they hold."""
    if (directory / INDEX).is_file():
        return _index_files(directory / INDEX)
    if (directory / SINGLE_FILE).is_file():
        return {SINGLE_FILE: set()}
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in directory.glob(pattern))
    if pickled:
        raise CheckpointError(
            f"{directory}: holds {', '.join(pickled)}, which are pickles and can run code when read; "
            "save the model as safetensors"
        )
    raise CheckpointError(f"{directory}: holds neither {SINGLE_FILE} nor {INDEX}")


def _index_files(path: Path) -> dict[str, set[str]]:
    files: dict[str, set[str]] = {}
    try:
        for tensor, name in json.loads(path.read_text(encoding="utf-8"))["weight_map"].items():
            files.setdefault(name, set()).add(tensor)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: is no index of safetensors files ({error!r})") from error
    for name in files:
        if Path(str(name)).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{path}: names {name!r}, which is no safetensors file of this directory")
    return files


def _match(
    expected: dict[str, tuple[int, ...]], stored: Mapping[str, StoredTensor | Fp8Tensor], lost: set[str]
) -> tuple[dict[str, WeightTensor], tuple[str, ...], list[str]]:
    faults, skipped = [f"{name}: is missing" for name in expected.keys() - stored.keys() - lost], []
    for name, tensor in stored.items():
        if name not in expected:
            if _is_skipped(name, expected):
                skipped.append(name)
            else:
                faults.append(f"{name}: is surplus")
        elif tensor.shape != expected[name]:
            faults.append(f"{name}: has shape {list(tensor.shape)} where config.json calls for {list(expected[name])}")
        elif isinstance(tensor, StoredTensor) and not tensor.is_float:
            faults.append(f"{name}: has dtype {tensor.dtype}; only F64, F32, F16 and BF16 are read")
    return {name: stored[name] for name in expected if name in stored}, tuple(sorted(skipped)), sorted(faults)


def _is_skipped(name: str, expected: Mapping[str, Any]) -> bool:
    """Vision weights, and copies of tied ones: the output head and the encoder's text weights."""
    tied = name == "lm_head.weight" or name.replace("model.encoder.language_model.", "model.decoder.") in expected
    return tied or name.startswith(("model.encoder.vision_tower.", "model.encoder.embed_vision."))


def _complain(directory: Path, faults: list[str]) -> None:
    if not faults:
        return
    named = faults[:_MOST_NAMED] + [f"and {len(faults) - _MOST_NAMED} more"] * (len(faults) > _MOST_NAMED)
    raise CheckpointError(f"{directory}: {len(faults)} faults in its tensors:\n  " + "\n  ".join(named))


def _chat_template(directory: Path) -> str | None:
    """The chat template: a file of its own, or in `tokenizer_config.json`; None where the checkpoint has none."""
    path = directory / CHAT_TEMPLATE
    if path.is_file():
        return path.read_text(encoding="utf-8")
    path = directory / "tokenizer_config.json"
    if not path.is_file():
        return None
    try:
        template = json.loads(path.read_text(encoding="utf-8")).get("chat_template")
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: is no JSON object ({error})") from error
    if isinstance(template, list):
        template = next((entry.get("template") for entry in template if entry.get("name") == "default"), None)
    return template if isinstance(template, str) else None
