"""What one client may have, against a model in fractions, and over a real socket."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusiongemma.v1 import generation_pb2, prompt_pb2
from runtime.errors import ClientLimitReached
from runtime.events import Committed
from runtime.runner import Handle
from runtime.scheduler import Limits
from runtime.vocabulary import Vocabulary
from service.authentication import Caller, by_peer
from service.mailbox import Mailbox
from service.pace import Pace
from service.quota import MAX_REMEMBERED, Account, ClientLimits, Quotas
from service.running import Running
from service.security import SecuritySettings
from tests.service.support import FIRST_CHARACTER, Harness, failure_of, finished, reached, request, serving


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@given(
    st.integers(1, 5),
    st.integers(1, 1000),
    st.lists(
        st.one_of(
            st.tuples(st.just("wait"), st.integers(0, 90)),
            st.tuples(st.just("begin"), st.integers(0, 300)),
            st.tuples(st.just("end"), st.integers(0, 4)),
        ),
        max_size=40,
    ),
)
def test_like_a_bucket_in_fractions(most: int, per_minute: int, acts: list[tuple[str, int]]) -> None:
    """Catches a limit that is off by one, tokens that come in twice, and a minute's worth that grows without bound."""
    clock = Clock()
    quotas = Quotas(lambda _: ClientLimits(most, per_minute), clock)
    level, open_ones = Fraction(per_minute), []
    for act, amount in acts:
        if act == "wait":
            clock.now += amount
            level = min(Fraction(per_minute), level + Fraction(per_minute * amount, 60))
        elif act == "end" and open_ones:
            open_ones.pop(amount % len(open_ones)).close()
        elif act == "begin":
            if abs(level) < Fraction(1, 10**6):
                continue  # where floats may take either side
            stack = ExitStack()
            if len(open_ones) >= most or level < 0:
                with pytest.raises(ClientLimitReached):
                    stack.enter_context(quotas.generation("client"))
                continue
            stack.enter_context(quotas.generation("client")).spend(amount)
            level -= amount
            open_ones.append(stack)


def test_after_the_time_that_is_told_the_next_one_goes() -> None:
    """And not a little before: the time told is that in which a token has come in."""
    clock = Clock()
    quotas = Quotas(lambda _: ClientLimits(tokens_per_minute=60), clock)
    with quotas.generation("client") as account:
        account.spend(100)
    with pytest.raises(ClientLimitReached) as caught, quotas.generation("client"):
        pass
    assert caught.value.retry_after == pytest.approx(41)
    clock.now += 39.9
    with pytest.raises(ClientLimitReached), quotas.generation("client"):
        pass
    clock.now += 1.1
    with quotas.generation("client"):
        pass


def test_who_has_spent_all_has_to_wait() -> None:
    quotas = Quotas(lambda _: ClientLimits(tokens_per_minute=60), Clock())
    with quotas.generation("client") as account:
        account.spend(60)
    with pytest.raises(ClientLimitReached), quotas.generation("client"):
        pass


def test_limits_that_change_hold_at_once() -> None:
    limits = {"client": ClientLimits()}
    quotas = Quotas(lambda name: limits[name], Clock())
    with quotas.generation("client") as account:
        account.spend(10**6)
        limits["client"] = ClientLimits(max_concurrent=1)
        with pytest.raises(ClientLimitReached), quotas.generation("client"):
            pass
    limits["client"] = ClientLimits(tokens_per_minute=60)
    with quotas.generation("client"):  # nothing is owed from the time without a limit
        pass


def test_clients_at_rest_are_forgotten() -> None:
    """Catches accounts that pile up with every address that ever called; one in debt is kept."""
    quotas = Quotas(lambda _: ClientLimits(tokens_per_minute=60), Clock())
    with quotas.generation("debtor") as account:
        account.spend(1000)
    for index in range(5 * MAX_REMEMBERED):
        with quotas.generation(f"client {index}"):
            pass
    assert len(quotas._accounts) <= MAX_REMEMBERED
    with pytest.raises(ClientLimitReached), quotas.generation("debtor"):
        pass


