"""Writes `serve.txt` and `dev.txt`: exact versions of every package that pip would install, direct or not.

`python requirements/lock.py` asks pip to resolve the project's own metadata without installing anything. The locks
name versions and nothing else: no addresses, and no local version, so that `torch==2.13.0` is answered by the CPU
build wherever pip is pointed at one.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
PROJECT = FOLDER.parent
LOCKS = {"serve.txt": "", "dev.txt": "[dev]"}
ONLY_ON = {"triton": 'sys_platform == "linux"'}
"""Packages that exist for one platform alone; their tests skip elsewhere."""

HEADER = "# Made by `make lock`. Exact versions of `pip install .{extra}` and of all that it pulls in.\n"


def resolve(extra: str) -> dict[str, str]:
    """Name and public version of every package that the project with `extra` needs, from pip's own resolver."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-"]
    report = json.loads(subprocess.run([*command, f"{PROJECT}{extra}"], check=True, capture_output=True).stdout)
    found = {entry["metadata"]["name"]: entry["metadata"]["version"] for entry in report["install"]}
    del found["dgemma"]
    return {re.sub(r"[-_.]+", "-", name).lower(): version.partition("+")[0] for name, version in found.items()}


def line(package: str, version: str) -> str:
    """A lock's line of a package."""
    marker = ONLY_ON.get(package)
    return f"{package}=={version}; {marker}\n" if marker else f"{package}=={version}\n"


def main() -> None:
    """Writes both locks, after both were resolved."""
    resolved = {name: resolve(extra) for name, extra in LOCKS.items()}
    for name, versions in resolved.items():
        lines = "".join(line(package, version) for package, version in sorted(versions.items()))
        (FOLDER / name).write_text(HEADER.format(extra=LOCKS[name]) + lines)
        print(f"{name}: {len(versions)} packages")


if __name__ == "__main__":
    main()
