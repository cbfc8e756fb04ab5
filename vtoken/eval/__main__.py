"""`python -m vtoken.eval mme | videomme | tiny`."""

from __future__ import annotations

import click

from .commands import mme, videomme
from .tiny_command import tiny


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Accuracy against kept visual tokens."""


cli.add_command(mme)
cli.add_command(videomme)
cli.add_command(tiny)


if __name__ == "__main__":
    cli(prog_name="python -m vtoken.eval")
