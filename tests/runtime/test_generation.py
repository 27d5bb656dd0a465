"""One request as calls of an engine that reads its answers from a script."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.bundle import GenerationDefaults, ModelFacts
from runtime.engines.protocol import Readout
from runtime.errors import InvalidRequest
from runtime.events import Committed, Draft, Event, Finished, FinishReason, Started
from runtime.generation import Denoise, Encode, Generation
from runtime.random import CanvasStream
from runtime.request import GenerationRequest, SamplingParameters
from runtime.vocabulary import Vocabulary
from tests.runtime.test_text import cut, whole_text
from tests.runtime.vocabularies import byte_tokenizer

TOKENIZER = byte_tokenizer()
VOCABULARY = Vocabulary(byte_tokenizer())
SIZE = TOKENIZER.get_vocab_size()
LENGTH = 8
EOS, TURN_END = 1, 5
FACTS = ModelFacts("tiny", SIZE, 4, canvas_length=LENGTH, sliding_window=16, max_position=4096, layers=())
DEFAULTS = GenerationDefaults(48, 0.1, 0.4, 0.8, 1, 0.005, (EOS, TURN_END), 0, 2)
SAMPLING = SamplingParameters(
    seed=11,
    max_output_tokens=100,
    max_denoising_steps=3,
    entropy_bound=0.1,
    t_min=0.4,
    t_max=0.8,
    stability_threshold=1,
    confidence_threshold=0.005,
)
A, B, E, N, D = (TOKENIZER.token_to_id(name) for name in ("a", "b", "E", "N", "D"))


def generation(
    sampling: SamplingParameters = SAMPLING, prompt_length: int = 3, chunk: int = 256, drafts: bool = False
) -> Generation:
    request = GenerationRequest("tiny", np.arange(prompt_length) + 7, sampling, drafts)
    return Generation(request, FACTS, DEFAULTS, VOCABULARY, chunk)


def readout(canvas: list[int], sure: bool = True) -> Readout:
    entropy = np.full(LENGTH, 0.0 if sure else 1.0, dtype=np.float32)
    return Readout(np.array(canvas, dtype=np.int64), np.full(LENGTH, B), entropy)


def play(
    subject: Generation, canvases: list[list[int]], draft: bool = False
) -> tuple[list[Encode | Denoise], list[Event]]:
    """Run to the end; each canvas settles at its second step."""
    calls: list[Encode | Denoise] = []
    events = subject.start(queue_seconds=0.5)
    block = 0
    while not subject.finished:
        call = subject.next_call()
        calls.append(call)
        if isinstance(call, Encode):
            events += subject.encoded(seconds=0.25)
        else:
            new = subject.denoised(readout(canvases[block]), seconds=1.0, draft=draft)
            block += any(isinstance(event, Committed) for event in new)
            events += new
    return calls, events


def canvas_of(*tokens: int) -> list[int]:
    """Filled up with "a"."""
    return [*tokens, *[A] * (LENGTH - len(tokens))]


def finish(events: list[Event]) -> Finished:
    assert isinstance(events[-1], Finished)
    return events[-1]


def commits(events: list[Event]) -> list[Committed]:
    return [event for event in events if isinstance(event, Committed)]


def test_what_was_made_is_what_was_shown() -> None:
    """After each step: the blocks committed by this stream, and of the open one what its draft shows. A resumed
    stream counts none of the earlier ones, and one that begins anew counts its open block anew."""
    resumed = replace(
        generation(drafts=True).request, committed_ids=np.array([A] * LENGTH), sampling=replace(SAMPLING, seed=12)
    )
    stop = replace(SAMPLING, stop_strings=("EN",))
    for subject in (
        generation(drafts=True),
        Generation(resumed, FACTS, DEFAULTS, VOCABULARY),
        generation(stop, drafts=True),
    ):
        committed, canvases = 0, iter([canvas_of(), canvas_of(B), canvas_of(A, B, E, N, D, EOS)])
        canvas, rewound = next(canvases), False
        while not subject.finished:
            if isinstance(subject.next_call(), Encode):
                subject.encoded(0.0)
                continue
            events = subject.denoised(readout(canvas), 0.0, draft=True)
            block = commits(events)
            committed += sum(len(event.token_ids) for event in block)
            [shown] = [len(event.token_ids) for event in events if isinstance(event, Draft)]
            assert subject.made_tokens == committed + (0 if block else shown)
            if committed and not block and not rewound:
                subject.rewind()
                rewound = True
                assert subject.made_tokens == committed
            canvas = next(canvases) if block and not subject.finished else canvas


def test_prompt_is_encoded_in_chunks_before_anything_else() -> None:
    calls, _ = play(generation(prompt_length=10, chunk=4), [canvas_of(EOS)])
    encodes = [call for call in calls if isinstance(call, Encode)]
    assert [(call.start, call.token_ids.tolist()) for call in encodes] == [
        (0, [7, 8, 9, 10]),
        (4, [11, 12, 13, 14]),
        (8, [15, 16]),
    ]
    assert calls[:3] == encodes


def test_denoise_calls_carry_the_canvas_its_place_and_its_numbers() -> None:
    calls, _ = play(generation(), [canvas_of(), canvas_of(EOS)])
    first, second, encode, third, fourth = calls[1:]
    assert isinstance(encode, Encode)
    for index, (call, canvas_index, step) in enumerate([(first, 0, 1), (second, 0, 2), (third, 1, 1), (fourth, 1, 2)]):
        assert isinstance(call, Denoise), index
        stream = CanvasStream(SAMPLING.seed, canvas_index, LENGTH)
        initial = stream.tokens(SIZE)
        if step == 2:
            stream.uniforms(), stream.tokens(SIZE)
        assert call.canvas.tolist() == (initial.tolist() if step == 1 else [B] * LENGTH)  # all were accepted
        assert call.uniform.tolist() == stream.uniforms().tolist()
        assert call.start == 3 + LENGTH * canvas_index
        assert call.first_step == (step == 1)
        assert call.guard_first == (canvas_index == 0)
        assert call.temperature == np.float32(0.4) + np.float32(0.8 - 0.4) * (np.float32(4 - step) / np.float32(3))


def test_without_the_guard_no_canvas_is_guarded() -> None:
    calls, _ = play(generation(replace(SAMPLING, end_token_guard=False)), [canvas_of(), canvas_of(EOS)])
    assert not any(call.guard_first for call in calls if isinstance(call, Denoise))


def test_next_call_is_the_same_until_its_result_came() -> None:
    subject = generation()
    chunk, same = subject.next_call(), subject.next_call()
    assert isinstance(chunk, Encode)
    assert isinstance(same, Encode)
    assert (chunk.start, chunk.token_ids.tolist()) == (same.start, same.token_ids.tolist())
    subject.encoded(0.0)
    first, again = subject.next_call(), subject.next_call()
    assert isinstance(first, Denoise)
    assert isinstance(again, Denoise)
    assert (first.canvas.tolist(), first.uniform.tolist()) == (again.canvas.tolist(), again.uniform.tolist())


def test_committed_canvas_is_encoded_whole_and_the_last_one_never() -> None:
    blocks = [canvas_of(B), canvas_of(D), canvas_of(N, EOS)]
    calls, events = play(generation(), blocks)
    encodes = [(call.start, call.token_ids.tolist()) for call in calls if isinstance(call, Encode)]
    assert encodes[1:] == [(3, blocks[0]), (11, blocks[1])]
    assert isinstance(calls[-1], Denoise)
    assert [event.token_ids.tolist() for event in commits(events)] == [blocks[0], blocks[1], [N]]
    assert [event.block_index for event in commits(events)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("limit", "canvas", "kept", "reason"),
    [
        (8, canvas_of(), 8, FinishReason.LENGTH),  # the limit is the canvas
        (5, canvas_of(), 5, FinishReason.LENGTH),  # not rounded up
        (5, canvas_of(A, A, EOS), 2, FinishReason.END_TOKEN),
        (5, canvas_of(A, A, A, A, A, TURN_END), 5, FinishReason.END_TOKEN),  # the answer just fits
        (4, canvas_of(A, A, A, A, A, EOS), 4, FinishReason.LENGTH),  # the end lies behind the limit
        (8, [A] * 7 + [EOS], 7, FinishReason.END_TOKEN),  # the canvas' last position
        (8, [EOS] * 8, 0, FinishReason.END_TOKEN),  # an empty answer
        (1, canvas_of(), 1, FinishReason.LENGTH),
    ],
)
def test_answer_ends_at_the_end_token_or_the_limit(
    limit: int, canvas: list[int], kept: int, reason: FinishReason
) -> None:
    subject = generation(replace(SAMPLING, max_output_tokens=limit))
    _, events = play(subject, [canvas])
    (block,) = commits(events)
    assert block.token_ids.tolist() == canvas[:kept]
    assert block.text == "a" * kept
    assert (finish(events).reason, finish(events).usage.output_tokens) == (reason, kept)


def test_limit_counts_over_blocks() -> None:
    subject = generation(replace(SAMPLING, max_output_tokens=18))
    assert subject.total_positions == 3 + 24
    _, events = play(subject, [canvas_of()] * 3)
    assert [len(event.token_ids) for event in commits(events)] == [8, 8, 2]


def test_stop_string_across_blocks_is_never_told() -> None:
    subject = generation(replace(SAMPLING, stop_strings=("x", "END")))
    _, events = play(subject, [[*[A] * 7, E], canvas_of(N, D, B)])
    assert [event.text for event in commits(events)] == ["a" * 7, ""]
    assert [event.token_ids.tolist() for event in commits(events)] == [[*[A] * 7, E], []]
    assert (finish(events).reason, finish(events).stop_string) == (FinishReason.STOP_STRING, "END")
    assert finish(events).usage.output_tokens == 8


def test_head_of_a_stop_string_comes_out_when_it_was_none() -> None:
    _, events = play(generation(replace(SAMPLING, stop_strings=("END",))), [[*[A] * 7, E], canvas_of(A, EOS)])
    assert [event.text for event in commits(events)] == ["a" * 7, "Ea"]
    _, events = play(generation(replace(SAMPLING, stop_strings=("END",))), [canvas_of(A, E, N, EOS)])
    assert [event.text for event in commits(events)] == ["aEN"]


def test_stop_string_behind_end_token_or_limit_does_not_count() -> None:
    _, events = play(generation(replace(SAMPLING, stop_strings=("END",))), [canvas_of(A, EOS, E, N, D)])
    assert finish(events).reason is FinishReason.END_TOKEN
    _, events = play(generation(replace(SAMPLING, stop_strings=("END",), max_output_tokens=3)), [canvas_of(A, E, N, D)])
    assert (finish(events).reason, commits(events)[0].text) == (FinishReason.LENGTH, "aEN")


def test_character_split_by_a_block_border_comes_whole_or_replaced() -> None:
    horse = [6 + byte for byte in "🦄".encode()]
    _, events = play(generation(), [[*[A] * 6, *horse[:2]], [*horse[2:], B, EOS, *[A] * 4]])
    assert [event.text for event in commits(events)] == ["a" * 6, "🦄b"]
    _, events = play(generation(), [canvas_of(A, *horse[:2], EOS)])
    assert [event.text for event in commits(events)] == ["a\ufffd"]


def test_drafts_show_each_step_and_the_commit_follows_its_last() -> None:
    subject = generation(replace(SAMPLING, stop_strings=("END",)))
    events: list[Event] = subject.start(0.0) + subject.encoded(0.0)
    assert isinstance(events[0], Started)
    scripts = [(canvas_of(A, B, EOS), False), (canvas_of(E, B, E, N, D, B), False), (canvas_of(A, E, EOS), True)]
    for canvas, sure in scripts:
        events += subject.denoised(readout(canvas, sure), 0.0, draft=True)
    assert [type(event).__name__ for event in events] == ["Started", *["Draft"] * 3, "Committed", "Finished"]
    drafts = [event for event in events if isinstance(event, Draft)]
    assert [draft.text for draft in drafts] == ["ab", "Eb", "aE"]
    assert [draft.token_text_lengths for draft in drafts] == [(1, 1), (1, 1, 0, 0, 0, 0, 0, 0), (1, 1)]
    assert [draft.step for draft in drafts] == [1, 2, 3]
    assert [draft.accepted.sum() for draft in drafts] == [1, 1, 8]
    assert drafts[0].temperature > drafts[1].temperature > drafts[2].temperature
    committed = commits(events)[0]
    assert (committed.text, committed.step_count, committed.converged) == ("aE", 3, False)


def test_settled_block_says_so() -> None:
    _, events = play(generation(), [canvas_of(EOS)])
    assert (commits(events)[0].step_count, commits(events)[0].converged) == (2, True)


def test_usage_adds_up() -> None:
    """Three prompt chunks at 0.25 s; two canvases of two steps at 1 s and one encoding of a canvas in between."""
    _, events = play(generation(prompt_length=10, chunk=4), [canvas_of(), canvas_of(A, EOS)])
    usage = finish(events).usage
    # A canvas of 8 takes two chunks of 4.
    assert (usage.queue_seconds, usage.prefill_seconds, usage.denoise_seconds) == (0.5, 0.75, 4.5)
    assert (usage.prompt_tokens, usage.output_tokens, usage.blocks, usage.denoising_steps) == (10, 9, 2, 4)


def test_started_echoes_what_is_in_force() -> None:
    (event,) = generation(prompt_length=4).start(0.0)
    assert event == Started("tiny", SAMPLING, LENGTH, 4)


def test_what_others_have_encoded_of_the_prompt_is_skipped() -> None:
    """At the beginning, after a chunk, to the prompt's end."""
    subject = generation(prompt_length=10, chunk=4)
    subject.start(0.0)
    assert subject.prompt_position == 0
    subject.skip_to(4)
    subject.encoded(0.0)
    assert (subject.prompt_position, subject.encode_tokens) == (8, 2)
    subject.skip_to(8)
    assert subject.prompt_position == 8
    subject.skip_to(10)
    assert (subject.prompt_position, subject.encode_tokens) == (None, 0)
    call = subject.next_call()
    assert isinstance(call, Denoise)
    assert call.start == 10
    _, events = play(subject, [canvas_of(EOS)])
    assert finish(events).usage.shared_tokens == 6


