"""The group of all commands, and the one place where errors end the program with a sentence.

Commands are named in a table with a line of help and loaded when they are run, so that `dgemma --help` imports neither
gRPC nor an engine. Other packages add theirs through the entry points `dgemma.commands`.
"""

from __future__ import annotations

import importlib
import os
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import click

from service.cli import exits
from service.cli.exits import Failure

ENTRY_POINTS = "dgemma.commands"

COMMANDS = {
    "serve": "Serve a bundle over gRPC.",
    "generate": "Generate the answer to one prompt.",
    "chat": "Hold a conversation.",
    "trace": "Draw how a block was denoised, step by step.",
    "count": "Count the tokens of a prompt.",
    "model": "Show what a server serves, its limits and defaults.",
    "inspect": "Show what a bundle holds, and verify its checksums.",
    "bench": "Measure a running server's latency.",
}
"""Own commands with their line of help; `service.cli.<name>` holds each as `command`."""

KNOWN_PLUGINS = {"export": "Export a checkpoint to a bundle (needs the extra `export`)."}
"""Lines of help of other packages' commands, which are not loaded to be listed."""


class LazyGroup(click.Group):
    """Loads commands when they are run, and tells what goes wrong in them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Own commands in the order of the table, then those of other packages."""
        return [*COMMANDS, *sorted(plugins().keys() - COMMANDS.keys())]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Load a command; None where there is none of that name."""
        if cmd_name in COMMANDS:
            command: click.Command = importlib.import_module(f"service.cli.{cmd_name}").command
            return command
        plugin = plugins().get(cmd_name)
        return None if plugin is None else _load(plugin)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without loading them."""
        lines = COMMANDS | KNOWN_PLUGINS
        rows = [(name, lines.get(name, "From another package.")) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; errors of the project's tree end with a sentence instead of a traceback."""
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            plugin = plugins().get(ctx.invoked_subcommand or "")
            if plugin is None:
                raise
            raise _missing(plugin, error) from error
        except (click.Abort, KeyboardInterrupt) as error:
            raise Failure("interrupted", exits.INTERRUPTED) from error
        except (click.ClickException, click.exceptions.Exit):
            raise
        except Exception as error:
            failure = _told(error)
            if failure is None:
                raise
            raise failure from error


def plugins() -> dict[str, EntryPoint]:
    """Commands of other packages by name."""
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}


def _load(plugin: EntryPoint) -> click.Command:
    try:
        command: click.Command = plugin.load()
    except ImportError as error:
        raise _missing(plugin, error) from error
    return command


def _missing(plugin: EntryPoint, error: ImportError) -> Failure:
    """Which extra to install for a command whose packages are not there."""
    extra = plugin.extras[0] if plugin.extras else plugin.name
    distribution = plugin.dist.name if plugin.dist is not None else "dgemma"
    missing = error.name or str(error)
    return Failure(
        f"`dgemma {plugin.name}` needs {missing}, which is not installed: pip install '{distribution}[{extra}]'"
    )


def _told(error: Exception) -> Failure | None:
    """The failure to end with, for errors that are meant to be told; imported late, for they bring gRPC along."""
    from runtime.errors import DgemmaError
    from service.cli.failures import failure_of

    if isinstance(error, UnicodeEncodeError) and error.reason.startswith("surrogates"):
        # How Python reads bytes of the command line and the environment that are no UTF-8.
        return Failure(f"an argument is not UTF-8: {os.fsencode(error.object)!r}")
    return failure_of(error) if isinstance(error, DgemmaError) else None


@click.group(
    cls=LazyGroup,
    epilog=exits.HELP,
    context_settings={"auto_envvar_prefix": "DGEMMA", "help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="dgemma")
def main() -> None:
    """Serve DiffusionGemma, a block-diffusion language model, over gRPC, and talk to it.

    Every option can be given in the environment, as in DGEMMA_CHAT_TIMEOUT=60; the server's address also as
    DGEMMA_ADDRESS for all commands.
    """
