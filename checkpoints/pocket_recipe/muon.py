"""Muon for matrices, AdamW for the rest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices, `[N, R, C]`, by five Newton-Schulz steps (Jordan et al. 2024)."""
    a, b, c = _COEFFICIENTS
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    orthogonal: Tensor = x.mT if tall else x
    return orthogonal


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, scaled to AdamW's step size (Liu et al. 2025, equation 4).

    Stacks of matrices (the experts) are orthogonalised one by one; parameters of one shape go through together.
    """

    def __init__(
        self, params: Iterable[dict[str, Any]], lr: float, weight_decay: float, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.orthogonalize: Callable[[Tensor], Tensor] = orthogonalize

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update from the gradients at hand."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                by_shape[parameter.shape[-2:]].append(parameter)
            for parameters in by_shape.values():
                self._update(parameters, group)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        buffers = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in parameters]
        gradients = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        # Nesterov: look one step of momentum ahead.
        ahead = torch._foreach_lerp(gradients, buffers, group["momentum"])
        rows, columns = parameters[0].shape[-2:]
        stacked = torch.cat([x.reshape(-1, rows, columns) for x in ahead])
        updates = self.orthogonalize(stacked).float() * (0.2 * max(rows, columns) ** 0.5)
        pieces = updates.split([p.numel() // (rows * columns) for p in parameters])
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(
            parameters, [piece.view_as(p) for piece, p in zip(pieces, parameters, strict=True)], alpha=-group["lr"]
        )


def optimizers(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the layers' and the self-conditioning's matrices; AdamW for embeddings, norms, scalars and routers.

    Each group's `share` is its part of the run's learning rate.
    """
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and "embed_tokens" not in name and "router" not in name
        (matrices if is_matrix else others).append(parameter)
    return [
        Muon([{"params": matrices, "share": 1.0}], lr=0.0, weight_decay=0.05),
        torch.optim.AdamW([{"params": others, "share": 0.5}], lr=0.0, betas=(0.9, 0.98), weight_decay=0.0),
    ]
