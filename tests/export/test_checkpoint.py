"""Opening checkpoint directories: what is read, and what is complained about."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from export.checkpoint import INDEX, SINGLE_FILE, open_checkpoint
from runtime.errors import CheckpointError
from tests.tiny import TEMPLATE, write_checkpoint

Q_PROJ = "model.decoder.layers.0.self_attn.q_proj.weight"
NORM = "model.decoder.norm.weight"
EXPERTS = "model.decoder.layers.1.experts.down_proj"


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def edit(checkpoint: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(checkpoint / SINGLE_FILE)
    change(tensors)
    save_file(tensors, checkpoint / SINGLE_FILE)


def test_tensors_are_those_the_library_saved(tiny_checkpoint: Path) -> None:
    opened = open_checkpoint(tiny_checkpoint)
    saved = load_file(tiny_checkpoint / SINGLE_FILE)
    assert opened.tensors.keys() | set(opened.skipped) == saved.keys()
    assert all("vision" in name for name in opened.skipped)
    for name, tensor in opened.tensors.items():
        assert torch.equal(tensor.load(torch.float32), saved[name])
    assert opened.chat_template == TEMPLATE


def test_both_layer_scalars_are_read(tiny_checkpoint: Path) -> None:
    tensors = open_checkpoint(tiny_checkpoint).tensors
    names = [f"model.{part}.layers.0.layer_scalar" for part in ("decoder", "encoder.language_model")]
    denoise, encode = (tensors[name].load(torch.float32) for name in names)
    assert denoise != encode


def test_shards_hold_the_same_tensors(tiny_checkpoint: Path, tmp_path: Path) -> None:
    sharded = write_checkpoint(tmp_path / "sharded", shard_bytes="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    single, split = open_checkpoint(tiny_checkpoint).tensors, open_checkpoint(sharded).tensors
    assert single.keys() == split.keys()
    assert all(torch.equal(single[name].load(torch.float32), split[name].load(torch.float32)) for name in single)


def test_all_faults_are_named_in_one_error(checkpoint: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[Q_PROJ]
        tensors["model.decoder.stray"] = torch.zeros(1)
        tensors[NORM] = torch.zeros(3)
        tensors[EXPERTS] = tensors[EXPERTS].to(torch.int8)

    edit(checkpoint, change)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(checkpoint)
    message = str(caught.value)
    assert "4 faults" in message
    assert f"{Q_PROJ}: is missing" in message
    assert "model.decoder.stray: is surplus" in message
    assert f"{NORM}: has shape [3]" in message
    assert f"{EXPERTS}: has dtype I8" in message


def test_many_faults_are_counted(checkpoint: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".layers." in name]:
            del tensors[name]

    edit(checkpoint, change)
    with pytest.raises(CheckpointError, match=r"and \d+ more"):
        open_checkpoint(checkpoint)


def test_a_shard_cut_short_is_named_beside_the_other_faults(tmp_path: Path) -> None:
    sharded = write_checkpoint(tmp_path / "sharded", shard_bytes="100KB")
    first, *_, last = sorted(sharded.glob("*.safetensors"))
    with last.open("r+b") as file:
        file.truncate(last.stat().st_size - 5)
    tensors = load_file(first)
    save_file(tensors | {"model.decoder.stray": torch.zeros(1)}, first)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(sharded)
    message = str(caught.value)
    assert "2 faults" in message, "what the index says lay in the broken file is not missing besides"
    assert f"{last.name}: is cut short" in message
    assert "model.decoder.stray: is surplus" in message


def test_tied_copies_are_skipped(checkpoint: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.decoder.embed_tokens.weight"].clone()
        tensors[Q_PROJ.replace("model.decoder", "model.encoder.language_model")] = tensors[Q_PROJ].clone()

    edit(checkpoint, change)
    assert {"lm_head.weight"} < set(open_checkpoint(checkpoint).skipped)


class Bomb:
    """Would leave a trace if anything unpickled it."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.trace,))


def test_pickles_are_refused_unread(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / SINGLE_FILE).unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "trace")))
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin, which are pickles .* safetensors"):
        open_checkpoint(checkpoint)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("index", "complaint"),
    [
        pytest.param("[]", "no index", id="a list"),
        pytest.param('{"weight_map": 3}', "no index", id="a map that is a number"),
        pytest.param(
            '{"weight_map": {"a": "../../etc/passwd.safetensors"}}', "no safetensors file of this", id="a path out"
        ),
        pytest.param('{"weight_map": {"a": "model.bin"}}', "no safetensors file of this", id="a pickle"),
        pytest.param(
            '{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors: cannot be read", id="an absent file"
        ),
    ],
)
def test_hostile_indices_are_refused(checkpoint: Path, index: str, complaint: str) -> None:
    (checkpoint / INDEX).write_text(index)
    with pytest.raises(CheckpointError, match=complaint):
        open_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("absent", "complaint"),
    [
        ("config.json", r"config\.json: cannot be read"),
        ("tokenizer.json", r"tokenizer\.json: is missing"),
        (SINGLE_FILE, "neither model.safetensors nor"),
    ],
)
def test_absent_files_are_named(checkpoint: Path, absent: str, complaint: str) -> None:
    (checkpoint / absent).unlink()
    with pytest.raises(CheckpointError, match=complaint):
        open_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        pytest.param({"chat_template": "x"}, "x", id="in tokenizer_config.json"),
        pytest.param({"chat_template": [{"name": "default", "template": "y"}]}, "y", id="as a list of named ones"),
        pytest.param({"chat_template": [{"name": "tool_use", "template": "y"}]}, None, id="no default among them"),
        pytest.param({}, None, id="none at all"),
    ],
)
def test_chat_templates_in_the_older_place(checkpoint: Path, stored: dict[str, object], expected: str | None) -> None:
    (checkpoint / "chat_template.jinja").unlink()
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(stored))
    assert open_checkpoint(checkpoint).chat_template == expected
