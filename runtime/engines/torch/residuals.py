"""The residual stream's joints of a step, found in its graph and replaced by one operation each.

Where a branch ends, its result is normed and added to the residual, and the sum is normed again for every branch that
begins there. `dgemma::residual_norm` does all of that, quantising included, in one kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import getitem

import torch
from torch import fx

from plugins_trt import torch_operations  # noqa: F401 (registers the operations)
from plugins_trt.quantized_linear.reference import quantize_rows
from runtime.engines.torch.pieces import sum_of_parts

_ATEN = torch.ops.aten
_NORM, _CAST, _ADD, _MUL = _ATEN.rms_norm.default, _ATEN.to.dtype, _ATEN.add.Tensor, _ATEN.mul.Tensor
_FLATTEN, _VIEW_AS = _ATEN.flatten.using_ints, _ATEN.view_as.default


def join_residuals(graph: fx.Graph) -> None:
    """Replace every joint that has the operation's form, in place; the graph means the same up to rounding.

    Args:
        graph: of a step, its operations taken apart.
    """
    for node in list(graph.nodes):
        joint = _Joint.at(node)
        if joint is not None:
            joint.replace(graph)
    graph.eliminate_dead_code()


@dataclass(frozen=True)
class _Norm:
    """`rms_norm(x) * weight`, cast back to the dtype of `x`."""

    x: fx.Node
    weight: fx.Node
    eps: float
    result: fx.Node

    @classmethod
    def at(cls, node: object) -> _Norm | None:
        """The norm whose result a node is."""
        norm = _uncast(node)
        if not (isinstance(norm, fx.Node) and norm.target is _NORM):
            return None
        x, _, weight, eps = norm.args
        return cls(_uncast(x), _uncast(weight), eps, node)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Use:
    """A norm of a sum: what it is multiplied with, and the nodes that hold it or its codes and scales."""

    norm: _Norm
    weight: fx.Node
    factor: float
    results: tuple[fx.Node, ...]

    @property
    def quantized(self) -> bool:
        return len(self.results) > 1

    @property
    def flat(self) -> bool:
        """Whether rows and tokens are one axis."""
        return self.norm.x.target is _FLATTEN

    @classmethod
    def of(cls, norm: _Norm) -> _Use:
        if norm.weight.target is _ATEN.ones.default:
            return cls._scaled(norm)
        [user, *others] = norm.result.users
        if user.target is quantize_rows and not others:
            codes, scale = sorted(user.users, key=lambda each: each.args[1])  # type: ignore[arg-type,return-value]
            return cls(norm, norm.weight, 1.0, (codes, scale))
        return cls(norm, norm.weight, 1.0, (norm.result,))

    @classmethod
    def _scaled(cls, norm: _Norm) -> _Use:
        """A norm without a weight of its own, and a learned and a constant factor behind it: the router's."""
        [learned] = norm.result.users
        [constant] = learned.users
        return cls(norm, learned.args[1], constant.args[1], (constant,))  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Joint:
    """A sum of the residual and a normed branch."""

    residual: fx.Node
    branches: tuple[_Norm, ...]
    """The one that may have parts first."""
    joint: _Norm | None
    """The norm of two branches' sum."""
    scalar: fx.Node | None
    total: fx.Node

    @classmethod
    def at(cls, node: fx.Node) -> _Joint | None:
        """The joint that a sum is, None where it is none."""
        if node.target is not _ADD:
            return None
        residual, added = node.args
        norm = _Norm.at(added)
        if norm is None or _Norm.at(residual) is not None:
            return None
        scalar, total = None, node
        [user, *others] = node.users
        if user.target is _MUL and not others:
            scalar, total = user.args[1], user
        two = tuple(_Norm.at(each) for each in norm.x.args) if norm.x.target is _ADD else ()
        if not all(two) or not two:
            return cls(residual, (norm,), None, scalar, total)  # type: ignore[arg-type]
        ordered = sorted(two, key=lambda each: _parts_of(each.x) is None)  # type: ignore[union-attr]
        return cls(residual, tuple(ordered), norm, scalar, total)  # type: ignore[arg-type]

    def replace(self, graph: fx.Graph) -> None:
        uses = [_Use.of(norm) for norm in self._norms()]
        with graph.inserting_after(self.total):
            joined = graph.call_function(torch.ops.dgemma.residual_norm.default, ())
        with graph.inserting_before(joined):
            joined.args = self._arguments(graph, uses)
        with graph.inserting_after(joined):
            results = [graph.call_function(getitem, (joined, i)) for i in range(1 + sum(len(u.results) for u in uses))]
        total, *normed = results
        self.total.replace_all_uses_with(total, delete_user_cb=lambda user: user is not joined)
        for use in uses:
            for old in use.results:
                new = normed.pop(0)
                if use.flat:
                    with graph.inserting_after(new):
                        new = graph.call_function(_FLATTEN, (new, 0, 1))
                old.replace_all_uses_with(new)

    def _norms(self) -> Iterator[_Norm]:
        """Norms of the total or of it flattened."""
        sums = [self.total, *(user for user in self.total.users if user.target is _FLATTEN)]
        for cast in (user for each in sums for user in each.users):
            for user in cast.users if cast.target is _CAST else ():
                if user.target is _NORM:
                    [back] = user.users
                    norm = _Norm.at(back)
                    assert norm is not None, "a norm is cast back"
                    yield norm

    def _arguments(self, graph: fx.Graph, uses: Sequence[_Use]) -> tuple[fx.node.Argument, ...]:
        def weight(norm: _Norm | None) -> fx.Node | None:
            return None if norm is None else _float32(graph, norm.weight)

        branch, *others = self.branches
        beside = others[0] if others else None
        parts = _parts_of(branch.x)
        if parts is None:
            flat = graph.call_function(_FLATTEN, (branch.x, 0, 1))
            parts = graph.call_function(_ATEN.unsqueeze.default, (flat, 1))
        return (
            self.residual, parts, weight(branch), None if beside is None else beside.x, weight(beside),
            weight(self.joint), self.scalar, [_float32(graph, use.weight) for use in uses],
            [use.factor for use in uses], [use.quantized for use in uses], branch.eps,
        )  # fmt: skip


def _float32(graph: fx.Graph, weight: fx.Node) -> fx.Node:
    """A parameter as the kernel reads it; the engine casts it once and for all."""
    return graph.call_function(_CAST, (weight, torch.float32))


def _parts_of(x: fx.Node) -> fx.Node | None:
    """The parts that `x` is the sum of."""
    inner = x.args[0] if x.target is _VIEW_AS else x
    summed = isinstance(inner, fx.Node) and inner.target is sum_of_parts
    return inner.args[0] if summed else None  # type: ignore[union-attr,return-value]


def _uncast(node: object) -> object:
    while isinstance(node, fx.Node) and node.target is _CAST:
        node = node.args[0]
    return node
