"""The meaning of the canvas readout in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCKED = -1e30
"""Added to a blocked logit: finite, so that its share of the entropy is 0 and not NaN."""


def softcapped_logits(hidden: Tensor, embedding: Tensor, softcap: float) -> Tensor:
    """Logits of the tied head, float32 or wider, within `(-softcap, softcap)`: `[..., H]`, `[V, H]` -> `[..., V]`."""
    logits = hidden @ embedding.T
    return softcap * torch.tanh(logits.to(torch.promote_types(logits.dtype, torch.float32)) / softcap)


def readout_logits(
    hidden: Tensor, embedding: Tensor, temperature: Tensor, guard: Tensor, guarded_ids: Tensor, softcap: float
) -> Tensor:
    """Logits whose softmax is read out, `[R, S, V]`: divided by the temperature, guarded tokens blocked."""
    scaled = softcapped_logits(hidden, embedding, softcap) / temperature[:, None, None]
    blocked = torch.zeros(embedding.shape[0], device=hidden.device).index_fill(0, guarded_ids, BLOCKED)
    first = scaled[:, :1] + torch.where(guard[:, None, None], blocked, 0.0)
    return torch.cat((first, scaled[:, 1:]), dim=1)


def canvas_readout(
    hidden: Tensor,
    embedding: Tensor,
    temperature: Tensor,
    uniform: Tensor,
    guard: Tensor,
    guarded_ids: Tensor,
    softcap: float,
    embedding_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Reduce the vocabulary axis of `R` canvases to what the diffusion loop needs.

    With `p = softmax(logits / temperature)` in float32: the most probable token; the candidate by inverse CDF, the
    first token whose cumulative probability exceeds `uniform` times the total; the entropy of `p`; and the embedding
    expected under `p`, which conditions the next denoising step.

    Args:
        hidden: final normed states, `[R, S, H]`.
        embedding: tied embedding table, `[V, H]`.
        temperature: of each canvas' denoising step, `[R]` float32, positive.
        uniform: one number in `[0, 1)` a position, `[R, S]` float32.
        guard: canvases whose position 0 must not hold a guarded token, `[R]` bool.
        guarded_ids: the guarded tokens (the end tokens), `[G]` int64.
        softcap: bound of the logits.
        embedding_scale: factor of embedded tokens, `sqrt(H)`.

    Returns:
        `(argmax_ids [R, S], candidate_ids [R, S], entropy [R, S], soft_embedding [R, S, H])`: int64 ids, the entropy in
        float32 nats, the embedding in the table's dtype.
    """
    scaled = readout_logits(hidden, embedding, temperature, guard, guarded_ids, softcap)
    log_p = torch.log_softmax(scaled, dim=-1)
    p = log_p.exp()
    entropy = -(p * log_p).sum(dim=-1)
    cumulative = p.cumsum(dim=-1)
    total = cumulative[..., -1:]
    # Rounding may lift the threshold to the total; kept below it, the candidate has a positive probability.
    threshold = torch.minimum(uniform.unsqueeze(-1) * total, total * (1 - 2**-23))
    candidate = (cumulative <= threshold).sum(dim=-1)
    scale = torch.tensor(embedding_scale, dtype=embedding.dtype, device=embedding.device)
    soft_embedding = (p.to(embedding.dtype) @ embedding) * scale
    return scaled.argmax(dim=-1), candidate, entropy, soft_embedding
