"""The bundle: what an export writes and an engine loads.

A directory of `manifest.json`, the tokenizer and chat template, the step graph and one weights file; for the torch
engine also the step as an exported program, which takes its weights from the same file. This module is the bundle's
schema, shared by the exporter that writes it and the runtime that reads it, and the reading itself.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from runtime.errors import BundleError

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
STEP_GRAPH = "step.onnx"
STEP_PROGRAM = "step.pt2"
WEIGHTS = "weights.bin"
TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"


class LayerFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One layer's K/V."""

    sliding: bool
    kv_heads: int
    head_dim: int


class ModelFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the runtime must know of the model."""

    name: str
    """How clients name the model."""
    vocab_size: int
    hidden_size: int
    canvas_length: int
    sliding_window: int
    max_position: int
    """Most positions a sequence may span, prompt and canvases together."""
    layers: tuple[LayerFacts, ...]
    vision: bool = False


class GenerationDefaults(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The checkpoint's own sampling values, used where a request names none."""

    max_denoising_steps: int
    entropy_bound: float
    """Nats."""
    t_min: float
    t_max: float
    stability_threshold: int
    """Steps."""
    confidence_threshold: float
    """Nats, mean over the canvas."""
    end_token_ids: tuple[int, ...]
    pad_token_id: int
    bos_token_id: int


class Verification(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far the finished bundle was from the PyTorch model when the exporter ran both."""

    backend: str
    """What ran the graph, with its version."""
    tokens: int
    """Positions compared."""
    max_entropy_error: float
    """Nats."""
    max_kv_error: float
    max_soft_embedding_error: float
    argmax_mismatches: int
    candidate_mismatches: int


class FileRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of the bundle, beside the manifest."""

    bytes: int
    sha256: str


class TensorRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a tensor lies in the weights file, row-major."""

    offset: int
    dtype: str
    """PyTorch's name of it, as in `bfloat16`."""
    shape: tuple[int, ...]


class ProgramRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the exported program is called with: it holds no weight, all of them are inputs."""

    inputs: tuple[str, ...]
    """In order: names of tensors of the weights file, of `constants` and of the graph's inputs."""
    constants: dict[str, tuple[float, ...]]
    """Values that follow from the model's shape, float32 `[n]` each."""


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`manifest.json`."""

    schema_version: int
    model: ModelFacts
    precision: str
    generation: GenerationDefaults
    graph_inputs: tuple[str, ...]
    graph_outputs: tuple[str, ...]
    operator_versions: dict[str, int]
    """Operator set versions of the graph by domain."""
    expert_body: str | None
    """Which standard-operator body the expert feed-forward got; None where the bundle has no step graph."""
    source: str
    """Name of the checkpoint directory."""
    source_sha256: dict[str, str]
    """Checksums of the checkpoint's files."""
    exporter: dict[str, str]
    """Versions of the packages that made the bundle."""
    files: dict[str, FileRecord]
    tensors: dict[str, TensorRecord] = {}
    """The weights file's tensors by their name in the checkpoint."""
    program: ProgramRecord | None = None
    """None where the bundle has no exported program."""
    verification: Verification | None = None
    unverified: str | None = None
    """Why there is no verification, where there is none."""


class Bundle:
    """A bundle directory opened for reading, its manifest parsed and its files present with the recorded sizes."""

    def __init__(self, directory: Path) -> None:
        """Open `directory`.

        Raises:
            BundleError: no bundle there, another schema version, or a file absent or of another size than recorded.
        """
        self.directory = directory
        self.manifest = _read_manifest(directory)
        for name, record in self.manifest.files.items():
            _check_size(directory / name, record)

    def path(self, name: str) -> Path:
        """Path of one of the bundle's files."""
        return self.directory / name

    def verify_checksums(self) -> None:
        """Read every file and compare its SHA-256 with the manifest.

        Raises:
            BundleError: naming each file that differs.
        """
        differing = [name for name, record in self.manifest.files.items() if sha256(self.path(name)) != record.sha256]
        if differing:
            raise BundleError(f"{self.directory}: {', '.join(differing)} changed since the export; export again")


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(directory: Path) -> Manifest:
    path = directory / MANIFEST
    try:
        raw = msgspec.json.decode(path.read_bytes())
    except OSError as error:
        raise BundleError(
            f"{directory}: no bundle here ({MANIFEST}: {error.strerror}); make one with `dgemma export`"
        ) from error
    except msgspec.DecodeError as error:
        raise BundleError(f"{path}: is not JSON ({error})") from error
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        raise BundleError(f"{path}: schema_version is {version!r}, this runtime reads {SCHEMA_VERSION}; export again")
    try:
        return msgspec.convert(raw, Manifest)
    except msgspec.ValidationError as error:
        raise BundleError(f"{path}: {error}") from error


def _check_size(path: Path, record: FileRecord) -> None:
    if not path.is_file():
        raise BundleError(f"{path}: is missing; export again")
    size = path.stat().st_size
    if size != record.bytes:
        raise BundleError(f"{path}: holds {size} bytes where the manifest says {record.bytes}; export again")
