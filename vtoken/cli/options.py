"""Shared parts of all commands: budget and list arguments, one-sentence errors, imports on demand."""

from __future__ import annotations

import errno
import importlib
import shlex
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from ..asking import out_of_memory
from ..checks import without_folders
from ..naming import split_outside

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

ARGUMENTS = "vtoken.arguments"  # key in a click context's `meta`
SYNTHETIC = "synthetic://0"  # the source of `vtoken demo stream`
MODEL = (
    "Hub id or folder of a vision-language model, or a tiny one that ships with vtoken: llava,"
    " llava_next, ..."
)


class Budget(click.ParamType):
    """A command-line budget: a share if it has a decimal point, else a number of tokens."""

    name = "budget"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | int:
        from ..strategies.budgets import check_budget

        try:
            return check_budget(
                value if isinstance(value, (int, float)) else float(value) if "." in value else int(value)
            )
        except ValueError as error:
            words = (
                str(error)
                if "budget" in str(error)
                else f"{value!r} is no number: use 0.2 or 128, for instance."
            )
            return self.fail(words, param, ctx)


def page_options(command: Any) -> Any:
    """Decorator: the options `host`, `port`, `hosts` and `show` of a command that serves a page."""
    for option in (
        click.option(
            "--open/--no-open", "show", default=True, show_default=True, help="Open the page in a browser."
        ),
        click.option(
            "--allow-host", "hosts", multiple=True, help="A further name that browsers may reach the page by."
        ),
        click.option("--port", type=int, help="Its port; default: a free one from 7860."),
        click.option(
            "--host",
            default="127.0.0.1",
            show_default=True,
            help="Address of the page; others than this need a token.",
        ),
    ):
        command = option(command)
    return command


def of_the_network(error: BaseException) -> bool:
    """Whether a request failed; the Hub's client passes on httpx's errors where it has no own sentence."""
    return any(kind.__module__.partition(".")[0].startswith("httpx") for kind in type(error).__mro__)


def failure(error: BaseException) -> click.ClickException | None:
    """The `click` exception for an error, with one sentence; None if the error is a fault of the program.

    Bad input is a `click.UsageError`, exit code 2. A missing part of the environment (a file, a package,
    memory, disk space, the network) is no fault of the command line: exit code 1, without the usage text.
    """
    if isinstance(error, click.ClickException):
        return error
    if isinstance(error, OSError) and error.errno == errno.EPIPE:
        return None  # click ends quietly when the output's reader has gone
    if out_of_memory(error):
        first = str(error).strip().splitlines()[:1]
        return click.ClickException(
            f"Out of memory{': ' + first[0] if first else ''}. Use less at once, or a smaller model."
        )
    if of_the_network(error):
        return click.ClickException(f"The network did not answer: {_line(error) or type(error).__name__}.")
    if isinstance(error, OSError):
        named = f": {error.filename!r}" if error.filename is not None else ""
        return click.ClickException(
            f"{error.strerror}{named}." if error.strerror else _line(error) or type(error).__name__
        )
    if isinstance(error, ImportError):
        return click.ClickException(_line(error))
    if isinstance(error, (ValueError, NotImplementedError)):
        cause = error.__cause__
        if isinstance(cause, (OSError, ImportError)) or (cause is not None and of_the_network(cause)):
            return click.ClickException(_line(error))
        return click.UsageError(_line(error) or type(error).__name__)
    return None


def _line(error: object) -> str:
    return " ".join(str(error).split())


def fail(what: object) -> click.ClickException:
    """The exception to raise for an error, see `failure`; a plain sentence is about bad input."""
    told = failure(what) if isinstance(what, BaseException) else None
    return told or click.UsageError(_line(what))


class Sentences(click.Command):
    """Mixin: errors that a user can mend end the command with one sentence instead of a traceback.

    An option of one value that is given twice is refused, where click takes the last and drops the others.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        _, _, given = self.make_parser(ctx).parse_args(list(args))
        for param in {p.name: p for p in given}.values():
            count = given.count(param)
            if isinstance(param, click.Option) and count > 1 and not (param.multiple or param.is_flag):
                ctx.fail(f"{param.opts[0]} takes one value, found {count}: leave the others out.")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            told = failure(error)
            if told is None or told is error:
                raise
            if isinstance(told, click.UsageError):
                told.ctx = told.ctx or ctx
            raise told from None


class Command(Sentences):
    """A command whose errors are sentences."""


class Group(Sentences, click.Group):
    """A group whose errors are sentences, and whose lazy commands are imported on demand.

    Args:
        lazy: per name of a command "module:attribute".
    """

    command_class = Command

    def __init__(self, *args: Any, lazy: dict[str, str] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lazy = lazy or {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *self.lazy})

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in self.lazy:
            return super().get_command(ctx, name)
        module, _, attribute = self.lazy[name].partition(":")
        return getattr(importlib.import_module(module), attribute)

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        given = list(args)  # parsing empties the list
        context = super().make_context(info_name, args, parent, **extra)
        if parent is None:
            context.meta[ARGUMENTS] = given
        return context


Group.group_class = Group


def command_line() -> str:
    """The `vtoken` command that is being run, which the files of its results name; "" if none is.

    An absolute path is cut to its last part, as the others say nothing to another reader.
    """
    context = click.get_current_context(silent=True)
    given = context.meta.get(ARGUMENTS) if context else None
    return shlex.join(["vtoken", *map(without_folders, given)]) if given else ""


def separated(ctx: click.Context, param: click.Parameter, value: Iterable[str]) -> list[str]:
    """Callback of an option that may be repeated: the parts of its values, split at commas."""
    return [part for one in value for part in split_outside(one, ",") if part]


def listed(*names: str, **attributes: Any) -> Any:
    """An option of several values, separated by commas or given one by one."""
    return click.option(*names, multiple=True, callback=separated, **attributes)


def console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 110)


def progress(out: Console, shown: bool = True) -> Progress:
    """A progress bar on a rich console: a description, a bar, a count and two times."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    text, counted = TextColumn("{task.description}"), MofNCompleteColumn()
    times = TimeElapsedColumn(), TimeRemainingColumn()
    return Progress(text, BarColumn(), counted, *times, console=out, disable=not shown)
