"""Generates the Python code of the contract beside its `.proto` files: messages, stubs and their types.

`python proto/generate.py` writes; with `--check` it generates into a temporary folder, names every committed file that
differs, and exits with 1 if there is one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).parent
PACKAGE = Path("diffusiongemma/v1")
GENERATED = "*_pb2*.py*"


def generate(target: Path) -> None:
    """Compiles every `.proto` file into `target`, below the folder that the package is named after."""
    plugins = ["protoc-gen-mypy", "protoc-gen-mypy_grpc"]
    common = [f"--plugin={name}={Path(sys.executable).with_name(name)}" for name in plugins]
    common += [f"--proto_path={ROOT}", f"--proto_path={files('grpc_tools') / '_proto'}"]
    every = sorted((ROOT / PACKAGE).glob("*.proto"))
    services = [path for path in every if "\nservice " in path.read_text()]
    for sources, languages in ((every, ("python", "mypy")), (services, ("grpc_python", "mypy_grpc"))):
        # quiet: the plugins of mypy-protobuf otherwise name every file that they write.
        outputs = [f"--{language}_out={'quiet:' if 'mypy' in language else ''}{target}" for language in languages]
        if protoc.main(["protoc", *common, *outputs, *map(str, sources)]) != 0:
            sys.exit("the contract does not compile")


def contents(root: Path) -> dict[str, bytes]:
    """Generated files below `root`, by name."""
    return {path.name: path.read_bytes() for path in (root / PACKAGE).glob(GENERATED)}


def main() -> None:
    """Writes or checks, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the committed files differ")
    if not parser.parse_args().check:
        generate(ROOT)
        return
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh, committed = contents(Path(folder)), contents(ROOT)
    stale = sorted(name for name in fresh | committed if fresh.get(name) != committed.get(name))
    if stale:
        sys.exit(f"out of date, run `make proto`: {', '.join(stale)}")


if __name__ == "__main__":
    main()
