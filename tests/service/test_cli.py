"""The command line as its users meet it: piped, on a terminal, and where things go wrong."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from service.channel import Credentials
from service.cli import main
from tests.service.certificates import make
from tests.service.processes import ROOT, ServerProcess, fake_server
from tests.service.support import write_bundle

LONG = "an answer of several blocks, each one of thirty-two tokens.\n" * 3


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    answers = {"long": LONG, "Grüße 😀": "Grüße zurück 😀", "empty": ""}
    with fake_server(tmp_path_factory.mktemp("bundle"), answers=answers) as started:
        yield started


@pytest.fixture(scope="module")
def slow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    answers = {"endless": LONG * 20, "brief": "a brief answer of one block"}
    with fake_server(tmp_path_factory.mktemp("bundle"), answers=answers, step_seconds=0.1, paced=True) as started:
        yield started


def run(server: ServerProcess | None, *arguments: str, stdin: str | bytes = "", **environment: str) -> Result:
    """Run `dgemma` with its streams piped."""
    address = {"DGEMMA_ADDRESS": server.address} if server is not None else {}
    return CliRunner().invoke(main, arguments, input=stdin, env={**address, **environment})


# Answers


def test_generate_writes_the_answer_and_nothing_else(server: ServerProcess) -> None:
    result = run(server, "generate", "long")
    assert (result.exit_code, result.stdout, result.stderr) == (0, LONG, "")


def test_generate_reads_a_piped_prompt(server: ServerProcess) -> None:
    result = run(server, "generate", stdin="Grüße 😀\n")
    assert result.stdout == "Grüße zurück 😀\n"
    assert run(server, "generate", "-", stdin="long").stdout == LONG


def test_generate_lets_others_go_first(server: ServerProcess) -> None:
    assert run(server, "generate", "long", "--batch").stdout == LONG


def test_generate_tells_what_it_took(server: ServerProcess) -> None:
    result = run(server, "generate", "long", "--stats", "--max-tokens", "40")
    assert result.stdout == LONG[:40] + "\n"
    assert re.search(r"^40 tokens in 2 blocks and \d+ steps", result.stderr)
    assert "cut at its limit" in result.stderr


def test_options_come_from_the_environment(server: ServerProcess) -> None:
    assert run(server, "generate", "long", DGEMMA_GENERATE_MAX_TOKENS="7").stdout == LONG[:7] + "\n"


def test_generate_stops_at_each_stop_string(server: ServerProcess) -> None:
    assert run(server, "generate", "long", "--stop", "blocks", "--stop", "several").stdout == "an answer of \n"


def test_chat_answers_each_piped_line(server: ServerProcess) -> None:
    result = run(server, "chat", stdin="one\n\nlong\nGrüße 😀\n")
    assert (result.exit_code, result.stdout) == (0, f"one\n{LONG}Grüße zurück 😀\n")


def test_count_and_model(server: ServerProcess) -> None:
    # <bos>, the turn's frame of 2 control tokens, "user\n", "hello", "\n", and "<|turn>model".
    assert run(server, "count", "hello").stdout == f"{1 + 2 + 5 + 5 + 1 + 1 + 5}\n"
    assert json.loads(run(server, "model", "--json").stdout)["canvas_length"] == 32
    assert re.search(r"^max_stop_sequence_count +16$", run(server, "model").stdout, re.MULTILINE)


def test_bench_tells_latencies(server: ServerProcess) -> None:
    result = run(server, "bench", "long", "--requests", "4", "--concurrency", "2")
    assert result.exit_code == 0, result.output
    assert re.search(r"time to first block +\d+\.\d ms .*4 samples", result.stdout)


# Pictures


def test_trace_draws_steps_and_positions(slow_server: ServerProcess) -> None:
    """The fake shows a third of the answer more at each step, and noise behind it."""
    result = run(slow_server, "trace", "endless", "--block", "1", COLUMNS="400")
    title, _, *rows = result.stdout.splitlines()
    assert title == "endless  (4 steps, 32 tokens)"
    committed = LONG[32:64].replace(" ", "·").replace("\n", "↵")
    assert [row.split("  ")[0] for row in rows] == ["step 1", "step 2", "step 3", "step 4", "committed"]
    cells = [row[11:].replace(" ", "") for row in rows]
    for shown, count in zip(cells, (11, 22, 32, 32, 32), strict=True):
        assert shown.startswith(committed[:count])
    assert cells[2] == cells[3] == cells[4] == committed
    assert not cells[0].startswith(committed[:20])


def test_trace_writes_pictures(server: ServerProcess, tmp_path: Path) -> None:
    svg, png = tmp_path / "trace.svg", tmp_path / "trace.png"
    result = run(server, "trace", "long", "--svg", str(svg), "--png", str(png))
    assert (result.exit_code, result.stdout) == (0, "")
    assert svg.read_text().startswith("<svg")
    assert "committed" in svg.read_text()
    with Image.open(png) as image:
        colours = image.convert("RGB").getcolors(maxcolors=1 << 20)
    assert colours is not None
    assert (120, 220, 140) in [colour for _, colour in colours]  # a token that the model is sure of


def test_trace_of_a_block_that_is_not_there(server: ServerProcess) -> None:
    result = run(server, "trace", "one", "--block", "9")
    assert result.exit_code == 2
    assert "no block 9" in result.stderr


# What goes wrong


def refused(server: ServerProcess | None, *arguments: str, code: int, **options: Any) -> str:
    """Standard error of a command that fails with `code` and without a traceback."""
    result = run(server, *arguments, **options)
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    return result.stderr


def test_a_refusal_names_each_field(server: ServerProcess) -> None:
    said = refused(server, "generate", "hello", "--entropy-bound", "nan", "--seed", "-4", code=3)
    assert "options.diffusion.entropy_bound: is nan" in said
    assert "options.seed: is -4" in said


def test_an_empty_prompt_is_refused(server: ServerProcess) -> None:
    assert "at least one part" in refused(server, "generate", "", code=3)


def test_a_chat_that_is_piped_ends_with_its_refusal(server: ServerProcess) -> None:
    assert "4064" in refused(server, "chat", stdin="x" * 5000, code=3)


def test_no_server_is_told(tmp_path: Path) -> None:
    said = refused(None, "generate", "hello", "--address", f"unix:{tmp_path}/none", "--timeout", "5", code=4)
    assert "cannot be reached" in said


def test_a_deadline_is_told(tmp_path: Path) -> None:
    with fake_server(tmp_path, hold=["denoise", 1]) as held:
        assert "--timeout" in refused(held, "generate", "hello", "--timeout", "0.5", code=5)
        held.release()


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_prompt_that_is_no_utf8_is_told(server: ServerProcess, command: str) -> None:
    assert "UTF-8" in refused(server, command, stdin=b"caf\xe9\n", code=1)


@pytest.mark.parametrize("arguments", [["caf\udce9"], ["x", "--system", "\udce9"], ["x", "--stop", "\udce9"]])
def test_an_argument_that_is_no_utf8_is_told(server: ServerProcess, arguments: list[str]) -> None:
    assert "not UTF-8" in refused(server, "generate", *arguments, code=1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", "x", "--seed", "9223372036854775808"], "--seed"),
        (["generate", "x", "--timeout", "0"], "--timeout"),
        (["serve", "x", "--max-waiting", "0"], "--max-waiting"),  # every request waits, if only for a moment
        (["generate", "x", "--timeout", "nan"], "--timeout"),  # click lets it pass
        (["generate", "x", "--timeout", "1e300"], "--timeout"),  # overflows to a deadline that has passed
        (["serve", "x", "--min-draft-interval", "inf"], "--min-draft-interval"),
        (["generate", "x", "--steps", "many"], "--steps"),
        (["nonsense"], "nonsense"),
    ],
)
def test_a_wrong_command_line_is_told(server: ServerProcess, arguments: list[str], says: str) -> None:
    assert says in refused(server, *arguments, code=2)


def test_serving_what_is_no_bundle_is_told(tmp_path: Path) -> None:
    result = dgemma("serve", str(tmp_path), "--address", "127.0.0.1:0")
    assert result.returncode == 1
    assert "no bundle here" in result.stderr
    assert "Traceback" not in result.stderr


def test_inspect_tells_facts_and_finds_changes(tmp_path: Path) -> None:
    write_bundle(tmp_path)
    result = run(None, "inspect", str(tmp_path))
    assert re.search(r"^canvas +32 tokens$", result.stdout, re.MULTILINE)
    assert "all 2 files are as exported" in result.stdout
    template = tmp_path / "chat_template.jinja"
    template.write_text(template.read_text().swapcase())
    assert "chat_template.jinja changed" in refused(None, "inspect", str(tmp_path), code=1)
    assert run(None, "inspect", str(tmp_path), "--no-verify").exit_code == 0


# Secured servers


@pytest.fixture
def secured(tmp_path: Path) -> Iterator[tuple[ServerProcess, Path]]:
    """A server with certificate, client certificates and tokens, and the files for a client of it."""
    authority = make("authority")
    certificate, key = make("localhost", authority).write(tmp_path, "server")
    client_authority, _ = authority.write(tmp_path, "authority")
    own, own_key = make("alice", authority).write(tmp_path, "alice")
    (tmp_path / "token").write_text("a-secret\n")
    digest = hashlib.sha256(b"a-secret").hexdigest()
    (tmp_path / "clients.toml").write_text(f'[clients.alice]\ntoken_sha256 = "{digest}"\n')
    tls = {"certificate": str(certificate), "key": str(key), "client_authority": str(client_authority)}
    security = {"tls": tls, "clients": str(tmp_path / "clients.toml")}
    credentials = Credentials(True, client_authority, own, own_key, "a-secret")
    with fake_server(tmp_path, credentials, security=security) as server:
        yield server, tmp_path


def test_a_secured_server_answers_who_shows_all(secured: tuple[ServerProcess, Path]) -> None:
    """Options of the client, or the environment; without the token, the certificate or the authority it is told."""
    server, files = secured
    shown = [
        "--tls-ca",
        f"{files}/authority.pem",
        "--tls-cert",
        f"{files}/alice.pem",
        "--tls-key",
        f"{files}/alice.key",
    ]
    token = ["--token-file", f"{files}/token"]
    assert run(server, "generate", "hello", *shown, *token).stdout == "hello\n"
    assert run(server, "generate", "hello", *shown, DGEMMA_TOKEN="a-secret").stdout == "hello\n"
    environment = {"DGEMMA_TLS_CA": shown[1], "DGEMMA_TLS_CERT": shown[3], "DGEMMA_TLS_KEY": shown[5]}
    environment["DGEMMA_TOKEN_FILE"] = token[1]
    for command in (["chat"], ["trace", "hello"], ["count", "hello"], ["model"], ["bench", "--requests", "1"]):
        assert run(server, *command, stdin="hello", **environment).exit_code == 0
    assert "--token-file" in refused(server, "generate", "hello", *shown, code=3)
    assert "cannot be reached" in refused(server, "generate", "hello", *shown[:2], *token, code=4)
    assert "cannot be reached" in refused(server, "generate", "hello", "--tls", *token, code=4)
    assert "cannot be reached" in refused(server, "generate", "hello", *token, code=4)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["generate", "x", "--address", "example.com:1", "--token-file", "TOKEN"], 2, "unencrypted"),
        (["generate", "x", "--tls-cert", "x.pem"], 2, "go together"),
        (["generate", "x", "--token-file", "none"], 1, "cannot be read"),
        (["generate", "x", "--token-file", "EMPTY"], 1, "holds no token"),
        (["generate", "x", "--tls-ca", "none"], 1, "cannot be read"),
        (["serve", "x", "--tls-cert", "x.pem"], 2, "--tls-key is missing"),
        (["serve", "x", "--tls-client-ca", "x.pem"], 2, "--tls-cert"),
        (["serve", "x", "--jwks", "x.json", "--jwt-issuer", "y"], 2, "--jwt-audience is missing"),
        (["serve", "x", "--address", "127.0.0.1:0", "--tls-cert", "EMPTY", "--tls-key", "EMPTY"], 1, "no certificate"),
        (["serve", "x", "--address", "127.0.0.1:0", "--clients", "none"], 1, "cannot be read"),
    ],
)
def test_wrong_security_is_told(tmp_path: Path, arguments: list[str], code: int, says: str) -> None:
    (tmp_path / "token").write_text("a-secret")
    (tmp_path / "empty").write_text("")
    paths = {"TOKEN": f"{tmp_path}/token", "EMPTY": f"{tmp_path}/empty"}
    result = dgemma(*(paths.get(argument, argument) for argument in arguments))
    assert (result.returncode, "Traceback" in result.stderr) == (code, False), result.stderr
    assert says in result.stderr


# The program as a whole


def dgemma(*arguments: str, blocked: tuple[str, ...] = (), **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `dgemma` in a process of its own, in which importing `blocked` fails."""
    program = f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); from service.cli import main; main()"
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60, **options)


