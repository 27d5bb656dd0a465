"""The written bundle: its content, its refusal to be wrong, its atomicity and its memory."""

from __future__ import annotations

import itertools
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner

from benchmarks.large_export import write_hollow_checkpoint
from export import bundle as writer
from export.bundle import write_bundle
from export.checkpoint import open_checkpoint
from export.cli import command
from export.staging import staged_directory
from export.tensor_file import CHUNK_BYTES
from export.verification import verify
from export.weights import Precision
from plugins_trt.onnx_function import DOMAIN
from runtime.bundle import STEP_GRAPH, WEIGHTS, Bundle
from runtime.errors import BundleError
from tests.runtime.vocabularies import CONTROL_TOKENS

OPERATIONS = {"expert_routing", "expert_ffn", "canvas_attention", "canvas_readout"}


@pytest.fixture(scope="module")
def graph(tiny_bundle: Bundle) -> onnx.ModelProto:
    return onnx.load(tiny_bundle.path(STEP_GRAPH), load_external_data=False)


def test_manifest_tells_the_model(tiny_bundle: Bundle, tiny_checkpoint: Path) -> None:
    manifest = tiny_bundle.manifest
    config = open_checkpoint(tiny_checkpoint).config
    assert manifest.model.name == "tiny"
    assert (manifest.model.hidden_size, manifest.model.canvas_length) == (config.hidden_size, config.canvas_length)
    assert [layer.sliding for layer in manifest.model.layers] == [layer.sliding for layer in config.layers]
    assert manifest.generation.end_token_ids == (CONTROL_TOKENS.index("<eos>"), CONTROL_TOKENS.index("<turn|>"))
    assert manifest.operator_versions == {"": 23, DOMAIN: 1}
    assert manifest.source == tiny_checkpoint.name
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= manifest.source_sha256.keys()
    tiny_bundle.verify_checksums()


def test_manifest_records_a_verification(tiny_bundle: Bundle) -> None:
    verification = tiny_bundle.manifest.verification
    assert verification is not None
    assert tiny_bundle.manifest.unverified is None
    assert verification.tokens > 2 * tiny_bundle.manifest.model.canvas_length
    assert 0 < verification.max_kv_error < 1e-4
    assert 0 < verification.max_soft_embedding_error < 1e-3


def test_graph_is_valid_and_as_the_manifest_says(tiny_bundle: Bundle, graph: onnx.ModelProto) -> None:
    onnx.checker.check_model(str(tiny_bundle.path(STEP_GRAPH)), full_check=True)
    assert tuple(value.name for value in graph.graph.input) == tiny_bundle.manifest.graph_inputs
    assert tuple(value.name for value in graph.graph.output) == tiny_bundle.manifest.graph_outputs
    assert graph.ir_version == 10


def test_operations_are_custom_nodes_with_functions(tiny_bundle: Bundle, graph: onnx.ModelProto) -> None:
    """Every node names the plugin namespace; no function's names meet the graph's, which TensorRT's parser mixes up."""
    nodes = [node for node in graph.graph.node if node.domain == DOMAIN]
    layers = len(tiny_bundle.manifest.model.layers)
    assert {node.op_type for node in nodes} == OPERATIONS == {function.name for function in graph.functions}
    assert len(nodes) == 3 * layers + 1
    for node in nodes:
        assert {attribute.name: attribute.s for attribute in node.attribute}["plugin_namespace"] == DOMAIN.encode()
    outer = {name for node in graph.graph.node for name in (*node.input, *node.output)}
    inner = [
        {*function.input, *(name for node in function.node for name in (*node.input, *node.output))}
        for function in graph.functions
    ]
    assert not any(names & outer for names in inner)
    assert sum(map(len, inner)) == len(set().union(*inner))


def test_weights_are_stored_once_and_unchanged(
    tiny_bundle: Bundle, graph: onnx.ModelProto, tiny_checkpoint: Path
) -> None:
    stored = np.fromfile(tiny_bundle.path(WEIGHTS), dtype=np.uint8)
    tensors = open_checkpoint(tiny_checkpoint).tensors
    found, spans = set(), []
    for initializer in graph.graph.initializer:
        if initializer.name not in tensors:
            continue
        place = {entry.key: entry.value for entry in initializer.external_data}
        assert place["location"] == WEIGHTS
        offset, length = int(place["offset"]), int(place["length"])
        values = torch.from_numpy(stored[offset : offset + length].copy()).view(torch.float32)
        assert torch.equal(values, tensors[initializer.name].load(torch.float32).flatten())
        assert offset % 4096 == 0
        found.add(initializer.name)
        spans.append((offset, offset + length))
    assert found == tensors.keys()
    spans.sort()
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))


def test_no_path_of_the_exporting_machine_is_in_the_graph(tiny_bundle: Bundle) -> None:
    content = tiny_bundle.path(STEP_GRAPH).read_bytes()
    assert str(Path(writer.__file__).parent).encode() not in content
    assert b"Traceback" not in content


