"""Print the `--hf-overrides` of `vllm serve`."""

from __future__ import annotations

import json

import click

from ..._json import value_of
from . import overrides


@click.command(context_settings={"ignore_unknown_options": True})  # -1 is a wrong budget, not an option
@click.argument("model")
@click.argument("strategy")
@click.argument("budget")
@click.argument("options", nargs=-1, metavar="[OPTION=VALUE]...")
def main(model: str, strategy: str, budget: str, options: tuple[str, ...]) -> None:
    """Print the value of `vllm serve MODEL --hf-overrides VALUE` that serves MODEL with STRATEGY.

    BUDGET is 0.2 for a share of the visual tokens, 128 for a number of them; OPTIONs are the strategy's.
    """
    if odd := [option for option in options if "=" not in option]:
        raise click.ClickException(f"Options are written as alpha=0.4, found {odd[0]}.")
    given: dict[str, str] = {}
    for name, text in (option.split("=", 1) for option in options):
        if name in given:
            raise click.ClickException(f"{name} is given twice: give it once.")
        if name in ("model", "strategy", "budget"):
            raise click.ClickException(
                f"{name} is told by its place, as MODEL STRATEGY BUDGET: leave {name}= out."
            )
        given[name] = text
    try:
        made = overrides(model, strategy, value_of(budget), **{k: value_of(v) for k, v in given.items()})
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from None
    click.echo(json.dumps(made["hf_overrides"]))


if __name__ == "__main__":
    main(prog_name="python -m vtoken.integrations.vllm")
