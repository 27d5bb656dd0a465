"""Weights as codes: the numbers, what a bundle of them holds, and what the model computes with them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from export import tensor_file
from export.bundle import write_bundle
from export.checkpoint import Checkpoint, open_checkpoint, stored_name
from export.model import Readouts, StepModel, StepOutputs
from export.quantization import quantize_fp8, quantize_int4, store
from export.quantized_model import load_quantized_model, quantize_modules
from export.rows import build_rows
from export.weights import Precision
from plugins_trt.expert_ffn.reference import expert_ffn_fp8
from plugins_trt.operations import REFERENCE
from plugins_trt.quantized_linear.reference import linear_fp8
from runtime.bundle import STEP_GRAPH, Bundle
from runtime.engines.onnxruntime import OnnxRuntimeEngine
from runtime.engines.protocol import DenoiseRow, Prefix
from runtime.engines.torch.engine import Options, TorchEngine
from runtime.engines.torch.program import Rewrites
from runtime.errors import BundleError, CheckpointError
from tests.tiny import SHAPE, write_checkpoint

FP8 = torch.float8_e4m3fn
QUANTIZED = (Precision.FP8, Precision.INT4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A tiny checkpoint whose rows are whole groups of 32; 64 is the square of the embedding scale, 8."""
    shape = replace(SHAPE, text={"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 96})
    return open_checkpoint(write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "even", shape))


def nearest(values: Tensor, grid: Tensor) -> Tensor:
    """Distance of each value to the grid, float64."""
    return (values.double().unsqueeze(-1) - grid.double()).abs().amin(-1)


def test_fp8_codes_are_the_nearest_of_the_format() -> None:
    """Catches truncation, a scale over the wrong axis, and a scale that leaves a channel's largest number out."""
    weight = torch.randn(6, 500, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 6)[:, None]
    codes, scale = quantize_fp8(weight)
    grid = torch.arange(256, dtype=torch.uint8).view(FP8).double()
    grid = grid[~grid.isnan()]
    assert torch.equal(scale, weight.abs().amax(1) / 448)
    off = (codes.double() * scale.double()[:, None] - weight).abs() / scale.double()[:, None]
    # The division rounds in float32, so a tie may fall to either side of it.
    assert (off <= nearest(weight.double() / scale.double()[:, None], grid) + 448 * 2.0**-24).all()


def test_channels_of_zeros_stay_zero() -> None:
    """Catches a division by a scale of zero."""
    codes, scale = quantize_fp8(torch.zeros(2, 32))
    assert not codes.float().any()
    assert (scale > 0).all()
    packed, group_scale = quantize_int4(torch.zeros(2, 32))
    assert not unpack(packed, group_scale).any()


def unpack(packed: Tensor, scale: Tensor) -> Tensor:
    """What 4-bit codes stand for, read off the format's description a column at a time, float64."""
    columns = []
    for column in range(packed.shape[-1] * 2):
        group, place = divmod(column, 32)
        h, t, j = place % 16 // 8, place % 8 // 2, place % 2
        byte = packed[..., group * 16 + 4 * t + 2 * j + h].int()
        code = (byte & 0x0F if place < 16 else byte >> 4) - 8
        columns.append(code.double() * scale[..., group].double())
    return torch.stack(columns, -1)


def test_int4_rounds_to_the_nearest_multiple_of_its_scale() -> None:
    """Catches nibbles in another order and codes that are not the best for the scale they go with."""
    weight = torch.randn(5, 96, generator=torch.Generator().manual_seed(1))
    packed, scale = quantize_int4(weight)
    assert (packed.shape, packed.dtype) == ((5, 48), torch.uint8)
    assert (scale.shape, scale.dtype) == ((5, 3), torch.bfloat16)
    multiples = torch.arange(-8, 8).double() * scale.double().repeat_interleave(32, -1).unsqueeze(-1)
    off = (unpack(packed, scale) - weight).abs()
    assert (off <= (weight.double().unsqueeze(-1) - multiples).abs().amin(-1) + 1e-6).all()


@given(st.integers(0, 2**32), st.sampled_from([1e-20, 1e-3, 1.0, 1e4]))
def test_int4_is_no_worse_than_plain_rounding(seed: int, spread: float) -> None:
    """Catches a choice between scales that takes the worse one, for any group and wherever its largest number lies."""
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(seed)) * spread
    plain_scale = (weight.view(3, 2, 32).abs().amax(-1) / 7.5).bfloat16().double().repeat_interleave(32, -1)
    plain = (weight.double() / plain_scale).round().clamp(-8, 7) * plain_scale

    def squared(approximation: Tensor) -> Tensor:
        return (approximation - weight).square().view(3, 2, 32).sum(-1)

    # Either sign of the scale is as good on average; of the group's own sign the search has the same candidate.
    mirrored = -(-weight.double() / plain_scale).round().clamp(-8, 7) * plain_scale
    best = torch.maximum(squared(plain), squared(mirrored))
    assert (squared(unpack(*quantize_int4(weight))) <= best * (1 + 1e-5)).all()