@pytest.mark.parametrize(
    ("peer", "name"),
    [
        pytest.param("ipv4:10.0.0.7:50000", "ipv4:10.0.0.7", id="ipv4"),
        pytest.param("ipv6:%5B2001:db8::1%5D:50000", "ipv6:2001:db8::/64", id="one-address-of-many"),
        pytest.param("ipv6:%5B2001:db8::ffff:2%5D:50001", "ipv6:2001:db8::/64", id="another-of-the-same"),
        pytest.param("ipv6:[2001:db8:0:1::1]:50000", "ipv6:2001:db8:0:1::/64", id="another-network"),
        pytest.param("ipv6:%5B::ffff:10.0.0.7%5D:50000", "ipv4:10.0.0.7", id="ipv4-in-ipv6"),
        pytest.param("ipv6:%5Bfe80::1%25eth0%5D:50000", "ipv6:fe80::/64", id="with-a-zone"),
        pytest.param("ipv6:nonsense:1", "ipv6:nonsense", id="no-address"),
        pytest.param("unix:", "unix", id="unix"),
    ],
)
def test_a_machine_is_one_client(peer: str, name: str) -> None:
    """Catches limits that a machine has 2^64 times, one for each of its addresses, and all of IPv4 as one client."""

    class Context:
        def auth_context(self) -> dict[str, list[bytes]]:
            return {}

        def peer(self) -> str:
            return peer

    context: Any = Context()
    assert by_peer(context) == Caller(name, known=False)


async def test_concurrency_over_a_socket(tmp_path: Path) -> None:
    """Two generations of one machine at a time; when one has ended, the next goes."""
    security = SecuritySettings(limits=ClientLimits(max_concurrent=2))
    async with serving(tmp_path, security=security) as harness:
        with harness.engine.hold("encode", 1) as gate:
            calls = [harness.generation.Generate(request(text), timeout=60) for text in ("one", "two")]
            await reached(gate)
            for _ in calls:
                await harness.runner.submitted()
            failure = await failure_of(harness.generation.Generate(request("three"), timeout=60))
            assert (failure.code, failure.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "CLIENT_LIMIT_REACHED")
            assert failure.metadata == {"limit": "max_concurrent", "value": "2"}
            assert failure.retry_after is not None
        for call in calls:
            assert await finished(call)
        assert await finished(harness.generation.Generate(request("four"), timeout=60))


async def test_tokens_over_a_socket(tmp_path: Path) -> None:
    """Prompt and answer count: the first request spends more than a minute's worth, the second has to wait."""
    security = SecuritySettings(limits=ClientLimits(tokens_per_minute=60))
    async with serving(tmp_path, {"go": "x" * 100}, security=security) as harness:
        call = harness.generation.Generate(request("go"), timeout=60)
        spent = sum([_tokens_of(response) async for response in call])
        failure = await failure_of(harness.generation.Generate(request("go"), timeout=60))
    assert spent == 100 + 17
    assert (failure.code, failure.metadata["limit"]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "tokens_per_minute")
    assert failure.retry_after is not None
    assert spent - 60 - 10 < failure.retry_after <= spent - 60 + 1  # a token a second, some of which have passed


async def test_what_was_committed_before_is_paid_for(tmp_path: Path) -> None:
    """Catches prompts that are sent as committed blocks, which the engine encodes like any other and nobody counted."""
    security = SecuritySettings(limits=ClientLimits(tokens_per_minute=1000))
    async with serving(tmp_path, {"go": "x" * 100}, security=security) as harness:
        resumed = request("go")
        resumed.options.seed = 1
        resumed.options.max_output_token_count = 2000
        resumed.resume.committed_token_ids.extend([FIRST_CHARACTER] * 1600)
        assert await finished(harness.generation.Generate(resumed, timeout=60))
        failure = await failure_of(harness.generation.Generate(request("go"), timeout=60))
    assert failure.metadata["limit"] == "tokens_per_minute"


async def paid_by(harness: Harness) -> float:
    """What the one client has spent so far."""
    [account] = harness.server._quotas._accounts.values()
    return MINUTE - account._level


MINUTE = 1_000_000
PAID = SecuritySettings(limits=ClientLimits(tokens_per_minute=MINUTE))


async def test_who_leaves_before_a_block_pays_for_what_it_could_read(tmp_path: Path) -> None:
    """Catches an answer for nothing: read from its drafts, and cancelled before its block is committed."""
    async with serving(tmp_path, {"go": "x" * 100}, steps=3, security=PAID) as harness:
        harness.server._quotas._clock = lambda: 0.0
        with harness.engine.hold("denoise", 4) as gate:  # of four: the third has shown the whole block
            call = harness.generation.Generate(request("go"), timeout=60)
            await reached(gate)
            prompt = (await call.read()).started.prompt_token_count
            call.cancel()
            await (await harness.runner.submitted()).wait_cancelled()
            assert await paid_by(harness) == prompt + 32


