"""The quantised linear layer: its meaning against float64, its kernels in Triton's interpreter, their compilation."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from plugins_trt.gpu import Gpu
from plugins_trt.quantized_linear import reference
from tests.plugins_trt.triton_support import SHARED_MEMORY, Interpreter, compile_launch, launches_of

kernel = pytest.importorskip("plugins_trt.quantized_linear.kernel", reason="Triton is not installed")

FP8 = torch.float8_e4m3fn
GRID = torch.arange(256, dtype=torch.uint8).view(FP8).double()
"""Every number of the format, and its two NaN."""


def operands(shape: tuple[int, ...], channels: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """`x`, codes and scales of a layer."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).to(dtype)
    weight = (torch.randn(channels, shape[-1], generator=generator) * 50).to(FP8)
    return x, weight, torch.rand(channels, generator=generator) + 0.5


def oracle(rows: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The product in float64 and what a computation in float32 may be off by before its last rounding.

    Products of these operands are exact in float32 up to 24 bits and a sum of K terms is off by at most
    `K u sum|terms|` whatever its order (Higham 2002, section 4.2), `u = 2^-24`; four more roundings are those of a
    product, of the two scales, and of the rows' own scaling.
    """
    right, wide = (weight.double() * scale.double()[:, None]).T, rows.double()
    return wide @ right, (rows.shape[-1] + 4) * 2.0**-24 * (wide.abs() @ right.abs())


def assert_close(actual: Tensor, expected: Tensor, slack: Tensor) -> None:
    """Within `slack`, and one rounding to the result's dtype (half an ulp, subnormals included)."""
    info = torch.finfo(actual.dtype)
    rounding = (info.eps / 2 * expected.abs()).clamp(min=info.smallest_normal * info.eps)
    excess = (actual.double() - expected).abs() - slack * (1 + info.eps) - rounding
    assert excess.max() <= 0, f"off by {excess.max():.2e} more than rounding explains"


def dequantized(codes: Tensor, scale: Tensor) -> Tensor:
    return codes.double() * scale.double()[..., None]


VALUES = torch.cat([torch.linspace(-449, 449, 7000), torch.linspace(-0.02, 0.02, 2001), torch.tensor([448.0])])


def test_rows_round_to_the_nearest_code() -> None:
    """Catches truncation, a lost carry into the exponent, and a wrong grid below the smallest normal number."""
    row = VALUES.clamp(-448, 448)[None]
    codes, scale = reference.quantize_rows(row)
    assert scale.item() == 1.0
    nearest = (row[0].double()[:, None] - GRID[None]).abs().nan_to_num(torch.inf).amin(1)
    assert torch.equal((codes[0].double() - row[0]).abs(), nearest)


def test_reference_is_the_product_of_what_the_codes_stand_for() -> None:
    """Catches a scale at the wrong axis and a product in low precision."""
    x, weight, scale = operands((3, 5, 96), 40, torch.float32)
    assert_close(reference.linear_fp8(x, weight, scale, dynamic_activations=False), *oracle(x, weight, scale))
    rows = dequantized(*reference.quantize_rows(x))
    assert_close(reference.linear_fp8(x, weight, scale, dynamic_activations=True), *oracle(rows, weight, scale))


CASES = [
    pytest.param((1, 1), 1, torch.float32, id="one-number: catches sizes of 1, which Triton makes constants"),
    pytest.param((33, 100), 129, torch.float32, id="catches edges of all three block sizes"),
    pytest.param((2, 3, 128), 64, torch.float16, id="catches leading dimensions, and a result rounded twice"),
    pytest.param((70, 256), 200, torch.float32, id="catches whole turns whose rows and channels are no whole blocks"),
    pytest.param((5, 1100), 70, torch.float16, id="catches split sums whose last part is short"),
    pytest.param((2, 9000), 17, torch.float32, id="catches rows longer than what the quantisation holds at a time"),
]


@pytest.mark.parametrize(("shape", "channels", "dtype"), CASES)
def test_interpreted_kernel_agrees_with_float64(
    shape: tuple[int, ...], channels: int, dtype: torch.dtype, interpreter: Interpreter
) -> None:
    x, weight, scale = operands(shape, channels, dtype)
    wide = interpreter(kernel.linear_fp8, x, weight, scale, dynamic_activations=False)
    assert wide.dtype == dtype
    assert wide.shape == (*shape[:-1], channels)
    assert_close(wide, *oracle(x, weight, scale))
    quantized = interpreter(kernel.linear_fp8, x, weight, scale, dynamic_activations=True)
    assert_close(quantized, *oracle(dequantized(*reference.quantize_rows(x)), weight, scale))


def test_interpreted_rows_get_the_codes_of_the_reference(interpreter: Interpreter) -> None:
    """Catches a row of zeros divided by zero, ties rounded away, subnormals, and rows longer than a block."""
    rows = torch.stack([VALUES, VALUES * 3e-5, VALUES.flip(0) * 7e8, torch.zeros_like(VALUES)])
    codes, scale = interpreter(kernel.quantize_rows, rows)
    expected, expected_scale = reference.quantize_rows(rows)
    assert torch.equal(codes.double(), expected.double()), "as numbers: the kernel knows no negative zero"
    assert torch.equal(scale, expected_scale)
    assert not codes[3].float().any()


def without_fp8(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The weight-only product as on a GPU that converts no 8-bit floats itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "has_fp8", lambda device: False)
        product: Tensor = kernel.linear_fp8(x, weight, scale, dynamic_activations=False)
    return product


def test_codes_are_widened_without_fp8_units(interpreter: Interpreter) -> None:
    """Catches a wrong exponent, sign or subnormal in the bits: the identity shows every code, a sum would hide some."""
    weight = torch.arange(256, dtype=torch.uint8).view(FP8)
    weight = weight[~weight.double().isnan()][:, None]
    product = interpreter(without_fp8, torch.ones(1, 1), weight, torch.ones(len(weight)))
    assert torch.equal(product[0], weight[:, 0].float())


def test_rows_do_not_depend_on_each_other(interpreter: Interpreter) -> None:
    """Catches a scale shared between rows: what a canvas reads must not depend on who else is in the batch."""
    x, weight, scale = operands((40, 96), 48, torch.float32)
    other = x.clone()
    other[1:] *= 50
    first, second = (interpreter(kernel.linear_fp8, rows, weight, scale)[0] for rows in (x, other))
    assert torch.equal(first, second)


@pytest.mark.parametrize(("fp8", "kernels"), [(True, ["_quantize", "_product"]), (False, ["_product"])])
def test_activations_are_quantised_where_the_gpu_multiplies_8_bit_floats(
    fp8: bool, kernels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a default that some GPUs cannot compile."""
    monkeypatch.setattr(kernel, "has_fp8", lambda device: fp8)
    x, weight = torch.empty(256, 128, device="meta"), torch.empty(8192, 128, dtype=FP8, device="meta")
    launches = launches_of(kernel.linear_fp8, x, weight, torch.empty(8192, device="meta"))
    assert [launch.kernel.__name__ for launch in launches] == kernels


FP8_PRODUCT = {
    89: r"mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32",
    90: r"wgmma.mma_async.sync.aligned.m64n\d+k32.f32.e4m3.e4m3",
    100: r"tcgen05.mma",
    120: r"mma.sync.aligned.m16n8k32",
}
"""The matrix instruction for 8-bit floats by target (PTX ISA, section on matrix multiply-accumulate)."""
TARGETS = [(capability, False) for capability in SHARED_MEMORY] + [(capability, True) for capability in FP8_PRODUCT]
"""Compute capability, and whether the activations are 8-bit floats too."""
RELEASED = [
    pytest.param(256, 1024, 2112, capability, dynamic, id=f"one canvas, K split, sm_{capability}, 8-bit: {dynamic}")
    for capability, dynamic in TARGETS
] + [
    pytest.param(2048, 8192, 2816, 90, True, id="eight canvases: the largest tile, sm_90"),
    pytest.param(2048, 8192, 2816, 120, True, id="eight canvases: the largest tile of a small GPU, sm_120"),
    pytest.param(2048, 8192, 2816, 80, False, id="eight canvases: the widened codes' largest tile, sm_80"),
]


@pytest.mark.parametrize(("rows", "channels", "depth", "capability", "dynamic_activations"), RELEASED)
def test_compiles_at_released_shapes(
    rows: int,
    channels: int,
    depth: int,
    capability: int,
    dynamic_activations: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches what a target cannot compile or hold, and products that miss the matrix units."""
    monkeypatch.setattr(kernel, "has_fp8", lambda device: capability >= 89)
    monkeypatch.setattr(kernel, "gpu_of", lambda device: Gpu(capability, multiprocessors=132))
    x = torch.empty(rows, depth, dtype=torch.bfloat16, device="meta")
    weight, scale = torch.empty(channels, depth, dtype=FP8, device="meta"), torch.empty(channels, device="meta")
    for launch in launches_of(kernel.linear_fp8, x, weight, scale, dynamic_activations=dynamic_activations):
        ptx = compile_launch(launch, capability).asm["ptx"]
        assert f".target sm_{capability}" in ptx
        if "DEPTH" in launch.arguments:
            assert re.search(FP8_PRODUCT[capability] if dynamic_activations else "mma", ptx)