@pytest.mark.parametrize("calls", range(1, 12))
def test_a_rewound_request_makes_the_same_calls_again(calls: int) -> None:
    """Rewound after any number of calls: the same pieces are encoded, the open canvas draws the same numbers."""
    blocks = [canvas_of(B), canvas_of(D), canvas_of(N, EOS)]
    straight, events = play(generation(prompt_length=10, chunk=4), blocks)
    subject = generation(prompt_length=10, chunk=4)
    told: list[Event] = subject.start(0.5)
    for _ in range(calls):
        told += run_call(subject, blocks)
    committed = len(commits(told))
    subject.rewind()
    again: list[Encode | Denoise] = []
    while not subject.finished:
        again.append(subject.next_call())
        told += run_call(subject, blocks)
    # What was committed is encoded anew behind the prompt; then all goes on as if nothing had been.
    expected = [call for call in straight if isinstance(call, Encode) and call.start < 10 + committed * LENGTH]
    first = next(i for i, call in enumerate(straight) if isinstance(call, Denoise) and call.block_index == committed)
    assert [described(call) for call in again] == [described(call) for call in [*expected, *straight[first:]]]
    assert [event.text for event in commits(told)] == [event.text for event in commits(events)]
    assert finish(told).usage.denoising_steps == finish(events).usage.denoising_steps


