"""The ONNX faces of expert routing and expert feed-forward against their references, in ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from plugins_trt.expert_ffn.onnx import ExpertBody
from plugins_trt.expert_ffn.onnx import function as ffn_function
from plugins_trt.expert_ffn.reference import expert_ffn
from plugins_trt.expert_routing.onnx import function as routing_function
from plugins_trt.expert_routing.reference import expert_routing
from tests.plugins_trt.onnx_session import OperationSession

EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"),
    [
        pytest.param(7, 5, 2, id="an ordinary choice"),
        pytest.param(1, 5, 2, id="one token: a dimension of one must not be dropped"),
        pytest.param(6, 4, 4, id="every expert chosen: the order alone is at stake"),
        pytest.param(6, 4, 1, id="one expert chosen: its weight is its scale"),
        pytest.param(3, 1, 1, id="one expert at all"),
        pytest.param(0, 5, 2, id="no token"),
    ],
)
def test_routing(tokens: int, experts: int, top_k: int) -> None:
    random = torch.Generator().manual_seed(tokens)
    logits = 3 * torch.randn(tokens, experts, generator=random)
    scale = 1 + torch.rand(experts, generator=random)
    session = OperationSession(
        routing_function(),
        {"logits": logits, "per_expert_scale": scale},
        [(torch.int64, 2), (torch.float32, 2)],
        {"top_k": top_k},
    )
    ids, weights = session(logits, scale)
    expected_ids, _ = expert_routing(logits, scale, top_k)
    _, oracle = expert_routing(logits.double(), scale.double(), top_k)
    assert torch.equal(ids, expected_ids)
    # A weight is a quotient of sums of K exponentials of arguments up to 12, times a scale up to 2.
    torch.testing.assert_close(weights.double(), oracle, rtol=(12 + 2 * top_k + 4) * EPS, atol=0)


def test_routing_gives_ties_to_the_lower_expert() -> None:
    logits, scale = torch.tensor([[1.0, 2.0, 2.0, 2.0]]), torch.ones(4)
    session = OperationSession(
        routing_function(),
        {"logits": logits, "per_expert_scale": scale},
        [(torch.int64, 2), (torch.float32, 2)],
        {"top_k": 2},
    )
    assert session(logits, scale)[0].tolist() == [[1, 2]]


@dataclass(frozen=True)
class Experts:
    """One layer of experts and a choice of them."""

    catches: str
    tokens: int = 7
    hidden: int = 12
    intermediate: int = 6
    experts: int = 5
    top_k: int = 2
    chosen: tuple[int, ...] | None = None
    """Experts to choose from; all where None."""


CASES = [
    Experts("an ordinary mixture"),
    Experts("odd sizes, prime where possible", tokens=11, hidden=13, intermediate=7, experts=3),
    Experts("experts without any token, the first and the last among them", experts=6, chosen=(1, 3)),
    Experts("one expert takes all tokens, the others none", top_k=1, chosen=(2,)),
    Experts("every expert takes every token", top_k=5),
    Experts("one token", tokens=1),
    Experts("one expert at all", experts=1, top_k=1),
    Experts("no token", tokens=0),
]


@pytest.mark.parametrize("body", ExpertBody)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.catches)
def test_feed_forward(case: Experts, body: ExpertBody) -> None:
    arguments = _arguments(case)
    session = OperationSession(
        ffn_function(case.experts, body),
        dict(zip(("x", "expert_ids", "expert_weights", "gate_up", "down"), arguments, strict=True)),
        [(torch.float32, 2)],
        {},
    )
    (mixed,) = session(*arguments)
    wide = [argument.double() if argument.is_floating_point() else argument for argument in arguments]
    true = expert_ffn(*wide)
    # Three rounded products in a row of at most hidden, intermediate and top-k terms, each of which is bounded by the
    # same sum over absolute values.
    absolute = _absolute(*wide)
    terms = case.hidden + case.intermediate + case.top_k + 16
    assert mixed.shape == true.shape
    assert bool(((mixed.double() - true).abs() <= terms * EPS * absolute).all())


def _arguments(case: Experts) -> list[Tensor]:
    random = torch.Generator().manual_seed(case.tokens)
    scores = torch.rand(case.tokens, case.experts, generator=random)
    if case.chosen is not None:
        scores[:, [e for e in range(case.experts) if e not in case.chosen]] = -1
    return [
        torch.randn(case.tokens, case.hidden, generator=random),
        scores.topk(case.top_k).indices,
        torch.rand(case.tokens, case.top_k, generator=random),
        torch.randn(case.experts, 2 * case.intermediate, case.hidden, generator=random),
        torch.randn(case.experts, case.hidden, case.intermediate, generator=random),
    ]


def _absolute(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Sum of the absolute values of everything that is added up; `|gelu(a)| <= |a|`, `|gelu'(a)| <= 1.13`."""
    gate, up = torch.einsum("th,eih->tei", x.abs(), gate_up.abs()).chunk(2, dim=-1)
    mask = torch.zeros(x.shape[0], gate_up.shape[0], dtype=x.dtype).scatter(1, ids, weights)
    return torch.einsum("tei,ehi,te->th", 2 * gate * up, down.abs(), mask)
