"""A short soak: `make soak` is the long one."""

from __future__ import annotations

import random
from pathlib import Path

import psutil
import pytest

from tests.reliability.soak import Soak, echoes, fake_server, soak

STREAMS, SECONDS = 150, 3.0


async def test_no_stream_is_lost(tmp_path: Path) -> None:
    """Catches streams that starve, end early or get another's answer when all of the engine's places are taken."""
    with fake_server(tmp_path, STREAMS) as (address, process_id, leaks):
        result = await soak(address, psutil.Process(process_id), echoes(random.Random(1)), STREAMS, SECONDS)
        assert dict(result.ended) == {"finished": sum(result.ended.values())}
        assert result.peak == STREAMS
        assert leaks() == []


def test_memory_that_grows_is_seen() -> None:
    """Catches a slope in other units, over the first half, or of the wrong sign."""
    flat_then_growing = [(float(second), 100.0) for second in range(60)]
    flat_then_growing += [(float(second), 100.0 + (second - 60) / 20) for second in range(60, 120)]
    assert Soak(1, samples=flat_then_growing).slope == pytest.approx(3.0)
