"""The command `vtoken demo`: one prompt, answered with all visual tokens and with fewer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..asking import TINY_KNOWS, TINY_QUESTION, ask, load, prepare, ships
from ..images import open_image

if TYPE_CHECKING:
    from rich.console import Console

SHAPE, SCALE = "llava-1.5-7b", "quick"  # of vtoken.bench: it shows a saving that a tiny model cannot show
PATIENCE = 20.0  # seconds for that measurement


def run(
    out: Console,
    image: str | None,
    question: str | None,
    strategy: str,
    budget: float | int,
    model_id: str | None,
    output: str,
    seed: int,
    max_new_tokens: int,
) -> None:
    """Ask twice, print both answers and the report, write the picture of kept tokens to `output`.

    Raises:
        ValueError: for an unknown strategy, an unreadable image, a model that cannot be loaded or served.
        OSError: if `output` cannot be written.
    """
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from ..strategies.registry import parse_strategy

    names = parse_strategy(strategy)
    check_output(output, image)
    picture, questions = _questions(image, question, model_id, seed)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=out, transient=True
    ) as bar:
        task = bar.add_task("loading the model", total=None)
        import vtoken

        model, processor = load(model_id)
        cases = [(text, known, prepare(model, processor, picture, text)) for text, known in questions]
        bar.update(task, description="reading all visual tokens", total=2 * len(cases), completed=0)
        ask(model, processor, cases[0][2], 1)  # warm-up: the first call also pays for caches and kernels
        dense, short = [], []
        for _, _, inputs in cases:
            dense.append(ask(model, processor, inputs, max_new_tokens))
            bar.advance(task)
        with vtoken.applied(model, names, budget=budget):
            bar.update(task, description=f"{strategy}: fewer visual tokens")
            for _, _, inputs in cases:
                short.append(ask(model, processor, inputs, max_new_tokens))
                bar.advance(task)
            report = vtoken.report(model)
    _print_answers(out, strategy, budget, cases, dense, short, report)
    caption = (
        f"{strategy}, budget {budget}: {report.tokens_out} of {report.tokens_in} visual tokens enter the LLM"
    )
    _draw(picture, cases[-1][2], processor, report, caption).save(output)
    out.print(f"The kept tokens are drawn in [bold]{escape(output)}[/bold]", highlight=False)
    if ships(model_id):
        if image is not None:
            out.print(TINY_KNOWS, highlight=False)
        _print_real_shape(out, strategy, budget)


def _print_real_shape(out: Console, strategy: str, budget: float | int) -> None:
    """Say what the times of a tiny model mean, and measure a larger shape."""
    out.print(
        "\nThe times above say nothing about speed: a call of a model this small is mostly overhead,"
        " whatever it reads.",
        highlight=False,
    )
    with out.status("measuring LLaVA-1.5's shape"):
        words = at_a_real_shape(strategy, budget)
    out.print(words, highlight=False, markup=False)


def check_output(output: str, image: str | None = None) -> None:
    """Raise FileNotFoundError or ValueError if no picture can be written there, or only over `image`."""
    folder = Path(output).resolve().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"The folder {str(folder)!r} for the picture does not exist.")
    if Image.registered_extensions().get(Path(output).suffix.lower()) not in Image.SAVE:
        raise ValueError(f"{output!r} does not name a picture file: end it with .png.")
    if image is not None and Path(image).resolve() == Path(output).resolve():
        raise ValueError(f"The output {output!r} is the picture that is asked about: name another file.")


def at_a_real_shape(strategy: str, budget: float | int) -> str:
    """Time of a prompt of LLaVA-1.5's shape with and without the strategy, measured here, in words."""
    from ..bench.cells import measure
    from ..bench.shapes import build, in_words
    from ..bench.timing import one_thread

    work = replace(build(SHAPE, SCALE), clock="cpu")
    with one_thread():
        (cell,) = measure(work, [strategy], [budget], repeats=3, steps=0, limit=PATIENCE)
    head = f"What a real shape gains: {in_words(work)}:"
    if "flops" not in cell:
        return f"{head} not measured. {cell['refused']}"
    dense, short = cell["flops"]
    promise = f"{short / dense:.0%} of the LLM's FLOPs"
    if "measured" not in cell:
        return f"{head} {promise}; this machine is too busy to time it."
    before, after = cell["ms_dense"]["total"], cell["ms"]["total"]
    speed = cell["measured"]["prefill"]["median"]
    times = f"{after:.0f} ms of processor time instead of {before:.0f} ms, {speed:.1f} times as fast"
    return f"{head} {promise}; the prompt is read in {times}."


