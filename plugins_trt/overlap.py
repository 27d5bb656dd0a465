"""What a Triton kernel may do while the one before it still runs."""

from __future__ import annotations

import triton
import triton.language as tl

_LINE = tl.constexpr(128)
"""Bytes of a line of the L2 cache."""
_TURN = tl.constexpr(16384)
"""Bytes asked for at a time."""


@triton.jit
def fetch_ahead(start, count):
    """Ask for the `count` bytes from pointer `start` on, in lines of the L2 cache."""
    first = start.to(tl.int64)
    for turn in range(0, count, _TURN):
        fetch_lines(first + tl.minimum(turn + tl.arange(0, _TURN // _LINE) * _LINE, count - 1))


@triton.jit
def fetch_lines(addresses):
    """Ask for the lines of the L2 cache that hold these int64 `addresses`."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [addresses], tl.int32, is_pure=False, pack=1
    )
