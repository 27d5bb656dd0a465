"""The residual stream's joints of a step, found in its graph and replaced by one operation each.

Where a branch ends, its result is normed and added to the residual, and the sum is normed again for every branch that
begins there. `dgemma::residual_norm` does all of that, quantising included, in one kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from operator import getitem

import torch
from torch import fx

from plugins_trt import torch_operations  # noqa: F401 (registers the operations)
from plugins_trt.quantized_linear.reference import quantize_rows
from plugins_trt.residual_norm import MOST_NORMS
from runtime.engines.torch.pieces import sum_of_parts

_ATEN = torch.ops.aten
_NORM, _CAST, _ADD, _MUL = _ATEN.rms_norm.default, _ATEN.to.dtype, _ATEN.add.Tensor, _ATEN.mul.Tensor
_FLATTEN, _VIEW_AS = _ATEN.flatten.using_ints, _ATEN.view_as.default


def join_residuals(graph: fx.Graph) -> None:
    """Replace every joint that has the operation's form, in place; the graph means the same up to rounding.

    Args:
        graph: of a step, its operations taken apart. The operation takes one scalar for all rows, so where a joint's
            depends on the row's kind, the graph must be specialised to one kind before it is run.
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
    def of(cls, norm: _Norm) -> _Use | None:
        """How a norm is used, None where the operation cannot do it."""
        if norm.weight.target is _ATEN.ones.default:
            return cls._scaled(norm)
        user = _only_user(norm.result)
        if user is None or user.target is not quantize_rows:
            return cls(norm, norm.weight, 1.0, (norm.result,))
        parts = {each.args[1]: each for each in user.users if each.target is getitem}
        return cls(norm, norm.weight, 1.0, (parts[0], parts[1])) if len(parts) == len(user.users) == 2 else None

    @classmethod
    def _scaled(cls, norm: _Norm) -> _Use | None:
        """A norm without a weight of its own, and a learned and a constant factor behind it: the router's."""
        learned = _only_user(norm.result)
        constant = None if learned is None else _only_user(learned)
        if learned is None or constant is None or not learned.target is constant.target is _MUL:
            return None
        (_, weight), (_, factor) = learned.args, constant.args
        fits = isinstance(weight, fx.Node) and isinstance(factor, float)
        return cls(norm, weight, factor, (constant,)) if fits else None  # type: ignore[arg-type]


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
    uses: tuple[_Use, ...]

    @classmethod
    def at(cls, node: fx.Node) -> _Joint | None:
        """The joint that a sum is, None where it is none that the operation can do."""
        residual, added = node.args if node.target is _ADD else (None, None)
        norm = _Norm.at(added)
        if norm is None or not isinstance(residual, fx.Node) or _Norm.at(residual) is not None:
            return None
        branches, joint = cls._branches(norm)
        scalar, total = cls._scalar(node)
        norms = list(_norms_of(total))
        uses = [_Use.of(each) for each in norms]
        found = {each.eps for each in (norm, *branches, *norms)}
        if len(found) > 1 or len(uses) > MOST_NORMS or not all(uses):
            return None
        return cls(residual, branches, joint, scalar, total, tuple(uses))  # type: ignore[arg-type]

    @staticmethod
    def _branches(norm: _Norm) -> tuple[tuple[_Norm, ...], _Norm | None]:
        """The branch that is added, or the two whose sum is normed and then added, and that norm."""
        two = [_Norm.at(each) for each in norm.x.args] if norm.x.target is _ADD else []
        both = [each for each in two if each is not None]
        if len(both) != 2:
            return (norm,), None
        return tuple(sorted(both, key=lambda each: _parts_of(each.x) is None)), norm

    @staticmethod
    def _scalar(node: fx.Node) -> tuple[fx.Node | None, fx.Node]:
        """What a sum is multiplied with, one number for each row of the call, and the product; else the sum."""
        user = _only_user(node)
        if user is None or user.target is not _MUL or user.args[0] is not node:
            return None, node
        scalar = user.args[1]
        # One of two numbers, by the row's kind; a step for one kind of row has one of them.
        chosen = isinstance(scalar, fx.Node) and scalar.target is _ATEN.where.self
        return (scalar, user) if chosen else (None, node)  # type: ignore[return-value]

    def replace(self, graph: fx.Graph) -> None:
        """Put the operation behind the total, and its results in the place of the total and of the norms."""
        with graph.inserting_after(self.total):
            joined = graph.call_function(torch.ops.dgemma.residual_norm.default, ())
        with graph.inserting_before(joined):
            joined.args = self._arguments(graph)
        olds = [old for use in self.uses for old in use.results]
        with graph.inserting_after(joined):
            total, *news = (graph.call_function(getitem, (joined, index)) for index in range(1 + len(olds)))
        self.total.replace_all_uses_with(total)
        flat = [use.flat for use in self.uses for _ in use.results]
        for old, new, flatten in zip(olds, news, flat, strict=True):
            with graph.inserting_after(new):
                old.replace_all_uses_with(graph.call_function(_FLATTEN, (new, 0, 1)) if flatten else new)

    def _arguments(self, graph: fx.Graph) -> tuple[fx.node.Argument, ...]:
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
            weight(self.joint), self.scalar, [_float32(graph, use.weight) for use in self.uses],
            [use.factor for use in self.uses], [use.quantized for use in self.uses], branch.eps,
        )  # fmt: skip


def _norms_of(total: fx.Node) -> Iterator[_Norm]:
    """Norms of a total or of it flattened that are cast back to its dtype."""
    sums = [total, *(user for user in total.users if user.target is _FLATTEN)]
    for user in (user for each in sums for cast in each.users if cast.target is _CAST for user in cast.users):
        norm = _Norm.at(_only_user(user)) if user.target is _NORM else None
        if norm is not None:
            yield norm


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


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
