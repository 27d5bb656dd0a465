"""DiffusionGemma's text backbone as one step module, written for tracing.

A step is `B` rows of `S` tokens, and a row is one of two kinds: an encode row (a prompt chunk or a committed canvas,
whose K/V the caller keeps) or a denoise row (a canvas). The two share all weights but a scalar a layer; beyond that
their kind shows only in the attention intervals, in the self-conditioning and in which rows ask for a readout.
Parameter names are those of the checkpoint under `model.decoder.`, with `encoder_layer_scalar` for the encoder's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.config import LayerConfig, ModelConfig
from plugins_trt.operations import REFERENCE, Operations


class Rows(NamedTuple):
    """`B` rows of `S` tokens and what each of them sees; all int64 but `denoise` and `self_conditioning`."""

    token_ids: Tensor
    """`[B, S]`."""
    start: Tensor
    """Absolute position of each row's first token, `[B]`."""
    denoise: Tensor
    """True for denoise rows, False for encode rows, `[B]` bool."""
    sliding_kv_start: Tensor
    sliding_kv_end: Tensor
    full_kv_start: Tensor
    full_kv_end: Tensor
    """Half-open intervals of the absolute positions a token sees, per layer type, `[B, S]` each."""
    sliding_page_table: Tensor
    sliding_page_base: Tensor
    full_page_table: Tensor
    full_page_base: Tensor
    """Pages of each row's prefix, `[B, P]`, and the position of the first slot, `[B]`, per layer type."""
    self_conditioning: Tensor
    """Soft embedding of the previous denoising step, zeros at the first, ignored for encode rows, `[B, S, H]`."""


class Readouts(NamedTuple):
    """Which rows ask for a readout, and the numbers it needs."""

    rows: Tensor
    """Indices into the rows, `[R]` int64."""
    temperature: Tensor
    """`[R]` float32."""
    uniform: Tensor
    """`[R, S]` float32 in `[0, 1)`."""
    guard: Tensor
    """Rows whose position 0 must not hold an end token, `[R]` bool."""
    guarded_ids: Tensor
    """The end tokens, `[G]` int64."""


