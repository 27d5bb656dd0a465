"""Loading a bundle into ONNX Runtime: what is refused, and what the default memory holds."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import onnxruntime
import pytest

from runtime.bundle import MANIFEST, STEP_GRAPH, Bundle, FileRecord, Manifest, sha256
from runtime.engines.onnxruntime import OnnxRuntimeEngine, Options
from runtime.errors import BundleError
from runtime.pool import PagePool


@pytest.fixture
def copied(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    """A copy of the tiny bundle, to be spoilt."""
    return Path(shutil.copytree(tiny_bundle.directory, tmp_path / "bundle"))


def rewrite(directory: Path, **changes: object) -> Bundle:
    """The bundle with these fields of its manifest replaced."""
    manifest = msgspec.json.decode((directory / MANIFEST).read_bytes(), type=Manifest)
    (directory / MANIFEST).write_bytes(msgspec.json.encode(msgspec.structs.replace(manifest, **changes)))
    return Bundle(directory)


def test_a_provider_that_is_not_there_is_named(tiny_bundle: Bundle) -> None:
    """Catches ONNX Runtime's silent fall back to the CPU."""
    absent = ({"CUDAExecutionProvider", "ROCMExecutionProvider"} - set(onnxruntime.get_available_providers())).pop()
    with pytest.raises(BundleError, match=f"{absent}.*it has .*CPUExecutionProvider"):
        OnnxRuntimeEngine.load(tiny_bundle, Options(providers=(absent,)))


def test_a_graph_that_is_not_the_manifests_is_refused(tiny_bundle: Bundle, copied: Path) -> None:
    inputs = tuple(name for name in tiny_bundle.manifest.graph_inputs if name != "guard")
    bundle = rewrite(copied, graph_inputs=(*inputs, "mask"))
    with pytest.raises(BundleError, match="inputs and the manifest's differ in guard, mask"):
        OnnxRuntimeEngine.load(bundle)


def test_a_graph_that_is_none_is_refused(tiny_bundle: Bundle, copied: Path) -> None:
    """A file of the recorded size that ONNX Runtime cannot read: its complaint is passed on with the path."""
    path = copied / STEP_GRAPH
    path.write_bytes(b"\xff" * path.stat().st_size)
    record = FileRecord(bytes=path.stat().st_size, sha256=sha256(path))
    bundle = rewrite(copied, files=tiny_bundle.manifest.files | {STEP_GRAPH: record})
    with pytest.raises(BundleError, match=rf"{STEP_GRAPH}: ONNX Runtime {onnxruntime.__version__} cannot load it"):
        OnnxRuntimeEngine.load(bundle)


@pytest.mark.parametrize("slots", [1, 8])
def test_the_default_pool_holds_a_sequence_as_long_as_the_model_allows(tiny_bundle: Bundle, slots: int) -> None:
    """And every slot a sequence of 4096 positions: nobody is refused for memory that could have been asked for."""
    facts = tiny_bundle.manifest.model
    pool = PagePool(Options(canvas_slots=slots).geometry(facts), facts)
    assert pool.fits(facts.max_position)
    for _ in range(slots):
        pool.reserve(4096)
