"""Runs Triton kernels in Triton's interpreter, and compiles their launches for GPUs that are not there.

Triton decides when a kernel is *defined* whether it will be interpreted, and its own library is defined when it is
imported. So the interpreter lives in a process of its own, and this one keeps the kernels that compile.
"""

from __future__ import annotations

import importlib
import io
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

SHARED_MEMORY = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Most bytes of shared memory that one block may have, by compute capability times ten (CUDA C++ Programming Guide,
table of technical specifications). Its keys are the targets that every kernel must compile for."""

_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.uint16: "u16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.uint32: "u32",
    torch.bool: "i1",
}


class Interpreter:
    """A process in which `TRITON_INTERPRET=1` held before Triton was imported."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`function(*args, **kwargs)` with its module's kernels interpreted; tensors are copied there and back.

        Args:
            function: a public function of a module; what it changes in place does not come back.
        """
        call = _pack((function.__module__, function.__qualname__, args, kwargs))
        return _unpack(self._pool.submit(_call, call).result())


def _start() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)


def _call(call: bytes) -> bytes:
    module, name, args, kwargs = _unpack(call)
    return _pack(getattr(importlib.import_module(module), name)(*args, **kwargs))


def _pack(values: Any) -> bytes:
    # Not `pickle`, which cannot read 8-bit floating-point tensors back (torch 2.13).
    file = io.BytesIO()
    torch.save(values, file)
    return file.getvalue()


def _unpack(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    """Triton's interpreter; float32 and float16 only, for its bfloat16 products are wrong (Triton 3.9)."""
    pytest.importorskip("triton", reason="Triton is not installed: it exists for Linux only")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_start) as pool:
        yield Interpreter(pool)


@dataclass(frozen=True)
class Launch:
    """One kernel launch as the host code asked for it."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    """By parameter; tensors are those that the host code handed over."""
    options: dict[str, Any]
    """`num_warps`, `num_stages` and the like."""


def launches_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Launch]:
    """The launches that `function(*args, **kwargs)` makes, none of which runs.

    Hand over tensors on the `meta` device: the released shape costs no memory, and reading a device value on the host
    fails, as it must.
    """
    from triton.runtime.jit import JITFunction

    launches = []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in list(kwargs) if name not in kernel.arg_names}
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        for parameter in kernel.params:
            if parameter.has_default:
                arguments.setdefault(parameter.name, parameter.default)
        sizes = grid(arguments) if callable(grid) else grid
        launches.append(Launch(kernel, tuple(sizes), arguments, options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", record)
        function(*args, **kwargs)
    assert launches, f"{function.__qualname__} launched nothing"
    return launches


def compile_launch(launch: Launch, capability: int) -> Any:
    """Compile a launch, specialised to its arguments as at run time, for compute capability `capability / 10`.

    Returns:
        Triton's compiled kernel: `.asm["ptx"]`, `.asm["cubin"]`, `.metadata`. Fails where its shared memory is more
        than a block of that target may have.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = _type_of(value)
        if isinstance(value, Tensor) or (type(value) is int and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(launch.kernel, signature, constants, attributes)
    # Said aloud because its default is about to change, of which Triton warns.
    options = {"enable_fp_fusion": True} | launch.options
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    name, shared = launch.kernel.__name__, compiled.metadata.shared
    assert shared <= SHARED_MEMORY[capability], f"{name}: {shared} bytes of shared memory on sm_{capability}"
    return compiled


def _type_of(value: Any) -> str:
    from triton.tools.tensor_descriptor import TensorDescriptor

    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_TYPES[value.base.dtype]}{value.block_shape}>"
    if isinstance(value, Tensor):
        return f"*{_TYPES[value.dtype]}"
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    assert isinstance(value, float), f"no kernel argument: {value!r}"
    return "fp32"