def _questions(
    image: str | None, question: str | None, model_id: str | None, seed: int
) -> tuple[Image.Image, list[tuple[str, str | None]]]:
    """The picture, and questions with their known answers (None: not known)."""
    if image is not None:
        if question is None and not ships(model_id):
            raise ValueError("Give a --question about the image.")
        return open_image(image), [(question or TINY_QUESTION, None)]
    from ..tiny.scenes import KINDS, make_scene, questions

    scene = make_scene(seed, "test")
    if question is not None:
        return scene.image, [
            (question, next((q.answer for q in questions(scene) if q.text == question), None))
        ]
    chosen: dict[str, Any] = {}
    for q in questions(scene):
        chosen.setdefault(q.kind, q)
    return scene.image, [(chosen[k].text, chosen[k].answer) for k in KINDS]


def question_about(
    image: str | None, question: str | None, model_id: str | None, seed: int
) -> tuple[Image.Image, str, str | None]:
    """The picture, one question and its known answer (None: not known)."""
    picture, questions = _questions(image, question, model_id, seed)
    from ..tiny.scenes import KINDS

    return picture, *(questions[0] if len(questions) == 1 else questions[KINDS.index("where")])


def tower_pictures(picture: Image.Image, inputs: Any, processor: Any) -> Any:
    """The pictures that the vision tower read, or the original where its pixels are flattened patches."""
    from ..drawing import tower_images

    if inputs["pixel_values"].ndim >= 4:
        return tower_images(inputs["pixel_values"], processor.image_processor)
    return picture


def _print_answers(
    out: Console,
    strategy: str,
    budget: float | int,
    cases: Sequence[Any],
    dense: Sequence[tuple[str, float]],
    short: Sequence[tuple[str, float]],
    report: Any,
) -> None:
    from rich.markup import escape
    from rich.table import Table

    few = f"{report.average_visual_tokens:.0f} with {strategy}, budget {budget}"
    table = Table("question", f"all {report.tokens_in} visual tokens", few)
    known = any(answer is not None for _, answer, _ in cases)
    if known:
        table.add_column("true answer")
    for (text, answer, _), (all_said, _), (few_said, _) in zip(cases, dense, short):
        right = (
            {s: "green" if s == answer else "red" for s in (all_said, few_said)} if answer is not None else {}
        )
        cells = [f"[{right.get(s, 'default')}]{escape(s)}[/]" for s in (all_said, few_said)]
        table.add_row(escape(text), *cells, *([escape(answer or "")] if known else []))
    table.add_section()
    table.add_row("time", *(f"{1000 * sum(t for _, t in said):.0f} ms" for said in (dense, short)))
    out.print(table)
    out.print(str(report), highlight=False, markup=False)


def _draw(picture: Image.Image, inputs: Any, processor: Any, report: Any, caption: str) -> Image.Image:
    from ..drawing import draw_cells, side_by_side, visualize

    visual = report.visuals[0]
    seen = tower_pictures(picture, inputs, processor)
    first = seen[0] if isinstance(seen, list) else seen
    grid = visual.segments[0].grid
    cell = max(8, 384 // max(grid))
    whole = draw_cells(first, grid, range(grid[0] * grid[1]), cell=cell)
    kept = visualize(seen, visual, cell=cell)
    return side_by_side([whole, kept], [f"all {report.tokens_in} visual tokens", caption])
