"""The command line: `graftwork`. A command's module is imported only when that command runs."""

from __future__ import annotations

import errno
import os
import shlex
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from graftwork import __version__, processes
from graftwork.errors import GraftworkError, RunInterrupted

if TYPE_CHECKING:
    from graftwork_registry import Catalog

COMMANDS = {
    "demo": ("graftwork.cli.train:demo", "Train, evaluate and compare a tiny model on this machine, in a minute."),
    "plan": ("graftwork.cli.train:plan", "Show what a run file resolves to, and how much memory it needs."),
    "train": ("graftwork.cli.train:train", "Train an adapter as a run file says."),
    "evaluate": ("graftwork.cli.evaluate:evaluate", "Score a checkpoint with evaluators."),
    "compare": ("graftwork.cli.evaluate:compare", "Score a checkpoint and its base in one pass."),
    "ask": ("graftwork.cli.evaluate:ask", "Ask a checkpoint about an image."),
    "inspect": ("graftwork.cli.checkpoint:inspect", "Say what a folder is: a checkpoint, or what other code left."),
    "import": ("graftwork.cli.importing:import_command", "Make a checkpoint of a folder that other code wrote."),
    "verify": ("graftwork.cli.checkpoint:verify", "Reopen a checkpoint and verify that it is what was saved."),
    "merge": ("graftwork.cli.checkpoint:merge", "Fold an adapter into its base, and verify that the result is equal."),
    "export": ("graftwork.cli.checkpoint:export", "Write a checkpoint in a format of other tools."),
    "data": ("graftwork.cli.data:data", "Say what a data set is made of, and what is wrong with it."),
    "list": ("graftwork.cli.catalogue:list_components", "List the installed components."),
    "show": ("graftwork.cli.catalogue:show", "Show everything about one component."),
    "new": ("graftwork.cli.scaffold:new", "Write a working plugin to start from."),
    "check": ("graftwork.cli.check:check", "Run the conformance kit against a plugin."),
    "doctor": ("graftwork.cli.doctor:doctor", "Say what is wrong with this environment, and what to do."),
    "schema": ("graftwork.cli.schema:schema", "Write the JSON Schema of run files."),
}
"""Command to where its function is, and its line in the help."""

ARGUMENTS = "graftwork.arguments"
"""The key under which the context keeps the arguments of the command line."""
BUG_STATUS = 70
"""The exit status for an error that is not the user's (EX_SOFTWARE of sysexits.h)."""


MENDABLE = {
    getattr(errno, name)
    for name in [
        "EACCES",
        "EDQUOT",
        "EEXIST",
        "EFBIG",
        "EISDIR",
        "ELOOP",
        "EMFILE",
        "ENAMETOOLONG",
        "ENFILE",
        "ENOENT",
        "ENOSPC",
        "ENOTDIR",
        "EPERM",
        "EROFS",
    ]
    if hasattr(errno, name)
}
"""What a disk or a path may have against a command; a person can mend that."""


@dataclass
class Session:
    """What every command gets by `@click.pass_obj`: the global options, and the catalogue that they lead to."""

    files: Sequence[Path] = ()
    disable: Sequence[str] = ()
    debug: bool = False

    @cached_property
    def catalog(self) -> Catalog:
        """The plugins of this environment, loaded when first asked for."""
        from graftwork_registry import Catalog

        return Catalog.discover(files=self.files, disable=self.disable)


class Commands(click.Group):
    """A group that knows its commands by name and imports only the one that runs."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the command line, and keep its arguments for the processes that run the same command."""
        ctx.meta[ARGUMENTS] = [*args]
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all commands, in the order of the help."""
        return [*COMMANDS]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import one command; None where there is none of that name."""
        if name not in COMMANDS:
            return None
        module, _, function = COMMANDS[name][0].partition(":")
        command: click.Command = getattr(import_module(module), function)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands into the help without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, help) for name, (_, help) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; every failure ends in a sentence and an exit status."""
        try:
            with terminable():
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            _say_ended("Interrupted.")
            ctx.exit(130)
        except RunInterrupted as error:
            if processes.is_first():
                click.echo(str(error), err=True)
                if error.checkpoint and ctx.invoked_subcommand == "train":
                    click.echo(f"  {_resuming(ctx.meta[ARGUMENTS])}", err=True)
            ctx.exit(error.status)
        except GraftworkError as error:
            processes.yield_to_launcher(error)
            if ctx.params["debug"]:
                _print_traceback(error)
            click.echo(f"Error: {error}", err=True)
            ctx.exit(1)
        except OSError as error:
            if error.errno not in MENDABLE or ctx.params["debug"]:
                raise
            what = f"'{error.filename}'" if error.filename else "a file, or this output,"
            click.echo(
                f"Error: {what} cannot be read or written ({error.strerror}); mend that, and try again", err=True
            )
            ctx.exit(1)
        except Exception as error:
            processes.yield_to_launcher(error)
            if processes.is_peer_failure(error):
                click.echo(
                    f"Error: process {processes.rank()} of {processes.count()} lost the others: one of them has ended; look for "
                    "its message",
                    err=True,
                )
                ctx.exit(1)
            _print_traceback(error)
            click.echo("This is a bug in Graftwork or in a plugin; please report it with the lines above.", err=True)
            ctx.exit(BUG_STATUS)


@contextmanager
def terminable() -> Iterator[None]:
    """While entered, SIGTERM ends the command as Ctrl-C does, so that it takes its locks and unfinished folders with it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> None:
        _say_ended("Terminated.")
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _say_ended(how: str) -> None:
    """Say once how a command ended, also before the processes of a launcher know one another."""
    if os.environ.get("RANK", "0") == "0":
        click.echo(how, err=True)


def _resuming(arguments: Sequence[str]) -> str:
    """The command that goes on with the run that a command began."""
    once = [word for word in arguments if word not in ("--resume", "--take-over")]
    return shlex.join(["graftwork", *once, "--resume"])


def _print_traceback(error: BaseException) -> None:
    import traceback

    click.echo("".join(traceback.format_exception(error)), err=True, nl=False)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "files",
    "--plugin",
    multiple=True,
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, resolve_path=True, path_type=Path),
    help="Load a plugin from a Python file as well.",
)
@click.option("--disable", multiple=True, metavar="NAME", help="Do not load a plugin; '*' for all that are installed.")
@click.option("--debug", is_flag=True, help="Show the traceback of every error.")
@click.version_option(__version__, prog_name="graftwork", message="%(prog)s %(version)s")
@click.pass_context
def main(ctx: click.Context, files: tuple[Path, ...], disable: tuple[str, ...], debug: bool) -> None:
    """Train adapters onto vision-language models; the checkpoints always open, evaluate, compare and merge."""
    ctx.obj = Session(files, disable, debug)
