"""Checkpoint directories with random weights, small enough for a test, and bundles of them."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from export.cli import command
from runtime.bundle import CHAT_TEMPLATE, TOKENIZER, Bundle
from tests.runtime.tiny_models import TinyShape, reference_model
from tests.runtime.vocabularies import CONTROL_TOKENS, byte_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}"
    "{{ message.content }}{{ '<turn|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn>model\n' }}{% endif %}"
)
# Three layers: with two, nothing shows the encoder's layer scalars, as the second layer norms the first one's away.
LAYERS = ("sliding_attention", "sliding_attention", "full_attention")
SHAPE = TinyShape(
    vocab_size=byte_tokenizer().get_vocab_size(),
    canvas_length=16,
    sliding_window=10,
    layer_types=LAYERS,
    embedding_std=0.5,
)


def write_checkpoint(directory: Path, shape: TinyShape = SHAPE, seed: int = 0, shard_bytes: int | str = "5GB") -> Path:
    """Save a random model with its tokenizer and chat template as `transformers` does."""
    reference_model(shape, seed).float().save_pretrained(directory, max_shard_size=shard_bytes)
    byte_tokenizer().save(str(directory / TOKENIZER))
    (directory / CHAT_TEMPLATE).write_text(TEMPLATE, encoding="utf-8")
    path = directory / "generation_config.json"
    ends = {"eos_token_id": [CONTROL_TOKENS.index(token) for token in ("<eos>", "<turn|>")]}
    path.write_text(json.dumps(json.loads(path.read_text()) | ends), encoding="utf-8")
    return directory


def export(checkpoint: Path, out: Path, name: str = "tiny") -> Bundle:
    """The bundle of a checkpoint directory, made by the command."""
    result = CliRunner().invoke(command, [str(checkpoint), str(out), "--name", name, "--program"])
    assert result.exit_code == 0, result.output
    assert "verified on onnxruntime" in result.output
    return Bundle(out)
