"""The commands `vtoken eval mme | videomme | tiny`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..asking import TINY_KNOWS, quiet, ships
from ..extras import require
from .options import MODEL, Budget, Command, Group, command_line, console, listed, progress

if TYPE_CHECKING:
    from ..eval.benchmarks.task import Task

PROTOCOLS = ("strict", "lmms-eval", "vlmevalkit")
BASELINES = "random,uniform,pool"


@click.group(
    cls=Group,
    short_help="Accuracy against visual tokens or GFLOPs.",
    lazy={
        "tiny": "vtoken.cli.board:tiny",
        "imagenet": "vtoken.cli.evaluate_encoders:imagenet",
        "retrieval": "vtoken.cli.evaluate_encoders:retrieval",
    },
    context_settings={"help_option_names": ["-h", "--help"]},
)
def evaluate() -> None:
    """Accuracy against kept visual tokens, and of plain encoders against GFLOPs."""


def common(default_output: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The options that all benchmarks have."""
    options = [
        click.option("--model", "model_id", help=MODEL + " [default: llava]"),
        listed("--strategy", "strategies", default=["hired"], show_default=True,
               help="Names separated by commas; two that work together are joined by +, options stand in"
                    " parentheses: 'fastv(layer=3)'."),
        click.option("--budget", type=Budget(), help="One budget, such as 0.2, without baselines."),
        listed("--budgets",
               help="Several, such as 1.0,0.5,0.2, with baselines and a plot."),
        listed("--baselines",
               help=f"Baselines to run as well; default with --budgets: {BASELINES}. none: without."),
        click.option("--protocol", type=click.Choice(PROTOCOLS), default="strict", show_default=True,
                     help="Whose prompts and reading of answers; see docs/evaluation.md."),
        click.option("--batch-size", type=click.IntRange(min=1), default=1, show_default=True),
        click.option("--max-new-tokens", type=click.IntRange(min=1),
                     help="Of an answer; default: the protocol's."),
        click.option("--output", type=click.Path(file_okay=False), default=default_output, show_default=True,
                     help="Folder of the answers; a run that is there is continued."
                     " results.* hold the runs of this command."),
        click.option("--example", is_flag=True, help="Use a few generated questions instead of a data set."),
    ]  # fmt: skip

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


@evaluate.command(cls=Command, short_help="MME: yes-or-no questions about images.")
@click.option(
    "--data",
    help="Folder with MME's parquet files, VLMEvalKit's MME.tsv, or a Hub id. [default: lmms-lab/MME]",
)
@common("vtoken-mme")
def mme(data: str | None, protocol: str, **options: Any) -> None:
    """MME: yes-or-no questions, two per image; perception and cognition apart."""
    if options["example"]:
        require("pandas", "pyarrow", extra="eval")
    from ..eval.benchmarks import example_data
    from ..eval.benchmarks.mme import HUB, MME, load

    def tasks(output: Path, example: bool) -> list[tuple[Path, Task]]:
        source = example_data.mme(output / "example") if example else data or HUB
        return [(output, MME(load(source), protocol))]

    run(tasks, **options)


@evaluate.command(cls=Command, short_help="Video-MME: multiple-choice questions on videos.")
@click.option("--data", help="Folder with Video-MME's parquet file, data/*.mp4 and subtitle/*.srt.")
@click.option("--frames", type=click.IntRange(min=1), help="Per video; default: the protocol's number.")
@click.option(
    "--same-tokens-as",
    type=click.IntRange(min=1),
    help="As many frames as cost what this many cost unpruned: 32 at a budget of 0.25 reads 128 frames.",
)
@click.option("--subtitles", type=click.Choice(["no", "yes", "both"]), default="no", show_default=True)
@click.option(
    "--letters", help="Of the options, ABCDEFGH for instance; default: as many as the data set uses."
)
@common("vtoken-videomme")
def videomme(
    data: str | None,
    protocol: str,
    frames: int | None,
    same_tokens_as: int | None,
    subtitles: str,
    letters: str | None,
    **options: Any,
) -> None:
    """Video-MME: multiple-choice questions about videos; by duration and task type."""
    require("av", "pyarrow", *["pysubs2"] * (subtitles != "no"), extra="eval")
    from ..eval.benchmarks import example_data
    from ..eval.benchmarks.videomme import HOW, VideoMME, load

    def tasks(output: Path, example: bool) -> list[tuple[Path, Task]]:
        if letters and (not letters.isalpha() or not letters.isupper() or len(set(letters)) != len(letters)):
            raise ValueError(
                f"The letters of options are different capitals such as ABCD, found {letters!r}."
            )
        source = example_data.videomme(output / "example") if example else data
        if source is None:
            raise ValueError(f"Video-MME is not downloaded by this command: {HOW}")
        items = load(source, letters)
        asked = {"no": [False], "yes": [True], "both": [False, True]}[subtitles]
        names = {False: "without_subtitles", True: "with_subtitles"}
        made = [(output / names[s] if len(asked) > 1 else output, s) for s in asked]
        return [(folder, VideoMME(items, protocol, frames, s, letters)) for folder, s in made]

    run(tasks, frames=frames, same_tokens_as=same_tokens_as, **options)