@pytest.mark.parametrize("precision", Precision)
def test_the_weights_file_holds_what_the_model_wants(checkpoint: Checkpoint, precision: Precision) -> None:
    """Catches a tensor that is quantised here and not there, or under another name, shape or dtype."""
    with torch.device("meta"):
        model = quantize_modules(StepModel(checkpoint.config).to(precision.torch_dtype), precision)
    wanted = {stored_name(name): (tensor.dtype, tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    assert {
        name: (source.dtype, source.shape) for name, source in store(checkpoint.tensors, precision).items()
    } == wanted
    wide = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if precision.is_quantized:
        assert all(name.startswith("self_conditioning.") or name.endswith(".router.proj") for name in wide)
        assert len(wide) == 3 + len(model.layers)


@pytest.mark.parametrize("precision", QUANTIZED)
def test_chunks_may_end_anywhere(checkpoint: Checkpoint, precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches rows that straddle two chunks quantised as two rows, and scales asked for before their codes."""
    whole = {name: source.load() for name, source in store(checkpoint.tensors, precision).items()}
    monkeypatch.setattr(tensor_file, "CHUNK_BYTES", 4 * 100)  # rows are of 16 to 96 numbers
    sources = store(checkpoint.tensors, precision)
    for name in reversed(sources):
        assert torch.equal(sources[name].load().view(torch.uint8), whole[name].view(torch.uint8)), name


def test_int4_refuses_rows_that_are_no_whole_groups(tiny_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"rows of 36 numbers; int4 takes multiples of 32"):
        store(open_checkpoint(tiny_checkpoint).tensors, Precision.INT4)


TEMPERATURE = 0.7


def canvas_of(checkpoint: Checkpoint, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A canvas and its uniform numbers."""
    S, random = checkpoint.config.canvas_length, torch.Generator().manual_seed(seed)
    return torch.randint(checkpoint.config.vocab_size, (S,), generator=random), torch.rand(S, generator=random)


def outputs_of(model: StepModel, canvas: Tensor, uniform: Tensor, condition: Tensor | None = None) -> StepOutputs:
    """One denoising step of a canvas without a prefix."""
    config, dtype = model.config, model.embed_tokens.weight.dtype
    if condition is None:
        condition = torch.zeros(len(canvas), config.hidden_size)
    readouts = Readouts(
        rows=torch.tensor([0]),
        temperature=torch.tensor([TEMPERATURE]),
        uniform=uniform[None],
        guard=torch.tensor([False]),
        guarded_ids=torch.tensor([1]),
    )
    pools = [torch.zeros(1, 4, layer.kv_heads, layer.head_dim, dtype=dtype) for layer in config.layers]
    rows = build_rows(config, canvas, 0, True, torch.tensor([0]), condition.to(dtype))
    with torch.no_grad():
        outputs: StepOutputs = model(rows, readouts, pools, pools)
    return outputs


def dequantized_state(checkpoint: Checkpoint, precision: Precision) -> Iterator[tuple[str, Tensor]]:
    """The wide model's tensors that a weights file's codes stand for, float32."""
    state = {name: source.load() for name, source in store(checkpoint.tensors, precision).items()}
    with torch.device("meta"):
        names = list(StepModel(checkpoint.config).state_dict())
    for name in names:
        tensor, scale = state[stored_name(name)], state.get(f"{stored_name(name)}_scale")
        if tensor.dtype == torch.uint8 and scale is not None:
            yield name, unpack(tensor, scale).float()
        else:
            yield name, tensor.float() if scale is None else tensor.float() * scale[..., None]


@pytest.mark.parametrize("precision", QUANTIZED)
def test_the_model_computes_with_what_the_codes_stand_for(checkpoint: Checkpoint, precision: Precision) -> None:
    """Catches gate and up, scales or operations mixed up between modules: the same numbers in a wide model, float32."""
    operations = replace(
        REFERENCE,
        linear_fp8=partial(linear_fp8, dynamic_activations=False),
        expert_ffn_fp8=partial(expert_ffn_fp8, dynamic_activations=False),
    )
    quantized = load_quantized_model(checkpoint, precision, operations)
    for parameter in quantized.parameters():
        parameter.data = parameter.data.float()
    for module in quantized.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.dtype == torch.bfloat16:
                setattr(module, name, nn.Buffer(buffer.float()))
    wide = StepModel(checkpoint.config)
    wide.load_state_dict(dict(dequantized_state(checkpoint, precision)))
    canvas, uniform = canvas_of(checkpoint)
    condition = torch.randn(len(canvas), checkpoint.config.hidden_size, generator=torch.Generator().manual_seed(4))
    actual, expected = (outputs_of(model, canvas, uniform, condition) for model in (quantized, wide))
    for value, other in zip(actual.keys + actual.values, expected.keys + expected.values, strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=2.0**-14 * other.abs().max().item())
    assert torch.equal(actual.argmax_ids, expected.argmax_ids)


@pytest.fixture(scope="module", params=QUANTIZED, ids=lambda precision: precision.value)
def bundle(
    request: pytest.FixtureRequest, checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Precision, Bundle]:
    """A bundle of each quantised precision."""
    out = tmp_path_factory.mktemp("bundle") / "out"
    write_bundle(checkpoint, out, "tiny", request.param)
    return request.param, Bundle(out)


def test_a_bundle_runs_in_the_torch_engine(bundle: tuple[Precision, Bundle], checkpoint: Checkpoint) -> None:
    """Catches a program that was exported with other modules, and codes or scales bound to the wrong inputs.

    The engine pads its page tables, so now and then a sum of the attention ends in another last bit, which 8-bit
    activations and near-tied experts make large: then nothing is equal. With a wrong weight no canvas ever is.
    """
    precision, opened = bundle
    assert opened.manifest.precision == precision.value
    options = Options("cpu", 4, canvas_slots=1, positions=256, compiler=None, rewrites=Rewrites(merge_products=False))
    engine, model = TorchEngine.load(opened, options), load_quantized_model(checkpoint, precision)
    equal = 0
    for seed in range(12):
        canvas, uniform = canvas_of(checkpoint, seed)
        expected = outputs_of(model, canvas, uniform)
        row = DenoiseRow(
            canvas=canvas.numpy(),
            start=0,
            prefix=Prefix((), 0, ()),
            slot=0,
            first_step=True,
            temperature=TEMPERATURE,
            uniform=uniform.numpy(),
            guard_first=False,
        )
        (readout,) = engine.denoise([row])
        if readout.entropy.tolist() == expected.entropy[0].tolist():
            assert readout.argmax_ids.tolist() == expected.argmax_ids[0].tolist()
            assert readout.candidate_ids.tolist() == expected.candidate_ids[0].tolist()
            equal += 1
    engine.close()
    assert equal >= 3


def test_onnxruntime_refuses_a_bundle_of_codes(bundle: tuple[Precision, Bundle]) -> None:
    """Catches a missing graph reported as a broken bundle."""
    precision, opened = bundle
    assert STEP_GRAPH not in opened.manifest.files
    with pytest.raises(BundleError, match=f"does not compute {precision.value}; choose the torch engine"):
        OnnxRuntimeEngine.load(opened)


def test_fp8_takes_a_byte_a_weight_and_four_a_channel(checkpoint: Checkpoint) -> None:
    """Catches scales a weight or a tensor instead of a channel, and a wide copy kept beside the codes."""
    wide, codes = (
        sum(source.bytes for source in store(checkpoint.tensors, precision).values())
        for precision in (Precision.BFLOAT16, Precision.FP8)
    )
    quantized = [
        tensor
        for name, tensor in checkpoint.tensors.items()
        if any(part in name for part in (".experts.", ".mlp.", ".self_attn.")) and "norm" not in name
    ]
    channels = sum(tensor.elements // tensor.shape[-1] for tensor in quantized)
    assert codes == wide - sum(tensor.elements for tensor in quantized) + 4 * channels


STREAM = """
import resource
import torch
from export.quantization import store
from export.tensor_file import CHUNK_BYTES
from export.weights import Precision

class Drawn:
    shape, elements, paths = (4, 4096, 4096), 1 << 26, ()
    def chunks(self):
        for _ in range(2 * self.elements // CHUNK_BYTES):
            yield torch.ones(CHUNK_BYTES // 2, dtype=torch.bfloat16)

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
next(Drawn().chunks())
before = peak()
sources = store({"layers.0.experts.down_proj": Drawn()}, Precision.INT4).values()
written = sum(chunk.nbytes for source in sources for chunk in source.chunks())
print(peak() - before, written)
"""


def test_quantising_needs_a_few_chunks_of_memory() -> None:
    """Catches a tensor of 128 MB, which can be one of 2 GB, held whole or quantised in one piece."""
    run = subprocess.run([sys.executable, "-c", STREAM], check=True, capture_output=True, text=True)
    grown, written = map(int, run.stdout.split())
    assert written == (1 << 26) // 2 + 2 * (1 << 26) // 32
    # The chunk, the next one, and what one block of it leaves behind; the whole tensor is eight chunks.
    assert grown <= 4 * tensor_file.CHUNK_BYTES
