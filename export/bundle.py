"""Writing a bundle: all of it or nothing."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import onnx_ir as ir

from export.checkpoint import Checkpoint
from export.config import ModelConfig
from export.onnx_graph import input_names, output_names, trace_step
from export.program import export_program, write_program
from export.quantization import store
from export.staging import staged_directory
from export.verification import verify
from export.weights import Precision, place, point_to, write_weights
from plugins_trt.expert_ffn.onnx import ExpertBody, choose_body
from runtime.bundle import (
    CHAT_TEMPLATE,
    MANIFEST,
    SCHEMA_VERSION,
    STEP_GRAPH,
    STEP_PROGRAM,
    TOKENIZER,
    WEIGHTS,
    FileRecord,
    LayerFacts,
    Manifest,
    ModelFacts,
    TensorRecord,
    Verification,
    sha256,
)
from runtime.errors import BundleError

Report = Callable[[str, float], None]
"""Told the stage and the share of it that is done, 0 to 1."""

_PACKAGES = ("dgemma", "torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime")
_VERIFICATION_BYTES = 24
"""Memory a parameter takes during the verification: float32 and float64 models, the session and its packed copies."""


def write_bundle(
    checkpoint: Checkpoint,
    out: Path,
    name: str,
    precision: Precision = Precision.FLOAT32,
    program: bool = False,
    force: bool = False,
    report: Report = lambda stage, share: None,
) -> Manifest:
    """Export a checkpoint to the bundle directory `out`, which appears only when it is whole and verified.

    Args:
        checkpoint: what to export.
        out: the directory to make.
        name: how clients will name the model.
        precision: of weights and states; a quantised one gets no step graph, for ONNX has no such operations.
        program: also write the exported program, for the torch engine; a quantised bundle always has it.
        force: replace a bundle that is already at `out`.
        report: told the progress.

    Raises:
        BundleError: `out` is taken, or the finished graph is further from the PyTorch model than rounding explains.
        CheckpointError: a tensor's file was cut short meanwhile.
    """
    _check_target(out, force)
    with staged_directory(out) as staging:
        expert_body = None if precision.is_quantized else _choose_body(checkpoint.config)
        graph = None if expert_body is None else _trace(checkpoint.config, expert_body, precision, report)
        weights, tensors = _write_weights(staging, graph, checkpoint, precision, report)
        files, program_record = {WEIGHTS: weights}, None
        if graph is not None:
            ir.save(graph, staging / STEP_GRAPH)
        _copy_texts(staging, checkpoint)
        if program or graph is None:
            report("exporting the program", 0.0)
            exported, program_record = export_program(checkpoint.config, precision)
            write_program(staging / STEP_PROGRAM, exported)
            report("exporting the program", 1.0)
        for file in (STEP_GRAPH, STEP_PROGRAM, TOKENIZER, CHAT_TEMPLATE):
            if (staging / file).exists():
                files[file] = FileRecord(bytes=(staging / file).stat().st_size, sha256=sha256(staging / file))
        report("verifying", 0.0)
        verification, unverified = _verify(staging, checkpoint, precision)
        report("verifying", 1.0)
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            model=model_facts(checkpoint.config, name),
            precision=precision.value,
            generation=checkpoint.generation,
            graph_inputs=input_names(checkpoint.config),
            graph_outputs=output_names(checkpoint.config),
            operator_versions={} if graph is None else dict(graph.opset_imports),
            expert_body=None if expert_body is None else expert_body.value,
            source=checkpoint.directory.resolve().name,
            source_sha256=_hash_sources(checkpoint, report),
            exporter={package: importlib.metadata.version(package) for package in _PACKAGES},
            files=files,
            tensors=tensors,
            program=program_record,
            verification=verification,
            unverified=unverified,
        )
        (staging / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")
    return manifest


def model_facts(config: ModelConfig, name: str) -> ModelFacts:
    """What the runtime must know of a model of this shape."""
    return ModelFacts(
        name=name,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        canvas_length=config.canvas_length,
        sliding_window=config.sliding_window,
        max_position=config.max_position,
        layers=tuple(
            LayerFacts(sliding=layer.sliding, kv_heads=layer.kv_heads, head_dim=layer.head_dim)
            for layer in config.layers
        ),
    )


def _check_target(out: Path, force: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / MANIFEST).is_file():
        raise BundleError(f"{out}: is taken by something that is no bundle; choose another place or remove it")
    if not force:
        raise BundleError(f"{out}: holds a bundle already; --force replaces it")


def _choose_body(config: ModelConfig) -> ExpertBody:
    matrices = 3 * config.hidden_size * config.expert_intermediate_size
    return choose_body(config.experts, config.top_k_experts, len(config.layers) * config.experts * matrices)


def _trace(config: ModelConfig, expert_body: ExpertBody, precision: Precision, report: Report) -> ir.Model:
    report("tracing", 0.0)
    graph = trace_step(config, expert_body, precision.torch_dtype)
    report("tracing", 1.0)
    return graph


def _write_weights(
    staging: Path, graph: ir.Model | None, checkpoint: Checkpoint, precision: Precision, report: Report
) -> tuple[FileRecord, dict[str, TensorRecord]]:
    """The weights file, and where each tensor lies in it."""
    sources = store(checkpoint.tensors, precision)
    placements = place(sources)
    if graph is not None:
        for name, placement in placements.items():
            point_to(graph.graph.initializers[name], placement, WEIGHTS)
    total, done = sum(placement.bytes for placement in placements.values()), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        report("writing weights", done / total)

    record = write_weights(staging / WEIGHTS, sources, placements, advance)
    return record, {
        name: TensorRecord(placement.offset, str(placement.dtype).removeprefix("torch."), placement.shape)
        for name, placement in placements.items()
    }


def _copy_texts(staging: Path, checkpoint: Checkpoint) -> None:
    shutil.copyfile(checkpoint.directory / TOKENIZER, staging / TOKENIZER)
    if checkpoint.chat_template is not None:
        (staging / CHAT_TEMPLATE).write_text(checkpoint.chat_template, encoding="utf-8")


def _verify(staging: Path, checkpoint: Checkpoint, precision: Precision) -> tuple[Verification | None, str | None]:
    """The verification, or why there is none."""
    if precision is not Precision.FLOAT32:
        return None, f"{precision.value} is not computed by the CPU backend that verifies"
    parameters = sum(tensor.elements for tensor in checkpoint.tensors.values())
    needed = parameters * _VERIFICATION_BYTES
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > available:
        return None, f"verifying {parameters} parameters takes {needed >> 20} MiB of memory, {available >> 20} are free"
    return verify(staging / STEP_GRAPH, checkpoint), None


def _hash_sources(checkpoint: Checkpoint, report: Report) -> dict[str, str]:
    paths, digests = checkpoint.source_files, {}
    for index, path in enumerate(paths):
        report("hashing the checkpoint", index / len(paths))
        digests[path.name] = sha256(path)
    report("hashing the checkpoint", 1.0)
    return digests
