"""The GPU that a tensor lives on, as far as the choice of a kernel's tiles depends on it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Gpu:
    """What tiles and grids are chosen by."""

    capability: int
    """Compute capability times ten."""
    multiprocessors: int

    @property
    def is_large(self) -> bool:
        """Whether a block may have 227 KB of shared memory, which the matrix units read (Hopper, Blackwell B200)."""
        return self.capability // 10 in (9, 10)

    @property
    def overlaps_kernels(self) -> bool:
        """Whether a kernel may start while the one before it ends (programmatic dependent launch)."""
        return self.capability >= 90

    @property
    def copies_by_descriptor(self) -> bool:
        """Whether it has a copy engine that tensors are described to (the tensor memory accelerator)."""
        return self.capability >= 90

    @property
    def rounds_to_e4m3(self) -> bool:
        """Whether it has an instruction that rounds to float8_e4m3fn."""
        return self.capability >= 89


def gpu_of(device: torch.device) -> Gpu:
    """The GPU `device`; for other devices (Triton's interpreter, `meta`) the smallest one that the kernels support."""
    return _gpu(device.index or 0) if device.type == "cuda" else Gpu(capability=80, multiprocessors=108)


def has_fp8(device: torch.device) -> bool:
    """Whether the device converts and multiplies 8-bit floats itself: of GPUs those from compute capability 8.9 on."""
    return device.type != "cuda" or gpu_of(device).capability >= 89


@cache
def _gpu(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    return Gpu(properties.major * 10 + properties.minor, properties.multi_processor_count)
