"""The README's client is a program: it runs, as it is printed, against a server."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from service.cli.options import DEFAULT_ADDRESS
from tests.service.processes import ROOT, fake_server

QUESTION = "Sort these words: river, apple, stone, bird, cloud"
ANSWER = "apple, bird and cloud"


def test_the_client_of_the_readme_runs(tmp_path: Path) -> None:
    """Catches an example that a change of the contract, or a slip of the pen, has broken."""
    [program] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert f'"{DEFAULT_ADDRESS}"' in program
    with fake_server(tmp_path, answers={QUESTION: ANSWER}, paced=True) as server:
        here = program.replace(DEFAULT_ADDRESS, server.address)
        ran = subprocess.run([sys.executable, "-c", here], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stderr) == (0, "")
    drafts, _, block = ran.stdout.rpartition("block 0: ")
    assert block == f"{ANSWER}\n"
    assert re.findall(r"^step (\d+): ", drafts, re.MULTILINE)[0] == "1"
