"""The step model's modules whose weights are codes with scales."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from export.checkpoint import Checkpoint, stored_name
from export.model import Experts, StepModel
from export.quantization import FP8, GROUP, is_linear, store
from export.weights import Precision
from plugins_trt.operations import REFERENCE, Operations


class Fp8Linear(nn.Module):
    """A linear in 8-bit floats: `weight` float8_e4m3fn `[N, K]`, `weight_scale` float32 `[N]`."""

    def __init__(self, linear: nn.Linear, operations: Operations) -> None:
        super().__init__()
        self.operations = operations
        self.weight = nn.Buffer(_empty_like(linear.weight, linear.weight.shape, FP8))
        self.weight_scale = nn.Buffer(_empty_like(linear.weight, linear.weight.shape[:1], torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return self.operations.linear_fp8(x, self.weight, self.weight_scale)


class Fp8Experts(nn.Module):
    """A layer's experts in 8-bit floats: `gate_up_proj [E, 2I, H]` and `down_proj [E, H, I]` float8_e4m3fn, with
    `gate_up_proj_scale [E, 2I]` and `down_proj_scale [E, H]` float32."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.operations = experts.operations
        gate_up, down = experts.gate_up_proj, experts.down_proj
        self.gate_up_proj = nn.Buffer(_empty_like(gate_up, gate_up.shape, FP8))
        self.gate_up_proj_scale = nn.Buffer(_empty_like(gate_up, gate_up.shape[:2], torch.float32))
        self.down_proj = nn.Buffer(_empty_like(down, down.shape, FP8))
        self.down_proj_scale = nn.Buffer(_empty_like(down, down.shape[:2], torch.float32))

    def forward(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        weights = self.gate_up_proj, self.gate_up_proj_scale, self.down_proj, self.down_proj_scale
        return self.operations.expert_ffn_fp8(x, expert_ids, expert_weights, *weights)


class Int4Experts(nn.Module):
    """A layer's experts in 4 bits: `gate_up_proj [E, 2I, H / 2]` and `down_proj [E, H, I / 2]` uint8, with
    `gate_up_proj_scale [E, 2I, H / 32]` and `down_proj_scale [E, H, I / 32]` in the states' dtype."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.operations = experts.operations
        self.gate_up_proj, self.gate_up_proj_scale = _int4_buffers(experts.gate_up_proj)
        self.down_proj, self.down_proj_scale = _int4_buffers(experts.down_proj)

    def forward(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        weights = self.gate_up_proj, self.gate_up_proj_scale, self.down_proj, self.down_proj_scale
        return self.operations.expert_ffn_int4(x, expert_ids, expert_weights, *weights)


def quantize_modules(model: StepModel, precision: Precision) -> StepModel:
    """Replace the modules that `precision` stores as codes, in place; what they hold is not converted but left empty.

    Build the model with the precision's dtype as the default, on the device it is to live on; then load into it what
    `export.quantization.store` makes. Never cast the result: that would turn codes and scales into another dtype too.

    Args:
        model: the step model; its experts and its layers' linears are replaced.
        precision: wide ones replace nothing.
    """
    if not precision.is_quantized:
        return model
    for name, module in list(model.named_modules()):
        parent, _, attribute = name.rpartition(".")
        if isinstance(module, nn.Linear) and is_linear(name):
            setattr(model.get_submodule(parent), attribute, Fp8Linear(module, model.operations))
        elif isinstance(module, Experts):
            experts = Int4Experts(module) if precision is Precision.INT4 else Fp8Experts(module)
            setattr(model.get_submodule(parent), attribute, experts)
    return model


def load_quantized_model(checkpoint: Checkpoint, precision: Precision, operations: Operations = REFERENCE) -> StepModel:
    """The checkpoint's step model in memory, in a quantised precision, as its bundle would hold it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(precision.torch_dtype)
    try:
        with torch.device("meta"):
            model = quantize_modules(StepModel(checkpoint.config, operations), precision)
    finally:
        torch.set_default_dtype(before)
    sources = store(checkpoint.tensors, precision)
    state = {name: sources[stored_name(name)].load() for name in model.state_dict()}
    model.load_state_dict(state, assign=True)
    return model.eval()


def _int4_buffers(weight: Tensor) -> tuple[nn.Buffer, nn.Buffer]:
    *channels, depth = weight.shape
    packed = _empty_like(weight, (*channels, depth // 2), torch.uint8)
    return nn.Buffer(packed), nn.Buffer(_empty_like(weight, (*channels, depth // GROUP), weight.dtype))


def _empty_like(weight: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=weight.device)
