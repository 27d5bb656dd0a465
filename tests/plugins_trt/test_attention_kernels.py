"""Canvas attention in Triton: against its reference in the interpreter, and compiled for GPUs that are not here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import log, prod
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from plugins_trt.canvas_attention import kernel
from plugins_trt.canvas_attention.reference import canvas_attention
from plugins_trt.gpu import Gpu
from tests.plugins_trt.attention_rows import CASES, Rows, arguments
from tests.plugins_trt.triton_support import SHARED_MEMORY, Interpreter, Launch, compile_launch, launches_of

WIDE = {"heads": 8, "kv_heads": 1, "head_dim": 272}
"""Heads that do not fit the fused kernel, and are no power of two."""

LONG = {"heads": 8, "kv_heads": 2, "head_dim": 384, "page_size": 128, "pages": 5}
"""Pages that hold a tile of keys, and heads that tiles of columns divide."""

LARGER = [
    Rows("more rows than a tile, ending inside one, and several splits of the keys", starts=(150,), tokens=70,
         page_size=64, pages=3),
    Rows("pages larger than a tile of keys, windows that begin in each of them", starts=(200, 70), tokens=40,
         page_size=64, pages=4, window=50, causal=True),
    Rows("pages that no tile of keys divides", starts=(90,), tokens=9, page_size=24, pages=5, window=70),
    Rows("three query heads a K/V head: a tile ends inside a token's", tokens=50, heads=6, causal=True),
    Rows("wide heads: a canvas behind prefixes of different lengths", starts=(9, 70), page_size=32, pages=3, **WIDE),
    Rows("wide heads: causal rows, many tiles of which are not seen", tokens=20, causal=True, window=3, **WIDE),
    Rows("wide heads: no prefix and no pages", starts=(0,), pages=0, **WIDE),
]  # fmt: skip


def bound(case: Rows, inputs: list[Tensor]) -> float:
    """What roundings explain.

    A score of `D` terms is off by `D * 2^-24` times the terms' magnitudes, a share by twice that, by its exponent's
    distance from the scale (48 beside the scores) and by the additions of `T` of them; shares, the splits' results and
    the result are rounded to the inputs' dtype.
    """
    wide = torch.finfo(torch.float32).eps
    score = (inputs[0].float().norm(dim=-1).max() * max(inputs[1].float().norm(dim=-1).max(), _norm(inputs[3]))).item()
    values = max(float(inputs[2].abs().max()), float(inputs[4].nan_to_num().abs().max()))
    terms = 2 * case.head_dim * score + 48 + case.pages * case.page_size + case.tokens
    return (wide * terms + 3 * torch.finfo(inputs[0].dtype).eps / 2) * values


def _norm(keys: Tensor) -> float:
    return float(keys.float().nan_to_num().norm(dim=-1).max())


def error(case: Rows, inputs: list[Tensor], got: Tensor) -> float:
    wide = [x.nan_to_num().double() if x.is_floating_point() else x for x in inputs]
    assert got.dtype == inputs[0].dtype
    assert got.shape == inputs[0].shape
    return float((got.double() - canvas_attention(*wide)).abs().max())


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *(pytest.param(case, torch.float32, id=case.catches) for case in CASES),
        *(
            pytest.param(case, dtype, id=f"{case.catches}, {dtype}")
            for case in LARGER
            for dtype in (torch.float32, torch.float16)
        ),
    ],
)
def test_attention(case: Rows, dtype: torch.dtype, interpreter: Interpreter) -> None:
    inputs = [x.to(dtype) if x.is_floating_point() else x for x in arguments(case)]
    got = interpreter(kernel.canvas_attention, *inputs)
    assert error(case, inputs, got) <= bound(case, inputs)


DESCRIBED = [
    Rows("whole tiles, one that ends inside a page, and the row's own: keys of another tile", starts=(470,), tokens=9,
         **LONG),
    Rows("prefixes of other lengths: whole tiles of one row counted for all", starts=(130, 520), tokens=3, **LONG),
    Rows("a window that begins inside a tile: keys that not all rows see", starts=(500,), tokens=6, window=200, **LONG),
    Rows("a prefix that ends at a page's border", starts=(512,), tokens=20, causal=True, **LONG),
    Rows("a prefix shorter than a tile", starts=(100,), tokens=4, **LONG),
]  # fmt: skip


def by_descriptor(*inputs: Tensor, scratch_bytes: int) -> Tensor:
    """Runs where the interpreter is, on a GPU with a copy engine; the second product takes the smaller steps."""
    tiles, _ = kernel.wide_tiles(Gpu(80, 108), inputs[0], described=True)
    pair = tiles, replace(tiles, step=tiles.step // 2)
    with (
        patch.object(Gpu, "copies_by_descriptor", True),
        patch.object(kernel, "_MANY_TILES", 2),
        patch.object(kernel, "wide_tiles", lambda *_, **__: pair),
    ):
        return kernel.canvas_attention(*inputs, scratch_bytes=scratch_bytes)


@pytest.mark.parametrize("scratch_bytes", [1 << 30, 1], ids=["at once", "in chunks"])
@pytest.mark.parametrize("case", DESCRIBED, ids=lambda case: case.catches)
def test_long_prefixes_are_read_by_descriptor(case: Rows, scratch_bytes: int, interpreter: Interpreter) -> None:
    inputs = [x.to(torch.float16) if x.is_floating_point() else x for x in arguments(case)]
    # Scores of a few units, so that many keys have a share.
    inputs[0] *= case.head_dim**-0.5
    got = interpreter(by_descriptor, *inputs, scratch_bytes=scratch_bytes)
    assert error(case, inputs, got) <= bound(case, inputs)


CODED = [
    Rows("four heads, a prefix that ends inside a page"),
    Rows("several splits of the keys", starts=(150,), tokens=70, page_size=64, pages=3),
    Rows(
        "six heads, in a block for eight, and several splits", starts=(150,), tokens=3, heads=6, page_size=64, pages=3
    ),
    Rows("wide heads: rows of different lengths", starts=(9, 70), page_size=32, pages=3, **WIDE),
]


def test_no_token_has_no_codes() -> None:
    """Catches an empty grid."""
    codes, scale = kernel.canvas_attention_codes(*arguments(Rows("", tokens=0)))
    assert (tuple(codes.shape), tuple(scale.shape)) == ((1, 0, 24), (1, 0))


@pytest.mark.parametrize("case", CODED, ids=lambda case: case.catches)
def test_attention_in_codes(case: Rows, interpreter: Interpreter) -> None:
    """Catches a scale of other heads than the token's, codes of heads in another order, and splits not merged."""
    inputs = [x.to(torch.float16) if x.is_floating_point() else x for x in arguments(case)]
    codes, scale = interpreter(kernel.canvas_attention_codes, *inputs)
    wide = [x.nan_to_num().double() if x.is_floating_point() else x for x in inputs]
    exact, slack = canvas_attention(*wide).flatten(2), bound(case, inputs)
    assert codes.shape == exact.shape
    largest = exact.abs().amax(-1)
    assert float((scale.double() * 448 - largest).abs().max()) <= slack + 2.0**-24 * float(largest.max())
    # Half of a code's last place: of four bits, or of the subnormals' steps of 2^-9.
    rounding = torch.maximum(exact.abs() / 16, scale.double().unsqueeze(-1) * 2.0**-10)
    excess = (codes.double() * scale.double().unsqueeze(-1) - exact).abs() - rounding
    assert float(excess.max()) <= (1 + 1 / 16) * slack


