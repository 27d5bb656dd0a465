"""Expert layers of the released shape with random weights, in every encoding, on the GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from plugins_trt.expert_ffn import kernel, reference
from plugins_trt.expert_ffn.kernel import ExpertWeights
from plugins_trt.expert_routing.kernel import expert_routing

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, LAYERS = 128, 2816, 704, 8, 30

ENCODINGS = ("bf16", "fp8", "fp8-dynamic", "int4")


@dataclass(frozen=True)
class Layer:
    """One layer's experts in one encoding."""

    encoding: str
    tensors: tuple[Tensor, ...]
    """As the operation takes them after the experts' weights."""

    @property
    def bytes(self) -> int:
        """What one pass over all its experts reads."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def operation(self) -> Callable[..., Tensor]:
        """The GPU's face: `(x, expert_ids, expert_weights, *tensors, tiles=None)`."""
        return _face(kernel, self.encoding)

    @property
    def reference(self) -> Callable[..., Tensor]:
        """The plain one."""
        return _face(reference, self.encoding)

    @property
    def weights(self) -> ExpertWeights:
        """What the single products take."""
        if self.encoding == "bf16":
            return ExpertWeights(self.tensors[0], None, self.tensors[1], None)
        gate_up, gate_up_scale, down, down_scale = self.tensors
        return ExpertWeights(gate_up, gate_up_scale, down, down_scale, self.encoding == "fp8-dynamic")


def random_layer(encoding: str, generator: torch.Generator) -> Layer:
    """Normal weights that keep the size of states."""
    gate_up = _normal(generator, EXPERTS, 2 * INTERMEDIATE, HIDDEN) * HIDDEN**-0.5
    down = _normal(generator, EXPERTS, HIDDEN, INTERMEDIATE) * INTERMEDIATE**-0.5
    if encoding == "bf16":
        return Layer(encoding, (gate_up, down))
    encode = _to_int4 if encoding == "int4" else _to_fp8
    return Layer(encoding, (*encode(gate_up), *encode(down)))


def random_tokens(tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """States, expert ids and expert weights; a random router, which spreads the tokens over all experts."""
    logits = _normal(generator, tokens, EXPERTS)
    ids, weights = expert_routing(logits, torch.ones(EXPERTS, dtype=torch.bfloat16, device="cuda"), TOP_K)
    return _normal(generator, tokens, HIDDEN), ids, weights


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device="cuda", generator=generator)


def _to_fp8(weights: Tensor) -> tuple[Tensor, Tensor]:
    scale = weights.abs().amax(dim=-1).float() / 448
    return (weights / scale.unsqueeze(-1)).to(torch.float8_e4m3fn), scale


def _to_int4(weights: Tensor) -> tuple[Tensor, Tensor]:
    groups = weights.view(*weights.shape[:-1], -1, reference.INT4_GROUP)
    scale = groups.abs().amax(dim=-1, keepdim=True) / 7.5
    low, high = (torch.round(groups / scale).clamp(-8, 7) + 8).to(torch.uint8).chunk(2, dim=-1)
    places = (low | high << 4).view(*low.shape[:-1], 2, 4, 2)  # h, t, j
    return places.movedim(-3, -1).flatten(-4), scale.squeeze(-1)


def _face(module: object, encoding: str) -> Callable[..., Tensor]:
    name, _, dynamic = encoding.partition("-")
    function: Callable[..., Tensor] = getattr(module, {"bf16": "expert_ffn"}.get(name, f"expert_ffn_{name}"))
    return partial(function, dynamic_activations=bool(dynamic)) if name == "fp8" else function
