"""FP8 checkpoints of the compressed-tensors layout, which the tests write themselves from a checkpoint's tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from export.checkpoint import INDEX, SINGLE_FILE, open_checkpoint
from export.quantization import store
from export.weights import Precision
from runtime.errors import CheckpointError

QUANTIZED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.")
LAYER = "model.decoder.layers.1."
SCHEME: dict[str, Any] = {
    "config_groups": {
        "group_0": {
            "format": "float-quantized",
            "input_activations": {
                "actorder": None, "block_structure": None, "dynamic": True, "group_size": None, "num_bits": 8,
                "observer": None, "observer_kwargs": {}, "strategy": "token", "symmetric": True, "type": "float",
            },
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": None, "block_structure": None, "dynamic": False, "group_size": None, "num_bits": 8,
                "observer": "minmax", "observer_kwargs": {}, "strategy": "channel", "symmetric": True, "type": "float",
            },
        }
    },
    "format": "float-quantized",
    "global_compression_ratio": None,
    "ignore": ["lm_head", "re:.*embed.*", "re:.*router.*", "re:.*vision.*", "re:.*self_conditioning.*"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}  # fmt: skip


def compress(name: str, weight: Tensor, scale_dtype: torch.dtype) -> dict[str, Tensor]:
    """A linear as the layout stores it."""
    scale = (weight.abs().amax(1, keepdim=True) / 448).to(scale_dtype)
    codes = (weight / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {f"{name}.weight": codes, f"{name}.weight_scale": scale}


def compress_all(tensors: dict[str, Tensor], scale_dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """A checkpoint's tensors as the layout stores them."""
    compressed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer, packed, kind = name.rpartition(".experts.")
        if packed:
            for expert, matrix in enumerate(tensor):
                halves = {"gate_proj": matrix.chunk(2)[0], "up_proj": matrix.chunk(2)[1]}
                for projection, weight in (halves if kind == "gate_up_proj" else {"down_proj": matrix}).items():
                    compressed |= compress(f"{layer}.experts.{expert}.{projection}", weight, scale_dtype)
        elif ".layers." in name and "vision" not in name and any(part in name for part in QUANTIZED):
            compressed |= compress(name.removesuffix(".weight"), tensor, scale_dtype)
        else:
            compressed[name] = tensor.bfloat16()
    return {name: tensor.contiguous() for name, tensor in compressed.items()}


def write(directory: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, directory / SINGLE_FILE)