@pytest.mark.parametrize("causal", [False, True], ids=["canvas", "causal"])
def test_weights_of_wide_heads_are_stored_in_chunks(causal: bool, interpreter: Interpreter) -> None:
    """Catches a chunk that forgets what those before it left, and rows that see nothing in some chunks."""
    case = Rows("", starts=(150,), tokens=10, page_size=64, pages=3, causal=causal, window=120, **WIDE)
    inputs = arguments(case)
    got = interpreter(kernel.canvas_attention, *inputs, scratch_bytes=1)
    assert error(case, inputs, got) <= bound(case, inputs)
    assert len(launches_of(kernel.canvas_attention, *inputs, scratch_bytes=1)) > len(
        launches_of(kernel.canvas_attention, *inputs)
    )


@pytest.mark.parametrize("head_dim", [32, 272], ids=["fused", "wide"])
def test_slots_that_no_token_sees_may_hold_anything(head_dim: int, interpreter: Interpreter) -> None:
    """Catches NaN of an unwritten slot that comes through a weight of 0, and a read past the prefix."""
    case = replace(CASES[0], head_dim=head_dim, window=5)
    inputs = arguments(case)
    seen = inputs[5][0, :3]
    keep = torch.zeros(8, case.page_size, dtype=torch.bool)
    keep[seen] = True
    keep[seen[-1], 1:] = False
    for pool in inputs[3:5]:
        pool[~keep] = torch.nan
    got = interpreter(kernel.canvas_attention, *inputs)
    assert error(case, inputs, got) <= bound(case, inputs)


