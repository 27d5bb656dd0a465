"""Generate over a real socket and the fake engine: the stream's grammar, and what every reader can rely on."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from diffusiongemma.v1 import generation_pb2, options_pb2
from tests.service.support import Harness, PacedMailbox, request, serving

LONG = "the quick brown fox jumps over the lazy dog, and then it does so again and again and again. " * 2
"""Several blocks of the fake's canvas of 32 tokens."""


@pytest.fixture(autouse=True)
def _every_draft_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.intake.Mailbox", PacedMailbox)


Options = options_pb2.GenerationOptions
Response = generation_pb2.GenerateResponse


async def events(harness: Harness, wanted: generation_pb2.GenerateRequest) -> list[Response]:
    return [response async for response in harness.generation.Generate(wanted, timeout=30)]


def kinds(responses: Sequence[Response]) -> list[str]:
    return [str(response.WhichOneof("event")) for response in responses]


def text_of(responses: Sequence[Response]) -> str:
    return "".join(response.committed.text for response in responses if response.HasField("committed"))


def check_grammar(responses: Sequence[Response]) -> None:
    """`started (draft* committed)* finished`, numbered without gaps, each draft of the block that is open."""
    assert [response.sequence_number for response in responses] == list(range(len(responses)))
    first, *middle, last = kinds(responses)
    assert (first, last) == ("started", "finished")
    assert set(middle) <= {"draft", "committed"}
    assert middle[-1:] in ([], ["committed"])
    block, step = 0, 0
    for response in responses[1:-1]:
        if response.HasField("draft"):
            assert response.draft.block_index == block
            assert response.draft.step > step
            step = response.draft.step
        else:
            assert response.committed.block_index == block
            assert response.committed.step_count >= step
            block, step = block + 1, 0
    assert last == "finished"
    assert responses[-1].finished.usage.block_count == block


FINISHES: list[Any] = [
    pytest.param("short", {}, "short", "END_TOKEN", 1, id="end-token"),
    pytest.param("x" * 32, {}, "x" * 32, "END_TOKEN", 2, id="end-token-opens-a-block"),
    pytest.param(LONG, {}, LONG, "END_TOKEN", math.ceil((len(LONG) + 1) / 32), id="many-blocks"),
    pytest.param(LONG, {"max_output_token_count": 40}, LONG[:40], "LENGTH", 2, id="length-inside-a-block"),
    pytest.param(LONG, {"max_output_token_count": 32}, LONG[:32], "LENGTH", 1, id="length-at-a-border"),
    pytest.param(LONG, {"max_output_token_count": 1}, LONG[:1], "LENGTH", 1, id="one-token"),
    pytest.param(
        LONG, {"stop_sequences": ["dog"]}, LONG[: LONG.index("dog")], "STOP_SEQUENCE", 2, id="stop-inside-a-block"
    ),
    # "jumps over" lies over the border at 32.
    pytest.param(LONG, {"stop_sequences": [LONG[29:35]]}, LONG[:29], "STOP_SEQUENCE", 2, id="stop-over-a-border"),
    pytest.param(LONG, {"stop_sequences": [LONG[:3]]}, "", "STOP_SEQUENCE", 1, id="stop-at-once"),
    pytest.param("[ü€😀] " * 9, {}, "[ü€😀] " * 9, "END_TOKEN", None, id="characters-in-bytes-over-borders"),
]


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize(("answer", "options", "expected", "reason", "blocks"), FINISHES)
async def test_every_ending(
    tmp_path: Path, answer: str, options: dict[str, Any], expected: str, reason: str, blocks: int | None, drafts: bool
) -> None:
    """Every way to end, with and without drafts: the same text, the grammar, and the counts that belong to it."""
    async with serving(tmp_path, {"go": answer}) as harness:
        responses = await events(harness, request("go", drafts=drafts, options=Options(seed=7, **options)))
    check_grammar(responses)
    assert text_of(responses) == expected
    finished = responses[-1].finished
    assert generation_pb2.FinishReason.Name(finished.finish_reason) == f"FINISH_REASON_{reason}"
    assert finished.stop_sequence == (options["stop_sequences"][0] if reason == "STOP_SEQUENCE" else "")
    committed = [response.committed for response in responses if response.HasField("committed")]
    assert len(committed) == finished.usage.block_count == (blocks or len(committed))
    assert finished.usage.output_token_count == sum(len(block.token_ids) for block in committed)
    assert finished.usage.denoising_step_count == sum(block.step_count for block in committed)
    assert finished.usage.prompt_token_count == responses[0].started.prompt_token_count
    assert ("draft" in kinds(responses)) == drafts


