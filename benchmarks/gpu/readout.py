"""The canvas readout on one GPU: `python -m benchmarks.gpu.readout [--check] [--out FILE]`.

Checks it in bfloat16 at the released vocabulary against float64, or times it by part and beside the time that its two
products must take.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path

import torch
import triton
from torch import Tensor

from benchmarks.gpu.timing import copy_bandwidth, graph_seconds, matrix_rate
from plugins_trt.canvas_readout import kernel, reference
from plugins_trt.canvas_readout.kernel import canvas_readout

VOCABULARY, HIDDEN, CANVAS = 262_144, 2816, 256
SOFTCAP, EMBEDDING_SCALE = 30.0, HIDDEN**0.5
END_TOKENS = [1, 106, 50]


def random_readout(canvases: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Arguments of `canvas_readout`, the first canvas guarded and its position 0 all for a guarded token."""
    draw = partial(torch.randn, dtype=torch.bfloat16, device="cuda", generator=generator)
    embedding = draw(VOCABULARY, HIDDEN) / HIDDEN**0.5
    # From flat to peaked: logits with standard deviations of 0.5 to 8 over the positions.
    spread = torch.linspace(0.5, 8.0, CANVAS, device="cuda", dtype=torch.bfloat16)[:, None]
    hidden = draw(canvases, CANVAS, HIDDEN) * spread
    hidden[0, 0] = 8 * embedding[END_TOKENS[0]] * HIDDEN**0.5
    # Sure of its token: the entropy is about 1e-9.
    hidden[:, 1] = 60 * embedding[7]
    return (
        hidden,
        embedding,
        torch.linspace(0.4, 0.8, canvases, device="cuda"),
        torch.rand(canvases, CANVAS, device="cuda", generator=generator),
        torch.arange(canvases, device="cuda") == 0,
        torch.tensor(END_TOKENS, device="cuda"),
    )


def check() -> list[dict[str, object]]:
    """Compares two canvases, one position group at a time, with the meaning of the operation in float64.

    The logits of both are those that the library rounds to bfloat16, so that ids can be compared exactly.
    """
    arguments = random_readout(2, torch.Generator("cuda").manual_seed(0))
    argmax_ids, candidates, entropy, soft = canvas_readout(*arguments, SOFTCAP, EMBEDDING_SCALE)
    hidden, embedding, temperature, uniform, guard, guarded_ids = arguments
    logits = hidden.view(-1, HIDDEN) @ embedding.T
    results: list[dict[str, object]] = []
    worst = dict.fromkeys(
        (
            "argmax ids that differ",
            "candidate's cumulative probability",
            "entropy",
            "entropy of sure positions, relative",
            "soft embedding",
        ),
        0.0,
    )
    for canvas in range(2):
        for first in range(0, CANVAS, 64):
            part = slice(first, first + 64)
            each = logits.view(2, CANVAS, -1)[canvas, part].double()
            if first == 0 and bool(guard[canvas]):
                each[0, guarded_ids] = -torch.inf
            capped = SOFTCAP * torch.tanh(each / SOFTCAP) / temperature[canvas].double()
            capped = capped.masked_fill(each == -torch.inf, reference.BLOCKED)
            p = torch.softmax(capped, -1)
            found = {
                "argmax ids that differ": float((argmax_ids[canvas, part] != capped.argmax(-1)).sum()),
                "candidate's cumulative probability": _miss(p, candidates[canvas, part], uniform[canvas, part]),
                "entropy": float((entropy[canvas, part] + torch.xlogy(p, p).sum(-1)).abs().max()),
                "entropy of sure positions, relative": _sure_error(p, entropy[canvas, part]),
                "soft embedding": _soft_error(p, embedding, soft[canvas, part]),
            }
            worst = {name: max(worst[name], found[name]) for name in worst}
    # Entropy: float32 exponents up to 2 * softcap / temperature = 150, off by a few of their last places, against a sum
    # of 262144 terms. Candidate: sums of 4096 weights and 64 blocks. Soft embedding: twice the
    # reference's error, each position's taken as a whole.
    bounds = {
        "argmax ids that differ": 0.0,
        "candidate's cumulative probability": 2.0**-16,
        "entropy": 150 * 16 * 2.0**-24,
        # A total of 1 and less than a rounding loses the latter, of which the entropy is 20 to 40 times as much.
        "entropy of sure positions, relative": 1 / 16,
        "soft embedding": 2.0,
    }
    for name, bound in bounds.items():
        failed = not worst[name] <= bound
        print(f"{'FAILED' if failed else 'ok':6} {name}: {worst[name]:.2e} (at most {bound:.2e})", flush=True)
        results.append({"name": name, "value": worst[name], "bound": bound, "failed": failed})
    return results