@pytest.mark.parametrize("head_dim", [32, 272], ids=["fused", "wide"])
def test_scores_far_apart(head_dim: int, interpreter: Interpreter) -> None:
    """Catches sums that overflow, or lose the large weights, where the scores of tiles lie hundreds apart."""
    case = Rows("", starts=(120,), tokens=3, head_dim=head_dim, page_size=32, pages=4)
    inputs = arguments(case)
    for pool, factor in ((inputs[3], 60.0), (inputs[1], 0.1)):
        pool *= factor / head_dim**0.5
    # Shares are 0 or 1 but for a few: the bound of scores grows with them.
    got = interpreter(kernel.canvas_attention, *inputs)
    assert error(case, inputs, got) <= bound(case, inputs)


def on_multiprocessors(*inputs: Tensor, count: int) -> Tensor:
    """Runs where the interpreter is; on one, one block of rows works through all of its keys."""
    with patch.object(kernel, "gpu_of", lambda _: Gpu(80, count)):
        return kernel.canvas_attention(*inputs)


@pytest.mark.parametrize("head_dim", [32, 272], ids=["fused", "wide"])
def test_scores_that_rise_and_fall_from_tile_to_tile(head_dim: int, interpreter: Interpreter) -> None:
    """Catches sums that stay at a scale which a later tile has outgrown, and a scale taken from another tile."""
    case = Rows("", starts=(250,), tokens=3, head_dim=head_dim, page_size=64, pages=4, heads=2, kv_heads=1)
    inputs = arguments(case)
    for page, factor in zip(inputs[5][0], (0.1, 10.0, 8.0, 0.1), strict=True):
        inputs[3][page] *= factor / head_dim**0.5 * 4
    got = interpreter(on_multiprocessors, *inputs, count=1)
    assert error(case, inputs, got) <= bound(case, inputs)


SHARED = [
    pytest.param(4, (0, 0, -74, -43, 0, 0, 0, 0), 1, id="a share that ends 88 binary orders below, rising by 44"),
    pytest.param(4, (0, 0, -28, -24, 0, 0, 0, 0), 1, id="a share that ends 35 binary orders below, rising by 5"),
    pytest.param(4, (0, 31, -300, -300, 0, 0, -300, -300), 1000, id="large sums brought down and up again"),
    *(
        pytest.param(
            7, tuple(150 * (page == large) for page in range(8)), 1, id=f"more shares than splits, page {large}"
        )
        for large in (2, 3, 4)
    ),
]
"""Multiprocessors, scores of each page's keys, and a factor of the values."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("multiprocessors", "scores", "factor"), SHARED)
def test_shares_of_scores_far_apart(
    multiprocessors: int, scores: tuple[int, ...], factor: int, dtype: torch.dtype, interpreter: Interpreter
) -> None:
    """Catches tiles that count beside far larger ones, sums that overflow, and totals of nothing that count as one."""
    case = Rows("", starts=(1024,), tokens=3, head_dim=272, page_size=128, pages=8, heads=2, kv_heads=1)
    inputs = [x.to(dtype) if x.is_floating_point() else x for x in arguments(case)]
    # Scores that every format holds exactly.
    inputs[0][...], inputs[0][..., 0], inputs[1][..., 0] = 0, 1, min(scores)
    for page, score in zip(inputs[5][0], scores, strict=True):
        inputs[3][page, ..., 0] = score
        if score < max(scores):
            # Far from the mean of the others, so that it shows where one of them counts too much.
            inputs[4][page] = 4
    for values in (inputs[2], inputs[4]):
        values *= factor
    got = interpreter(on_multiprocessors, *inputs, count=multiprocessors)
    # An exponent is rounded at its distance from the scale, a total at each of its terms; shares, the splits' results
    # and the result are rounded to the inputs' dtype.
    exponents = 2 * (max(map(abs, scores)) / log(2) + 48) * log(2)
    roundings = 2.0**-23 * (exponents + 1024) + 3 * torch.finfo(dtype).eps / 2
    assert error(case, inputs, got) <= roundings * float(max(inputs[2].abs().max(), inputs[4].abs().max()))


def released(layer: str, batch: int, tokens: int, pages: int, page_size: int = 256) -> list[Tensor]:
    """Arguments of the released shape, without memory."""
    dtype = torch.bfloat16
    kv_heads, head_dim = {"sliding": (8, 256), "full": (2, 512)}[layer]

    def integers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int64, device="meta")

    query = torch.empty(batch, tokens, 16, head_dim, dtype=dtype, device="meta")
    own = torch.empty(batch, tokens, kv_heads, head_dim, dtype=dtype, device="meta")
    pool = torch.empty(4096, page_size, kv_heads, head_dim, dtype=dtype, device="meta")
    numbers = [
        integers(batch, pages),
        integers(batch),
        integers(batch),
        integers(batch, tokens),
        integers(batch, tokens),
    ]
    return [query, own, own, pool, pool, *numbers]


@pytest.fixture(params=sorted(SHARED_MEMORY), ids=lambda capability: f"sm_{capability}")
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Launches are made for this GPU."""
    monkeypatch.setattr(kernel, "gpu_of", lambda _: Gpu(request.param, 132))
    return request.param


