"""The browser page: plays a stream, draws the kept tokens on it, and answers questions at any moment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

try:
    import gradio as gr
except ImportError:
    raise ImportError("The page needs gradio: pip install 'vtoken[stream]', or use --terminal.") from None

from .options import SYNTHETIC
from .page_parts import picture_html
from .page_visitors import MAX_QUESTION, Desks
from .stream_visitors import NOTHING, PLOTS, Desk, Said

EVERY = 0.5  # seconds between two looks at the stream
MAX_FPS = 10.0
MAX_UPLOAD = 400 * 2**20  # bytes of all uploaded files together, of one address half as many
LEGEND = "Outlined: visual tokens that were kept. Red dots: cells that the vision tower computed anew."
CSS = """
#frame img { max-height: min(52vh, 500px); max-width: 100%; display: block; margin: auto;
  image-rendering: pixelated; }
#frame { min-height: 120px; }
#status { min-height: 1.5em; overflow-wrap: anywhere; }
#chat { max-height: 420px; overflow-y: auto; }
#chat .message { white-space: pre-wrap; overflow-wrap: anywhere; padding: 2px 0; }
#chat .user { font-weight: 600; margin-top: 8px; }
#chat .facts { opacity: 0.7; font-size: 85%; }
footer { display: none; }
"""


def build_page(
    desks: Desks[Desk],
    strategies: list[str],
    source: str = SYNTHETIC,
    budget: float = 0.5,
    fps: float = 2.0,
    allow_sources: bool = False,
    examples: Sequence[str] = (),
) -> Any:
    """The page as a `gradio.Blocks`, not yet served.

    Args:
        desks: state of the page, one desk per browser.
        strategies: names to choose from; the first is chosen.
        source: the source to play, also the initial text of the source field, if there is one.
        budget: initial position of the budget slider.
        fps: frames per second at first.
        allow_sources: whether visitors may name files, addresses and cameras of this machine, and upload
            files.
        examples: questions to press.
    """
    buttons = Buttons(desks, strategies, source, allow_sources)
    own: dict[str, Any] = dict(api_visibility="private", show_progress="hidden")
    many = own | dict(concurrency_limit=desks.most)
    delete = (600, 24 * 3600)  # seconds: look for files of an earlier day every ten minutes
    with gr.Blocks(
        title="vtoken: questions to a live stream",
        analytics_enabled=False,
        delete_cache=delete,
        fill_width=True,
    ) as page:
        gr.HTML("<h3>Questions to a live stream</h3>")
        with gr.Row():
            start = gr.Button("Play", variant="primary", elem_id="play", min_width=80)
            pause = gr.Button("Pause", elem_id="pause", min_width=80)
            stop = gr.Button("Stop", elem_id="stop", min_width=80)
        with gr.Row():
            with gr.Column(scale=3):
                frame = gr.HTML(elem_id="frame")
                status = gr.HTML(escape("Nothing is playing."), elem_id="status")
            with gr.Column(scale=2):
                chat = gr.HTML(elem_id="chat")
                _questions(buttons, chat, examples, many)
        with gr.Row():
            settings = _settings(strategies, source if allow_sources else "", budget, fps, allow_sources)
            if allow_sources:
                upload = gr.UploadButton("Open a file", file_types=["video"])
                upload.upload(buttons.upload, upload, settings[0], **own)
        with gr.Row():
            shown = [frame, status, *_plots()]
        gr.HTML(f"<small>{escape(LEGEND)}</small>")
        start.click(buttons.play, settings, status, **many)
        pause.click(buttons.pause, None, None, **many)
        stop.click(buttons.stop, None, [frame, status, chat], **many)
        gr.Timer(EVERY).tick(buttons.look, None, shown, **many)
        page.load(buttons.look, None, shown, **many)
        page.unload(buttons.leave)
    page.queue(max_size=32 * desks.most, api_open=False, default_concurrency_limit=desks.most)
    return page


def _questions(buttons: Buttons, chat: Any, examples: Sequence[str], event: dict[str, Any]) -> None:
    """The field for a question and the buttons that ask; answers go to `chat`."""
    question = gr.Textbox(
        placeholder="Ask at any moment, then press Enter",
        show_label=False,
        elem_id="question",
        max_length=MAX_QUESTION,
    )
    send = gr.Button("Ask", variant="primary", elem_id="ask")
    with gr.Row():
        pressed = [gr.Button(text, size="sm", min_width=120, elem_classes="example") for text in examples]
    gr.on([send.click, question.submit], buttons.ask, question, [question, chat], **event)
    for button in pressed:
        button.click(buttons.ask, button, [question, chat], **event)


def _settings(
    strategies: list[str], source: str, budget: float, fps: float, allow_sources: bool
) -> list[Any]:
    """The fields for the source, the strategy, its budget and the frame rate."""
    where = gr.Textbox(
        source,
        label="source",
        info="a file, an rtsp or http address, the number of a camera, or synthetic://SEED",
        elem_id="source",
        visible=allow_sources,
        max_length=2000,
    )
    which = gr.Dropdown(strategies, value=strategies[0], label="strategy", elem_id="strategy")
    share = gr.Slider(0.05, 1.0, value=budget, step=0.05, label="budget")
    rate = gr.Slider(0.1, MAX_FPS, value=min(fps, MAX_FPS), step=0.1, label="frames per second")
    return [where, which, share, rate]


def _plots() -> list[Any]:
    look: dict[str, Any] = dict(x="seconds", height=200, min_width=220)
    return [gr.LinePlot(y=name, title=title, elem_id=f"plot-{name}", **look) for name, title in PLOTS.items()]


class Buttons:
    """Event handlers of the page, each for the desk of its own browser. All shown text is escaped."""

    def __init__(self, desks: Desks[Desk], strategies: list[str], source: str, allow_sources: bool) -> None:
        self.desks, self.strategies, self.source, self.allow_sources = (
            desks,
            strategies,
            source,
            allow_sources,
        )

    def play(self, source: str, strategy: str, budget: float, fps: float, request: gr.Request) -> str:
        source = source.strip() if self.allow_sources else self.source
        try:
            if source == "-" and source != self.source:
                raise ValueError("The standard input of the server is not the page's to read.")
            if strategy not in self.strategies or not 0 < budget <= 1 or not 0 < fps <= MAX_FPS:
                raise ValueError("That strategy, budget or frame rate is not on the page.")
            desk = self.desks.open(request.session_hash)
            with desk.turn("play"):
                desk.play(source, strategy, budget, fps)
            return self._text(desk.status())
        except (ValueError, OSError, ImportError) as error:
            return self._text(str(error))

    def pause(self, request: gr.Request) -> None:
        desk = self.desks.of(request.session_hash)
        if desk is not None:
            desk.pause()

    def stop(self, request: gr.Request) -> tuple[str, str, str]:
        self.desks.leave(request.session_hash)
        return "", self._text("Nothing is playing."), ""

    def leave(self, request: gr.Request) -> None:
        self.desks.leave(request.session_hash)

    def upload(self, path: Any, request: gr.Request) -> str:
        if not self.allow_sources:
            return ""
        desk = self.desks.open(request.session_hash)
        if desk.upload is not None and desk.upload != Path(path):
            desk.upload.unlink(missing_ok=True)
        desk.upload = Path(path)
        return str(path)

    def ask(self, question: str, request: gr.Request) -> Iterator[tuple[str, str]]:
        desk = self.desks.of(request.session_hash)
        if not str(question).strip():
            yield "", talk_html(desk.talk if desk is not None else ())
            return
        if desk is None:
            yield "", talk_html([Said(question, NOTHING)])
            return
        try:
            with desk.turn("answer"):
                for said in desk.answer(question):
                    yield "", talk_html(desk.talk or [said])
        except ValueError as error:
            yield question, talk_html([*desk.talk, Said(question, str(error))])

    def look(self, request: gr.Request) -> tuple[Any, ...]:
        desk = self.desks.of(request.session_hash)
        if desk is None:
            return gr.skip(), gr.skip(), *(gr.skip() for _ in PLOTS)
        player, session = desk.player, desk.session
        picture = player.picture() if player is not None else None
        shown = "" if picture is None else picture_html(picture, "the latest frame")
        table = desk.table()
        tops = {name: table[name].max() if len(table) else 0 for name in PLOTS}
        if session is not None:
            tops["memory"] = desk.bound(session.stats) or tops["memory"]
        plots = (gr.LinePlot(table, y_lim=[0, 1.1 * float(top) or 1]) for top in tops.values())
        return shown, self._text(desk.status()), *plots

    def _text(self, text: str) -> str:
        """Plain text as HTML; the source, which may hold a password, is shown to the operator only."""
        if not self.allow_sources:
            text = text.replace(self.source, "the source") if len(self.source) > 1 else text
        return escape(" ".join(text.split()))


def talk_html(talk: Any) -> str:
    """Questions and answers as HTML, all text escaped."""
    lines = []
    for said in list(talk):
        lines.append(f'<div class="user message">{escape(said.question)}</div>')
        answer = escape(said.answer)
        for name, text in (("shown", said.truth), ("without pruning", said.unpruned)):
            answer += "" if text is None else f'  <span class="facts">· {name}: {escape(text)}</span>'
        lines.append(f'<div class="bot message">{answer}</div>')
        if said.facts:
            lines.append(f'<div class="facts">{escape(said.facts)}</div>')
    return "".join(lines)


__all__ = ["PLOTS", "Desk", "build_page"]
