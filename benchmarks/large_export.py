"""Exports a checkpoint of the released model's full shape, 25 billion parameters: `python -m benchmarks.large_export`.

Its safetensors files are holes that read as zeros, so that it fits on any disk, but every one of its 50 GB goes through
the exporter. The printed peak of resident memory shows that an export needs far less than the checkpoint, and less than
its largest tensor: 0.70 GB for 50.5 GB, the largest tensor 1.48 GB, in 12 minutes on 2 busy cores.
"""

from __future__ import annotations

import json
import math
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from export.bundle import write_bundle
from export.checkpoint import INDEX, expected_tensors, open_checkpoint
from export.config import parse_config
from export.weights import Precision

RELEASED: dict[str, Any] = {
    "model_type": "diffusion_gemma",
    "canvas_length": 256,
    "text_config": {
        "vocab_size": 262_144,
        "hidden_size": 2816,
        "intermediate_size": 2112,
        "num_hidden_layers": 30,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 5,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "global_head_dim": 512,
        "num_global_key_value_heads": 2,
        "sliding_window": 1024,
        "max_position_embeddings": 262_144,
        "num_experts": 128,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
        "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh",
        "final_logit_softcapping": 30.0,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
        },
    },
}
SHARD_BYTES = 5 << 30
WIDTH = 2
"""Bytes of a number in the checkpoint, which is in bfloat16."""
PRECISIONS = [precision.value for precision in Precision]


@click.command()
@click.option("--directory", type=click.Path(file_okay=False, path_type=Path), help="Where to work.")
@click.option("--precision", type=click.Choice(PRECISIONS), default="bfloat16", show_default=True)
def main(directory: Path | None, precision: str) -> None:
    """Make the hollow checkpoint, export it, print sizes, time and peak memory."""
    with tempfile.TemporaryDirectory(dir=directory) as work:
        checkpoint = write_hollow_checkpoint(Path(work) / "released-shape", RELEASED)
        before = peak_bytes()
        begin = time.perf_counter()
        opened = open_checkpoint(checkpoint)
        stored = sum(WIDTH * tensor.elements for tensor in opened.tensors.values())
        largest = max(WIDTH * tensor.elements for tensor in opened.tensors.values())
        click.echo(
            f"checkpoint: {len(opened.tensors)} tensors, {stored / 1e9:.1f} GB, the largest {largest / 1e9:.2f} GB"
        )
        manifest = write_bundle(opened, Path(work) / "bundle", "released-shape", Precision(precision), report=_stages())
        click.echo(f"bundle: {sum(record.bytes for record in manifest.files.values()) / 1e9:.1f} GB, {precision}")
        click.echo(f"not verified: {manifest.unverified}")
        click.echo(f"export took {time.perf_counter() - begin:.0f} s")
        click.echo(
            f"peak resident memory {peak_bytes() / 1e9:.2f} GB, of which {before / 1e9:.2f} GB before the export"
        )


def write_hollow_checkpoint(directory: Path, config: dict[str, Any]) -> Path:
    """A checkpoint directory of this `config.json` in bfloat16 whose tensors are holes in their files."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text("{}")
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in expected_tensors(parse_config(config)):
        if filled and filled + WIDTH * math.prod(shape) > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += WIDTH * math.prod(shape)
    files = {f"model-{index:05}.safetensors": shard for index, shard in enumerate(shards)}
    for file, shard in files.items():
        _write_hollow_file(directory / file, shard)
    weight_map = {name: file for file, shard in files.items() for name in shard}
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return directory


def _write_hollow_file(path: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    header, end = {}, 0
    for name, shape in tensors.items():
        begin, end = end, end + WIDTH * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)


def peak_bytes() -> int:
    """Most memory that was ever resident in this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _stages() -> Any:
    begin, seen = time.perf_counter(), set()

    def report(stage: str, share: float) -> None:
        if stage not in seen:
            seen.add(stage)
            click.echo(f"{time.perf_counter() - begin:5.0f} s  {stage}")

    return report


if __name__ == "__main__":
    main()
