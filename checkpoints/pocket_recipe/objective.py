"""The training objective: recover clean canvases from uniform noise, and predict the prefix's next tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoints.pocket_recipe.passes import Prefix, denoise, encode
from checkpoints.pocket_recipe.tokenizer import PAD
from export.model import StepModel
from plugins_trt.canvas_readout.reference import softcapped_logits

PADDING_WEIGHT = 0.06
"""Of a canvas position after the answer: there are ten times as many of them as of others."""
NEXT_TOKEN_WEIGHT = 0.1
CLEAN_PADDING_SHARE = 0.3
"""Of rows whose padding is left clean, as it is after the first denoising steps of a short answer."""
FULL_NOISE_SHARE = 0.13
"""Of rows that are all noise, as every canvas is at its first step."""
PROPOSED_SHARE = 0.5
"""Of self-conditioned rows that show the model's own candidates where they show no noise, as every canvas after the
first step does: a model that has only ever seen the truth there trusts its own mistakes and builds on them."""


class Clean(NamedTuple):
    """A batch on the device, all int64."""

    prefix: Tensor
    length: Tensor
    canvas: Tensor


class Losses(NamedTuple):
    """What a step of training reports."""

    total: Tensor
    next_token: Tensor
    rows: Tensor
    """Mean loss of each row's answer, `[B]`."""


class Noised(NamedTuple):
    """A canvas as a denoising step sees it, and as the step before saw it."""

    canvas: Tensor
    before: Tensor
    noisy: Tensor
    """Where `canvas` is noise, bool."""


class Belief(NamedTuple):
    """What a denoising step makes of a canvas."""

    soft_embedding: Tensor
    """`[B, C, H]`."""
    probabilities: Tensor
    """Of the tokens, `[B, C, V]` float32."""
    entropy: Tensor
    """Of that distribution, nats, `[B, C]`."""


def corrupt(canvas: Tensor, vocabulary: int, generator: torch.Generator) -> Noised:
    """Replace tokens by uniform random ones with a probability `t ~ U(0, 1)` a row, a part of the rows wholly.

    The canvas of the step before is noisier: what is noise now was other noise then, and so was part of the rest.
    """

    def uniform(*size: int) -> Tensor:
        return torch.rand(size, generator=generator, device=canvas.device)

    B, C = canvas.shape
    level = (uniform(B, 1) / (1 - FULL_NOISE_SHARE)).clamp(max=1)
    noisy = uniform(B, C) < level
    noisy &= ~((canvas == PAD) & (uniform(B, 1) < CLEAN_PADDING_SHARE))
    noisier = noisy | (uniform(B, C) < uniform(B, 1))
    tokens = torch.randint(vocabulary, (2, B, C), generator=generator, device=canvas.device)
    return Noised(torch.where(noisy, tokens[0], canvas), torch.where(noisier, tokens[1], canvas), noisy)


def draw_candidates(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Tokens by inverse CDF, `[B, C, V]`, `[B, C]` -> `[B, C]`: as many as lie wholly below the uniform number.

    Never compiled: a running sum over the vocabulary gains nothing from it.
    """
    below = probabilities.cumsum(-1) <= uniform[..., None]
    return below.sum(-1).clamp(max=probabilities.shape[-1] - 1)


def propose(noised: Noised, belief: Belief, generator: torch.Generator) -> Tensor:
    """The canvas with candidates where a step may have accepted them: not noise, and of an entropy below a row's bound.

    Positions that the step was unsure of keep the truth: candidates drawn there one by one make no text together.
    """
    B, device = len(noised.canvas), noised.canvas.device
    chosen, bound = torch.rand(2, B, 1, generator=generator, device=device)
    uniform = torch.rand(noised.canvas.shape, generator=generator, device=device)
    accepted = (belief.entropy < bound) & (chosen < PROPOSED_SHARE)
    candidates = draw_candidates(belief.probabilities, uniform)
    return torch.where(accepted & ~noised.noisy, candidates, noised.canvas)


def answer_weights(canvas: Tensor) -> Tensor:
    """Weight of each position in the loss, `[B, C]`."""
    return torch.where(canvas == PAD, PADDING_WEIGHT, 1.0)


def _head_loss(hidden: Tensor, embedding: Tensor, targets: Tensor, softcap: float) -> Tensor:
    logits = softcapped_logits(hidden, embedding, softcap).flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(), reduction="none").view_as(targets)


def _belief(hidden: Tensor, embedding: Tensor, temperature: Tensor, softcap: float, scale: float) -> Belief:
    log_p = torch.log_softmax(softcapped_logits(hidden, embedding, softcap) / temperature, dim=-1)
    p = log_p.exp()
    soft = (p.to(hidden.dtype) @ embedding).float() * scale
    return Belief(soft, p, -(p * log_p).sum(-1))


@dataclass(frozen=True)
class Objective:
    """Computes the loss of a batch; `head_loss` and `belief` may be compiled forms of the functions above."""

    model: StepModel
    head_loss: Callable[..., Tensor] = field(default=_head_loss)
    belief: Callable[..., Belief] = field(default=_belief)

    def __call__(self, clean: Clean, generator: torch.Generator, self_condition: bool) -> Losses:
        """The loss of one batch, with self-conditioning on a step before or without."""
        config, embedding = self.model.config, self.model.embed_tokens.weight
        noised = corrupt(clean.canvas, config.vocab_size, generator)
        states, prefix = encode(self.model, clean.prefix, clean.length)
        canvas, soft = noised.canvas, None
        if self_condition:
            belief = self._believe(noised.before, prefix, generator)
            canvas, soft = propose(noised, belief, generator), belief.soft_embedding
        hidden = denoise(self.model, canvas, prefix, soft)
        losses, weights = (
            self.head_loss(hidden, embedding, clean.canvas, config.final_logit_softcap),
            answer_weights(clean.canvas),
        )
        next_token = self._next_token(states, clean)
        denoising = (losses * weights).sum() / weights.sum()
        answer = clean.canvas != PAD
        rows = (losses.detach() * answer).sum(1) / answer.sum(1)
        return Losses(denoising + NEXT_TOKEN_WEIGHT * next_token, next_token.detach(), rows)

    @torch.no_grad()
    def _believe(self, canvas: Tensor, prefix: Prefix, generator: torch.Generator) -> Belief:
        config, device = self.model.config, canvas.device
        # From what the pocket's sampler uses to what the released model's begins with.
        temperature = 0.2 + 0.6 * torch.rand(len(canvas), 1, 1, generator=generator, device=device)
        hidden, weight = denoise(self.model, canvas, prefix, None), self.model.embed_tokens.weight
        return self.belief(hidden, weight, temperature, config.final_logit_softcap, config.embedding_scale)

    def _next_token(self, states: Tensor, clean: Clean) -> Tensor:
        targets = clean.prefix[:, 1:]
        positions = torch.arange(1, clean.prefix.shape[1], device=targets.device)
        real = positions < clean.length[:, None]
        losses = self.head_loss(
            states[:, :-1], self.model.embed_tokens.weight, targets, self.model.config.final_logit_softcap
        )
        return (losses * real).sum() / real.sum()
