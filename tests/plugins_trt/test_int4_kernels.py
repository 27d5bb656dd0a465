"""The experts' kernels for 4-bit weights in Triton's interpreter against float64, and their compilation.

The interpreter reads no assembly: what looks the codes up on a GPU is checked there, by
`python -m benchmarks.gpu.experts --check`.
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from plugins_trt.expert_ffn import reference
from plugins_trt.gpu import Gpu
from tests.plugins_trt.test_expert_kernels import U32, Experts, Mixture, Oracle, _between_codes, assert_close, mixture
from tests.plugins_trt.triton_support import Interpreter, compile_launch, launches_of

kernel = pytest.importorskip("plugins_trt.expert_ffn.kernel", reason="Triton is not installed")
int4_kernel = pytest.importorskip("plugins_trt.expert_ffn.int4_kernel", reason="Triton is not installed")
dispatch = pytest.importorskip("plugins_trt.expert_ffn.dispatch", reason="Triton is not installed")

CASES = [
    Experts("an ordinary mixture: pairs that go to a wrong place", hidden=64, intermediate=32),
    Experts("several turns of the loop and tiles, groups of channels that share a scale", 5, 160, 96, 3),
    Experts("one expert that takes all tokens, over several blocks", tokens=70, top_k=1, chosen=(2,)),
    Experts("sizes of one, which Triton makes constants", 1, 32, 32, 1, 1),
    Experts("an odd number of groups of hidden channels that share a scale", 4, 32, 192, 2, 1),
    Experts("no token: an empty grid", tokens=0),
]


def packed(magnitudes: Tensor, negative: Tensor) -> Tensor:
    """Bytes of codes, read off the format's description a column at a time."""
    *rows, size = magnitudes.shape
    words = torch.zeros(*rows, size // 8, dtype=torch.int64)
    for column in range(size):
        group, place = divmod(column, 32)
        half, t, i = place // 16, place % 16 // 4, place % 4
        word = words[..., group * 4 + t]
        word |= magnitudes[..., column].long() << 4 * (4 * half + i)
        word |= negative[..., column].long() << (8 * i + (3 if half else 7))
    return torch.stack([words >> 8 * byte & 0xFF for byte in range(4)], dim=-1).flatten(-2).to(torch.uint8)


def scales_of(row_scale: Tensor, group_scale: Tensor) -> Tensor:
    """One tensor of scales of rows `[E, N]` and of groups `[E, N, G]`."""
    experts, rows = row_scale.shape
    own = row_scale.float().contiguous().view(torch.uint8).view(experts, 4, rows)
    return torch.cat([own, group_scale.transpose(1, 2)], dim=1).contiguous()


def encoded(shape: torch.Size, generator: torch.Generator, size: float) -> tuple[Tensor, Tensor, Tensor]:
    """Random codes, their scales, and the weights of about `size` that they stand for, float64."""
    experts, rows, columns = shape
    magnitudes = torch.randint(8, shape, generator=generator)
    negative = torch.randint(2, shape, generator=generator)
    group_scale = torch.randint(64, 127, (experts, rows, columns // 32), generator=generator).to(torch.uint8)
    row_scale = (0.5 + torch.rand(experts, rows, generator=generator)) * size / 64
    scale = group_scale.view(torch.float8_e4m3fn).float().repeat_interleave(32, dim=-1)
    # Numbers of a group: its scale times the magnitude, rounded to float8.
    numbers = (scale * torch.tensor(reference.INT4_MAGNITUDES)[magnitudes]).to(torch.float8_e4m3fn).double()
    weights = numbers * (1 - 2 * negative) * row_scale.double().unsqueeze(-1)
    return packed(magnitudes, negative), scales_of(row_scale, group_scale), weights


def oracle(case: Mixture) -> Oracle:
    """As `test_expert_kernels.oracle`, with hidden states rounded to float8 in groups of 64 channels."""
    unit = torch.finfo(case.x.dtype).eps / 2
    least = torch.finfo(case.x.dtype).smallest_normal * unit
    value, slack = torch.zeros(2, *case.x.shape, dtype=torch.float64)
    states = reference._round_to_fp8(case.x.float()).double()
    for t, (x, ids, weights) in enumerate(zip(states, case.ids, case.weights.double(), strict=True)):
        for expert, weight in zip(ids, weights, strict=True):
            gate, up = (case.gate_up[expert] @ x).chunk(2)
            gate_sum, up_sum = (case.gate_up[expert].abs() @ x.abs()).chunk(2)
            hidden = F.gelu(gate, approximate="tanh") * up
            off = (2 * len(x) + 16) * U32 * 1.13 * gate_sum * up_sum + least
            groups = [_between_codes(*group) for group in zip(hidden.split(64), off.split(64), strict=True)]
            hidden, off = (torch.cat(parts) for parts in zip(*groups, strict=True))
            down = case.down[expert]
            value[t] += weight * (down @ hidden)
            products = down.abs() @ hidden.abs()
            slack[t] += weight * (down.abs() @ off + ((len(hidden) + 16) * U32 + unit) * products) + least
    return Oracle(value, slack * 1.01 + case.ids.shape[1] * U32 * slack + unit * value.abs() + least)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.catches)
def test_int4_weights(interpreter: Interpreter, case: Experts, dtype: torch.dtype) -> None:
    """Catches halves of bytes, signs, groups or scales that are swapped."""
    layer, random = mixture(case, dtype), torch.Generator().manual_seed(1)
    *gate_up, true_gate_up = encoded(layer.gate_up.shape, random, case.hidden**-0.5)
    *down, true_down = encoded(layer.down.shape, random, case.intermediate**-0.5)
    expected = oracle(replace(layer, gate_up=true_gate_up, down=true_down))
    assert_close(interpreter(kernel.expert_ffn_int4, *layer.tokens, *gate_up, *down), expected)
    if dtype == torch.float32:
        assert_close(reference.expert_ffn_int4(*layer.tokens, *gate_up, *down), expected)


def test_every_code_of_every_scale(interpreter: Interpreter) -> None:
    """Catches a subnormal number and a border of the format: gates are 1 in channel 0 of each token, so that up rows,
    one for each of 126 scales in 16 codes, come out as they are."""
    scales = torch.arange(128, dtype=torch.uint8)[:, None]
    scales[127] = 0
    codes = torch.arange(32).expand(128, 32)
    one = torch.full((128, 1), 0x38, dtype=torch.uint8)  # 1.0
    gate_up = torch.cat([packed(torch.full((128, 32), 7), torch.zeros(128, 32)), packed(codes % 8, codes // 8 % 2)])
    down = packed(torch.full((32, 128), 7), torch.zeros(32, 128))
    # Each row of the down matrix passes all channels; the tokens are unit vectors, one for each column.
    gate_up_scale = scales_of(torch.ones(1, 256), torch.cat([one, scales])[None])
    down_scale = scales_of(torch.ones(1, 32), one[:4].T.expand(1, 32, 4))
    token = torch.eye(32), torch.zeros(32, 1, dtype=torch.int64), torch.ones(32, 1)
    output = interpreter(kernel.expert_ffn_int4, *token, gate_up[None], gate_up_scale, down[None], down_scale)
    numbers = scales.view(torch.float8_e4m3fn).float() * torch.tensor(reference.INT4_MAGNITUDES)[codes[0] % 8]
    numbers = numbers.to(torch.float8_e4m3fn).double() * (1 - 2 * (codes[0] // 8 % 2))
    hidden = F.gelu(torch.ones(1, dtype=torch.float64), approximate="tanh") * numbers.T  # token, channel
    rounded = torch.cat([reference._round_to_fp8(group.float()) for group in hidden.split(64, dim=1)], dim=1)
    torch.testing.assert_close(output, rounded.sum(1, keepdim=True).expand(32, 32), rtol=2.0**-4, atol=0)


@pytest.mark.parametrize(
    ("tokens", "capability"), [(256, 89), (256, 90), (256, 100), (256, 120), (1024, 90), (8192, 90)]
)
def test_compiles(monkeypatch: pytest.MonkeyPatch, tokens: int, capability: int) -> None:
    """Catches tiles too large for a target's shared memory, what only the interpreter allows, a host that reads a
    device's value, and codes that the look-up takes for each other's."""
    experts, hidden, intermediate, top_k = 128, 2816, 704, 8
    matrices = []
    for rows, columns in ((2 * intermediate, hidden), (hidden, intermediate)):
        for shape in ((experts, rows, columns // 2), (experts, 4 + columns // 32, rows)):
            matrices.append(torch.empty(shape, dtype=torch.uint8, device="meta"))
    x = torch.empty(tokens, hidden, dtype=torch.bfloat16, device="meta")
    ids = torch.empty(tokens, top_k, dtype=torch.int64, device="meta")
    for module in (kernel, int4_kernel, dispatch):
        monkeypatch.setattr(module, "gpu_of", lambda _: Gpu(capability, 132))
    launches = launches_of(kernel.expert_ffn_int4, x, ids, x[:, :top_k], *matrices)
    products = [launch for launch in launches if launch.kernel.__name__.startswith("int4_")]
    assert len(products) == 2
    for launch in products:
        compiled = compile_launch(launch, capability)
        assert compiled.asm["cubin"]
        assert_four_neighbours_in_a_register(compiled.asm["ttgir"])


def assert_four_neighbours_in_a_register(code: str) -> None:
    """The look-up takes four bytes of a row at a time; Triton promises no order of what it packs for assembly."""
    layouts = dict(re.findall(r"^(#\w+) = #ttg\.linear<{register = (\[\[.*?\]\])", code, re.MULTILINE))
    operands = re.findall(r"tt\.elementwise_inline_asm.*packed_element = 4.*: tensor<\d+x\d+xi8, (#\w+)>", code)
    assert operands
    for layout in operands:
        assert layouts[layout].startswith("[[0, 1], [0, 2], "), layouts[layout]
