"""The operations in PyTorch's dispatcher, as `torch.ops.dgemma.*`, so that an exported program keeps one node for each.

A registered operation runs its `reference.py` on the CPU and its `kernel.py` on a GPU, never the one for the other: a
device without a face is PyTorch's own error. Triton is imported when the first GPU tensor comes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plugins_trt.operations import Operations

NAMESPACE = "dgemma"


@dataclass(frozen=True)
class _Registration:
    """One operation: where its faces are and what its results look like."""

    folder: str
    schema: str
    """Its name, and the arguments of the functions of that name in `reference.py` and `kernel.py`."""
    results: Callable[..., Any]
    """Empty results in the shapes that arguments of these shapes lead to."""
    contiguous: bool = True
    """Whether the kernel wants its tensors contiguous."""

    @property
    def name(self) -> str:
        return self.schema.partition("(")[0]

    def run_reference(self, *arguments: Any) -> Any:
        """The CPU's face; what it returns as views is made contiguous, as `results` promises."""
        result = self._face("reference")(*arguments)
        return type(result)(map(Tensor.contiguous, result)) if isinstance(result, tuple | list) else result.contiguous()

    def run_kernel(self, *arguments: Any) -> Any:
        """The GPU's face."""
        if self.contiguous:
            arguments = tuple(each.contiguous() if isinstance(each, Tensor) else each for each in arguments)
        return self._face("kernel")(*arguments)

    def _face(self, room: str) -> Callable[..., Any]:
        face: Callable[..., Any] = getattr(importlib.import_module(f"plugins_trt.{self.folder}.{room}"), self.name)
        return face


def _like_first(first: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(first, memory_format=torch.contiguous_format)


def _chosen_experts(logits: Tensor, per_expert_scale: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape)


def _readout(hidden: Tensor, embedding: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    positions = hidden.shape[:2]
    ids = [hidden.new_empty(positions, dtype=torch.int64) for _ in range(2)]
    entropy = hidden.new_empty(positions, dtype=torch.promote_types(hidden.dtype, torch.float32))
    return ids[0], ids[1], entropy, hidden.new_empty(hidden.shape, dtype=embedding.dtype)


def _normed_heads(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _like_first(query), _like_first(key), _like_first(value)


def _product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _product_of_codes(codes: Tensor, code_scale: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], weight.shape[0]), dtype=dtype)


def _expert_parts(x: Tensor, expert_ids: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*expert_ids.shape, x.shape[1]))


def _expert_parts_of_codes(codes: Tensor, code_scale: Tensor, expert_ids: Tensor, *others: Any) -> Tensor:
    return codes.new_empty((*expert_ids.shape, codes.shape[1]), dtype=others[-1])


