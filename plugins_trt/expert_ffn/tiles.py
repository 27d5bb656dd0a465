"""Tile sizes of the two products, chosen from shapes and the device alone: graphs must not change from run to run."""

from __future__ import annotations

import math
from dataclasses import dataclass

import triton

from plugins_trt.expert_ffn.encodings import E4M3_BITS, E4M3_DOT, INT4, WIDE
from plugins_trt.gpu import Gpu


@dataclass(frozen=True)
class Product:
    """Tile of one product: weights are the left operand, token rows the right one."""

    weight_rows: int
    """Rows of the weight matrix in a tile; of the gate and of the up matrix each in the first product."""
    depth: int
    """Columns of the weight matrix that one turn of the loop reads."""
    warps: int
    stages: int
    """Turns whose reads are under way at once."""
    registers: int | None = None
    """Most registers of a thread, for more blocks on a multiprocessor."""

    @property
    def options(self) -> dict[str, int | None]:
        """What a launch is told."""
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}


@dataclass(frozen=True)
class Tiles:
    """Tiles of a layer's two products, which share one dispatch plan."""

    block_rows: int
    """Token rows of a block: a power of two, or the sum of two of them that are 16 or more."""
    gate_up: Product
    down: Product


# By the most token rows an expert has on average. Narrow blocks serve decoding, where reading the weights is all the
# work; wide ones serve prefill and many canvases. Measured on an H200 with Triton 3.6 by
# `python -m benchmarks.gpu.experts --tune`, 128 experts of 2816 x 704, the least sum of both products: 256 and 2048
# tokens of `WIDE` and `E4M3_DOT`, 256 to 8192 of `E4M3_BITS` and of `INT4`. Since blocks leave out a tail that they
# do not need, those of 160 rows serve 2048 and 4096 tokens best (2048 of `WIDE`: 513 us, 583 in blocks of 128; 8192:
# 1920 and 1718; of `E4M3_DOT`: 391 and 447, 1460 and 1291), and in a step of 8 canvases, whose tokens spread less
# evenly, they gain 1 to 2 %. Not measured: blocks of 48 rows, and of 96 for 1024 tokens of `WIDE`.
_TABLES = {
    WIDE.value: (
        (24, Tiles(32, Product(128, 128, 8, 3), Product(64, 64, 4, 6))),
        (40, Tiles(48, Product(128, 64, 8, 3), Product(128, 64, 8, 4))),
        (72, Tiles(96, Product(128, 64, 8, 3), Product(256, 64, 8, 4))),
        (320, Tiles(160, Product(128, 64, 8, 4), Product(128, 64, 4, 3))),
        (math.inf, Tiles(128, Product(128, 64, 8, 4), Product(128, 64, 4, 3))),
    ),
    E4M3_DOT.value: (
        (24, Tiles(32, Product(128, 128, 4, 3), Product(128, 128, 4, 3))),
        (40, Tiles(48, Product(128, 128, 8, 3), Product(128, 128, 4, 4))),
        (72, Tiles(96, Product(128, 128, 8, 3), Product(128, 128, 8, 3))),
        (320, Tiles(160, Product(128, 128, 8, 4), Product(64, 128, 4, 4))),
        (math.inf, Tiles(128, Product(128, 128, 8, 4), Product(64, 128, 4, 4))),
    ),
    E4M3_BITS.value: (
        (48, Tiles(32, Product(64, 128, 4, 3), Product(64, 128, 4, 5))),
        (160, Tiles(64, Product(64, 128, 8, 3), Product(128, 128, 4, 3))),
        (math.inf, Tiles(128, Product(64, 128, 8, 4), Product(128, 128, 8, 3))),
    ),
    INT4.value: (
        (48, Tiles(32, Product(64, 256, 4, 3), Product(128, 64, 4, 4, registers=128))),
        (160, Tiles(64, Product(128, 128, 8, 3), Product(128, 128, 4, 3))),
        (math.inf, Tiles(128, Product(128, 128, 8, 3), Product(128, 128, 8, 3))),
    ),
}
_SMALL = Tiles(32, Product(32, 32, 4, 2), Product(64, 32, 4, 2))
"""For GPUs of 99 KB of shared memory a block, and for float32."""
_SMALL_E4M3 = Tiles(32, Product(128, 64, 8, 2), Product(64, 64, 4, 2))
"""The same of 8-bit numbers, whose hidden states have a scale for each 128 channels of a tile."""


def choose_tiles(rows_per_expert: float, encoding: int, element_size: int, gpu: Gpu) -> Tiles:
    """Tiles for experts of `rows_per_expert` token rows on average.

    Args:
        rows_per_expert: `T * K / E`.
        encoding: how the weights are stored, as `encodings.py` names it.
        element_size: bytes of an activation.
        gpu: where they run.
    """
    if element_size > 2 or not gpu.is_large:
        return _SMALL_E4M3 if encoding == E4M3_DOT.value else _SMALL
    return next(tiles for most, tiles in _TABLES[encoding] if rows_per_expert <= most)


def row_parts(block_rows: int) -> tuple[int, int]:
    """The two powers of two that a block's rows are the sum of, the larger one first; the other may be 0."""
    main = 1 << (block_rows.bit_length() - 1)
    return main, block_rows - main


def weight_tiles(rows: int, product: Product) -> int:
    """Tiles that cover `rows` of a weight matrix."""
    return int(triton.cdiv(rows, product.weight_rows))
