"""Weights asked for while the GPU computes something else, so that the L2 cache has them when they are multiplied."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LINE = tl.constexpr(128)
"""Bytes of a line of the L2 cache."""
_BLOCK = 2048
"""Lines that one block of threads asks for."""


def prefetch(weights: Tensor, most: int) -> None:
    """Ask for the first `most` bytes of `weights`; returns nothing, changes nothing and waits for nothing.

    Args:
        weights: contiguous, on a GPU.
        most: bytes.
    """
    lines = min(weights.nbytes, most) // LINE.value
    if lines:
        ask[(triton.cdiv(lines, _BLOCK),)](weights.view(torch.uint8), lines, _BLOCK, num_warps=4)


@triton.jit
def ask(WEIGHTS, lines, BLOCK: tl.constexpr):
    """One prefetch a line; those past the end repeat the last one."""
    line = tl.minimum(tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), lines - 1)
    address = WEIGHTS.to(tl.int64) + line.to(tl.int64) * LINE
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [address], tl.int32, is_pure=False, pack=1
    )
