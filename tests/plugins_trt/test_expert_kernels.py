"""The expert feed-forward's kernels in Triton's interpreter against float64, and their compilation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from plugins_trt.expert_ffn import reference
from plugins_trt.gpu import Gpu
from tests.plugins_trt.triton_support import SHARED_MEMORY, Interpreter, compile_launch, launches_of

kernel = pytest.importorskip("plugins_trt.expert_ffn.kernel", reason="Triton is not installed")
dispatch = pytest.importorskip("plugins_trt.expert_ffn.dispatch", reason="Triton is not installed")
tiles = pytest.importorskip("plugins_trt.expert_ffn.tiles", reason="Triton is not installed")

U32 = 2.0**-24
"""Half a unit in the last place of float32, relative."""


@dataclass(frozen=True)
class Experts:
    """One layer of experts and a choice of them."""

    catches: str
    tokens: int = 7
    hidden: int = 64
    intermediate: int = 32
    experts: int = 5
    top_k: int = 2
    chosen: tuple[int, ...] | None = None
    """Experts to choose from; all where None."""


ORDINARY = Experts("an ordinary mixture: pairs that go to a wrong place")
CASES = [
    ORDINARY,
    Experts("odd sizes, prime where possible: tiles that reach past a row or a matrix", 11, 37, 23, 3),
    Experts("experts without any token, the first and the last among them", experts=6, chosen=(1, 3)),
    Experts("one expert that takes all tokens, over several blocks", tokens=70, top_k=1, chosen=(2,)),
    Experts("every expert takes every token: a sum that forgets one", top_k=5),
    Experts("sizes of one, which Triton makes constants", 1, 32, 32, 1, 1),
    Experts("no token: an empty grid", tokens=0),
    Experts("more blocks than evenly spread tokens need: a program that stops at its first one", 96, 32, 32, 3, 1),
    Experts("one column, so that little rounding hides a gelu of another kind", 9, 1, 8),
    Experts("several turns of the loop and several tiles", 5, 160, 96, 3),
    Experts("even sizes, which two codes in a word need, that fill no tile", 11, 38, 22, 3),
]
EVEN = CASES[-1]
GROUPS = Experts("several groups of hidden channels, the last one not full", 9, 64, 288, 3)
WIDE = Experts("blocks of a power of two and a tail, full and not, one of them with an empty tail", 57, 64, 160, 3, 2)
GROUPED = [case for case in CASES if case.hidden % 32 == case.intermediate % 32 == 0]
"""Those whose sizes the 4-bit encoding can hold."""


@dataclass(frozen=True)
class Mixture:
    """Arguments of the operation, and the weights that they stand for."""

    x: Tensor
    ids: Tensor
    weights: Tensor
    gate_up: Tensor
    down: Tensor

    @property
    def tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.x, self.ids, self.weights


def test_uneven_tokens_need_more_blocks_than_are_launched() -> None:
    """Catches a case above that never makes a program go on."""
    (case,) = (case for case in CASES if "evenly" in case.catches)
    counts = torch.bincount(mixture(case, torch.float32).ids.flatten())
    assert int(((counts + 31) // 32).sum()) > case.experts


def mixture(case: Experts, dtype: torch.dtype) -> Mixture:
    random = torch.Generator().manual_seed(case.tokens)
    scores = torch.rand(case.tokens, case.experts, generator=random)
    if case.chosen is not None:
        scores[:, [e for e in range(case.experts) if e not in case.chosen]] = -1
    return Mixture(
        torch.randn(case.tokens, case.hidden, generator=random).to(dtype),
        scores.topk(case.top_k).indices,
        torch.rand(case.tokens, case.top_k, generator=random).to(dtype),
        (torch.randn(case.experts, 2 * case.intermediate, case.hidden, generator=random) * case.hidden**-0.5).to(dtype),
        (torch.randn(case.experts, case.hidden, case.intermediate, generator=random)).to(dtype),
    )


@dataclass(frozen=True)
class Oracle:
    """The mixture in float64, token by token, and how far a right computation may be off."""

    value: Tensor
    slack: Tensor


def oracle(case: Mixture, rounded: bool = False) -> Oracle:
    """Sums in float32 of K terms are off by at most `K u sum|terms|` (Higham 2002, section 4.2); hidden states, parts
    and results are rounded to the dtype of `x`, each by at most half a unit in its last place.

    Args:
        case: what to compute.
        rounded: both products' rows are rounded to float8, those of the first one by `reference`, those of the second
            in groups of 128 channels. A hidden state within its error of the border between two codes may fall to
            either.
    """
    unit = torch.finfo(case.x.dtype).eps / 2
    least = torch.finfo(case.x.dtype).smallest_normal * unit
    value, slack = torch.zeros(2, *case.x.shape, dtype=torch.float64)
    states = reference._round_to_fp8(case.x.float()) if rounded else case.x
    for t, (x, ids, weights) in enumerate(zip(states.double(), case.ids, case.weights.double(), strict=True)):
        for expert, weight in zip(ids, weights, strict=True):
            gate_up, down = case.gate_up[expert].double(), case.down[expert].double()
            gate, up = (gate_up @ x).chunk(2)
            gate_sum, up_sum = (gate_up.abs() @ x.abs()).chunk(2)
            hidden = F.gelu(gate, approximate="tanh") * up
            # |gelu(a)| <= |a| and |gelu'(a)| <= 1.13; 16 roundings in all of scales, gelu and products.
            off = (2 * len(x) + 16) * U32 * 1.13 * gate_sum * up_sum + unit * hidden.abs() + least
            if rounded:
                groups = zip(hidden.split(128), off.split(128), strict=True)
                hidden, off = map(torch.cat, zip(*(_between_codes(*group) for group in groups), strict=True))
            value[t] += weight * (down @ hidden)
            products = down.abs() @ hidden.abs()
            slack[t] += weight * (down.abs() @ off + ((len(hidden) + 16) * U32 + unit) * products) + least
    return Oracle(value, slack * 1.01 + case.ids.shape[1] * U32 * slack + unit * value.abs() + least)


def _between_codes(hidden: Tensor, off: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states as float8 holds them, and how far they move within `off` of where they are."""
    scale = hidden.abs().max() / 448
    # The scale is off too, by as much as the largest state is.
    off = off + hidden.abs() * off.max() / hidden.abs().max()
    low, high, middle = (_codes(states / scale) * scale for states in (hidden - off, hidden + off, hidden))
    return middle, torch.maximum(high - middle, middle - low) + off


