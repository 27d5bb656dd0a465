"""Expert routing and the dispatch plan in Triton's interpreter, and their compilation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plugins_trt.expert_routing.reference import expert_routing
from plugins_trt.gpu import Gpu
from tests.plugins_trt.triton_support import SHARED_MEMORY, Interpreter, compile_launch, launches_of

kernel = pytest.importorskip("plugins_trt.expert_routing.kernel", reason="Triton is not installed")
dispatch_kernel = pytest.importorskip("plugins_trt.expert_ffn.dispatch", reason="Triton is not installed")

RELEASED = {"experts": 128, "top_k": 8}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"),
    [
        pytest.param(7, 5, 2, id="catches padding experts that are chosen"),
        pytest.param(3, 16, 16, id="every expert chosen: catches one that is chosen twice or lost"),
        pytest.param(4, 13, 1, id="one expert chosen: catches a weight that is not its scale"),
        pytest.param(2, 1, 1, id="one expert at all: catches sizes of 1"),
        pytest.param(0, 5, 2, id="no token: catches an empty grid"),
        pytest.param(5, 128, 8, id="the released numbers"),
    ],
)
def test_routing(interpreter: Interpreter, tokens: int, experts: int, top_k: int, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(tokens)
    logits = (3 * torch.randn(tokens, experts, generator=random)).to(dtype)
    scale = (1 + torch.rand(experts, generator=random)).to(dtype)
    ids, weights = interpreter(kernel.expert_routing, logits, scale, top_k)
    order = torch.sort(logits, dim=1, descending=True, stable=True).indices[:, :top_k]
    assert torch.equal(ids, order)
    _, oracle = expert_routing(logits.double(), scale.double(), top_k)
    # A quotient of sums of K exponentials of arguments up to 24 in float32, times a scale; then one rounding.
    bound = (24 + 2 * top_k + 4) * 2.0**-24 + torch.finfo(dtype).eps / 2
    torch.testing.assert_close(weights.double(), oracle, rtol=bound, atol=torch.finfo(dtype).smallest_normal)


INF = float("inf")


@pytest.mark.parametrize(
    ("logits", "chosen"),
    [
        pytest.param([1.0, 2.0, 2.0, 2.0], [1, 2, 3], id="catches ties that go to the higher id"),
        pytest.param([0.0, -0.0, 0.0, -1.0], [0, 1, 2], id="catches a zero that is less than another"),
        pytest.param([-INF, 1.0, -INF, -INF], [1, 0, 2], id="catches an expert without any share that is taken twice"),
        pytest.param([-1.0, -3.0, -2.0, -1e-45], [3, 0, 2], id="catches negative numbers that order the wrong way"),
    ],
)
def test_routing_breaks_ties_by_id(interpreter: Interpreter, logits: list[float], chosen: list[int]) -> None:
    ids, _ = interpreter(kernel.expert_routing, torch.tensor([logits]), torch.ones(4), 3)
    assert ids.tolist() == [chosen]


def test_routing_of_products(interpreter: Interpreter) -> None:
    """Catches columns lost or counted twice, experts and tokens mixed up, blocks whose last tokens are not there, and
    parts summed in other units than they are rounded in."""
    for dtype, tokens, experts, size, top_k in (
        (torch.float32, 1, 5, 40, 2),
        (torch.float32, 37, 16, 512, 4),
        (torch.float16, 33, 21, 600, 3),
    ):
        random = torch.Generator().manual_seed(tokens)
        x = torch.randn(tokens, size, generator=random).to(dtype)
        weight = (torch.randn(experts, size, generator=random) / size**0.5).to(dtype)
        scale = (1 + torch.rand(experts, generator=random)).to(dtype)
        ids, weights = interpreter(kernel.project_and_route, x, weight, scale, top_k)
        logits, magnitude = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
        # Sums of `size` products in float32 (Higham 2002, section 4.2), rounded once to `dtype` where there are
        # several of them.
        off = size * 2.0**-24 * magnitude + torch.finfo(dtype).eps / 2 * logits.abs()
        margin = 2 * off.amax(1)
        order = torch.sort(logits, dim=1, descending=True).indices[:, : min(top_k + 1, experts)]
        gaps = -torch.diff(logits.gather(1, order), dim=1).amin(1)
        apart = gaps.abs() > margin
        assert apart.float().mean() > 0.5, "the case shows nothing"
        assert torch.equal(ids[apart], order[apart, :top_k])
        chosen = logits.gather(1, ids)
        oracle = torch.softmax(chosen, 1) * scale.double()[ids]
        # A share's relative error is at most that of its own exponential and of the sum's terms together.
        bound = 2 * margin[:, None] + (24 + 2 * top_k + 4) * 2.0**-24 + torch.finfo(dtype).eps / 2
        assert ((weights.double() - oracle).abs() <= bound * oracle + torch.finfo(dtype).smallest_normal).all()


def test_a_token_is_routed_alike_among_others(interpreter: Interpreter) -> None:
    """Catches sums whose order depends on how many tokens there are."""
    random = torch.Generator().manual_seed(0)
    x, weight = torch.randn(70, 512, generator=random), torch.randn(8, 512, generator=random)
    alone, among = (interpreter(kernel.project_and_route, rows, weight, torch.ones(8), 3) for rows in (x[40:41], x))
    assert torch.equal(alone[0][0], among[0][40])
    assert torch.equal(alone[1][0], among[1][40])


def test_many_tokens_are_left_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a product of our own where a library's is faster, and one kernel too many."""
    weight = torch.empty(128, 2816, device="meta")
    for tokens, kernels in ((kernel.MOST_TOKENS, ["project", "route"]), (kernel.MOST_TOKENS + 1, ["route"])):
        x = torch.empty(tokens, 2816, device="meta")
        launches = launches_of(kernel.project_and_route, x, weight, weight[:, 0], 8)
        assert [launch.kernel.__name__ for launch in launches] == kernels


