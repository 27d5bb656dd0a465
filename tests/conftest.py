"""Fixtures that several packages' tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import settings

from runtime.bundle import Bundle
from tests.tiny import export, write_checkpoint

# The tests' tensors are tiny: a second thread brings nothing, and on a busy machine it waits for the first at every
# operation (the engines' tests: 107 s with two threads).
torch.set_num_threads(1)

# The same examples on every machine; and no time limit for one, which on a busy machine fails what is right.
settings.register_profile("repository", derandomize=True, deadline=None)
settings.load_profile("repository")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random checkpoint: 3 layers, canvas of 16, window of 10, 5 experts, byte tokenizer."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The bundle of `tiny_checkpoint`, named `tiny`."""
    return export(tiny_checkpoint, tmp_path_factory.mktemp("bundle") / "tiny")
