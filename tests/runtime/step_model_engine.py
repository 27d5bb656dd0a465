"""An engine over the PyTorch step model with the operations' references, for tests of the loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from export.config import ModelConfig
from export.model import Readouts, Rows, StepModel, StepOutputs
from runtime.bundle import GenerationDefaults, LayerFacts, ModelFacts
from runtime.engines.protocol import DenoiseRow, EncodeRow, PoolGeometry, Prefix, Readout
from runtime.events import Event
from runtime.generation import Encode, Generation


class StepModelEngine:
    """`runtime.engines.protocol.Engine` over a StepModel; one row at a time."""

    def __init__(self, model: StepModel, defaults: GenerationDefaults, pool: PoolGeometry) -> None:
        self.facts, self.pool = model_facts(model.config), pool
        self._model, self._end_token_ids = model, torch.tensor(defaults.end_token_ids, dtype=torch.int64)
        shapes = [
            (pool.sliding_pages if layer.sliding else pool.full_pages, pool.page_size, layer.kv_heads, layer.head_dim)
            for layer in model.config.layers
        ]
        dtype, config = model.embed_tokens.weight.dtype, model.config
        self.keys = [torch.zeros(shape, dtype=dtype) for shape in shapes]
        self.values = [torch.zeros(shape, dtype=dtype) for shape in shapes]
        self.self_conditioning = torch.zeros(pool.canvas_slots, config.canvas_length, config.hidden_size, dtype=dtype)

    def soil(self, seed: int) -> None:
        """Fill all memory that carries over from one request to the next with noise."""
        generator = torch.Generator().manual_seed(seed)
        for tensor in (*self.keys, *self.values, self.self_conditioning):
            tensor.normal_(std=10.0, generator=generator)

    @torch.no_grad()
    def encode(self, rows: Sequence[EncodeRow]) -> None:
        for row in rows:
            tokens = torch.from_numpy(row.token_ids)[None]
            outputs = self._run(tokens, row.start, row.prefix, None, _no_readouts(tokens.shape[1], self._end_token_ids))
            self._write(row, outputs)

    @torch.no_grad()
    def denoise(self, rows: Sequence[DenoiseRow]) -> list[Readout]:
        return [self._denoise(row) for row in rows]

    def close(self) -> None:
        pass

    def _denoise(self, row: DenoiseRow) -> Readout:
        condition = self.self_conditioning[row.slot]
        readouts = Readouts(
            rows=torch.tensor([0]),
            temperature=torch.tensor([row.temperature]),
            uniform=torch.from_numpy(row.uniform)[None],
            guard=torch.tensor([row.guard_first]),
            guarded_ids=self._end_token_ids,
        )
        condition = torch.zeros_like(condition) if row.first_step else condition
        outputs = self._run(torch.from_numpy(row.canvas)[None], row.start, row.prefix, condition, readouts)
        self.self_conditioning[row.slot] = outputs.soft_embedding[0]
        return Readout(
            outputs.argmax_ids[0].numpy(), outputs.candidate_ids[0].numpy(), outputs.entropy[0].float().numpy()
        )

    def _run(
        self, tokens: Tensor, start: int, prefix: Prefix, condition: Tensor | None, readouts: Readouts
    ) -> StepOutputs:
        denoise, window, length = condition is not None, self._model.config.sliding_window, tokens.shape[1]
        position = start + torch.arange(length)[None]
        end = torch.full_like(position, start + length) if denoise else position + 1
        # A canvas sees the window's last cached positions from each of its places alike.
        oldest = torch.full_like(position, start - window + 1) if denoise else position - window + 1
        rows = Rows(
            token_ids=tokens,
            start=torch.tensor([start]),
            denoise=torch.tensor([denoise]),
            sliding_kv_start=oldest.clamp(min=0),
            sliding_kv_end=end,
            full_kv_start=torch.zeros_like(position),
            full_kv_end=end,
            sliding_page_table=torch.tensor([prefix.sliding_pages]),
            sliding_page_base=torch.tensor([prefix.sliding_base]),
            full_page_table=torch.tensor([prefix.full_pages]),
            full_page_base=torch.tensor([0]),
            self_conditioning=self.self_conditioning.new_zeros(1, length, self._model.config.hidden_size)
            if condition is None
            else condition[None],
        )
        outputs: StepOutputs = self._model(rows, readouts, self.keys, self.values)
        return outputs

    def _write(self, row: EncodeRow, outputs: StepOutputs) -> None:
        positions = row.start + np.arange(len(row.token_ids))
        for index, layer in enumerate(self._model.config.layers):
            pages, base = (
                (row.prefix.sliding_pages, row.prefix.sliding_base) if layer.sliding else (row.prefix.full_pages, 0)
            )
            inside = positions >= base
            page, slot = np.divmod(positions[inside] - base, self.pool.page_size)
            place = torch.from_numpy(np.array(pages)[page]), torch.from_numpy(slot)
            self.keys[index][place] = outputs.keys[index][0, torch.from_numpy(inside)]
            self.values[index][place] = outputs.values[index][0, torch.from_numpy(inside)]


@dataclass(frozen=True)
class Residence:
    """Which of the engine's memory one request gets, in a test without a scheduler."""

    slot: int
    sliding_pages: tuple[int, ...]
    """Page of each page-sized stretch of the sequence, as if nothing were released."""
    full_pages: tuple[int, ...]

    def prefix(self, start: int, window: int, page_size: int) -> Prefix:
        """The pages for a row at `start`: of the sliding ones, those from the oldest position that the row can see."""
        first = max(0, start - window + 1) // page_size
        return Prefix(self.sliding_pages[first:], first * page_size, self.full_pages)


def run(generation: Generation, engine: StepModelEngine, residence: Residence) -> list[Event]:
    """Drive one request to its end."""
    events = generation.start(queue_seconds=0.0)
    window, page_size = engine.facts.sliding_window, engine.pool.page_size
    while not generation.finished:
        call = generation.next_call()
        prefix = residence.prefix(call.start, window, page_size)
        if isinstance(call, Encode):
            engine.encode([EncodeRow(call.token_ids, call.start, prefix)])
            events += generation.encoded(seconds=0.0)
        else:
            row = DenoiseRow(
                canvas=call.canvas,
                start=call.start,
                prefix=prefix,
                slot=residence.slot,
                first_step=call.first_step,
                temperature=call.temperature,
                uniform=call.uniform,
                guard_first=call.guard_first,
            )
            events += generation.denoised(engine.denoise([row])[0], seconds=0.0, draft=False)
    return events


def model_facts(config: ModelConfig) -> ModelFacts:
    """The facts that an exporter would write of a model."""
    return ModelFacts(
        name="tiny",
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        canvas_length=config.canvas_length,
        sliding_window=config.sliding_window,
        max_position=config.max_position,
        layers=tuple(LayerFacts(layer.sliding, layer.kv_heads, layer.head_dim) for layer in config.layers),
    )


def _no_readouts(length: int, end_token_ids: Tensor) -> Readouts:
    return Readouts(
        rows=torch.tensor([], dtype=torch.int64),
        temperature=torch.zeros(0),
        uniform=torch.zeros(0, length),
        guard=torch.tensor([], dtype=torch.bool),
        guarded_ids=end_token_ids,
    )
