"""The step model against the reference implementation on random tiny models.

The yardstick is the reference itself in float64, which our model in float64 must meet far below float32's rounding. In
float32 both are samples of the same rounding noise: ours may be four times as far from the yardstick as the reference's
(one draw twice as bad as usual against one half as bad), plus a few units in the last place of the largest value.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DiffusionGemmaForBlockDiffusion, DynamicCache

from export.config import ModelConfig
from export.model import Readouts, StepModel
from export.rows import build_rows
from plugins_trt.canvas_readout.reference import softcapped_logits
from tests.runtime.tiny_models import TinyShape, reference_model, step_model
from tests.tiny import LAYERS

TEMPERATURE = 0.7
SLACK = 4
BAND = 2.0**-20
"""Of the largest value: 16 units in float32's last place."""
FINER = 2.0**-20
"""Share of the float32 bound that float64 must keep: it rounds 2^29 times finer."""
FULL = "full_attention"


def tiny(**changes: Any) -> TinyShape:
    """Three layers: with two, nothing shows the encoder's layer scalars, as the second norms the first one's away."""
    return TinyShape(**{"layer_types": LAYERS} | changes)


@dataclass(frozen=True)
class Case:
    """One model and one sequence."""

    catches: str
    shape: TinyShape = field(default_factory=lambda: tiny())
    prompt: int = 9
    chunk: int = 100
    """Tokens an encode call."""
    page_size: int = 4


CASES = [
    Case("a prompt shorter than the window: the window must not reach below position 0", prompt=3),
    Case("a prompt longer than the window, in chunks that straddle pages and the window", prompt=23, chunk=5),
    Case(
        "odd and prime sizes: nothing may rely on a power of two or on a divisor",
        tiny(
            canvas_length=11,
            vocab_size=59,
            text={
                "hidden_size": 37,
                "intermediate_size": 41,
                "head_dim": 6,
                "global_head_dim": 10,
                "num_attention_heads": 3,
                "num_key_value_heads": 3,
                "num_experts": 7,
                "top_k_experts": 3,
                "moe_intermediate_size": 13,
            },
        ),
        prompt=13,
        page_size=5,
    ),
    Case("more experts than pairs of token and expert: most experts get no token", tiny(text={"num_experts": 61})),
    Case("top-k = experts: every expert gets every token", tiny(text={"num_experts": 4, "top_k_experts": 4})),
    Case("full layers alone, V taken from K", tiny(layer_types=(FULL, FULL, FULL)), prompt=10),
    Case(
        "as many K/V heads as query heads in one layer type, one for all in the other",
        tiny(text={"num_key_value_heads": 4, "num_global_key_value_heads": 1}),
    ),
    Case(
        "rotation of half a head, other bases, an eighth of a page a chunk",
        tiny(
            text={
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 5000.0},
                }
            }
        ),
        prompt=17,
        chunk=1,
        page_size=8,
    ),
    Case("a window of two positions: canvases see one cached position in sliding layers", tiny(sliding_window=2)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.catches)
def test_step_model_agrees_with_the_reference(case: Case) -> None:
    reference = reference_model(case.shape, seed=7).float()
    ours = step_model(reference).float()
    config, dtype = ours.config, torch.float32
    single, ours_single = run_reference(reference, case), run_ours(ours, case)
    with float64():
        double = run_reference(reference.double(), case)
    ours_double = run_ours(ours.double(), case)
    assert single.keys() == ours_single.keys()
    assert len(single) == 2 * (2 * len(config.layers) + 2 * 2), "two canvases: K/V, logits and soft embeddings of each"
    for name, true in double.items():
        allowed = SLACK * distance(single[name], true) + BAND * true.abs().max().item()
        assert ours_single[name].dtype == dtype
        assert distance(ours_single[name], true) <= allowed, name
        assert distance(ours_double[name], true) <= FINER * allowed, name


