"""A request as the runtime takes it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingParameters:
    """Everything that decides a generation's tokens beside the prompt."""

    seed: int
    max_output_tokens: int
    max_denoising_steps: int
    entropy_bound: float
    """Nats."""
    t_min: float
    t_max: float
    stability_threshold: int
    """Steps."""
    confidence_threshold: float
    """Nats, mean over the canvas."""
    end_token_guard: bool = True
    """No end token at position 0 of the first canvas: terse prompts else denoise to an empty answer."""
    stop_strings: tuple[str, ...] = ()
