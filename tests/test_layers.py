"""Imports run one way, and the serving packages import without what only an export or an accelerator needs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

ALLOWED = {
    "plugins_trt": ("plugins_trt",),
    "runtime": ("runtime", "plugins_trt"),
    # The bundle's schema and the one tree of errors; nothing that serves.
    "export": ("export", "plugins_trt", "runtime.bundle", "runtime.errors"),
    "service": ("service", "runtime", "diffusiongemma"),
}
"""What each package may import of the project: module names, each with all that lies below it."""

PROJECT = {"benchmarks", "checkpoints", "diffusiongemma", "export", "plugins_trt", "runtime", "service", "tests"}
ROOMS = {"reference", "kernel", "onnx", "tensorrt"}
"""Files of one operation, which stand side by side and never lean on each other."""

HEAVY = ("torch", "triton", "onnx", "onnxscript", "safetensors", "tensorrt", "transformers")
ACCELERATED = set((ROOT / "runtime" / "engines" / "torch").glob("*.py"))
"""Engines that a server imports only when it is told to use them."""
GRPC = ("grpc", "grpc_health", "grpc_reflection", "grpc_channelz", "grpc_status", "diffusiongemma")


def modules_of(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports_of(path: Path, root: Path = ROOT) -> Iterator[str]:
    """Full names of the modules that a file imports, wherever in it; `from a import b` counts as `a.b`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = path.relative_to(root).parts[: -node.level] if node.level else ()
            prefix = [*above, *([node.module] if node.module else [])]
            yield from (".".join([*prefix, alias.name]) for alias in node.names)


def is_below(name: str, tops: tuple[str, ...]) -> bool:
    return any(name == top or name.startswith(f"{top}.") for top in tops)


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_run_one_way(package: str) -> None:
    """Catches a layer that reaches up or sideways, also by an import inside a function."""
    assert modules_of(package), f"no modules found in {package}/"
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules_of(package)
        for name in imports_of(path)
        if name.partition(".")[0] in PROJECT and not is_below(name, ALLOWED[package])
    ]
    assert wrong == []


def test_rooms_of_an_operation_do_not_import_each_other() -> None:
    """Catches a kernel that borrows from its oracle, which would make comparing the two worthless."""
    rooms = [path for path in modules_of("plugins_trt") if path.stem in ROOMS]
    assert rooms
    wrong = []
    for path in rooms:
        operation = ".".join(path.parent.relative_to(ROOT).parts)
        siblings = tuple(f"{operation}.{room}" for room in ROOMS - {path.stem})
        wrong += [f"{path.relative_to(ROOT)} imports {name}" for name in imports_of(path) if is_below(name, siblings)]
    assert wrong == []


def test_imports_are_found(tmp_path: Path) -> None:
    """Catches a reader of imports that misses a spelling, and so lets everything through."""
    path = tmp_path / "package" / "inner" / "module.py"
    path.parent.mkdir(parents=True)
    path.write_text("import a.b\nfrom c import d\nfrom . import e\nfrom ..f import g\ndef h():\n    import i\n")
    found = set(imports_of(path, root=tmp_path))
    assert found == {"a.b", "c.d", "package.inner.e", "package.f.g", "i"}


def import_everything(packages: list[str], blocked: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Imports every module of `packages` in a fresh interpreter in which importing `blocked` fails."""
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for package in packages
        for path in modules_of(package)
        if path.stem != "__main__" and path not in ACCELERATED
    ]
    assert names
    program = (
        "import importlib, sys\n"
        f"sys.modules.update(dict.fromkeys({blocked!r}))\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
    )
    command = [sys.executable, "-W", "error", "-c", program]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize(
    ("packages", "blocked"),
    [
        pytest.param(["service", "runtime"], HEAVY, id="serving-without-torch-onnx-triton-tensorrt-transformers"),
        pytest.param(["runtime"], (*HEAVY, *GRPC, "google"), id="runtime-without-grpc-and-protobuf"),
        pytest.param(["export", "plugins_trt"], (*GRPC, "transformers"), id="export-without-serving"),
    ],
)
def test_packages_import_without(packages: list[str], blocked: tuple[str, ...]) -> None:
    """Catches a heavy import at the head of a serving module, also one that comes by way of a third package."""
    result = import_everything(packages, blocked)
    assert result.returncode == 0, result.stderr


def test_blocked_packages_cannot_be_imported() -> None:
    """Catches a block that blocks nothing: the model's definition needs torch, so it must fail here."""
    result = import_everything(["export"], ("torch",))
    assert result.returncode != 0
    assert "import of torch halted" in result.stderr
