"""The command `vtoken demo explore`: two strategies side by side on a page, at any budget."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import click

from ..extras import require
from .options import Budget, Command, fail, listed, page_options

TINY = "qwen2_5_vl"  # reads pictures and clips
SESSIONS = 8  # browsers with a file of their own at a time
QUESTION = "what is shown here?"
UPLOADS = "Warning: visitors may upload pictures and clips, which this machine decodes."


@click.command("explore", cls=Command)
@click.option("--image", type=click.Path(), help="Begin with this image; generated ones are there too.")
@click.option("--video", help="Begin with this video: eight frames of it.")
@click.option("--question", help="The first question.")
@click.option(
    "--model",
    "model_id",
    help="Hub id or folder of a vision-language model, or a tiny one that ships with vtoken."
    f"  [default: {TINY}]",
)
@listed("--strategies", help="The two to begin with, separated by a comma; a+b joins two.")
@click.option(
    "--budget", type=Budget(), default="0.2", show_default=True, help="Share of the visual tokens to keep."
)
@page_options
@click.option("--allow-uploads", is_flag=True, help="Visitors may upload pictures and clips.")
def explore_command(**options: Any) -> None:
    """Compare two strategies on a page: what they keep, answer and cost, redrawn as you move the budget."""
    try:
        run(**options)
    except (ValueError, OSError, ImportError) as error:
        raise fail(error) from None


def run(
    image: str | None,
    video: str | None,
    question: str | None,
    model_id: str | None,
    strategies: list[str],
    budget: float | int,
    host: str,
    port: int | None,
    hosts: tuple[str, ...],
    allow_uploads: bool,
    show: bool,
) -> None:
    """Serve the page until interrupted; the address is tried before the model is loaded."""
    require("gradio", extra="stream")
    if image is not None and video is not None:
        raise ValueError("The page begins with one file: give --image or --video.")
    from ..strategies.budgets import Budget as Allowance
    from ..strategies.registry import parse_strategy

    if not Allowance(budget).is_share:
        raise ValueError(f"The page takes a share such as --budget 0.2, found {budget}.")
    if len(strategies) > 2:
        raise ValueError(f"The page shows two strategies, found {len(strategies)}: {', '.join(strategies)}.")
    for name in strategies:
        parse_strategy(name)
    from .page_server import Service, listen, private_folder, serve

    with listen(host, port) as listening, private_folder() as folder:
        page, desks, room = _page(image, video, question, model_id, strategies, budget, allow_uploads)
        try:
            from .explore_html import CSS

            uploads = folder if allow_uploads else None
            service = Service(page, listening, host, hosts, uploads, room, CSS)
            serve(service, "ask this model", UPLOADS if allow_uploads else "", show)
        finally:
            desks.close()


def _page(
    image: str | None,
    video: str | None,
    question: str | None,
    model_id: str | None,
    strategies: list[str],
    budget: float,
    allow_uploads: bool,
) -> tuple[Any, Any, int]:
    """The page, what its visitors have, and the bytes that they may upload."""
    from ..asking import TINY_QUESTION, load, ships
    from .explore_inputs import examples, of_the_owner
    from .explore_page import MAX_UPLOAD, Visit, build_page
    from .explore_state import Explorer
    from .page_visitors import Desks

    small = ships(model_id)
    model, processor = load(model_id, TINY)
    usual = TINY_QUESTION if small and video is None else QUESTION
    own = of_the_owner(image, video, question or usual, processor)
    shown = examples(model_id, processor)
    if own is not None:
        taken = own.name in {each.name for each in shown}
        shown = [replace(own, name=f"{own.name} (file)") if taken else own, *shown]
    explorer = Explorer(model, processor, strategies, small)
    explorer.check(strategies, shown[0].kind)
    desks: Desks[Visit] = Desks(lambda: Visit(explorer), SESSIONS)
    page = build_page(explorer, desks, shown, question or "", strategies, budget, allow_uploads)
    return page, desks, MAX_UPLOAD if allow_uploads else 0
