"""The command `vtoken ask`: one question about one video file, with fewer visual tokens."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import click

from .options import Budget, Command, console

TINY, FRAMES = "qwen2_5_vl", 32


@click.command("ask", cls=Command, short_help="Ask a model about a video.")
@click.option("--video", required=True, help="File or address of a video with an end.")
@click.option("--question", required=True)
@click.option(
    "--model",
    "model_id",
    help="Hub id or folder of a model that reads videos; default: a shipped tiny one, which knows digits and"
    " shapes that appear one after the other.",
)
@click.option(
    "--strategy",
    help="See `vtoken list`; two are joined by +, options stand in parentheses: 'fastv(layer=3)'."
    " [default: farcover]",
)
@click.option(
    "--budget",
    type=Budget(),
    help="A share such as 0.25, or a count per frame: 64. [default: all visual tokens]",
)
@click.option("--frames", type=click.IntRange(min=1), help="Of the video. [default: 32, unless --fps]")
@click.option("--fps", type=click.FloatRange(min=0, min_open=True), help="Frames per second, not --frames.")
@click.option("--scaled", is_flag=True, help="Resize while decoding: faster, and other pixels.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True)
def ask(
    video: str,
    question: str,
    model_id: str | None,
    strategy: str | None,
    budget: float | int | None,
    **options: Any,
) -> None:
    """Ask a model about a video: decode the frames that it takes, and prune their visual tokens.

    Prints the answer as it comes, then what each stage took.
    """
    if options["frames"] is None and options["fps"] is None:
        options["frames"] = FRAMES
    out = console()
    from rich.markup import escape

    with out.status("loading the model") as status:
        import vtoken

        from ..asking import TINY_KNOWS, load, ships

        model, processor = load(model_id, TINY)
        patched = strategy is not None or budget is not None
        with vtoken.applied(model, strategy, budget=budget) if patched else nullcontext():
            status.update(f"reading {escape(video)}")

            def show(piece: str) -> None:
                status.stop()
                out.out(piece, end="", highlight=False)

            answer = vtoken.answer(model, processor, video, question, on_text=show, **options)
    out.out("\n" if answer.text else "The model ended its answer without a word.\n")
    out.print(str(answer), highlight=False, markup=False, style="dim")
    if ships(model_id) and not video.startswith("synthetic:"):
        out.print(TINY_KNOWS, highlight=False)