def test_help_needs_neither_grpc_nor_an_engine() -> None:
    """Catches a heavy import on the way to `--help`: it must answer at once."""
    heavy = ("grpc", "onnxruntime", "tokenizers", "numpy", "rich", "jinja2", "PIL", "torch", "onnx")
    result = dgemma("--help", blocked=heavy)
    assert result.returncode == 0, result.stderr
    for name in ("serve", "generate", "chat", "trace", "export", "inspect", "bench"):
        assert re.search(rf"^  {name} +\w", result.stdout, re.MULTILINE)


@pytest.mark.parametrize("name", ["serve", "generate", "chat", "trace", "count", "model", "inspect", "bench", "export"])
def test_every_command_explains_itself(name: str) -> None:
    result = run(None, name, "--help")
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) > 6


def test_a_missing_extra_is_told(tmp_path: Path) -> None:
    """Without the packages of the extra the command says what to install."""
    result = dgemma("export", str(tmp_path), str(tmp_path / "out"), blocked=("torch",))
    assert result.returncode == 1
    assert "torch" in result.stderr
    assert "pip install 'dgemma[export]'" in result.stderr
    assert "Traceback" not in result.stderr


# On a terminal


class Terminal:
    """`dgemma` on a pseudo-terminal."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.pid, self._file = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            # As a shell does for what it starts in the foreground: a test run in the background ignores SIGINT.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            program = "from service.cli import main; main()"
            settings = {
                **os.environ,
                "TERM": "xterm-256color",
                "COLORTERM": "truecolor",
                "COLUMNS": "80",
                "LINES": "24",
                **environment,
            }
            os.execve(sys.executable, [sys.executable, "-c", program, *arguments], settings)
        self.seen, self._read = "", 0

    def until(self, expected: str, seconds: float = 30.0) -> str:
        """Read until a text has appeared behind what was read before; what was read now."""
        deadline = time.monotonic() + seconds
        start = self._read
        while expected not in self.seen[start:]:
            assert select.select([self._file], [], [], max(0.0, deadline - time.monotonic()))[0], self.seen
            try:
                self.seen += os.read(self._file, 65536).decode(errors="replace")
            except OSError:  # the other side is closed
                break
        assert expected in self.seen[start:], self.seen
        self._read = self.seen.index(expected, start) + len(expected)
        return self.seen[start : self._read]

    def send(self, text: str) -> None:
        with suppress(OSError):  # the program has gone
            os.write(self._file, text.encode())

    def exit_code(self) -> int:
        """Wait for the end."""
        try:
            while os.read(self._file, 65536):
                pass
        except OSError:
            pass
        _, status = os.waitpid(self.pid, 0)
        os.close(self._file)
        return os.waitstatus_to_exitcode(status)


def test_chat_on_a_terminal(slow_server: ServerProcess) -> None:
    """Drafts are drawn in place; Ctrl-C cancels the answer and not the conversation; Ctrl-D ends it."""
    terminal = Terminal("chat", "--address", slow_server.address)
    terminal.until("> ")
    terminal.send("endless\n")
    drawn = terminal.until("an answer")
    assert "\x1b[1;38;2;120;220;140m" in drawn  # accepted and sure
    terminal.send("\x03")
    terminal.until("(cancelled)")
    terminal.until("> ")
    terminal.send("brief\n")
    terminal.until("a brief answer of one block")
    terminal.until("> ")
    terminal.send("\x04")
    assert terminal.exit_code() == 0


def test_chat_on_a_terminal_survives_a_refusal(slow_server: ServerProcess) -> None:
    terminal = Terminal("chat", "--address", slow_server.address, "--max-tokens", "4065")
    terminal.until("> ")
    terminal.send("brief\n")
    terminal.until("max_output_token_count")
    terminal.until("> ")
    terminal.send("\x04")
    assert terminal.exit_code() == 0


def test_generate_on_a_terminal_is_interrupted(slow_server: ServerProcess) -> None:
    terminal = Terminal("generate", "endless", "--address", slow_server.address)
    terminal.until("an answer")
    terminal.send("\x03")
    terminal.until("interrupted")
    assert terminal.exit_code() == 130