def distinct(launches: list[Launch]) -> list[Launch]:
    """One launch of each specialisation."""
    kinds = ("FIRST", "STEP")

    def kind(launch: Launch) -> tuple[str, ...]:
        given = (launch.arguments.get(name) for name in kinds)
        return launch.kernel.__name__, *(str(each) if isinstance(each, bool) else str(each is None) for each in given)

    return list({kind(launch): launch for launch in launches}.values())


@pytest.mark.parametrize("layer", ["sliding", "full"])
@pytest.mark.parametrize("page_size", [64, 256])
def test_compiles(layer: str, page_size: int, capability: int) -> None:
    """Catches tiles that do not fit a target's shared memory, and (Hopper) products that miss the matrix units."""
    inputs = released(layer, 1, 256, 5, page_size)
    launches = distinct(launches_of(kernel.canvas_attention, *inputs))
    if capability >= 89:  # GPUs that multiply what is quantised here
        launches = distinct([*launches, *launches_of(kernel.canvas_attention_codes, *inputs)])
    kernels = [(launch.kernel.__name__, compile_launch(launch, capability)) for launch in launches]
    assert {name for name, _ in kernels} - {"merge"} == ({"attend"} if layer == "sliding" else {"weigh", "gather"})
    products = [compiled.asm["ptx"] for name, compiled in kernels if name != "merge"]
    for ptx in products:
        assert ("wgmma.mma_async" in ptx) == (capability == 90)
        assert "cp.async.cg.shared.global" in ptx, "K and V are not fetched 16 bytes at a time"


def test_descriptors_compile(capability: int) -> None:
    """Catches a GPU that is handed descriptors without a copy engine, and one with it that is not."""
    launches = launches_of(kernel.canvas_attention, *released("full", 1, 256, pages=64))
    for launch in distinct([launch for launch in launches if launch.kernel.__name__ != "merge"]):
        ptx = compile_launch(launch, capability).asm["ptx"]
        assert ("cp.async.bulk.tensor" in ptx) == (capability >= 90)
        assert ("wgmma.mma_async" in ptx) == (capability == 90)


def test_one_head_of_one_token_compiles(capability: int) -> None:
    """Catches sizes of one, which Triton makes constants."""
    query, key, value, key_pool, value_pool, *others = released("sliding", 1, 1, 5)
    one = [x[..., :1, :] for x in (query, key, value, key_pool, value_pool)]
    # GPUs below sm_89 multiply no codes.
    function = kernel.canvas_attention_codes if capability >= 89 else kernel.canvas_attention
    for launch in launches_of(function, *one, *others):
        assert compile_launch(launch, capability).asm["cubin"]


@pytest.mark.parametrize(("layer", "batch"), [("sliding", 1), ("full", 1), ("sliding", 8), ("full", 8)])
def test_a_call_fills_the_gpu(layer: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches too few splits of one canvas' keys, and splits that only cost where rows fill the GPU."""
    monkeypatch.setattr(kernel, "gpu_of", lambda _: Gpu(90, 132))
    launches = launches_of(kernel.canvas_attention, *released(layer, batch, 256, 17))
    programs = {launch.kernel.__name__: prod(launch.grid) for launch in launches}
    assert programs.get("attend", programs.get("gather", 0)) >= 128
    assert ("merge" in programs) == (batch == 1)


def test_scratch_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches weights stored for a whole prompt or context at once, which would be 2 GB and more."""
    monkeypatch.setattr(kernel, "gpu_of", lambda _: Gpu(90, 132))
    for batch, tokens, pages in ((1, 256, 4096), (16, 256, 1024), (1, 8192, 0)):
        for launch in launches_of(kernel.canvas_attention, *released("full", batch, tokens, pages)):
            assert launch.arguments.get("WEIGHTS", torch.empty(0)).nbytes <= kernel.SCRATCH_BYTES
