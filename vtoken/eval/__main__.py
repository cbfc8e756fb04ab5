"""`python -m vtoken.eval mme | videomme | tiny`."""

from __future__ import annotations

import click

from ..shell import Group

COMMANDS = {name: f"vtoken.eval.commands:{name}" for name in ("mme", "videomme")}


@click.group(
    cls=Group,
    lazy=COMMANDS | {"tiny": "vtoken.eval.tiny_command:tiny"},
    context_settings={"help_option_names": ["-h", "--help"]},
)
def cli() -> None:
    """Accuracy against kept visual tokens."""


if __name__ == "__main__":
    cli(prog_name="python -m vtoken.eval")