async def test_blocks_that_nobody_reads_are_paid_for() -> None:
    """Catches an engine that is kept busy for nothing, by a client that reads the first block alone and leaves."""
    account, mailbox, made = Account(ClientLimits(tokens_per_minute=MINUTE), 0.0), Mailbox(), [0]
    running = Running(mailbox, Handle(lambda: None, lambda: None, lambda: made[0]), account, Pace())
    for block in range(3):
        mailbox.put(Committed(block, np.zeros(32, np.int64), "", 4, True))
    await running.next()
    assert MINUTE - account._level == 32
    made[0] = 3 * 32 + 7
    running.close()
    assert MINUTE - account._level == 3 * 32 + 7


async def test_counting_is_paid_for(tmp_path: Path) -> None:
    """Catches a method that keeps the tokeniser busy, and that no limit holds for."""
    security = SecuritySettings(limits=ClientLimits(tokens_per_minute=60))
    async with serving(tmp_path, security=security) as harness:
        count = generation_pb2.CountTokensRequest(token_ids=prompt_pb2.TokenIds(ids=[5] * 100))
        assert (await harness.generation.CountTokens(count, timeout=30)).token_count == 100
        for call in (
            harness.generation.CountTokens(count, timeout=30),
            harness.generation.Generate(request("go"), timeout=30),
        ):
            failure = await failure_of(call)
            assert (failure.code, failure.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "CLIENT_LIMIT_REACHED")
            assert failure.metadata["limit"] == "tokens_per_minute"


async def test_counting_takes_no_generations_place(tmp_path: Path) -> None:
    security = SecuritySettings(limits=ClientLimits(max_concurrent=1))
    async with serving(tmp_path, security=security) as harness:
        with harness.engine.hold("encode", 1) as gate:
            call = harness.generation.Generate(request("first"), timeout=60)
            await reached(gate)
            count = generation_pb2.CountTokensRequest(token_ids=prompt_pb2.TokenIds(ids=[5]))
            assert (await harness.generation.CountTokens(count, timeout=30)).token_count == 1
        assert await finished(call)


async def test_who_floods_the_queue_leaves_places_to_others(tmp_path: Path) -> None:
    """Over a socket, two clients by their tokens: the flood's newest is told when to come again, and pays nothing."""
    names = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("flood", "other")}
    path = tmp_path / "clients.toml"
    path.write_text("".join(f"[clients.{name}]\ntoken_sha256 = '{digest}'\n" for name, digest in names.items()))
    security = SecuritySettings(clients=path, limits=ClientLimits(tokens_per_minute=10**9))

    def generate(harness: Harness, client: str, text: str) -> Any:
        metadata = (("authorization", f"Bearer {client}"),)
        return harness.generation.Generate(request(text), timeout=60, metadata=metadata)

    async with serving(tmp_path, security=security, limits=Limits(max_active=1, max_waiting=2)) as harness:
        harness.server._quotas._clock = lambda: 0.0
        with harness.engine.hold("encode", 1) as gate:
            calls = []
            for name in ("first", "second", "third"):
                calls.append(generate(harness, "flood", name))
                await harness.runner.submitted()
            await reached(gate)
            refused = await failure_of(generate(harness, "flood", "fourth"))
            assert (refused.code, refused.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
            calls.append(generate(harness, "other", "hello"))
            await harness.runner.submitted()
        crowded_out = await failure_of(calls.pop(2))
        assert (crowded_out.code, crowded_out.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        assert crowded_out.retry_after is not None
        spent = [sum([_tokens_of(response) async for response in call]) for call in calls]
        assert len(spent) == 3
        left = harness.server._quotas._accounts["flood"]
        assert 10**9 - left._level == sum(spent[:2])


async def test_who_may_have_nothing_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches prompts that are tokenised, which everybody waits for, before their client's limits are looked at."""
    tokenised: list[str] = []
    encode = Vocabulary.encode

    def noted(vocabulary: Vocabulary, text: str) -> list[int]:
        tokenised.append(text)
        return encode(vocabulary, text)

    monkeypatch.setattr(Vocabulary, "encode", noted)
    async with serving(tmp_path, security=SecuritySettings(limits=ClientLimits(max_concurrent=1))) as harness:
        with harness.engine.hold("encode", 1) as gate:
            call = harness.generation.Generate(request("first"), timeout=60)
            await reached(gate)
            tokenised.clear()
            failure = await failure_of(harness.generation.Generate(request("second"), timeout=60))
            assert failure.reason == "CLIENT_LIMIT_REACHED"
            assert tokenised == []
        assert await finished(call)


def _tokens_of(response: object) -> int:
    started, committed = getattr(response, "started"), getattr(response, "committed")  # noqa: B009
    return int(started.prompt_token_count) + len(committed.token_ids)
