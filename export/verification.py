"""Runs a finished step graph against the PyTorch model and says how far apart they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor

from export.checkpoint import Checkpoint, stored_name
from export.model import Readouts, Rows, StepModel, StepOutputs
from export.rows import build_rows
from plugins_trt.canvas_readout.reference import readout_logits
from runtime.bundle import Verification
from runtime.errors import BundleError

_PAGE_SIZE = 16
_LONGEST_PROMPT = 160
_SLACK = 4.0
"""The graph may be this many times as far from the float64 model as PyTorch in float32 is: both round the same
products, in another order."""
_SEEDS = (0, 1, 2)
"""Tried in turn. Where two experts are all but tied, rounding routes a token elsewhere and its K/V jump; that may
happen to the graph and not to PyTorch, about once in twenty runs of 4000 routings; a fault stays at every seed."""
_BAND = 2.0**-18
"""Rounding allowed besides, relative to a tensor's largest value: 64 units in the last place."""


def load_model(checkpoint: Checkpoint, dtype: torch.dtype) -> StepModel:
    """The checkpoint's step model in memory."""
    with torch.device("meta"):
        model = StepModel(checkpoint.config)
    state = {name: checkpoint.tensors[stored_name(name)].load(dtype) for name in model.state_dict()}
    model.load_state_dict(state, assign=True)
    return model.to(dtype).eval()


def verify(step_graph: Path, checkpoint: Checkpoint) -> Verification:
    """Encode random tokens, then denoise a random canvas for two steps, the second self-conditioned.

    The yardstick is the model in float64: every tensor of the graph must be as near to it as the model in float32 is,
    up to a factor and a rounding band, and ids may differ only where the float64 probabilities call it a tie.

    Args:
        step_graph: `step.onnx` beside its weights, in float32.
        checkpoint: what it was made from.

    Raises:
        BundleError: the graph is further off than that.
    """
    session = onnxruntime.InferenceSession(step_graph, providers=["CPUExecutionProvider"])
    model, oracle = load_model(checkpoint, torch.float32), load_model(checkpoint, torch.float64)
    for seed in _SEEDS:
        with torch.no_grad():
            calls = _calls(oracle, torch.Generator().manual_seed(seed))
            comparisons = [_compare(call, _run_graph(session, call), model, oracle) for call in calls]
        faults = _faults(comparisons)
        if not faults:
            return _summary(comparisons)
    raise BundleError("the exported graph is not the model: " + "; ".join(faults))


@dataclass(frozen=True)
class _Call:
    """The arguments of one step, float32."""

    rows: Rows
    readouts: Readouts
    keys: list[Tensor]
    values: list[Tensor]


