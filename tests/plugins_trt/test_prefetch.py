"""The prefetch of weights: what it asks for, and its compilation."""

from __future__ import annotations

import pytest
import torch

from tests.plugins_trt.triton_support import SHARED_MEMORY, compile_launch, launches_of

prefetch = pytest.importorskip("plugins_trt.prefetch", reason="Triton is not installed")


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_compiles(capability: int) -> None:
    """Catches what a target does not know, and prefetches that the compiler drops because nothing reads them."""
    weights = torch.empty(2816, 4096, dtype=torch.bfloat16, device="meta")
    (launch,) = launches_of(prefetch.prefetch, weights, 1 << 30)
    assert "prefetch.global.L2" in compile_launch(launch, capability).asm["ptx"]


def test_asks_for_no_more_than_there_is_and_is_allowed() -> None:
    """Catches lines past the weights' end, elements taken for bytes, and a launch for nothing."""
    weights = torch.empty(100, 128, dtype=torch.bfloat16, device="meta")
    for most, lines in ((1 << 30, 200), (1000, 7)):
        (launch,) = launches_of(prefetch.prefetch, weights, most)
        assert launch.arguments["lines"] == lines
    with pytest.raises(AssertionError, match="launched nothing"):
        launches_of(prefetch.prefetch, weights, 0)
