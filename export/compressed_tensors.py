"""FP8 checkpoints of the compressed-tensors layout, as Red Hat AI publishes them.

Every linear has a `weight` in 8-bit floats and a `weight_scale`, one number an output channel; the experts, which other
checkpoints pack into two tensors a layer, are single linears `experts.E.{gate,up,down}_proj`. `config.json` says so
under `quantization_config`. Which modules were left wide shows in the tensors' dtypes; the `ignore` list repeats it.
The activations' own 8-bit floats are made at run time, so nothing of them is stored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export.tensor_file import StoredTensor, load, whole_rows
from runtime.errors import CheckpointError

_FP8 = "F8_E4M3"
_METHOD, _FORMAT = "compressed-tensors", "float-quantized"
_WEIGHTS = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
_ACTIVATIONS = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}


@dataclass(frozen=True)
class Fp8Tensor:
    """A weight whose rows are 8-bit floats with a scale each, perhaps stored as several matrices one after the other.

    As a `WeightTensor` it is the numbers that the codes stand for.
    """

    parts: tuple[tuple[StoredTensor, StoredTensor], ...]
    """Codes `[n, K]` and scales of n numbers."""
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files it is read from."""
        return tuple({tensor.path for part in self.parts for tensor in part})

    def codes(self) -> Iterator[Tensor]:
        """float8_e4m3fn, flat, in order."""
        for codes, _ in self.parts:
            yield from codes.chunks()

    def scales(self) -> Iterator[Tensor]:
        """float32, flat, one number a row."""
        for _, scales in self.parts:
            yield scales.load(torch.float32).flatten()

    def chunks(self) -> Iterator[Tensor]:
        """What the codes stand for, float32, flat, in order.

        Raises:
            CheckpointError: a file ends early.
        """
        for codes, stored_scales in self.parts:
            scales, row = stored_scales.load(torch.float32).flatten(), 0
            for rows in whole_rows(codes):
                yield (rows.float() * scales[row : row + len(rows), None]).flatten()
                row += len(rows)

    def load(self, dtype: torch.dtype) -> Tensor:
        """All of it in memory, as `dtype`."""
        return load(self, dtype)


def is_compressed(directory: Path) -> bool:
    """Whether a checkpoint's `config.json` announces this layout.

    Raises:
        CheckpointError: it announces another quantisation.
    """
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: is no JSON object ({error})") from error
    if config is None:
        return False
    complaint = _complaint(config)
    if complaint is not None:
        raise CheckpointError(
            f"{path}: quantization_config: {complaint}. Of quantised checkpoints only compressed-tensors with 8-bit "
            "floats and a scale a channel are read; export from the unquantised checkpoint instead"
        )
    return True


def assemble(
    expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, StoredTensor]
) -> tuple[dict[str, StoredTensor | Fp8Tensor], dict[str, list[str]]]:
    """Put codes and scales together, and the experts into the tensors that the model wants.

    Args:
        expected: shapes of the model's tensors by name.
        stored: all tensors of the checkpoint.

    Returns:
        tensors: what is stored, with every quantised tensor of the model in place of its pieces.
        faults: by name of each tensor that could not be put together, what is wrong with its pieces.
    """
    tensors: dict[str, StoredTensor | Fp8Tensor] = dict(stored)
    faults: dict[str, list[str]] = {}
    for name, shape in expected.items():
        pieces = _pieces(name, shape)
        if not any(piece in stored and stored[piece].dtype == _FP8 for piece in pieces):
            continue
        for piece in pieces:
            tensors.pop(piece, None)
            tensors.pop(f"{piece}_scale", None)
        wrong = [fault for piece, size in pieces.items() for fault in _piece_faults(piece, size, stored)]
        if wrong:
            faults[name] = wrong
        else:
            tensors[name] = Fp8Tensor(tuple((stored[piece], stored[f"{piece}_scale"]) for piece in pieces), shape)
    return tensors, faults


def _pieces(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes of the matrices that a tensor of the model is stored as, by name, in the order of its rows."""
    layer, _, kind = name.rpartition(".experts.")
    each: dict[str, tuple[int, ...]]
    if kind == "gate_up_proj":
        experts, rows, columns = shape
        each = {"gate_proj": (rows // 2, columns), "up_proj": (rows // 2, columns)}
    elif kind == "down_proj":
        experts, *matrix = shape
        each = {"down_proj": tuple(matrix)}
    else:
        return {name: shape}
    return {
        f"{layer}.experts.{expert}.{projection}.weight": size
        for expert in range(experts)
        for projection, size in each.items()
    }


def _piece_faults(name: str, shape: tuple[int, ...], stored: Mapping[str, StoredTensor]) -> Iterator[str]:
    codes, scales = stored.get(name), stored.get(f"{name}_scale")
    if codes is None:
        yield f"{name}: is missing"
    elif codes.shape != shape:
        yield f"{name}: has shape {list(codes.shape)} where config.json calls for {list(shape)}"
    elif codes.dtype != _FP8:
        yield f"{name}: has dtype {codes.dtype} where its neighbours have {_FP8}"
    if scales is None:
        yield f"{name}_scale: is missing"
    elif scales.shape not in ((shape[0],), (shape[0], 1)):
        yield f"{name}_scale: has shape {list(scales.shape)} where each of {shape[0]} channels needs a number"
    elif not scales.is_float:
        yield f"{name}_scale: has dtype {scales.dtype}; only F64, F32, F16 and BF16 are read"


def _complaint(config: Any) -> str | None:
    """What in a `quantization_config` is not of this layout; None where all is."""
    if not isinstance(config, dict):
        return "is no object"
    if config.get("quant_method") != _METHOD:
        return f"quant_method is {config.get('quant_method')!r}, not {_METHOD!r}"
    if config.get("kv_cache_scheme") is not None:
        return "kv_cache_scheme asks for quantised K/V"
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        return "config_groups is missing"
    complaints = (_group_complaint(name, group, config.get("format")) for name, group in groups.items())
    return next((complaint for complaint in complaints if complaint is not None), None)


def _group_complaint(name: str, group: Any, outer_format: Any) -> str | None:
    if not isinstance(group, dict):
        return f"{name} is no object"
    format_ = group.get("format") or outer_format
    if format_ != _FORMAT:
        return f"format of {name} is {format_!r}, not {_FORMAT!r}"
    for part, wanted in (("weights", _WEIGHTS), ("input_activations", _ACTIVATIONS)):
        values = group.get(part)
        if values is None and part == "input_activations":
            continue
        for key, value in wanted.items():
            if not isinstance(values, dict) or values.get(key) != value:
                found = values.get(key) if isinstance(values, dict) else None
                return f"{key} of {name}'s {part} is {found!r}, not {value!r}"
    return None if group.get("output_activations") is None else f"{name} quantises output_activations"