def plan_of(ids: Tensor, experts: int, block_rows: int) -> list[tuple[int, list[int]]]:
    """The plan by its definition: expert and rows of every block."""
    pairs = ids.flatten().tolist()
    blocks = []
    for expert in range(experts):
        own = [pair for pair, chosen in enumerate(pairs) if chosen == expert]
        for start in range(0, len(own), block_rows):
            rows = own[start : start + block_rows]
            blocks.append((expert, [*rows, *[len(pairs)] * (block_rows - len(rows))]))
    return blocks


def assert_planned(interpreter: Interpreter, ids: Tensor, experts: int, block_rows: int) -> None:
    plan = interpreter(dispatch_kernel.dispatch, ids, experts, block_rows)
    expected = plan_of(ids, experts, block_rows)
    used = len(expected)
    assert plan.block_expert.tolist() == [expert for expert, _ in expected] + [-1] * (plan.blocks - used)
    assert plan.used.tolist() == [used]
    assert plan.rows[:used].tolist() == [rows for _, rows in expected]


def test_plan_spans_several_chunks(interpreter: Interpreter) -> None:
    """Catches ranks and counts that start again with every 2048 pairs that a program looks at."""
    ids = torch.randint(3, (1400, 3), generator=torch.Generator().manual_seed(0))
    assert_planned(interpreter, ids, 3, 64)


def test_plan_of_more_experts_than_a_warp_has_lanes(interpreter: Interpreter) -> None:
    """Catches experts that share a bin of the histogram, and surplus blocks that keep what memory held."""
    ids = torch.rand(16, 40, generator=torch.Generator().manual_seed(0)).topk(4).indices * 3 % 40
    assert_planned(interpreter, ids, 40, 16)


@settings(max_examples=25)
@given(data=st.data())
def test_plan_sorts_pairs_by_expert(interpreter: Interpreter, data: st.DataObject) -> None:
    """Catches an expert without tokens, one with all, blocks filled to the brim or of no power of two, single pairs."""
    experts, top_k = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 3))
    chosen = st.lists(st.integers(0, experts - 1), min_size=top_k, max_size=top_k)
    ids = torch.tensor(data.draw(st.lists(chosen, min_size=1, max_size=24)))
    assert_planned(interpreter, ids, experts, data.draw(st.sampled_from([2, 4, 6, 16])))


@given(counts=st.lists(st.integers(0, 70), min_size=1, max_size=9), block_rows=st.sampled_from([1, 2, 16, 32]))
def test_blocks_fit_the_bound(counts: list[int], block_rows: int) -> None:
    """Catches a grid that is too small for an unlucky split of the pairs."""
    needed = sum(-(-count // block_rows) for count in counts)
    assert needed <= dispatch_kernel.block_bound(sum(counts), len(counts), block_rows)


def test_bound_is_attained() -> None:
    """Catches a bound with blocks that no split of the pairs can need: every one costs a wave of idle programs."""
    assert dispatch_kernel.block_bound(4 * 33, 4, 32) == 8


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_compiles(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches what the interpreter allows and a target does not, and a host that reads a device's value."""
    monkeypatch.setattr(kernel, "gpu_of", lambda device: Gpu(capability, multiprocessors=132))
    x = torch.empty(256, 2816, dtype=torch.bfloat16, device="meta")
    for launch in launches_of(kernel.project_and_route, x, x[:128], x[0, :128], RELEASED["top_k"]):
        assert compile_launch(launch, capability).asm["cubin"]
    logits = torch.empty(256, RELEASED["experts"], dtype=torch.bfloat16, device="meta")
    (launch,) = launches_of(kernel.expert_routing, logits, logits[0], RELEASED["top_k"])
    assert compile_launch(launch, capability).asm["cubin"]
    ids = torch.empty(256, RELEASED["top_k"], dtype=torch.int64, device="meta")
    (launch,) = launches_of(dispatch_kernel.dispatch, ids, RELEASED["experts"], 32)
    assert compile_launch(launch, capability).asm["cubin"]