def _calls(oracle: StepModel, random: torch.Generator) -> Iterator[_Call]:
    """The calls of the scenario; what later calls are conditioned on comes from the oracle, rounded to float32."""
    config = oracle.config
    S = config.canvas_length
    prompt_length = max(1, min(2 * config.sliding_window + 3, _LONGEST_PROMPT, config.max_position - S))
    pages = torch.randperm(-(-prompt_length // _PAGE_SIZE) + 1, generator=random)
    keys, values = (
        [torch.zeros(len(pages), _PAGE_SIZE, layer.kv_heads, layer.head_dim) for layer in config.layers]
        for _ in range(2)
    )
    prompt = torch.randint(config.vocab_size, (prompt_length,), generator=random)
    encode = _Call(build_rows(config, prompt, 0, False, pages), _readouts(0, prompt_length, random), keys, values)
    yield encode
    encoded = _run_model(oracle, encode)
    for pool, new in zip(keys + values, encoded.keys + encoded.values, strict=True):
        positions = torch.arange(prompt_length)
        pool[pages[positions // _PAGE_SIZE], positions % _PAGE_SIZE] = new[0].float()
    soft_embedding = None
    for _ in range(2):
        canvas = torch.randint(config.vocab_size, (S,), generator=random)
        rows = build_rows(config, canvas, prompt_length, True, pages, soft_embedding)
        denoise = _Call(rows, _readouts(1, S, random), keys, values)
        yield denoise
        soft_embedding = _run_model(oracle, denoise).soft_embedding[0].float()


def _readouts(rows: int, length: int, random: torch.Generator) -> Readouts:
    return Readouts(
        rows=torch.arange(rows),
        temperature=torch.full((rows,), 0.6),
        uniform=torch.rand(rows, length, generator=random),
        guard=torch.ones(rows, dtype=torch.bool),
        guarded_ids=torch.tensor([1]),
    )


def _run_graph(session: onnxruntime.InferenceSession, call: _Call) -> StepOutputs:
    """The graph's outputs."""
    arguments = (*call.rows, *call.readouts, *call.keys, *call.values)
    names = [argument.name for argument in session.get_inputs()]
    feeds = {name: tensor.numpy() for name, tensor in zip(names, arguments, strict=True)}
    outputs = [torch.from_numpy(output) for output in session.run(None, feeds)]
    argmax_ids, candidate_ids, entropy, soft_embedding, *new = outputs
    layers = len(call.keys)
    return StepOutputs(argmax_ids, candidate_ids, entropy, soft_embedding, new[:layers], new[layers:])


def _run_model(model: StepModel, call: _Call) -> StepOutputs:
    """The PyTorch model's outputs in its own precision."""
    dtype = model.embed_tokens.weight.dtype
    rows, readouts = (
        type(part)(*(x.to(dtype) if x.is_floating_point() else x for x in part)) for part in (call.rows, call.readouts)
    )
    outputs: StepOutputs = model(rows, readouts, [x.to(dtype) for x in call.keys], [x.to(dtype) for x in call.values])
    return outputs


@dataclass(frozen=True)
class _Comparison:
    """One call's differences to the float64 model, and the differences allowed."""

    tokens: int
    errors: dict[str, float]
    bounds: dict[str, float]
    mismatches: dict[str, int]
    wrong: dict[str, int]
    """Of the mismatches, those that are no ties."""


def _compare(call: _Call, graph: StepOutputs, model: StepModel, oracle: StepModel) -> _Comparison:
    single, double = _run_model(model, call), _run_model(oracle, call)
    errors, bounds = {}, {}
    for name in ("entropy", "soft_embedding", "keys", "values"):
        got, ours, true = (
            [x] if isinstance(x, Tensor) else x for x in (getattr(r, name) for r in (graph, single, double))
        )
        errors[name] = max(_distance(x, y) for x, y in zip(got, true, strict=True))
        largest = max((y.abs().max().item() for y in true if y.numel()), default=0.0)
        bounds[name] = _SLACK * max(_distance(x, y) for x, y in zip(ours, true, strict=True)) + _BAND * largest
    ids = {"argmax": graph.argmax_ids != double.argmax_ids, "candidate": graph.candidate_ids != double.candidate_ids}
    wrong = _untied(call, graph, model, oracle) if len(call.readouts.rows) else dict.fromkeys(ids, 0)
    mismatches = {name: int(differs.sum()) for name, differs in ids.items()}
    return _Comparison(call.rows.token_ids.numel(), errors, bounds, mismatches, wrong)


def _tensors(field: Tensor | list[Tensor]) -> list[Tensor]:
    return [field] if isinstance(field, Tensor) else field


def _distance(x: Tensor, y: Tensor) -> float:
    return (x.double() - y.double()).abs().max().item() if y.numel() else 0.0


def _untied(call: _Call, graph: StepOutputs, model: StepModel, oracle: StepModel) -> dict[str, int]:
    """Ids of the graph that no rounding within the allowance explains."""
    single, double = (_logits(each, call).double() for each in (model, oracle))
    allowed = _SLACK * _distance(single, double) + _BAND * model.config.final_logit_softcap
    chosen = double.gather(-1, graph.argmax_ids[..., None])[..., 0]
    argmax_wrong = chosen < double.max(dim=-1).values - 2 * allowed
    cumulative, rounded = double.softmax(-1).cumsum(-1), single.float().softmax(-1).cumsum(-1)
    above = cumulative.gather(-1, graph.candidate_ids[..., None])[..., 0]
    below = above - double.softmax(-1).gather(-1, graph.candidate_ids[..., None])[..., 0]
    allowed = _SLACK * _distance(rounded, cumulative) + _BAND
    uniform = call.readouts.uniform.double()
    candidate_wrong = (uniform < below - allowed) | (uniform > above + allowed)
    return {"argmax": int(argmax_wrong.sum()), "candidate": int(candidate_wrong.sum())}


def _logits(model: StepModel, call: _Call) -> Tensor:
    dtype = model.embed_tokens.weight.dtype
    rows = Rows(*(x.to(dtype) if x.is_floating_point() else x for x in call.rows))
    hidden, _, _ = model.transform(rows, [x.to(dtype) for x in call.keys], [x.to(dtype) for x in call.values])
    readouts = call.readouts
    return readout_logits(
        hidden.index_select(0, readouts.rows),
        model.embed_tokens.weight,
        readouts.temperature.to(dtype),
        readouts.guard,
        readouts.guarded_ids,
        model.config.final_logit_softcap,
    )


def _faults(comparisons: list[_Comparison]) -> list[str]:
    faults = [
        f"{name} differs by {error:.3g}, {comparison.bounds[name]:.3g} is allowed"
        for comparison in comparisons
        for name, error in comparison.errors.items()
        if not error <= comparison.bounds[name]
    ]
    return faults + [
        f"{count} {name} ids differ beyond ties"
        for comparison in comparisons
        for name, count in comparison.wrong.items()
        if count
    ]


def _summary(comparisons: list[_Comparison]) -> Verification:
    def worst(*names: str) -> float:
        return max(comparison.errors[name] for comparison in comparisons for name in names)

    return Verification(
        backend=f"onnxruntime {onnxruntime.__version__}",
        tokens=sum(comparison.tokens for comparison in comparisons),
        max_entropy_error=worst("entropy"),
        max_kv_error=worst("keys", "values"),
        max_soft_embedding_error=worst("soft_embedding"),
        argmax_mismatches=sum(comparison.mismatches["argmax"] for comparison in comparisons),
        candidate_mismatches=sum(comparison.mismatches["candidate"] for comparison in comparisons),
    )
