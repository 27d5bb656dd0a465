"""Short chaos: `make chaos` is the long one."""

from __future__ import annotations

from pathlib import Path

from tests.reliability.kills import kill_clients, kill_servers, terminate
from tests.reliability.misbehaviour import BEHAVIOURS, chaos

REQUESTS = 300
SEED = 1


async def test_clients_that_misbehave_leave_nothing_behind(tmp_path: Path) -> None:
    """Catches pages and slots that are lost on some way out, streams against the grammar, and unmapped statuses."""
    result = await chaos(tmp_path, REQUESTS, SEED)
    assert result.wrong == []
    assert result.leaks == []
    assert {outcome.partition(":")[0] for outcome in result.outcomes} == {act.__name__ for act, _ in BEHAVIOURS}


def test_streams_of_killed_clients_are_resumed(tmp_path: Path) -> None:
    """Catches a resumed answer that repeats, misses or changes anything, and streams of the dead that go on."""
    result = kill_clients(tmp_path, 2, SEED)
    assert (result.wrong, result.leaks) == ([], [])
    assert result.outcomes["resumed in the midst"] > 0


def test_streams_of_killed_servers_are_resumed(tmp_path: Path) -> None:
    """Catches text that is lost, or told twice, with a server."""
    result = kill_servers(tmp_path, 1, SEED)
    assert (result.wrong, result.leaks) == ([], [])
    assert result.outcomes["whole after it broke"] > 0


def test_every_stream_has_a_final_status_under_sigterm(tmp_path: Path) -> None:
    """Catches streams that are cut off, and a process that outlives its grace time."""
    result = terminate(tmp_path, streams=16, grace=1.0, seed=SEED)
    assert result.wrong == []
    assert result.outcomes["DRAINING"] > 0