@pytest.mark.parametrize(
    ("tensor", "factor"),
    [
        pytest.param("model.decoder.layers.0.mlp.gate_proj.weight", 1.001, id="a matrix a thousandth too large"),
        pytest.param("model.decoder.self_conditioning.up_proj.weight", 0.0, id="no self-conditioning"),
        pytest.param("model.encoder.language_model.layers.0.layer_scalar", 1.01, id="a scalar of the encoder alone"),
    ],
)
def test_a_graph_that_is_not_the_model_is_refused(
    tiny_bundle: Bundle, graph: onnx.ModelProto, tiny_checkpoint: Path, tmp_path: Path, tensor: str, factor: float
) -> None:
    copy = Path(shutil.copytree(tiny_bundle.directory, tmp_path / "copy"))
    checkpoint = open_checkpoint(tiny_checkpoint)
    verify(copy / STEP_GRAPH, checkpoint)
    initializer = next(each for each in graph.graph.initializer if each.name == tensor)
    place = {entry.key: entry.value for entry in initializer.external_data}
    begin = int(place["offset"]) // 4
    weights = np.memmap(copy / WEIGHTS, dtype=np.float32, mode="r+")
    weights[begin : begin + int(place["length"]) // 4] *= factor
    weights.flush()
    with pytest.raises(BundleError, match="is not the model"):
        verify(copy / STEP_GRAPH, checkpoint)


def test_other_precisions_are_written_but_not_verified(tiny_checkpoint: Path, tmp_path: Path) -> None:
    manifest = write_bundle(open_checkpoint(tiny_checkpoint), tmp_path / "out", "tiny", Precision.BFLOAT16)
    onnx.checker.check_model(str(tmp_path / "out" / STEP_GRAPH), full_check=True)
    assert manifest.precision == "bfloat16"
    assert manifest.verification is None
    assert "bfloat16 is not computed" in str(manifest.unverified)
    parameters = sum(tensor.elements for tensor in open_checkpoint(tiny_checkpoint).tensors.values())
    assert manifest.files[WEIGHTS].bytes < 4 * parameters + 4096 * len(open_checkpoint(tiny_checkpoint).tensors)


def test_an_existing_bundle_stays_unless_forced(tiny_bundle: Bundle, tiny_checkpoint: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(command, [str(tiny_checkpoint), str(tiny_bundle.directory)])
    assert result.exit_code == 1
    assert "--force replaces it" in result.output
    (tmp_path / "thesis.txt").touch()
    result = CliRunner().invoke(command, [str(tiny_checkpoint), str(tmp_path), "--force"])
    assert result.exit_code == 1
    assert "something that is no bundle" in result.output
    assert (tmp_path / "thesis.txt").exists()


def test_errors_are_sentences(tmp_path: Path) -> None:
    result = CliRunner().invoke(command, [str(tmp_path), str(tmp_path / "out")])
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    assert "config.json: cannot be read" in result.output
    assert "Traceback" not in result.output


def test_a_killed_export_leaves_no_bundle_and_the_next_one_sweeps_up(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = "from export.cli import command; command()"
    arguments = [sys.executable, "-c", run, str(tiny_checkpoint), str(out)]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert any(line.startswith("verifying") for line in process.stderr), "the weights are written by then"
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    leftovers = list(tmp_path.iterdir())
    assert len(leftovers) == 1
    assert (leftovers[0] / WEIGHTS).exists()
    with staged_directory(out):
        pass
    assert list(tmp_path.iterdir()) == [out]


STREAM = """
import resource, sys
from pathlib import Path
from export.checkpoint import open_checkpoint
from export.quantization import store
from export.weights import Precision, place, write_weights
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
checkpoint = open_checkpoint(Path(sys.argv[1]))
before = peak()
sources = store(checkpoint.tensors, Precision.FLOAT32)
placements = place(sources)
record = write_weights(Path(sys.argv[2]), sources, placements, lambda count: None)
print(peak() - before, record.bytes)
"""


def test_streaming_needs_a_few_chunks_of_memory(tmp_path: Path) -> None:
    """A checkpoint with one tensor of 256 MB among others, written as 512 MB of float32."""
    config: dict[str, Any] = {
        "model_type": "diffusion_gemma",
        "canvas_length": 8,
        "text_config": {
            "vocab_size": 1 << 21,
            "hidden_size": 64,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "layer_types": ["full_attention"],
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "global_head_dim": 8,
            "sliding_window": 4,
            "max_position_embeddings": 64,
            "num_experts": 2,
            "top_k_experts": 1,
            "moe_intermediate_size": 8,
            "rms_norm_eps": 1e-6,
            "hidden_activation": "gelu_pytorch_tanh",
            "rope_parameters": {"full_attention": {"rope_type": "proportional", "rope_theta": 1e4}},
        },
    }
    checkpoint = write_hollow_checkpoint(tmp_path / "hollow", config)
    largest = max(tensor.bytes for tensor in open_checkpoint(checkpoint).tensors.values())
    weights = tmp_path / "weights.bin"
    run = subprocess.run(
        [sys.executable, "-c", STREAM, str(checkpoint), str(weights)], check=True, capture_output=True, text=True
    )
    grown, written = map(int, run.stdout.split())
    assert written >= 2 * largest >= math.prod((2, 2, 1 << 21, 64))
    # A chunk as read, as converted, and the old one still alive while the next is made.
    assert grown <= 8 * CHUNK_BYTES < largest
    assert os.stat(weights).st_blocks * 512 < 1 << 20, "zeros are holes"