def _miss(p: Tensor, candidates: Tensor, uniform: Tensor) -> float:
    """By how much the uniform numbers lie outside of their candidates' shares of the cumulative distribution."""
    above = p.cumsum(-1).gather(-1, candidates[:, None])[:, 0]
    below = above - p.gather(-1, candidates[:, None])[:, 0]
    return float(torch.maximum(below - uniform, uniform - above).clamp(min=0).max())


def _sure_error(p: Tensor, entropy: Tensor) -> float:
    """Largest relative error of entropies below 1e-6."""
    true = -torch.xlogy(p, p).sum(-1)
    sure = true < 1e-6
    return float(((entropy - true).abs() / true)[sure].max()) if bool(sure.any()) else 0.0


def _soft_error(p: Tensor, embedding: Tensor, soft: Tensor) -> float:
    """Largest error of the soft embedding, in units of the reference's own bfloat16 product's and a rounding.

    The matrix units cut off 2^-23 of a running sum of 262144 terms in each of its additions, and the library may add up
    parts of it in bfloat16: an error that hangs on the library's choices, and that both share.
    """
    true = torch.zeros_like(soft, dtype=torch.float32)
    for first in range(0, VOCABULARY, 16384):
        true += p[:, first : first + 16384].float() @ embedding[first : first + 16384].float()
    scale = torch.tensor(EMBEDDING_SCALE, dtype=embedding.dtype, device=embedding.device)
    product = (p.to(embedding.dtype) @ embedding) * scale
    ours, theirs = ((each.float() - EMBEDDING_SCALE * true).norm(dim=-1) for each in (soft, product))
    rounding = torch.finfo(soft.dtype).eps / 2 * EMBEDDING_SCALE * true.norm(dim=-1)
    return float((ours / (theirs + rounding)).max())


def measure(canvases: int, limits: tuple[float, float]) -> dict[str, object]:
    """Median time of a readout, and of its products alone."""
    arguments = random_readout(canvases, torch.Generator("cuda").manual_seed(1))
    hidden, embedding = arguments[0].view(-1, HIDDEN)[: kernel.POSITIONS], arguments[1]
    weights = torch.softmax(hidden @ embedding.T, -1)
    parts = triton.cdiv(canvases * CANVAS, kernel.POSITIONS)
    whole = graph_seconds([partial(canvas_readout, *arguments, SOFTCAP, EMBEDDING_SCALE)])
    head = parts * graph_seconds([partial(torch.mm, hidden, embedding.T)])
    back = parts * graph_seconds([partial(torch.mm, weights, embedding)])
    operations = 2 * 2 * canvases * CANVAS * VOCABULARY * HIDDEN
    logits = 2 * canvases * CANVAS * VOCABULARY
    read = 2 * embedding.nbytes * parts
    floor = max(operations / limits[1], read / limits[0])
    passes = whole - head - back
    print(
        f"{canvases:2} canvases: {whole * 1e3:7.3f} ms (floor {floor * 1e3:6.3f}): head {head * 1e3:6.3f}, softmax @ "
        f"embedding {back * 1e3:6.3f}, the passes between {passes * 1e3:6.3f} ({4 * logits / passes / 1e9:5.0f} GB/s); "
        f"{operations / whole / 1e12:4.0f} TFLOP/s",
        flush=True,
    )
    return {"canvases": canvases, "seconds": whole, "head": head, "back": back, "floor": floor}


def main() -> int:
    """Command line; 1 where a check fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with float64 in place of timing")
    parser.add_argument("--out", type=Path, help="file for the figures, as JSON")
    options = parser.parse_args()
    begin = time.monotonic()
    print(f"torch {torch.__version__}, Triton {triton.__version__}, {torch.cuda.get_device_name()}", flush=True)
    if options.check:
        result = check()
    else:
        limits = copy_bandwidth(), matrix_rate()
        print(f"copies {limits[0] / 1e12:.2f} TB/s, products {limits[1] / 1e12:.0f} TFLOP/s", flush=True)
        result = [measure(canvases, limits) for canvases in (1, 2, 4, 8)]
    print(f"{time.monotonic() - begin:.0f} s")
    if options.out:
        options.out.write_text(json.dumps(result, indent=1))
    return int(any(row.get("failed") for row in result))


if __name__ == "__main__":
    raise SystemExit(main())
