"""The engines behind the service: either serves the same bundle, and gives the same answer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from runtime.bundle import Bundle
from runtime.errors import BundleError
from runtime.events import Committed
from runtime.request import SamplingOverrides
from service.client import Client
from service.loading import Settings, load
from tests.service.processes import ROOT

DGEMMA = "from service.cli import main; main()"


def answers(bundle: Path, *options: str) -> list[tuple[list[int], int]]:
    """Tokens and steps of each block of some answers of a served bundle."""
    command = [sys.executable, "-c", DGEMMA, "serve", str(bundle), "--address", "127.0.0.1:0", *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            with Client(process.stdout.readline().split()[-1]) as client:
                return [
                    (event.token_ids.tolist(), event.step_count)
                    for seed in range(4)
                    for event in client.generate(
                        "hello", SamplingOverrides(seed=seed, max_output_tokens=40, max_denoising_steps=6), timeout=60
                    )
                    if isinstance(event, Committed)
                ]
        finally:
            process.terminate()


def test_both_engines_answer_alike(tiny_bundle: Bundle) -> None:
    """In float32 and from the same seeds: tokens and steps are equal, where only sums round differently."""
    torch = answers(tiny_bundle.directory, "--engine", "torch", "--device", "cpu")
    assert torch == answers(tiny_bundle.directory, "--threads", "1")
    assert len(torch) > 4


def test_an_engine_that_cannot_be_is_told(tiny_bundle: Bundle) -> None:
    """Catches an engine that falls back to another device without a word."""
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA GPU")
    settings = Settings(
        tiny_bundle.directory, threads=1, max_active=1, max_waiting=1, min_draft_interval=0.0, engine="torch"
    )
    with pytest.raises(BundleError, match="finds no CUDA GPU; use device cpu"):
        load(settings)