async def test_text_never_splits_a_character(tmp_path: Path) -> None:
    """Catches half a character at a block's end: all of it comes with the block that completes it."""
    answer = "x" * 31 + "😀" + "y" * 40  # its four bytes are four tokens, one of them in the first block
    async with serving(tmp_path, {"go": answer}) as harness:
        responses = await events(harness, request("go", drafts=True))
    texts = [response.committed.text for response in responses if response.HasField("committed")]
    assert texts[0] == "x" * 31
    assert texts[1].startswith("😀")
    assert "".join(texts) == answer
    first_block = [response.draft for response in responses if response.draft.block_index == 0 and response.draft.text]
    assert first_block[-1].text == "x" * 31 + "\ufffd"


async def test_drafts_describe_the_canvas(tmp_path: Path) -> None:
    """Catches a bitmap or an entropy that does not cover the canvas, and lengths that do not add up to the text."""
    async with serving(tmp_path, {"go": LONG}) as harness:
        responses = await events(harness, request("go", drafts=True))
    drafts = [response.draft for response in responses if response.HasField("draft")]
    assert drafts
    for draft in drafts:
        assert len(draft.accepted_bitmap) == math.ceil(32 / 8)
        assert len(draft.position_entropies) == 32
        assert len(draft.token_text_lengths) == len(draft.token_ids) <= 32
        assert sum(draft.token_text_lengths) == len(draft.text)
        # The fake's entropies are 0 where it shows the answer and 1 nat elsewhere.
        assert set(draft.position_entropies) <= {0, 32}
        assert draft.mean_entropy == pytest.approx(sum(draft.position_entropies) / 32 / 32, abs=1e-12)
        sure = {index for index, entropy in enumerate(draft.position_entropies) if entropy == 0}
        accepted = {index for index in range(32) if draft.accepted_bitmap[index // 8] >> index % 8 & 1}
        assert sure <= accepted


async def test_started_echoes_what_is_in_force(tmp_path: Path) -> None:
    """The echo, sent again, gives the same settings; what was not set is there too, the seed among it."""
    async with serving(tmp_path, min_draft_interval=0.02) as harness:
        asked = Options(stop_sequences=["zz"], diffusion=options_pb2.DiffusionOptions(entropy_bound=0.25))
        first = (await events(harness, request("hello", drafts=True, options=asked)))[0].started
        assert first.options.diffusion.entropy_bound == 0.25
        assert first.options.diffusion.temperature_max == 0.8
        assert list(first.options.stop_sequences) == ["zz"]
        assert first.options.drafts.min_draft_interval.ToMilliseconds() == 20
        assert first.options.HasField("seed")
        assert (first.model, first.canvas_length) == ("fake", 32)
        again = (await events(harness, request("hello", options=first.options)))[0].started
        assert again == first
        other = (await events(harness, request("hello")))[0].started
        assert other.options.seed != first.options.seed


async def test_a_prompt_in_token_ids_goes_as_it_is(tmp_path: Path) -> None:
    async with serving(tmp_path) as harness:
        wanted = generation_pb2.GenerateRequest()
        wanted.token_ids.ids.extend([2, 310, 311, 312])
        responses = await events(harness, wanted)
        assert harness.engine.rows[0].token_ids.tolist() == [2, 310, 311, 312]  # type: ignore[union-attr]
    assert responses[0].started.prompt_token_count == 4


async def test_drafts_keep_their_distance(tmp_path: Path) -> None:
    """Catches drafts sent more often than the server allows: with an hour between two, one is sent."""
    async with serving(tmp_path, {"go": LONG}, min_draft_interval=3600.0) as harness:
        responses = await events(harness, request("go", drafts=True))
    check_grammar(responses)
    assert kinds(responses).count("draft") <= 1
    assert text_of(responses) == LONG


async def test_many_at_once_get_each_their_own(tmp_path: Path) -> None:
    """Catches events that reach another call's stream."""
    async with serving(tmp_path) as harness:
        prompts = [f"prompt number {index} " * (index % 5 + 1) for index in range(12)]
        answers = await asyncio.gather(*(events(harness, request(prompt, drafts=True)) for prompt in prompts))
    for prompt, responses in zip(prompts, answers, strict=True):
        check_grammar(responses)
        assert text_of(responses) == prompt
