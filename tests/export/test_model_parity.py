"""The step model against the reference implementation on random tiny models.

Both round, so how far apart may they be? Their rounding noise is sampled: a model whose hidden dimensions are put
into another order has the same results, but adds in another order. Over some orders, the reference's distance in
float32 from itself in float64 is what an implementation of this model cannot help, and ours may differ from that by
chance alone: the ratio of two mean squares of n normal errors has the F distribution with (n, n) degrees of freedom.
One error an order is counted, as if all numbers of a position rounded alike; they do not, which is the slack. In
float64 both round 2^29 times finer, so there our distance from the reference is that of two such noises, 2^-29 in size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
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
ORDERS = 12
"""Of twelve errors the F distribution finds 5 times the reference's noise unlikely; ours is up to 2.2 times it."""
UNLIKELY = 1e-6
"""For one of the 2000 positions that are compared."""
FINER = 2.0**-29
"""Unit roundoff of float64 over that of float32."""
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
    noise = measure(case)
    layers = len(case.shape.layer_types)
    assert len(noise.reference) == 2 * (2 * layers + 2 * 2), "two canvases: K/V, logits and soft embeddings of each"
    for name, usual in noise.reference.items():
        assert chance(noise.ours[name] / usual) > UNLIKELY, name
        assert chance(noise.ours_in_float64[name] / (2 * FINER**2 * usual)) > UNLIKELY, name


@dataclass(frozen=True)
class Noise:
    """Mean squares, over orders and a position's numbers, of distances from the reference in float64; by result."""

    reference: dict[str, Tensor]
    ours: dict[str, Tensor]
    ours_in_float64: dict[str, Tensor]


def measure(case: Case, change: Callable[[StepModel], object] = lambda model: None) -> Noise:
    """The noise over all orders, of our model with a `change`."""
    single = reference_model(case.shape, seed=7).float()
    weights = {name: tensor.clone() for name, tensor in single.state_dict().items()}
    random, hidden_size = torch.Generator().manual_seed(5), single.config.get_text_config().hidden_size
    noise = Noise({}, {}, {})
    for _ in range(ORDERS):
        put_hidden_in_order(single.float(), weights, torch.randperm(hidden_size, generator=random))
        ours = step_model(single).float()
        change(ours)
        found, ours_found = run_reference(single, case), run_ours(ours, case)
        with float64():
            true = run_reference(single.double(), case)
        assert all(tensor.dtype is torch.float32 for tensor in ours_found.values())
        add(noise.reference, found, true)
        add(noise.ours, ours_found, true)
        add(noise.ours_in_float64, run_ours(ours.double(), case), true)
    return noise


def add(squares: dict[str, Tensor], found: dict[str, Tensor], true: dict[str, Tensor]) -> None:
    assert found.keys() == true.keys()
    for name, tensor in true.items():
        distances = (found[name].double() - tensor).flatten(1).square().mean(1) / ORDERS
        squares[name] = squares.get(name, torch.zeros_like(distances)) + distances


@torch.no_grad()
def put_hidden_in_order(model: DiffusionGemmaForBlockDiffusion, weights: dict[str, Tensor], order: Tensor) -> None:
    """Give `model` these weights with the dimensions of its hidden states in another order."""
    without = ("q_norm.weight", "k_norm.weight", "per_expert_scale", "layer_scalar")
    for name, tensor in model.state_dict().items():
        if "vision" in name or name.endswith(without):
            continue
        writes = name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj"))
        tensor.copy_(weights[name].index_select(-2 if writes else -1, order))


def chance(ratios: Tensor) -> float:
    """How likely a ratio of mean squares as large as the largest of these is, of two times `ORDERS` normal errors.

    The tail of the F distribution, an incomplete beta function (Abramowitz & Stegun 26.6.2), which for an even number
    of errors is a sum of binomial probabilities (26.5.24).
    """
    p, draws = 1 / (1 + ratios.max().item()), ORDERS - 1
    return sum(math.comb(draws, k) * p**k * (1 - p) ** (draws - k) for k in range(ORDERS // 2, ORDERS))


@contextmanager
def float64() -> Iterator[None]:
    """The reference widens to float32 in places; here it widens to float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch, "float", torch.float64)
        yield


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
    """The test above can fail: with one pass' scalars in the other, results leave the noise by far."""

    def mistake(model: StepModel) -> None:
        for layer in model.layers:
            getattr(layer, wrong).copy_(getattr(layer, right))

    noise = measure(CASES[0], mistake)
    assert chance(noise.ours[where] / noise.reference[where]) < UNLIKELY


def test_errors_of_float32_alone_are_noticed() -> None:
    """It can fail by far less, too: a last norm that is off by 2^-16, where bfloat16 would be off by up to 2^-9."""
    noise = measure(CASES[0], lambda model: model.norm.weight.data.mul_(1 + 2**-16))
    assert chance(noise.ours["block 0 step 0 logits"] / noise.reference["block 0 step 0 logits"]) < UNLIKELY