def run_call(subject: Generation, blocks: list[list[int]]) -> list[Event]:
    """As `play` does, for one call."""
    call = subject.next_call()
    if isinstance(call, Encode):
        return subject.encoded(0.25)
    return subject.denoised(readout(blocks[call.block_index]), 1.0, draft=False)


def described(call: Encode | Denoise) -> tuple[object, ...]:
    if isinstance(call, Encode):
        return call.start, call.token_ids.tolist()
    numbers = (call.canvas.tolist(), call.uniform.tolist())
    return call.start, call.block_index, call.first_step, call.temperature, call.guard_first, *numbers


@pytest.mark.parametrize("told_blocks", [1, 2])
def test_a_resumed_request_goes_on_as_the_unbroken_one(told_blocks: int) -> None:
    """The rest of its calls and its events; a character, and the head of a stop string, reach over the break."""
    horse = [6 + byte for byte in "🦄".encode()]
    blocks = [[*[A] * 6, *horse[:2]], [*horse[2:], *[B] * 5, E], canvas_of(N, A, EOS)]
    sampling = replace(SAMPLING, stop_strings=("END",))
    straight, unbroken = play(generation(sampling, prompt_length=10, chunk=4), blocks)
    request = GenerationRequest(
        "tiny",
        np.arange(10) + 7,
        sampling,
        committed_ids=np.array([i for block in blocks[:told_blocks] for i in block]),
    )
    subject = Generation(request, FACTS, DEFAULTS, VOCABULARY, 4)
    assert subject.total_positions == generation(sampling, prompt_length=10).total_positions
    calls: list[Encode | Denoise] = []
    events = subject.start(0.0)
    while not subject.finished:
        calls.append(subject.next_call())
        events += run_call(subject, blocks)
    rest = commits(unbroken)[told_blocks:]
    assert [(event.block_index, event.text, event.token_ids.tolist()) for event in commits(events)] == [
        (event.block_index, event.text, event.token_ids.tolist()) for event in rest
    ]
    encodes = [call for call in straight if isinstance(call, Encode)]
    denoises = [call for call in straight if isinstance(call, Denoise) and call.block_index >= told_blocks]
    assert sorted(described(call) for call in calls if isinstance(call, Encode)) == sorted(map(described, encodes))
    assert [described(call) for call in calls if isinstance(call, Denoise)] == [described(call) for call in denoises]
    usage = finish(events).usage
    assert (usage.output_tokens, usage.blocks) == (finish(unbroken).usage.output_tokens, 3)


