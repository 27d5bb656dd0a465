"""An encode step that writes each layer's K/V into the pool as soon as they are there.

Returned at the end instead, those of all layers live at once: 0.9 GB of 4096 tokens of the released model, which is
more than everything else that a step needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, fx


@dataclass(frozen=True)
class Target:
    """Where an output goes."""

    pool: Tensor
    """`[pages, page_size, kv_heads, head_dim]`."""
    slots: str
    """Name of an argument, int64 `[length]`: the slot over all pages of each token."""


def write_outputs(step: fx.GraphModule, targets: Sequence[Target]) -> fx.GraphModule:
    """Change a step that returns K/V of one row, each `[1, length, kv_heads, head_dim]`, so that it writes them.

    Args:
        step: changed in place; it takes the targets' slots as arguments beside its own and returns nothing.
        targets: of its outputs, in their order.
    """
    graph, output = step.graph, step.graph.output_node()
    with graph.inserting_before(next(iter(graph.nodes))):
        slots = {name: graph.placeholder(name) for name in dict.fromkeys(target.slots for target in targets)}
    [results] = output.args
    output.args = ((),)
    for index, (result, target) in enumerate(zip(results, targets, strict=True)):  # type: ignore[arg-type]
        step.register_buffer(f"target_{index}", target.pool.flatten(0, 1))
        with graph.inserting_after(result):
            pool = graph.get_attr(f"target_{index}")
        with graph.inserting_after(pool):
            graph.call_function(_write, (pool, slots[target.slots], result))
    graph.lint()
    step.recompile()
    return step


def _write(pool: Tensor, slots: Tensor, rows: Tensor) -> None:
    pool.index_copy_(0, slots, rows[0])
