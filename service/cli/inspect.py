"""`dgemma inspect`."""

from __future__ import annotations

from pathlib import Path

import click

from runtime.bundle import Bundle, Manifest
from service.cli.columns import echo_columns


@click.command("inspect")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--verify/--no-verify", default=True, help="Read every file and compare its checksum; on by default.")
def command(bundle: Path, verify: bool) -> None:
    """Show what BUNDLE holds: the model's facts, how it was exported and how far it was off, and its files."""
    opened = Bundle(bundle)
    rows = facts_of(opened.manifest)
    if verify:
        opened.verify_checksums()
        rows.append(("checksums", f"all {len(opened.manifest.files)} files are as exported"))
    echo_columns(rows)


def facts_of(manifest: Manifest) -> list[tuple[str, str]]:
    """The manifest in words."""
    model, defaults = manifest.model, manifest.generation
    return [
        ("model", model.name),
        ("precision", manifest.precision),
        ("vocabulary", f"{model.vocab_size} tokens"),
        ("hidden size", str(model.hidden_size)),
        ("layers", _layers(manifest)),
        ("canvas", f"{model.canvas_length} tokens"),
        ("window", f"{model.sliding_window} tokens (sliding layers)"),
        ("context", f"{model.max_position} tokens"),
        ("vision", "yes" if model.vision else "no"),
        ("steps", f"at most {defaults.max_denoising_steps} a canvas"),
        ("temperature", f"{defaults.t_max} down to {defaults.t_min}"),
        ("acceptance", f"entropy bound {defaults.entropy_bound} nats"),
        (
            "stopping",
            f"{defaults.stability_threshold} stable steps, mean entropy below {defaults.confidence_threshold} nats",
        ),
        ("end tokens", ", ".join(map(str, defaults.end_token_ids))),
        ("experts", f"{manifest.expert_body} (body of the expert feed-forward)"),
        (
            "operators",
            ", ".join(f"{name or 'ai.onnx'} {version}" for name, version in manifest.operator_versions.items()),
        ),
        ("source", manifest.source),
        ("exported by", ", ".join(f"{name} {version}" for name, version in manifest.exporter.items())),
        ("verified", _verification(manifest)),
        *((f"file {name}", f"{record.bytes:,} bytes") for name, record in manifest.files.items()),
    ]


def _layers(manifest: Manifest) -> str:
    groups = {
        "sliding": [layer for layer in manifest.model.layers if layer.sliding],
        "full": [layer for layer in manifest.model.layers if not layer.sliding],
    }
    told = [
        f"{len(layers)} {kind} ({layers[0].kv_heads} K/V heads of {layers[0].head_dim})"
        for kind, layers in groups.items()
        if layers
    ]
    return ", ".join(told)


def _verification(manifest: Manifest) -> str:
    found = manifest.verification
    if found is None:
        return f"no: {manifest.unverified or 'the export did not end'}"
    return (
        f"on {found.backend} over {found.tokens} positions: entropy off by {found.max_entropy_error:.1e} nats, K/V by "
        f"{found.max_kv_error:.1e}, self-conditioning by {found.max_soft_embedding_error:.1e}; "
        f"{found.argmax_mismatches} argmax and {found.candidate_mismatches} candidates differ"
    )