def _codes(states: Tensor) -> Tensor:
    return states.clamp(-448, 448).to(torch.float8_e4m3fn).double()


def assert_close(actual: Tensor, expected: Oracle) -> None:
    assert actual.shape == expected.value.shape
    excess = ((actual.double() - expected.value).abs() - expected.slack).flatten()
    assert bool((excess <= 0).all()), f"off by {excess.max():.2e} more than roundings explain"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.catches)
def test_feed_forward(interpreter: Interpreter, case: Experts, dtype: torch.dtype) -> None:
    layer = mixture(case, dtype)
    assert_close(interpreter(kernel.expert_ffn, *layer.tokens, layer.gate_up, layer.down), oracle(layer))


BLOCK_48 = tiles.Tiles(48, tiles.Product(32, 32, 4, 2), tiles.Product(64, 32, 4, 2))
BLOCK_48_E4M3 = tiles.Tiles(48, tiles.Product(128, 64, 4, 2), tiles.Product(64, 64, 4, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_of_two_powers_of_two(interpreter: Interpreter, dtype: torch.dtype) -> None:
    """Catches a tail that takes its block's first rows, or that is stored where they are."""
    layer = mixture(WIDE, dtype)
    counts = torch.bincount(layer.ids.flatten())
    assert any(count % 48 > 32 for count in counts)
    assert any(0 < count % 48 <= 32 for count in counts)
    output = interpreter(kernel.expert_ffn, *layer.tokens, layer.gate_up, layer.down, tiles=BLOCK_48)
    assert_close(output, oracle(layer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_parts(interpreter: Interpreter, dtype: torch.dtype) -> None:
    """Catches a part in another's place: their sum would be right all the same."""
    layer = mixture(ORDINARY, dtype)
    actual = interpreter(kernel.expert_parts, *layer.tokens, layer.gate_up, layer.down)
    named = reference.expert_parts(*layer.tokens, layer.gate_up, layer.down)
    for choice in range(ORDINARY.top_k):
        one = slice(choice, choice + 1)
        single = Mixture(layer.x, layer.ids[:, one], layer.weights[:, one], layer.gate_up, layer.down)
        assert_close(actual[:, choice], oracle(single))
        if dtype == torch.float32:
            assert_close(named[:, choice], oracle(single))


def to_fp8(weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and the weights that they stand for."""
    scale = weights.abs().amax(-1).float() / 448
    codes = (weights / scale.unsqueeze(-1)).to(torch.float8_e4m3fn)
    return codes, scale, codes.double() * scale.double().unsqueeze(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", [ORDINARY, EVEN], ids=lambda case: case.catches)
def test_fp8_weights(interpreter: Interpreter, case: Experts, dtype: torch.dtype) -> None:
    """Catches a code that is decoded wrongly, and a scale of the wrong row."""
    layer = mixture(case, dtype)
    *gate_up, true_gate_up = to_fp8(layer.gate_up)
    *down, true_down = to_fp8(layer.down)
    true = Mixture(*layer.tokens, true_gate_up, true_down)
    output = interpreter(kernel.expert_ffn_fp8, *layer.tokens, *gate_up, *down, dynamic_activations=False)
    assert_close(output, oracle(true))


@pytest.mark.parametrize(
    ("case", "size"),
    [*((case, None) for case in (ORDINARY, EVEN, CASES[3], GROUPS)), (WIDE, BLOCK_48_E4M3)],
    ids=lambda value: getattr(value, "catches", None),
)
def test_fp8_weights_and_activations(interpreter: Interpreter, case: Experts, size: tiles.Tiles | None) -> None:
    """Catches a scale of the wrong token or group, rows that truncate, and padding rows that spoil their block."""
    layer = mixture(case, torch.float32)
    *gate_up, true_gate_up = to_fp8(layer.gate_up)
    *down, true_down = to_fp8(layer.down)
    true = Mixture(*layer.tokens, true_gate_up, true_down)
    output = interpreter(kernel.expert_ffn_fp8, *layer.tokens, *gate_up, *down, dynamic_activations=True, tiles=size)
    assert_close(output, oracle(true, rounded=True))


def test_fp8_parts(interpreter: Interpreter) -> None:
    """Catches codes that are rounded a second time, a scale of the wrong token, and a part in another's place."""
    layer = mixture(GROUPS, torch.float32)
    codes, scale, _ = to_fp8(layer.x)
    *gate_up, true_gate_up = to_fp8(layer.gate_up)
    *down, true_down = to_fp8(layer.down)
    for function in (partial(interpreter, kernel.expert_parts_fp8), reference.expert_parts_fp8):
        parts = function(codes, scale, *layer.tokens[1:], *gate_up, *down, torch.float32)
        for choice in range(GROUPS.top_k):
            ids, weights = layer.ids[:, choice, None], layer.weights[:, choice, None]
            assert_close(
                parts[:, choice], oracle(Mixture(layer.x, ids, weights, true_gate_up, true_down), rounded=True)
            )


def test_every_fp8_code(interpreter: Interpreter) -> None:
    """Catches a subnormal number, a sign or a border of the format that the decoding gets wrong."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    codes[[0x7F, 0xFF]] = 0.0  # the two that are no numbers
    # One expert of two channels, whose up rows hold every code; each token picks one of them, its gates are 1 and 0.
    one, zero = torch.ones(256).to(codes.dtype), torch.zeros(256).to(codes.dtype)
    gate_up = torch.stack([one, zero, codes, codes])[None]
    down = torch.ones(1, 256, 2).to(codes.dtype)
    token = torch.eye(256), torch.zeros(256, 1, dtype=torch.int64), torch.ones(256, 1)
    arguments = *token, gate_up, torch.ones(1, 4), down, torch.ones(1, 256)
    output = interpreter(kernel.expert_ffn_fp8, *arguments, dynamic_activations=False)
    expected = F.gelu(torch.ones(1, dtype=torch.float64), approximate="tanh") * codes.double()[:, None]
    torch.testing.assert_close(output.double(), expected.expand(256, 256), rtol=8 * U32, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", [GROUPED[0], GROUPED[-1]], ids=lambda case: case.catches)
def test_int4_weights(interpreter: Interpreter, case: Experts, dtype: torch.dtype) -> None:
    """Catches halves of bytes, groups or scales that are swapped."""
    layer = mixture(case, dtype)
    random = torch.Generator().manual_seed(1)
    encoded, true = [], []
    for weights in (layer.gate_up, layer.down):
        *shape, size = weights.shape
        codes = torch.randint(-8, 8, (*shape, size // 32, 32), generator=random)
        scale = (torch.rand(*shape, size // 32, generator=random) / 8).to(dtype)
        low, high = (codes + 8).to(torch.uint8).chunk(2, dim=-1)
        order = [8 * h + 2 * t + j for t in range(4) for j in range(2) for h in range(2)]
        encoded += [(low + 16 * high)[..., order].flatten(-2), scale]
        # Weights are rounded to the dtype of the activations.
        true.append((codes * scale.unsqueeze(-1)).flatten(-2))
    output = interpreter(kernel.expert_ffn_int4, *layer.tokens, *encoded)
    assert_close(output, oracle(Mixture(*layer.tokens, *true)))
    assert_close(reference.expert_ffn_int4(*layer.tokens, *encoded), oracle(Mixture(*layer.tokens, *true)))


@pytest.mark.parametrize("case", [ORDINARY, GROUPS], ids=lambda case: case.catches)
@pytest.mark.parametrize("rounded", [False, True])
def test_fp8_reference(rounded: bool, case: Experts) -> None:
    """Catches an oracle of the GPU's checks that means something else than the kernels' oracle here."""
    layer = mixture(case, torch.float32)
    *gate_up, true_gate_up = to_fp8(layer.gate_up)
    *down, true_down = to_fp8(layer.down)
    output = reference.expert_ffn_fp8(*layer.tokens, *gate_up, *down, dynamic_activations=rounded)
    assert_close(output, oracle(Mixture(*layer.tokens, true_gate_up, true_down), rounded=rounded))


def test_tokens_do_not_depend_on_each_other(interpreter: Interpreter) -> None:
    """Catches a block whose rows mix: the same tokens among others give the same bits."""
    layer = mixture(Experts("", tokens=40, experts=3), torch.float32)
    size = tiles.choose_tiles(1, 0, 4, Gpu(80, 108))
    matrices = (layer.gate_up, layer.down)
    among, alone = (
        interpreter(kernel.expert_ffn, *(tensor[:tokens] for tensor in layer.tokens), *matrices, tiles=size)
        for tokens in (40, 9)
    )
    assert torch.equal(among[:9], alone)


_META = {
    "bf16": (kernel.expert_ffn, torch.bfloat16, 1, None, {}),
    "fp8": (kernel.expert_ffn_fp8, torch.float8_e4m3fn, 1, torch.float32, {"dynamic_activations": False}),
    "fp8-dynamic": (kernel.expert_ffn_fp8, torch.float8_e4m3fn, 1, torch.float32, {}),
    "int4": (kernel.expert_ffn_int4, torch.uint8, 2, torch.bfloat16, {}),
}


@pytest.mark.parametrize(
    ("encoding", "tokens", "capability"),
    [
        *(pytest.param("bf16", 256, capability) for capability in SHARED_MEMORY),
        *(pytest.param("bf16", tokens, 90) for tokens in (512, 1024, 2048, 8192)),
        *(pytest.param("fp8", tokens, capability) for tokens, capability in ((256, 80), (256, 90), (8192, 90))),
        *(pytest.param("fp8-dynamic", 256, capability) for capability in (89, 90, 120)),
        *(pytest.param(encoding, 8192, 100) for encoding in ("bf16", "fp8-dynamic")),
        *(pytest.param("fp8-dynamic", tokens, 90) for tokens in (512, 1024, 2048, 8192)),
        *(pytest.param("int4", 256, capability) for capability in (80, 90)),
    ],
)
def test_compiles(monkeypatch: pytest.MonkeyPatch, encoding: str, tokens: int, capability: int) -> None:
    """Catches tiles too large for a target's shared memory, what only the interpreter allows, and a host that reads a
    device's value. float8 products exist from sm_89 on; float8 weights are decoded everywhere."""
    function, dtype, packed, scales, options = _META[encoding]
    experts, hidden, intermediate, top_k = 128, 2816, 704, 8
    matrices = []
    for rows, columns in ((2 * intermediate, hidden), (hidden, intermediate)):
        matrices.append(torch.empty(experts, rows, columns // packed, dtype=dtype, device="meta"))
        if scales is not None:
            shape = (experts, rows, columns // 32) if packed == 2 else (experts, rows)
            matrices.append(torch.empty(shape, dtype=scales, device="meta"))
    x = torch.empty(tokens, hidden, dtype=torch.bfloat16, device="meta")
    ids = torch.empty(tokens, top_k, dtype=torch.int64, device="meta")
    for module in (kernel, dispatch):
        monkeypatch.setattr(module, "gpu_of", lambda _: Gpu(capability, 132))
    for launch in launches_of(function, x, ids, x[:, :top_k], *matrices, **options):
        if "product" in launch.kernel.__name__ or tokens == 256:
            assert compile_launch(launch, capability).asm["cubin"]
