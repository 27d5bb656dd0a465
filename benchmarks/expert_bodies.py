"""Times the ways to write the expert feed-forward in standard ONNX operators: `python -m benchmarks.expert_bodies`.

The table is what `plugins_trt.expert_ffn.onnx.choose_body` goes by. Bodies take turns, so that a busy machine slows
all of them alike; the least time of each counts.
"""

from __future__ import annotations

import time

import click
import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from numpy.typing import NDArray

from plugins_trt.expert_ffn.onnx import ExpertBody, function
from plugins_trt.expert_ffn.reference import expert_ffn
from plugins_trt.onnx_function import DOMAIN, DOMAIN_VERSION, OPSET

SHAPES = (
    # hidden, intermediate, experts, top-k, tokens
    (256, 96, 16, 4, 256),
    (256, 96, 16, 4, 32),
    (256, 128, 16, 16, 256),
    (64, 32, 8, 2, 32),
    (256, 128, 64, 8, 256),
    (256, 128, 128, 8, 256),
    (1024, 256, 128, 8, 256),
)


@click.command()
@click.option("--rounds", default=15, show_default=True, help="Turns of each body.")
@click.option("--threads", default=2, show_default=True)
def main(rounds: int, threads: int) -> None:
    """Print milliseconds a call, the seconds a session takes to load, and the largest error against PyTorch."""
    click.echo(f"{'H':>5} {'I':>4} {'E':>4} {'k':>3} {'T':>4}   " + "".join(f"{body.value:>24}" for body in ExpertBody))
    for shape in SHAPES:
        hidden, intermediate, experts, top_k, tokens = shape
        feeds, expected = _inputs(*shape)
        sessions, loads = {}, {}
        for body in ExpertBody:
            begin = time.perf_counter()
            sessions[body] = _session(experts, top_k, body, feeds, threads)
            loads[body] = time.perf_counter() - begin
        times: dict[ExpertBody, list[float]] = {body: [] for body in ExpertBody}
        for _ in range(rounds):
            for body, session in sessions.items():
                begin = time.perf_counter()
                (result,) = session.run(None, {name: feeds[name] for name in ("x", "expert_ids", "expert_weights")})
                times[body].append(time.perf_counter() - begin)
                error = float(np.abs(result - expected).max())
                if error > 1e-3:
                    raise click.ClickException(f"{body.value} is off by {error:.3g}")
        cells = "".join(f"{min(times[body]) * 1e3:>13.2f} ms {loads[body]:>6.2f} s" for body in ExpertBody)
        click.echo(f"{hidden:>5} {intermediate:>4} {experts:>4} {top_k:>3} {tokens:>4}   {cells}")


def _inputs(
    hidden: int, intermediate: int, experts: int, top_k: int, tokens: int
) -> tuple[dict[str, NDArray[np.generic]], NDArray[np.float32]]:
    """Random arguments by name, and what PyTorch makes of them."""
    random = torch.Generator().manual_seed(0)
    arguments = {
        "x": torch.randn(tokens, hidden, generator=random),
        "expert_ids": torch.rand(tokens, experts, generator=random).topk(top_k).indices,
        "expert_weights": torch.rand(tokens, top_k, generator=random),
        "gate_up": torch.randn(experts, 2 * intermediate, hidden, generator=random) / hidden**0.5,
        "down": torch.randn(experts, hidden, intermediate, generator=random) / intermediate**0.5,
    }
    return {name: tensor.numpy() for name, tensor in arguments.items()}, expert_ffn(*arguments.values()).numpy()


def _session(
    experts: int, top_k: int, body: ExpertBody, feeds: dict[str, NDArray[np.generic]], threads: int
) -> onnxruntime.InferenceSession:
    """A session of one node, its weights constant."""
    values = {name: _value(name, array) for name, array in feeds.items()}
    node = ir.Node(DOMAIN, "expert_ffn", list(values.values()), num_outputs=1)
    node.outputs[0].name = "mixed"
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    constants = [values["gate_up"], values["down"]]
    graph = ir.Graph(
        list(values.values())[:3],
        node.outputs,
        nodes=[node],
        initializers=constants,
        opset_imports={"": OPSET, DOMAIN: DOMAIN_VERSION},
        name="experts",
    )
    model = ir.Model(graph, ir_version=10, functions=[function(experts, body)])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    serialized = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(serialized, options, providers=["CPUExecutionProvider"])


def _value(name: str, array: NDArray[np.generic]) -> ir.Value:
    constant = ir.tensor(array, name=name)
    # The number of tokens is dynamic, as in the step graph.
    sizes = list(array.shape) if name in ("gate_up", "down") else ["T", array.shape[1]]
    value = ir.Value(name=name, type=ir.TensorType(constant.dtype), shape=ir.Shape(sizes))
    if name in ("gate_up", "down"):
        value.const_value = constant
    return value


if __name__ == "__main__":
    main()