@contextmanager
def float64() -> Iterator[None]:
    """The reference widens to float32 in places; here it widens to float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch, "float", torch.float64)
        yield


def distance(x: Tensor, y: Tensor) -> float:
    return (x.double() - y.double()).abs().max().item()


def sequence(shape: TinyShape, case: Case) -> tuple[Tensor, list[Tensor], list[list[Tensor]]]:
    """The prompt, the committed canvases and the two canvases denoised before each commit."""
    random = torch.Generator().manual_seed(3)

    def draw(length: int) -> Tensor:
        return torch.randint(shape.vocab_size, (length,), generator=random)

    S = shape.canvas_length
    return draw(case.prompt), [draw(S) for _ in range(2)], [[draw(S) for _ in range(2)] for _ in range(2)]


@torch.no_grad()
def run_reference(model: DiffusionGemmaForBlockDiffusion, case: Case) -> dict[str, Tensor]:
    """K/V of what was encoded last, logits and soft embeddings of each step; the second step is self-conditioned."""
    prompt, commits, canvases = sequence(case.shape, case)
    cache = DynamicCache(config=model.config.get_text_config())
    found: dict[str, Tensor] = {}
    for block, encoded in enumerate((prompt, commits[0])):
        model.model.encoder(input_ids=encoded[None], past_key_values=cache)
        for index, layer in enumerate(cache.layers):
            # Sliding layers keep the last `window - 1` positions.
            length = min(len(encoded), layer.keys.shape[2])
            found[f"block {block} keys {index}"] = layer.keys[0, :, -length:].transpose(0, 1).clone()
            found[f"block {block} values {index}"] = layer.values[0, :, -length:].transpose(0, 1).clone()
        conditioning = None
        for step, canvas in enumerate(canvases[block]):
            logits = model(
                decoder_input_ids=canvas[None], past_key_values=cache, self_conditioning_logits=conditioning
            ).logits
            conditioning = logits / TEMPERATURE
            embedding = model.model.decoder.embed_tokens.weight
            # The exact root: the reference's own scale stays rounded to float32, which its norm takes out again.
            soft = conditioning.softmax(-1) @ embedding * embedding.shape[1] ** 0.5
            found[f"block {block} step {step} logits"] = logits[0]
            found[f"block {block} step {step} soft embedding"] = soft[0]
    return found


@torch.no_grad()
def run_ours(model: StepModel, case: Case) -> dict[str, Tensor]:
    """The same of the step model, over a pool of shuffled pages."""
    config, dtype = model.config, model.embed_tokens.weight.dtype
    prompt, commits, canvases = sequence(case.shape, case)
    pages = torch.randperm(-(-(case.prompt + 2 * config.canvas_length) // case.page_size) + 3)
    pools = Pools(config, len(pages), case.page_size, dtype)
    found: dict[str, Tensor] = {}
    position = 0
    for block, encoded in enumerate((prompt, commits[0])):
        new: list[list[Tensor]] = []
        for chunk in encoded.split(case.chunk):
            rows = build_rows(config, chunk, position, False, pages)._replace(
                self_conditioning=torch.zeros(1, len(chunk), config.hidden_size, dtype=dtype)
            )
            _, keys, values = model.transform(rows, pools.keys, pools.values)
            pools.write(pages, position, keys, values)
            new.append([x[0] for x in keys + values])
            position += len(chunk)
        for index, layer in enumerate(config.layers):
            length = min(len(encoded), case.shape.sliding_window - 1) if layer.sliding else len(encoded)
            if layer.sliding and position < case.shape.sliding_window:
                length = len(encoded)
            for kind, offset in (("keys", 0), ("values", len(config.layers))):
                whole = torch.cat([chunk[index + offset] for chunk in new])
                found[f"block {block} {kind} {index}"] = whole[-length:]
        soft = torch.zeros(config.canvas_length, config.hidden_size, dtype=dtype)
        for step, canvas in enumerate(canvases[block]):
            rows = build_rows(config, canvas, position, True, pages, soft)
            hidden, _, _ = model.transform(rows, pools.keys, pools.values)
            logits = softcapped_logits(hidden[0], model.embed_tokens.weight, config.final_logit_softcap)
            soft = model(rows, readouts(config, dtype), pools.keys, pools.values).soft_embedding[0]
            found[f"block {block} step {step} logits"] = logits
            found[f"block {block} step {step} soft embedding"] = soft
    return found


class Pools:
    """K/V pages of all layers."""

    def __init__(self, config: ModelConfig, pages: int, page_size: int, dtype: torch.dtype) -> None:
        self.page_size = page_size
        sizes = [(pages, page_size, layer.kv_heads, layer.head_dim) for layer in config.layers]
        self.keys = [torch.zeros(size, dtype=dtype) for size in sizes]
        self.values = [torch.zeros(size, dtype=dtype) for size in sizes]

    def write(self, pages: Tensor, start: int, keys: list[Tensor], values: list[Tensor]) -> None:
        positions = start + torch.arange(keys[0].shape[1])
        for pool, new in zip(self.keys + self.values, keys + values, strict=True):
            pool[pages[positions // self.page_size], positions % self.page_size] = new[0]


def readouts(config: ModelConfig, dtype: torch.dtype) -> Readouts:
    return Readouts(
        rows=torch.tensor([0]),
        temperature=torch.tensor([TEMPERATURE], dtype=dtype),
        uniform=torch.zeros(1, config.canvas_length, dtype=dtype),
        guard=torch.tensor([False]),
        guarded_ids=torch.tensor([], dtype=torch.int64),
    )


@pytest.mark.parametrize(
    ("wrong", "right", "where"),
    [
        ("layer_scalar", "encoder_layer_scalar", "block 0 step 0 logits"),
        ("encoder_layer_scalar", "layer_scalar", "block 0 keys 2"),
    ],
)
def test_a_wrong_layer_scalar_is_noticed(wrong: str, right: str, where: str) -> None:
    """The test above can fail: with one pass' scalars in the other, results leave the bound by far."""
    case = CASES[0]
    reference = reference_model(case.shape, seed=7).float()
    ours = step_model(reference).float()
    for layer in ours.layers:
        getattr(layer, wrong).copy_(getattr(layer, right))
    true = run_reference(reference, case)[where]
    assert distance(run_ours(ours, case)[where], true) > 1000 * BAND * true.abs().max().item()
