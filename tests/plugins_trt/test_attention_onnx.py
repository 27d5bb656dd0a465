"""The ONNX face of canvas attention against its reference, in ONNX Runtime."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from plugins_trt.canvas_attention.onnx import function
from plugins_trt.canvas_attention.reference import canvas_attention
from tests.plugins_trt.attention_rows import CASES, Rows, arguments
from tests.plugins_trt.onnx_session import OperationSession

EPS = torch.finfo(torch.float32).eps
NAMES = (
    "query key value key_pool value_pool page_table page_base start kv_start kv_end".split()  # noqa: SIM905
)


# Six pages of four slots: a canvas at 24 sees them all and needs no mask; each case but the first lacks one thing.
ALL_SEEN = [
    Rows("every slot is seen: the answer without a mask", starts=(24,)),
    Rows("every slot but the first, which is left of the window", starts=(24,), window=24),
    Rows("every slot but the last, which is empty", starts=(23,)),
    Rows("every slot, but not every token of the row", starts=(24,), causal=True),
    Rows("every slot in one row, all but the last in the other", starts=(24, 23)),
    Rows("the slots from the base on, which is where the window starts", starts=(28,), base=4, window=25),
]


@pytest.mark.parametrize("case", [*CASES, *ALL_SEEN], ids=lambda case: case.catches)
def test_attention(case: Rows) -> None:
    inputs = arguments(case)
    session = _session(case, inputs)
    (attended,) = session(*inputs)
    wide = [argument.double() if argument.is_floating_point() else argument for argument in inputs]
    true = canvas_attention(*wide)
    # A score of head_dim terms is off by head_dim * eps * |q| |k|; the shares follow it relatively, and T of them are
    # added with values up to the largest.
    query, keys = inputs[0], torch.cat([inputs[1].flatten(), inputs[3].flatten()])
    score = case.head_dim * query.abs().max() * keys.abs().max()
    values = torch.cat([inputs[2].flatten(), inputs[4].flatten()]).abs().max()
    keys_seen = case.pages * case.page_size + case.tokens
    allowed = EPS * (2 * case.head_dim * score + 2 * keys_seen) * values
    assert (attended.double() - true).abs().max() <= allowed


def test_pages_beyond_the_prefix_do_not_matter() -> None:
    """A page table may name any page behind the prefix, and its slots may hold another request's K/V."""
    case = CASES[0]
    inputs = arguments(case)
    session = _session(case, inputs)
    (before,) = session(*inputs)
    table = inputs[5].clone()
    table[:, 3:] = 7
    (after,) = session(*inputs[:5], table, *inputs[6:])
    assert torch.equal(before, after)


def _session(case: Rows, inputs: list[Tensor]) -> OperationSession:
    joined_pages = [0, -1, case.kv_heads * case.head_dim]
    attributes = {"heads": case.heads, "kv_heads": case.kv_heads, "joined_pages": joined_pages}
    return OperationSession(function(), dict(zip(NAMES, inputs, strict=True)), [(torch.float32, 4)], attributes)
