"""Short fuzzing: `make fuzz` is the long one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.reliability.fuzz_frames import fuzz_frames
from tests.reliability.fuzz_messages import Fuzzed, Input, fuzz, replay, seeds
from tests.reliability.grammar import Turn, Ungrammatical

RUNS, CONNECTIONS = 500, 60
SEED = 1


async def test_no_request_ends_in_an_unmapped_error(tmp_path: Path) -> None:
    """Catches requests that no check has thought of: INTERNAL, a handler that hangs, a bad stream, a lost page."""
    result = await fuzz(tmp_path, RUNS, SEED)
    assert (result.wrong, result.leaks) == ([], [])
    assert result.corpus > len(seeds())
    # The seeds themselves are good requests, and reach the engine.
    assert min(result.outcomes[name] for name in ("Generate: OK", "Converse: OK", "GetModel: OK")) > 0


async def test_a_failing_input_can_be_replayed(tmp_path: Path) -> None:
    """Catches an input that a file does not hold as it was sent."""
    sent = next(each for each in seeds() if each.method == "Generate")
    result = await replay(tmp_path, Input.from_json(sent.to_json()))
    assert result == Fuzzed(outcomes=result.outcomes)
    assert dict(result.outcomes) == {"Generate: OK": 1}


def test_garbage_on_the_wire_hurts_nobody(tmp_path: Path) -> None:
    """Catches a server that dies of it, keeps sockets or requests, or does not answer others meanwhile."""
    result = fuzz_frames(tmp_path, CONNECTIONS, SEED)
    assert (result.wrong, result.leaks) == ([], [])


def event(name: str, index: int = 0) -> Any:
    value = SimpleNamespace(block_index=index, text="", token_ids=[])
    return SimpleNamespace(WhichOneof=lambda _: name, **{name: value})


BAD = [
    pytest.param([event("committed")], id="nothing-before-started"),
    pytest.param([event("started"), event("started")], id="started-once"),
    pytest.param([event("started"), event("finished")], id="a-block-at-least"),
    pytest.param([event("started"), event("draft", 1)], id="drafts-are-of-the-open-block"),
    pytest.param([event("started"), event("committed", 1)], id="no-block-is-left-out"),
    pytest.param([event("started"), event("committed"), event("committed")], id="no-block-twice"),
    pytest.param(
        [event("started"), event("committed"), event("draft", 1), event("finished")], id="no-draft-at-the-end"
    ),
    pytest.param([event("started"), event("committed"), event("finished"), event("committed", 1)], id="nothing-behind"),
]


@pytest.mark.parametrize("events", BAD)
def test_the_grammar_is_checked(events: list[Any]) -> None:
    """Catches a checker that lets everything pass: all of the above would then prove nothing."""
    turn = Turn()
    for each in events[:-1]:
        turn.take(each)
    with pytest.raises(Ungrammatical):
        turn.take(events[-1])