def _routed(x: Tensor, weight: Tensor, per_expert_scale: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    return _chosen_experts(x, per_expert_scale, top_k)


def _joined(residual: Tensor, *others: Any) -> list[Tensor]:
    results = [_like_first(residual)]
    for codes in others[-2]:
        normed = _like_first(residual)
        step = residual.new_empty(residual.shape[:-1], dtype=torch.float32)
        results += [normed.to(torch.float8_e4m3fn), step] if codes else [normed]
    return results


def _attended_codes(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    codes = query.new_empty((*query.shape[:2], query.shape[2] * query.shape[3]), dtype=torch.float8_e4m3fn)
    return codes, query.new_empty(query.shape[:2], dtype=torch.float32)


_ATTENTION = (
    "Tensor query, Tensor key, Tensor value, Tensor key_pool, Tensor value_pool, Tensor page_table, "
    "Tensor page_base, Tensor start, Tensor kv_start, Tensor kv_end"
)
_EXPERTS = "Tensor x, Tensor expert_ids, Tensor expert_weights"
_SCALED = "Tensor gate_up, Tensor gate_up_scale, Tensor down, Tensor down_scale"
_REGISTRATIONS = (
    _Registration(
        "expert_routing",
        "expert_routing(Tensor logits, Tensor per_expert_scale, int top_k) -> (Tensor, Tensor)",
        _chosen_experts,
    ),
    _Registration("expert_ffn", f"expert_ffn({_EXPERTS}, Tensor gate_up, Tensor down) -> Tensor", _like_first),
    _Registration("expert_ffn", f"expert_ffn_fp8({_EXPERTS}, {_SCALED}) -> Tensor", _like_first),
    _Registration("expert_ffn", f"expert_ffn_int4({_EXPERTS}, {_SCALED}) -> Tensor", _like_first),
    _Registration("canvas_attention", f"canvas_attention({_ATTENTION}) -> Tensor", _like_first),
    _Registration(
        "canvas_readout",
        "canvas_readout(Tensor hidden, Tensor embedding, Tensor temperature, Tensor uniform, Tensor guard, "
        "Tensor guarded_ids, float softcap, float embedding_scale) -> (Tensor, Tensor, Tensor, Tensor)",
        _readout,
    ),
    _Registration(
        "head_norm",
        "head_norm(Tensor query, Tensor key, Tensor value, Tensor query_weight, Tensor key_weight, Tensor cosine, "
        "Tensor sine, float eps) -> (Tensor, Tensor, Tensor)",
        _normed_heads,
        contiguous=False,
    ),
    _Registration("quantized_linear", "linear_fp8(Tensor x, Tensor weight, Tensor scale) -> Tensor", _product),
)
"""What a model is written against."""
_PIECES = (
    _Registration(
        "expert_routing",
        "project_and_route(Tensor x, Tensor weight, Tensor per_expert_scale, int top_k) -> (Tensor, Tensor)",
        _routed,
    ),
    _Registration("expert_ffn", f"expert_parts({_EXPERTS}, Tensor gate_up, Tensor down) -> Tensor", _expert_parts),
    _Registration("expert_ffn", f"expert_parts_int4({_EXPERTS}, {_SCALED}) -> Tensor", _expert_parts),
    _Registration(
        "expert_ffn",
        "expert_parts_fp8(Tensor codes, Tensor code_scale, Tensor expert_ids, Tensor expert_weights, "
        f"{_SCALED}, ScalarType dtype) -> Tensor",
        _expert_parts_of_codes,
    ),
    _Registration(
        "quantized_linear",
        "product_fp8(Tensor codes, Tensor code_scale, Tensor weight, Tensor scale, ScalarType dtype) -> Tensor",
        _product_of_codes,
    ),
    _Registration("canvas_attention", f"canvas_attention_codes({_ATTENTION}) -> (Tensor, Tensor)", _attended_codes),
    _Registration(
        "residual_norm",
        "residual_norm(Tensor residual, Tensor branch, Tensor branch_weight, Tensor? beside, Tensor? beside_weight, "
        "Tensor? joint_weight, Tensor? scalar, Tensor[] weights, float[] factors, bool[] quantized, float eps) "
        "-> Tensor[]",
        _joined,
    ),
)
"""What an engine calls in their place, where the rest of an operation is fused with its neighbours, or in place of many
small computations."""

_BY_NAME = {registration.name: registration for registration in _REGISTRATIONS}
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]


def _register(registration: _Registration) -> Callable[..., Any]:
    """Register an operation and return it."""
    _LIBRARY.define(registration.schema)  # type: ignore[no-untyped-call]
    for device, face in (("CPU", registration.run_reference), ("CUDA", registration.run_kernel)):
        _LIBRARY.impl(registration.name, face, device)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"{NAMESPACE}::{registration.name}", registration.results, lib=_LIBRARY)
    operation: Callable[..., Any] = getattr(torch.ops.dgemma, registration.name).default
    return operation


REGISTERED = Operations(**{name: _register(registration) for name, registration in _BY_NAME.items()})
"""What a model is written against to be exported as a program."""

for _piece in _PIECES:
    _register(_piece)


def reference(name: str) -> Callable[..., Any]:
    """An operation's reference for any device: slow on a GPU, for comparing."""
    return _BY_NAME[name].run_reference
