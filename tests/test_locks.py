"""The locked versions: exact, without addresses, and a serving install without what only an export needs."""

from __future__ import annotations

import re
from importlib.metadata import requires
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "requirements"
EXACT = re.compile(r"([a-z0-9-]+)==([0-9][0-9a-z.]*)(; sys_platform == \"linux\")?")
NEVER_SERVED = {"torch", "transformers", "onnx", "onnxscript", "safetensors", "triton", "tensorrt"}


def read_lock(name: str) -> dict[str, str]:
    """Versions by package; fails on a line that is not exactly `name==version`, for one platform at most."""
    lines = [line for line in (FOLDER / name).read_text().splitlines() if not line.startswith("#")]
    matches = {line: EXACT.fullmatch(line) for line in lines}
    assert [line for line, match in matches.items() if match is None] == []
    return {match[1]: match[2] for match in matches.values() if match}


def requirements_of(extra: str | None) -> set[str]:
    """Names that the project's metadata asks for: without an extra, or by that extra alone."""
    marker = f'extra == "{extra}"' if extra else None
    lines = [line.partition(";") for line in requires("dgemma") or []]
    wanted = [head for head, _, tail in lines if (tail.strip() or None) == marker]
    return {re.split(r"[<>=\[ ]", head)[0].lower() for head in wanted} - {"dgemma"}


def test_serving_needs_no_export_packages() -> None:
    """Catches a dependency that drags a training framework into every serving install."""
    assert NEVER_SERVED.isdisjoint(read_lock("serve.txt"))


def test_development_serves_what_production_serves() -> None:
    """Catches locks that were resolved apart: tests would then run on other versions than the server."""
    assert read_lock("serve.txt").items() <= read_lock("dev.txt").items()


@pytest.mark.parametrize(
    ("lock", "extras"),
    [
        pytest.param("serve.txt", (None,), id="serving"),
        pytest.param("dev.txt", (None, "export", "jwt", "test", "dev"), id="development"),
    ],
)
def test_every_requirement_is_locked(lock: str, extras: tuple[str | None, ...]) -> None:
    """Catches a dependency that was added to the project but not to its lock."""
    wanted = set().union(*(requirements_of(extra) for extra in extras))
    assert wanted
    assert wanted - read_lock(lock).keys() == set()