class StepOutputs(NamedTuple):
    """What a step returns; the K/V lists hold one `[B, S, kv_heads, head_dim]` tensor a layer."""

    argmax_ids: Tensor
    candidate_ids: Tensor
    entropy: Tensor
    soft_embedding: Tensor
    keys: list[Tensor]
    values: list[Tensor]


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps)` in float32 or wider, times a weight where there is one (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, eps: float, weighted: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size)) if weighted else None

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        # Ones instead of no weight: traced without one, ONNX gets ones in the shape of `x`, which is 5 times slower.
        weight = torch.ones(x.shape[-1], dtype=wide, device=x.device) if self.weight is None else self.weight.to(wide)
        return F.rms_norm(x.to(wide), x.shape[-1:], weight, self.eps).to(x.dtype)


class GatedFeedForward(nn.Module):
    """`down(gelu_tanh(gate(x)) * up(x))`."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gated: Tensor = self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))
        return gated


class SelfConditioning(nn.Module):
    """Adds what the previous denoising step believed, as a soft embedding, to the canvas' embeddings."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.pre_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.post_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, weighted=False)

    def forward(self, embeddings: Tensor, soft_embedding: Tensor) -> Tensor:
        normed = self.pre_norm(soft_embedding)
        signal = self.down_proj(F.gelu(self.gate_proj(normed), approximate="tanh") * self.up_proj(normed))
        conditioned: Tensor = self.post_norm(embeddings + signal)
        return conditioned


def inverse_frequencies(layer: LayerConfig) -> Tensor:
    """RoPE frequencies of a layer, `[head_dim / 2]` float32 (Su et al. 2021).

    The "proportional" kind spreads its frequencies over the whole head but rotates only the first `rotary_fraction`
    of them; the others have frequency 0 and stay as they are.
    """
    rotated = int(layer.rotary_fraction * layer.head_dim // 2)
    exponents = torch.arange(0, 2 * rotated, 2, dtype=torch.float32, device="cpu") / layer.head_dim
    return F.pad(1.0 / (layer.rope_theta**exponents), (0, layer.head_dim // 2 - rotated))


def derived_constants(config: ModelConfig) -> dict[str, Tensor]:
    """Buffers that follow from the config and stand in no checkpoint, by name, float32."""
    constants = {"embedding_scale": torch.tensor(config.embedding_scale, dtype=torch.float32, device="cpu")}
    for layer in config.layers:
        constants[f"{'sliding' if layer.sliding else 'full'}_inverse_frequencies"] = inverse_frequencies(layer)
    return constants


class Attention(nn.Module):
    """Grouped-query attention over the paged prefix and the row; full layers take V from the K projection."""

    def __init__(self, config: ModelConfig, layer: LayerConfig, operations: Operations) -> None:
        super().__init__()
        self.operations, self.head_dim = operations, layer.head_dim
        hidden, kv_size = config.hidden_size, layer.kv_heads * layer.head_dim
        self.q_proj = nn.Linear(hidden, layer.heads * layer.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, kv_size, bias=False)
        self.v_proj = nn.Linear(hidden, kv_size, bias=False) if layer.sliding else None
        self.o_proj = nn.Linear(layer.heads * layer.head_dim, hidden, bias=False)
        self.q_norm = RMSNorm(layer.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(layer.head_dim, config.rms_norm_eps)
        self.v_norm = RMSNorm(layer.head_dim, config.rms_norm_eps, weighted=False)

    def forward(self, x: Tensor, view: _LayerView, key_pool: Tensor, value_pool: Tensor) -> tuple[Tensor, ...]:
        heads = (-1, self.head_dim)
        query, key = self.q_proj(x).unflatten(-1, heads), self.k_proj(x).unflatten(-1, heads)
        value = key if self.v_proj is None else self.v_proj(x).unflatten(-1, heads)
        query, key, value = self._normed(query, key, value, view)
        attended = self.operations.canvas_attention(query, key, value, key_pool, value_pool, *view.visibility)
        return self.o_proj(attended.flatten(2)), key, value

    def _normed(self, query: Tensor, key: Tensor, value: Tensor, view: _LayerView) -> tuple[Tensor, Tensor, Tensor]:
        turn = view.cosine, view.sine
        if self.operations.head_norm is not None:
            weights = self.q_norm.weight, self.k_norm.weight
            return self.operations.head_norm(query, key, value, *weights, *turn, self.q_norm.eps)
        rotate = self.operations.rotate
        return rotate(self.q_norm(query), *turn), rotate(self.k_norm(key), *turn), self.v_norm(value)


class Router(nn.Module):
    """Chooses each token's experts from the raw residual."""

    def __init__(self, config: ModelConfig, operations: Operations) -> None:
        super().__init__()
        self.operations, self.top_k, self.inverse_root = operations, config.top_k_experts, config.hidden_size**-0.5
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, weighted=False)
        self.scale = nn.Parameter(torch.ones(config.hidden_size))
        self.proj = nn.Linear(config.hidden_size, config.experts, bias=False)
        self.per_expert_scale = nn.Parameter(torch.ones(config.experts))

    def forward(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.proj(self.norm(residual) * self.scale * self.inverse_root)
        return self.operations.expert_routing(logits, self.per_expert_scale, self.top_k)


class Experts(nn.Module):
    """The packed weights of a layer's experts."""

    def __init__(self, config: ModelConfig, operations: Operations) -> None:
        super().__init__()
        self.operations = operations
        sizes = config.experts, config.expert_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(sizes[0], 2 * sizes[1], sizes[2]))
        self.down_proj = nn.Parameter(torch.empty(sizes[0], sizes[2], sizes[1]))

    def forward(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        return self.operations.expert_ffn(x, expert_ids, expert_weights, self.gate_up_proj, self.down_proj)


class Layer(nn.Module):
    """Attention, then a dense and a mixture-of-experts feed-forward side by side."""

    def __init__(self, config: ModelConfig, layer: LayerConfig, operations: Operations) -> None:
        super().__init__()
        norm = (config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer, operations)
        self.mlp = GatedFeedForward(config.hidden_size, config.intermediate_size)
        self.router = Router(config, operations)
        self.experts = Experts(config, operations)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(*norm), RMSNorm(*norm)
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = RMSNorm(*norm), RMSNorm(*norm)
        self.pre_feedforward_layernorm_2 = RMSNorm(*norm)
        self.post_feedforward_layernorm_1, self.post_feedforward_layernorm_2 = RMSNorm(*norm), RMSNorm(*norm)
        self.layer_scalar = nn.Buffer(torch.ones(1))
        self.encoder_layer_scalar = nn.Buffer(torch.ones(1))

    def forward(
        self, x: Tensor, denoise: Tensor, view: _LayerView, key_pool: Tensor, value_pool: Tensor
    ) -> tuple[Tensor, ...]:
        attended, key, value = self.self_attn(self.input_layernorm(x), view, key_pool, value_pool)
        residual = x + self.post_attention_layernorm(attended)
        mixed = residual + self.post_feedforward_layernorm(self._feed_forward(residual))
        scalar = torch.where(denoise[:, None, None], self.layer_scalar, self.encoder_layer_scalar)
        return mixed * scalar, key, value

    def _feed_forward(self, residual: Tensor) -> Tensor:
        dense = self.post_feedforward_layernorm_1(self.mlp(self.pre_feedforward_layernorm(residual)))
        tokens = residual.flatten(0, 1)
        expert_ids, expert_weights = self.router(tokens)
        sparse = self.experts(self.pre_feedforward_layernorm_2(tokens), expert_ids, expert_weights)
        combined: Tensor = dense + self.post_feedforward_layernorm_2(sparse.view_as(residual))
        return combined


class _LayerView(NamedTuple):
    """What all layers of one type share in a step."""

    cosine: Tensor
    sine: Tensor
    visibility: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    """page_table, page_base, start, kv_start, kv_end."""


class StepModel(nn.Module):
    """One step over `B` rows: embeddings, layers, and the readout of the rows that ask for it."""

    embedding_scale: Tensor
    sliding_inverse_frequencies: Tensor
    full_inverse_frequencies: Tensor

    def __init__(self, config: ModelConfig, operations: Operations = REFERENCE) -> None:
        super().__init__()
        self.config, self.operations = config, operations
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, layer, operations) for layer in config.layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_conditioning = SelfConditioning(config)
        for name, constant in derived_constants(config).items():
            self.register_buffer(name, constant, persistent=False)

    def forward(
        self, rows: Rows, readouts: Readouts, key_pools: list[Tensor], value_pools: list[Tensor]
    ) -> StepOutputs:
        """Run the step.

        Args:
            rows: the tokens and what they see.
            readouts: which rows ask for a readout.
            key_pools, value_pools: a layer's pages, `[pages, page_size, kv_heads, head_dim]`.
        """
        hidden, keys, values = self.transform(rows, key_pools, value_pools)
        readout = self.operations.canvas_readout(
            hidden.index_select(0, readouts.rows),
            self.embed_tokens.weight,
            readouts.temperature,
            readouts.uniform,
            readouts.guard,
            readouts.guarded_ids,
            self.config.final_logit_softcap,
            self.config.embedding_scale,
        )
        return StepOutputs(*readout, keys, values)

    def transform(
        self, rows: Rows, key_pools: list[Tensor], value_pools: list[Tensor]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The rows' final normed states `[B, S, H]` and each layer's own K and V."""
        views = {sliding: self._view(rows, sliding) for sliding in {layer.sliding for layer in self.config.layers}}
        x, keys, values = self._embed(rows), [], []
        for layer, facts, key_pool, value_pool in zip(
            self.layers, self.config.layers, key_pools, value_pools, strict=True
        ):
            x, key, value = layer(x, rows.denoise, views[facts.sliding], key_pool, value_pool)
            keys.append(key)
            values.append(value)
        return self.norm(x), keys, values

    def _embed(self, rows: Rows) -> Tensor:
        embeddings = self.embed_tokens(rows.token_ids)
        embeddings = embeddings * self.embedding_scale.to(embeddings.dtype)
        conditioned = self.self_conditioning(embeddings, rows.self_conditioning)
        return torch.where(rows.denoise[:, None, None], conditioned, embeddings)

    def _view(self, rows: Rows, sliding: bool) -> _LayerView:
        frequencies = self.sliding_inverse_frequencies if sliding else self.full_inverse_frequencies
        positions = rows.start[:, None] + torch.arange(rows.token_ids.shape[1], device=rows.start.device)
        # Angles in float32 or wider, whatever the weights' dtype: bfloat16 cannot tell positions past 256 apart.
        wide = torch.promote_types(frequencies.dtype, torch.float32)
        angles = positions.unsqueeze(-1).to(wide) * frequencies.to(wide)
        dtype = self.embed_tokens.weight.dtype
        if sliding:
            pages, interval = (
                (rows.sliding_page_table, rows.sliding_page_base),
                (rows.sliding_kv_start, rows.sliding_kv_end),
            )
        else:
            pages, interval = (rows.full_page_table, rows.full_page_base), (rows.full_kv_start, rows.full_kv_end)
        return _LayerView(angles.cos().to(dtype), angles.sin().to(dtype), (*pages, rows.start, *interval))
