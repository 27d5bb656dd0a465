"""Reading safetensors: real files, and files made to harm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from export import tensor_file
from export.tensor_file import read_header
from runtime.errors import CheckpointError


def write(path: Path, header: Any, body: bytes = b"", length: int | None = None) -> Path:
    """A file with this header, raw where it is bytes, and this body; `length` overrides the header's true length."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + body)
    return path


def entry(shape: list[Any], begin: Any, end: Any, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_reads_what_the_library_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All float types, scalars and empty tensors, with chunks that end inside tensors."""
    monkeypatch.setattr(tensor_file, "CHUNK_BYTES", 24)
    random = torch.Generator().manual_seed(0)
    written = {
        "double": torch.randn(3, 5, generator=random, dtype=torch.float64),
        "single": torch.randn(7, generator=random),
        "half": torch.randn(2, 2, 3, generator=random).half(),
        "brain": torch.randn(11, generator=random).bfloat16(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
    }
    save_file(written, tmp_path / "x.safetensors", metadata={"format": "pt"})
    stored = read_header(tmp_path / "x.safetensors")
    assert stored.keys() == written.keys()
    for name, tensor in written.items():
        assert max((len(chunk) * chunk.itemsize for chunk in stored[name].chunks()), default=0) <= 24
        assert torch.equal(stored[name].load(tensor.dtype), tensor)


FILES = [
    pytest.param(b"", "cut short", id="an empty file"),
    pytest.param(b"\x01\x02", "cut short", id="a file shorter than the length field"),
    pytest.param((1 << 62).to_bytes(8, "little") + b"{}", "cut short", id="a huge length: must not be allocated"),
    pytest.param((10).to_bytes(8, "little") + b"{}", "cut short", id="a header cut short"),
    pytest.param(b"PK\x03\x04" + bytes(40), "safetensors", id="another format"),
]


@pytest.mark.parametrize(("content", "complaint"), FILES)
def test_broken_files_are_refused(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=complaint):
        read_header(path)


HEADERS = [
    pytest.param(b"not json", 0, "not JSON", id="a header that is no JSON"),
    pytest.param(b"[" * 100_000, 0, "not JSON", id="a header nested deep enough to exhaust the stack"),
    pytest.param([1], 0, "not a JSON object", id="a header that is no object"),
    pytest.param({"a": 3}, 0, "malformed", id="an entry that is no object"),
    pytest.param({"a": {"dtype": "F32", "shape": [1]}}, 4, "malformed", id="an entry without offsets"),
    pytest.param({"a": entry([1], 0, 4, "F1")}, 4, "unknown dtype", id="an unknown dtype"),
    pytest.param({"a": entry([-1], 0, 4)}, 4, "integers from 0", id="a negative size"),
    pytest.param({"a": entry([True], 0, 4)}, 4, "integers from 0", id="a size that is a boolean"),
    pytest.param({"a": entry([1.0], 0, 4)}, 4, "integers from 0", id="a size that is no integer"),
    pytest.param({"a": entry([1 << 60], 0, 4)}, 4, "offsets span 4", id="sizes beyond the offsets"),
    pytest.param({"a": entry([2], 4, 0)}, 4, "offsets span -4", id="offsets in reverse"),
    pytest.param({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, 4, "overlaps", id="two tensors in one place"),
    pytest.param({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, 12, "overlaps", id="overlapping tensors"),
    pytest.param({"a": entry([1], 4, 8)}, 8, "hole", id="a hole before the first tensor"),
    pytest.param({"a": entry([4], 0, 16)}, 12, "cut short", id="a tensor beyond the file's end"),
    pytest.param({"a": entry([1], 0, 4)}, 9, "5 bytes follow", id="bytes behind the last tensor"),
]


@pytest.mark.parametrize(("header", "body", "complaint"), HEADERS)
def test_contradicting_headers_are_refused(tmp_path: Path, header: Any, body: int, complaint: str) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        read_header(write(tmp_path / "x.safetensors", header, bytes(body)))


numbers = st.integers(-2, 40) | st.none() | st.booleans() | st.floats() | st.just(1 << 70)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F9", 3, None]),
        "shape": st.lists(numbers, max_size=3) | numbers,
        "data_offsets": st.lists(numbers, max_size=3) | numbers,
    },
)


@settings(max_examples=300, deadline=None)
@given(header=st.dictionaries(st.text(max_size=3), entries | numbers, max_size=4), body=st.integers(0, 64))
def test_any_header_is_read_consistently_or_refused(
    tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any], body: int
) -> None:
    path = write(tmp_path_factory.getbasetemp() / "any.safetensors", header, bytes(body))
    try:
        tensors = read_header(path)
    except CheckpointError:
        return
    assert sum(tensor.bytes for tensor in tensors.values()) == body


def test_a_file_that_shrinks_during_the_export_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"a": entry([4], 0, 16)}, bytes(16))
    tensor = read_header(path)["a"]
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="ends inside a tensor"):
        tensor.load(torch.float32)