def run(
    tasks: Callable[[Path, bool], list[tuple[Path, Task]]],
    model_id: str | None,
    strategies: list[str],
    budget: float | int | None,
    budgets: list[str],
    baselines: list[str],
    batch_size: int,
    max_new_tokens: int | None,
    output: str,
    example: bool,
    frames: int | None = None,
    same_tokens_as: int | None = None,
) -> None:
    """Run tasks; print, write and draw their results."""
    from ..eval.running.answer_log import locked
    from ..eval.running.runner import Processes, plan
    from ..strategies.registry import parse_strategy

    if budget is not None and budgets:
        raise ValueError("--budget and --budgets exclude each other.")
    shares = [Budget().convert(b, None, None) for b in budgets] or [0.2 if budget is None else budget]
    if not baselines and budgets:
        baselines = BASELINES.split(",")
    added = [] if baselines == ["none"] else baselines
    for name in strategies + added:
        parse_strategy(name)
    runs = plan(strategies + added, shares, frames, same_tokens_as)
    if len(runs) > 1:
        require("matplotlib", extra="eval")
    optional = set(added) - set(strategies)
    quiet()
    from ..eval.running.asker import load

    processes, folder = Processes.found(), Path(output)
    with locked(folder) if processes.index == 0 else nullcontext():
        if processes.index == 0:
            made = tasks(folder, example)
        processes.wait()  # one process writes the example or downloads, the others find it
        if processes.index:
            made = tasks(folder, example)
        asker = load(model_id)
        for where, task in made:
            task.max_new_tokens = max_new_tokens or task.max_new_tokens
            one_task(task, asker, where, runs, optional, batch_size, str(model_id or "llava"), processes)
        if ships(model_id) and not example and not processes.index:
            console().print(TINY_KNOWS, highlight=False)


def one_task(
    task: Task,
    asker: Any,
    folder: Path,
    runs: Sequence[Any],
    optional: set[str],
    batch_size: int,
    model: str,
    processes: Any,
) -> None:
    """All runs of one task; the first process shows them.

    Raises:
        ValueError: if a strategy that is not among the optional ones refuses.
    """
    from ..eval.board.board import versions
    from ..eval.running.runner import Evaluation
    from ..eval.running.summary import save, show, summary

    out, main = console(), processes.index == 0
    settings = {
        "model": model,
        "dtype": str(asker.model.dtype),
        "max_new_tokens": task.max_new_tokens,
        **versions(),
    }
    outcomes, left_out = [], []
    with progress(out, shown=main) as bar:
        line = bar.add_task("questions", total=0)
        evaluation = Evaluation(
            task, asker, folder, batch_size, settings, processes, lambda done: bar.update(line, advance=done)
        )
        for run in runs:
            there, left = evaluation.progress(run)
            bar.update(line, description=run.name, total=left, completed=0)
            if there:
                bar.console.print(f"{run.name}: {there} answers are there already", highlight=False)
            outcome = evaluation.run(run)
            if not isinstance(outcome, str):
                outcomes.append(outcome)
            elif run.strategy in optional:
                left_out.append(f"{run.name}: {outcome}")
            else:
                raise ValueError(f"{run.name}: {outcome}")
    if not main:
        return
    title = f"{task.title}, {'tiny ' * ships(model)}{model}"
    for o in outcomes:
        if o.run.strategy not in optional:
            show(out, f"\n{o.run.name}", o.breakdown.rows)
        for sentence in o.unreadable.values():
            out.print(f"counted as wrong: {sentence}", highlight=False, markup=False)
    for sentence in left_out:
        out.print(f"left out, {sentence}", highlight=False, markup=False)
    show(out, f"\n{title}; * marks baselines" if optional else f"\n{title}", summary(outcomes))
    for path in save(folder, title, outcomes, task.settings() | settings, left_out, command_line()):
        out.print(f"wrote {path}", highlight=False)
