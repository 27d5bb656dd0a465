"""The residual stream's joints: found in a graph as the exporter writes it, and the same when joined."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from export.model import RMSNorm
from plugins_trt.torch_operations import REGISTERED
from runtime.engines.torch.pieces import take_apart
from runtime.engines.torch.residuals import join_residuals

H, TOKENS, EXPERTS, TOP_K = 64, 7, 4, 2
JOINED = torch.ops.dgemma.residual_norm.default
FP8 = torch.float8_e4m3fn


class Block(nn.Module):
    """What stands around a layer's two branches, with weights that tell the norms apart."""

    def __init__(self, odd_eps: float = 1e-6, fp8: bool = True) -> None:
        super().__init__()
        eps, self.fp8 = 1e-6, fp8
        random = torch.Generator().manual_seed(1)
        names = ("after_attention", "dense_in", "sparse_in", "dense_out", "sparse_out", "both", "next")
        self.norms = nn.ModuleDict({name: RMSNorm(H, odd_eps if name == "next" else eps) for name in names})
        for norm in self.norms.values():
            norm.weight.data = torch.rand(H, generator=random) + 0.5
        self.router_norm = RMSNorm(H, eps, weighted=False)
        self.router_scale = nn.Parameter((torch.rand(H, generator=random) + 0.5).bfloat16())
        self.scalars = nn.Parameter(torch.tensor([-0.7, 0.4]).bfloat16())
        self.bfloat16()

    def forward(self, x: Tensor, attended: Tensor, denoise: Tensor, *branch: Tensor) -> tuple[Tensor, ...]:
        residual = x + self.norms["after_attention"](attended)
        dense, sparse, routed = self._branches(residual, *branch)
        combined = self.norms["dense_out"](dense) + self.norms["sparse_out"](sparse.view_as(residual))
        mixed = residual + self.norms["both"](combined)
        x = mixed * torch.where(denoise[:, None, None], self.scalars[0], self.scalars[1])
        return x, self.norms["next"](x), routed

    def _branches(self, residual: Tensor, *branch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight, scale, ids, shares, *experts = branch
        dense_in = self.norms["dense_in"](residual)
        tokens = residual.flatten(0, 1)
        routed = self.router_norm(tokens) * self.router_scale * 0.25
        sparse_in = self.norms["sparse_in"](tokens)
        if self.fp8:
            dense = REGISTERED.linear_fp8(dense_in, weight, scale)
            return dense, REGISTERED.expert_ffn_fp8(sparse_in, ids, shares, *experts), routed
        return F.linear(dense_in, weight), REGISTERED.expert_ffn(sparse_in, ids, shares, *experts), routed


class Gated(nn.Module):
    """A sum that is multiplied with a tensor of its own shape."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = RMSNorm(H, 1e-6).bfloat16()

    def forward(self, x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
        return (x + self.norm(branch)) * gate


def inputs(fp8: bool = True) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).bfloat16()

    def codes(*shape: int) -> Tensor:
        return (50 * torch.randn(shape, generator=random)).to(FP8)

    def scales(*shape: int) -> Tensor:
        return (torch.rand(shape, generator=random) + 0.5) / 400

    ids = torch.rand(TOKENS, EXPERTS, generator=random).topk(TOP_K).indices
    experts = codes(EXPERTS, 64, H), scales(EXPERTS, 64), codes(EXPERTS, H, 32), scales(EXPERTS, H)
    weight = codes(H, H)
    if not fp8:
        experts = normal(EXPERTS, 64, H) / 8, normal(EXPERTS, H, 32) / 6
        weight = normal(H, H) / 8
    shares = torch.rand(TOKENS, TOP_K, generator=random).bfloat16()
    row = normal(1, TOKENS, H), normal(1, TOKENS, H), torch.tensor([True])
    return *row, weight, scales(H), ids, shares, *experts


def traced(module: nn.Module, arguments: tuple[Tensor, ...]) -> fx.GraphModule:
    """The module's graph, its operations taken apart."""
    graph = torch.export.export(module, arguments, strict=False).module()
    # What the exporter leaves out.
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        graph.graph.erase_node(node)
    take_apart(graph.graph, torch.device("cpu"))
    return graph


def joined(graph: fx.GraphModule) -> list[Any]:
    """Joins the graph's residuals, and returns the operations that stand for them."""
    join_residuals(graph.graph)
    graph.graph.lint()
    graph.recompile()
    return list(graph.graph.find_nodes(op="call_function", target=JOINED))


def test_all_norms_of_a_block_are_joined() -> None:
    """Catches a joint that is not found, a norm left behind or quantised that is not, and a lost factor."""
    after_attention, end = joined(graph := traced(Block(), inputs()))
    assert after_attention.args[-3:] == ([1.0, 0.25, 1.0], [True, False, True], 1e-6)
    assert end.args[-3:] == ([1.0], [False], 1e-6)
    assert after_attention.args[3:7] == (None,) * 4
    assert None not in end.args[:7]
    assert not graph.graph.find_nodes(op="call_function", target=torch.ops.aten.rms_norm.default)


def test_a_joined_block_computes_the_same() -> None:
    """Catches a weight of another norm, the second branch in the first one's place, a sum from before the scalar, and
    results that are handed to the wrong reader."""
    block, arguments = Block(fp8=False), inputs(fp8=False)
    plain, graph = traced(block, arguments), traced(block, arguments)
    assert joined(graph)
    for got, expected in zip(graph(*arguments), plain(*arguments), strict=True):
        # The plain graph rounds to bfloat16 up to ten times on the way, each time by 2^-9 of a number that is no larger
        # than its row's largest, and norms keep what is relative to that.
        slack = 10 * 2**-9 * expected.abs().amax(-1, keepdim=True).float()
        assert got.shape == expected.shape
        assert bool(((got - expected).abs().float() <= slack).all())


def test_what_the_operation_cannot_do_is_left_alone() -> None:
    """Catches a gate taken for a scalar, and norms of two epsilons made with one."""
    random = torch.Generator().manual_seed(2)
    arguments = tuple(torch.randn(1, TOKENS, H, generator=random).bfloat16() for _ in range(3))
    graph = traced(Gated(), arguments)
    expected = graph(*arguments)
    [joint] = joined(graph)
    assert joint.args[6] is None
    torch.testing.assert_close(graph(*arguments), expected, rtol=2**-6, atol=2**-6)
    assert len(joined(traced(Block(odd_eps=1e-3), inputs()))) == 1


@pytest.mark.parametrize("shared", [False, True], ids=["read by the product alone", "read by another one too"])
def test_attention_makes_the_codes_of_the_only_product_that_reads_it(shared: bool) -> None:
    """Catches an attention that is computed twice because somebody else wants it as it is."""

    class Attending(nn.Module):
        def forward(self, weight: Tensor, scale: Tensor, *attention: Tensor) -> tuple[Tensor, ...]:
            attended = REGISTERED.canvas_attention(*attention)
            product = REGISTERED.linear_fp8(attended.flatten(2), weight, scale)
            return (product, attended) if shared else (product,)

    random = torch.Generator().manual_seed(3)
    row, pool = (torch.randn(shape, generator=random).bfloat16() for shape in ((1, 3, 2, 8), (2, 4, 2, 8)))
    whole = [torch.tensor(each) for each in ([[0, 1]], [0], [5], [[0, 0, 0]], [[8, 8, 8]])]
    arguments = torch.randn(6, 16).to(FP8), torch.rand(6), row, row, row, pool, pool, *whole
    graph = traced(Attending(), arguments)
    named = torch.ops.dgemma.canvas_attention_codes.default
    assert len(graph.graph.find_nodes(op="call_function", target=named)) == (0 if shared else 1)
    graph.recompile()
    for got, expected in zip(graph(*arguments), Attending()(*arguments), strict=True):
        torch.testing.assert_close(got, expected)