def set_scheme(directory: Path, scheme: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": scheme}))


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """`tiny_checkpoint` in the published layout."""
    directory = Path(shutil.copytree(tiny_checkpoint, tmp_path / "compressed"))
    write(directory, compress_all(load_file(directory / SINGLE_FILE)))
    set_scheme(directory, SCHEME)
    return directory


def dequantized(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the stored linears stand for, by name, float32."""
    scaled = {name: tensors[f"{name}_scale"] for name in tensors if f"{name}_scale" in tensors}
    return {name: tensors[name].float() * scale.float().view(-1, 1) for name, scale in scaled.items()}


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
def test_tensors_are_what_the_codes_stand_for(
    checkpoint: Path, tiny_checkpoint: Path, scale_dtype: torch.dtype
) -> None:
    """Catches up rows before gate rows, experts out of order and scales left out."""
    write(checkpoint, compress_all(load_file(tiny_checkpoint / SINGLE_FILE), scale_dtype))
    opened, plain = open_checkpoint(checkpoint), open_checkpoint(tiny_checkpoint)
    assert list(opened.tensors) == list(plain.tensors)
    linears = dequantized(load_file(checkpoint / SINGLE_FILE))
    for name, tensor in opened.tensors.items():
        loaded, original = tensor.load(torch.float32), plain.tensors[name].load(torch.float32)
        assert loaded.shape == original.shape
        layer, packed, kind = name.rpartition(".experts.")
        if kind == "gate_up_proj":
            names = [[f"{layer}.experts.{e}.{half}_proj.weight" for half in ("gate", "up")] for e in range(len(loaded))]
            expected = torch.stack([torch.cat([linears[gate], linears[up]]) for gate, up in names])
        elif packed:
            expected = torch.stack([linears[f"{layer}.experts.{e}.down_proj.weight"] for e in range(len(loaded))])
        else:
            expected = linears.get(name, original.bfloat16().float())
        assert torch.equal(loaded, expected), name
        # Half a step of the format: 2^-4 of a number, or 2^-10 of the row's scale; bfloat16 scales add 2^-9.
        step = (original.abs() * 2.0**-4).clamp(min=2.0**-10 * original.abs().amax(-1, keepdim=True) / 448)
        assert ((loaded - original).abs() <= step * (1 + 2.0**-5) + 2.0**-8 * original.abs()).all(), name


def test_fp8_export_keeps_the_published_codes(checkpoint: Path) -> None:
    """Catches codes that are dequantised and quantised anew, which would round a second time."""
    stored = load_file(checkpoint / SINGLE_FILE)
    sources = store(open_checkpoint(checkpoint).tensors, Precision.FP8)
    query, scale = (sources[f"{LAYER}self_attn.q_proj.weight{end}"].load() for end in ("", "_scale"))
    assert torch.equal(query.view(torch.uint8), stored[f"{LAYER}self_attn.q_proj.weight"].view(torch.uint8))
    assert torch.equal(scale, stored[f"{LAYER}self_attn.q_proj.weight_scale"].float()[:, 0])
    gate_up, gate_up_scale = (sources[f"{LAYER}experts.gate_up_proj{end}"].load() for end in ("", "_scale"))
    for expert in range(len(gate_up)):
        for codes, scales, half in zip(
            gate_up[expert].chunk(2), gate_up_scale[expert].chunk(2), ("gate", "up"), strict=True
        ):
            name = f"{LAYER}experts.{expert}.{half}_proj.weight"
            assert torch.equal(codes.view(torch.uint8), stored[name].view(torch.uint8))
            assert torch.equal(scales, stored[f"{name}_scale"].float()[:, 0])


def test_the_export_knows_the_files_that_it_read(checkpoint: Path) -> None:
    assert checkpoint / SINGLE_FILE in open_checkpoint(checkpoint).source_files


def test_linears_left_wide_are_read_as_they_are(checkpoint: Path, tiny_checkpoint: Path) -> None:
    """Catches a layout that is believed more than the tensors: any linear may be on the ignore list."""
    name, tensors = f"{LAYER}mlp.gate_proj.weight", load_file(checkpoint / SINGLE_FILE)
    del tensors[f"{name}_scale"]
    tensors[name] = load_file(tiny_checkpoint / SINGLE_FILE)[name].bfloat16()
    write(checkpoint, tensors)
    assert torch.equal(open_checkpoint(checkpoint).tensors[name].load(torch.bfloat16), tensors[name])


EXPERT, DENSE = f"{LAYER}experts.3.up_proj.weight", f"{LAYER}mlp.up_proj.weight"
BROKEN: list[Any] = [
    pytest.param(lambda t: t.pop(EXPERT), f"{EXPERT}: is missing", id="catches one expert of many missing"),
    pytest.param(lambda t: t.pop(f"{EXPERT}_scale"), f"{EXPERT}_scale: is missing", id="catches a missing scale"),
    pytest.param(lambda t: t.pop(f"{DENSE}_scale"), f"{DENSE}_scale: is missing", id="catches codes taken for numbers"),
    pytest.param(
        lambda t: t.update({EXPERT: t[EXPERT][:-1].contiguous()}),
        f"{EXPERT}: has shape [15, 36] where config.json calls for [16, 36]",
        id="catches an expert of another shape",
    ),
    pytest.param(
        lambda t: t.update({EXPERT: t[EXPERT].bfloat16()}),
        f"{EXPERT}: has dtype BF16 where its neighbours have F8_E4M3",
        id="catches a wide expert among coded ones",
    ),
    pytest.param(
        lambda t: t.update({f"{EXPERT}_scale": torch.ones(1)}),
        f"{EXPERT}_scale: has shape [1] where each of 16 channels needs a number",
        id="catches a scale for the whole matrix",
    ),
    pytest.param(
        lambda t: t.update({f"{DENSE}_scale": torch.ones(48, 1, dtype=torch.int8)}),
        f"{DENSE}_scale: has dtype I8",
        id="catches scales that are no floats",
    ),
    pytest.param(
        lambda t: t.update({f"{LAYER}mlp.up_proj.input_scale": torch.ones(1)}),
        f"{LAYER}mlp.up_proj.input_scale: is surplus",
        id="catches static scales of activations, which would be ignored",
    ),
]


@pytest.mark.parametrize(("change", "fault"), BROKEN)
def test_what_does_not_fit_is_named(checkpoint: Path, change: Callable[[dict[str, Tensor]], None], fault: str) -> None:
    tensors = load_file(checkpoint / SINGLE_FILE)
    change(tensors)
    write(checkpoint, tensors)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(checkpoint)
    assert "1 faults" in str(caught.value)
    assert fault in str(caught.value)


def test_what_an_unreadable_file_held_is_not_missing_besides(checkpoint: Path) -> None:
    """Catches hundreds of complaints about experts where the one cause is a shard cut short."""
    tensors = load_file(checkpoint / SINGLE_FILE)
    experts = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{LAYER}experts.2.")}
    save_file(experts, checkpoint / "experts.safetensors")
    save_file({name: tensors[name] for name in tensors.keys() - experts.keys()}, checkpoint / "rest.safetensors")
    (checkpoint / SINGLE_FILE).unlink()
    weight_map = {name: "experts.safetensors" if name in experts else "rest.safetensors" for name in tensors}
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert open_checkpoint(checkpoint).tensors
    (checkpoint / "experts.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"1 faults in its tensors:\s+experts.safetensors: is cut short"):
        open_checkpoint(checkpoint)


def changed(**group: Any) -> dict[str, Any]:
    """The scheme with parts of its group's fields replaced."""
    fields = dict(SCHEME["config_groups"]["group_0"])
    for name, value in group.items():
        fields[name] = fields[name] | value if isinstance(value, dict) else value
    return SCHEME | {"config_groups": {"group_0": fields}}


REFUSED: list[Any] = [
    pytest.param({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_method is 'modelopt'", id="modelopt"),
    pytest.param(changed(format="nvfp4-pack-quantized"), "format of group_0 is 'nvfp4-pack-quantized'", id="nvfp4"),
    pytest.param(changed(weights={"num_bits": 4}), "num_bits of group_0's weights is 4, not 8", id="4 bits"),
    pytest.param(changed(weights={"type": "int"}), "type of group_0's weights is 'int', not 'float'", id="integers"),
    pytest.param(
        changed(weights={"strategy": "block"}), "strategy of group_0's weights is 'block', not 'channel'", id="blocks"
    ),
    pytest.param(changed(weights=None), "num_bits of group_0's weights is None", id="no weights"),
    pytest.param(
        changed(input_activations={"dynamic": False}), "dynamic of group_0's input_activations is False", id="static"
    ),
    pytest.param(changed(output_activations=[8]), "group_0 quantises output_activations", id="outputs"),
    pytest.param(SCHEME | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme asks", id="quantised K/V"),
    pytest.param(SCHEME | {"config_groups": {}}, "config_groups is missing", id="no groups"),
    pytest.param("fp8", "is no object", id="no object"),
]


@pytest.mark.parametrize(("scheme", "complaint"), REFUSED)
def test_other_schemes_are_refused(checkpoint: Path, scheme: Any, complaint: str) -> None:
    """Catches codes of another scheme read as if they were of this one."""
    set_scheme(checkpoint, scheme)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(checkpoint)
    assert complaint in str(caught.value)
    assert "export from the unquantised checkpoint" in str(caught.value)


def test_weight_only_and_the_older_spelling_are_read(checkpoint: Path) -> None:
    """Catches a reader that insists on quantised activations, or on the format inside the group."""
    group = {name: value for name, value in SCHEME["config_groups"]["group_0"].items() if name != "format"}
    set_scheme(checkpoint, SCHEME | {"config_groups": {"group_0": group | {"input_activations": None}}})
    assert open_checkpoint(checkpoint).tensors
