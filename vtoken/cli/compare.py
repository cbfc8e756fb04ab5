"""The command `vtoken compare`: several strategies at one budget, on one picture and one question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from .options import MODEL, Budget, Command, console, listed, progress

if TYPE_CHECKING:
    from PIL import Image
    from rich.console import Console

# the first five that fit the model: one for each idea, and a baseline
USUAL = (
    "farcover",
    "visionzip",
    "divprune",
    "hired",
    "uniform",
    "scope",
    "fastv",
    "cdpruner",
    "pool",
    "random",
)
COUNT, COLUMNS = 5, 3


@dataclass
class Outcome:
    """A strategy's name, its answer and the report."""

    name: str
    said: str
    report: Any


@click.command(cls=Command, short_help="What several strategies keep of one picture, side by side.")
@click.option("--image", type=click.Path(), help="Ask about this image instead of a generated scene.")
@click.option("--question", help="The question; needed with --image unless a tiny model answers.")
@click.option("--model", "model_id", help=MODEL)
@listed(
    "--strategies",
    help="Names separated by commas; two are joined by +, options stand in parentheses: 'fastv(layer=3)'."
    " [default: five that fit the model]",
)
@click.option("--budget", type=Budget(), default="0.2", show_default=True, help="A share, or a count: 64.")
@click.option("--output", type=click.Path(dir_okay=False), default="vtoken_compare.png", show_default=True)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Which held-out scene."
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=32, show_default=True)
def compare(
    image: str | None,
    question: str | None,
    model_id: str | None,
    strategies: list[str],
    budget: float | int,
    output: str,
    seed: int,
    max_new_tokens: int,
) -> None:
    """Ask one question with all visual tokens and under several strategies at one budget.

    Prints the answers beside each other, and draws the tokens that each strategy keeps.
    """
    from rich.markup import escape

    from ..asking import TINY_KNOWS, ask, load, prepare, ships
    from ..strategies.registry import parse_strategy
    from .demo import check_output, question_about

    out = console()
    check_output(output, image)
    names = {name: parse_strategy(name) for name in strategies}
    picture, text, known = question_about(image, question, model_id, seed)
    with progress(out) as bar:
        task = bar.add_task("loading the model", total=None)
        import vtoken

        model, processor = load(model_id)
        names = names or {name: name for name in usual(model)}
        check_strategies(model, names, budget)
        inputs = prepare(model, processor, picture, text)
        bar.update(task, description="all visual tokens", total=1 + len(names))
        dense, _ = ask(model, processor, inputs, max_new_tokens)
        bar.advance(task)
        outcomes = []
        for name, parsed in names.items():
            bar.update(task, description=name)
            with vtoken.applied(model, parsed, budget=budget):
                said, _ = ask(model, processor, inputs, max_new_tokens)
                outcomes.append(Outcome(name, said, vtoken.report(model)))
            bar.advance(task)
    print_answers(out, text, known, dense, outcomes)
    if image is not None and ships(model_id):
        out.print(TINY_KNOWS, highlight=False)
    sheet(processor, inputs, picture, dense, outcomes).save(output)
    out.print(f"The kept tokens are drawn in [bold]{escape(output)}[/bold]", highlight=False)


def usual(model: Any) -> list[str]:
    """Five strategies that fit a model."""
    import vtoken

    from ..strategies.registry import modalities_of

    fit = [name for name in vtoken.list_strategies(model=model) if "image" in modalities_of(name)]
    return [*(name for name in USUAL if name in fit), *(name for name in fit if name not in USUAL)][:COUNT]


def check_strategies(model: Any, names: Mapping[str, str | list[str]], budget: float | int) -> None:
    """Raise ValueError for a strategy that does not fit the model or is not defined for an image.

    For that nothing is asked: an answer of a large model takes long, and those of the others would be lost.
    """
    import vtoken

    from ..strategies.registry import modalities_of

    for parsed in names.values():
        with vtoken.applied(model, parsed, budget=budget):
            pass
        for name in [parsed] if isinstance(parsed, str) else parsed:
            if "image" not in modalities_of(name):
                raise ValueError(
                    f"{name} is defined for video input, and vtoken compare asks about an image: use"
                    f" {', '.join(usual(model))}."
                )


def print_answers(
    out: Console, question: str, known: str | None, dense: str, outcomes: Sequence[Outcome]
) -> None:
    """Print a row for all tokens and one per strategy, and below what a budget counts if it is not these."""
    from rich.markup import escape
    from rich.table import Table

    from ..strategies.info import BUDGET_MEANS

    told = question if known is None else f"{question} ({known})"
    columns = ("strategy", "visual tokens", "LLM FLOPs", "KV cache", "answer", "as with all")
    table = Table(*columns, title=escape(told))
    table.add_row("all", str(outcomes[0].report.tokens_in), "100 %", "100 %", escape(dense), "")
    for one in outcomes:
        shares = (one.report.flops / one.report.flops_dense, one.report.kv_bytes / one.report.kv_bytes_dense)
        same = "yes" if one.said == dense else "no"
        tokens = f"{one.report.average_visual_tokens:.0f}"
        table.add_row(one.name, tokens, *(f"{100 * share:.0f} %" for share in shares), escape(one.said), same)
    out.print(table)
    for one in outcomes:
        if one.report.budget_counts != BUDGET_MEANS["entrance"]:
            words = f"{one.name}: the budget counts {one.report.budget_counts or 'nothing that is told'}"
            out.print(words, highlight=False, markup=False)


def sheet(
    processor: Any, inputs: Any, picture: Image.Image, dense: str, outcomes: Sequence[Outcome]
) -> Image.Image:
    """The picture with all tokens and with those of every strategy, three in a row, answers above."""
    import torch
    from PIL import Image

    from ..drawing import side_by_side, visualize
    from .demo import tower_pictures

    seen, visual = tower_pictures(picture, inputs, processor), outcomes[0].report.visuals[0]
    cell = max(4, 288 // max(visual.segments[0].grid))
    everything = replace(visual, keep=torch.arange(visual.tokens_in), layers=())
    panels = [(visualize(seen, everything, cell=cell), f"all {visual.tokens_in} visual tokens: {dense}")]
    for one in outcomes:
        words = f"{one.name}, {one.report.average_visual_tokens:.0f} visual tokens: {one.said}"
        panels.append((visualize(seen, one.report.visuals[0], cell=cell), words))
    chunks = [panels[i : i + COLUMNS] for i in range(0, len(panels), COLUMNS)]
    rows = [side_by_side([p for p, _ in some], [words for _, words in some]) for some in chunks]
    canvas = Image.new("RGB", (max(r.width for r in rows), sum(r.height for r in rows)), "white")
    top = 0
    for row in rows:
        canvas.paste(row, (0, top))
        top += row.height
    return canvas