@pytest.mark.parametrize(
    ("committed", "message"),
    [
        pytest.param([A] * (LENGTH - 1), "whole blocks", id="part of a block"),
        pytest.param([*[A] * 3, EOS, *[A] * 4], "block 0", id="a block with an end token"),
        pytest.param([*[A] * LENGTH, *[A] * 5, E, N, D], "block 1", id="a stop string in the second block"),
        pytest.param([A] * (3 * LENGTH), "block 2", id="as many tokens as are allowed"),
    ],
)
def test_what_cannot_be_gone_on_with_is_refused(committed: list[int], message: str) -> None:
    sampling = replace(SAMPLING, max_output_tokens=3 * LENGTH, stop_strings=("END",))
    request = GenerationRequest("tiny", np.arange(3), sampling, committed_ids=np.array(committed, np.int64))
    with pytest.raises(InvalidRequest, match=f"committed_ids: .*{message}"):
        Generation(request, FACTS, DEFAULTS, VOCABULARY)


tokens = st.one_of(
    st.sampled_from([A, B, E, N, D]), st.integers(6, SIZE - 1), st.sampled_from([6 + byte for byte in "🦄é".encode()])
)


@settings(max_examples=300)
@given(
    canvases=st.lists(st.lists(tokens, min_size=LENGTH, max_size=LENGTH), min_size=1, max_size=4),
    end=st.integers(0, 4 * LENGTH),
    limit=st.integers(1, 4 * LENGTH),
    stops=st.lists(st.sampled_from(["END", "EN", "ab", "aab", "🦄", "b", "E\ufffd"]), max_size=2),
    draft=st.booleans(),
)
def test_whole_answers_are_those_of_a_plain_reading(
    canvases: list[list[int]], end: int, limit: int, stops: list[str], draft: bool
) -> None:
    """All canvases in a row, cut at the end token and the limit, decoded at once, cut at the first stop string."""
    answer = [token for canvas in canvases for token in canvas]
    end = min(end, len(answer) - 1)
    answer[end] = EOS
    blocks = [answer[begin : begin + LENGTH] for begin in range(0, len(answer), LENGTH)]
    sampling = replace(SAMPLING, max_output_tokens=limit, stop_strings=tuple(stops))
    _, events = play(generation(sampling), blocks, draft)
    expected, stop_string = cut(whole_text(answer[: min(end, limit)]), stops)
    assert "".join(event.text for event in commits(events)) == expected
    assert finish(events).stop_string == stop_string
    told = [token for event in commits(events) for token in event.token_ids.tolist()]
    assert told == answer[: len(told)]
    if stop_string is None:
        reason = FinishReason.END_TOKEN if end <= limit else FinishReason.LENGTH
        assert (finish(events).reason, len(told)) == (reason, min(end, limit))
    kinds = [type(event) for event in events if not isinstance(event, Draft)]
    assert kinds == [Started, *[Committed] * (len(kinds) - 2), Finished]
