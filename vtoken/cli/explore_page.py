"""The page of `vtoken demo explore`: an input, a question, two strategies and a budget, side by side."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

try:
    import gradio as gr
except ImportError:
    raise ImportError("The page needs gradio: pip install 'vtoken[stream]'.") from None

from ..asking import TINY_KNOWS
from .explore_html import ALL, CSS, LEGEND, PHONE, TITLE, panel, times_html
from .explore_inputs import Subject
from .explore_state import Explorer, Outcome, tidy
from .page_visitors import MAX_QUESTION, Desks, Held

MAX_UPLOAD = 128 * 2**20  # bytes of all uploaded files together, of one address half; each goes as it is read
GONE = "That is not on the page any more: choose another, or upload it again."
SETTLE = 250  # ms for which the slider rests before the model is asked
# a call to the model only for the value at which it rests; keys move it too, which is no release
REST = f"""() => new Promise(done => {{
  clearTimeout(window.vtokenRest);
  window.vtokenRest = setTimeout(() => done(Date.now()), {SETTLE});
}})"""


class Visit(Held):
    """What one browser has uploaded.

    Args:
        explorer: forgets what was asked about it when the browser leaves.
    """

    def __init__(self, explorer: Explorer) -> None:
        self.explorer, self.touched = explorer, time.monotonic()
        self.subject: Subject | None = None

    def take(self, subject: Subject) -> None:
        """Put a file in the place of the one before it."""
        self.close()
        self.subject = subject

    def close(self) -> None:
        if self.subject is not None:
            self.explorer.forget(self.subject)
            self.subject = None


def build_page(
    explorer: Explorer,
    desks: Desks[Visit],
    subjects: Sequence[Subject],
    question: str = "",
    strategies: Sequence[str] = (),
    budget: float = 0.2,
    allow_uploads: bool = False,
) -> Any:
    """The page as a `gradio.Blocks`, not yet served.

    Args:
        explorer: the model.
        desks: what browsers have uploaded.
        subjects: what may be asked about; the first is shown.
        question: the first question, that of the first subject if empty.
        strategies: the two to begin with, where they fit.
        budget: initial position of the slider.
        allow_uploads: whether visitors may upload files.
    """
    first = subjects[0]
    buttons = Controls(explorer, desks, subjects, strategies, allow_uploads)
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 3600), fill_width=True) as page:
        f = _fields(buttons, first, question or buttons.first_question(first), budget)
        _connect(page, f, buttons)
    page.queue(max_size=32 * desks.most, api_open=False, default_concurrency_limit=desks.most)
    return page


def _fields(buttons: Controls, first: Subject, question: str, budget: float) -> SimpleNamespace:
    """The parts of the page from top to bottom, by name."""
    explorer, f = buttons.explorer, SimpleNamespace(upload=None)
    gr.HTML(f"<style>{PHONE}</style><h1>{escape(TITLE)}</h1>")
    with gr.Row(equal_height=True):
        f.which = gr.Dropdown(
            [*buttons.subjects], value=first.name, label="picture or clip", min_width=200, elem_id="which"
        )
        f.text = gr.Textbox(
            question,
            label="question",
            max_length=MAX_QUESTION,
            max_lines=1,
            scale=2,
            min_width=260,
            elem_id="question",
        )
        with gr.Column(scale=0, min_width=140, elem_id="actions"):
            f.go = gr.Button("Ask", variant="primary", elem_id="ask")
            if buttons.allow_uploads:
                f.upload = gr.UploadButton("Upload", file_types=["image", "video"], elem_id="upload")
    f.tries = gr.Radio(label="questions to try", elem_id="tries", **buttons.tries(first))
    with gr.Row(equal_height=True, elem_id="choice"):
        one, two = explorer.two(first.kind, buttons.wanted)
        offered = explorer.strategies(first.kind)
        f.a = _strategies(offered, one, label="strategy A", elem_id="first")
        f.b = _strategies(offered, two, label="strategy B", elem_id="second")
        f.share = gr.Slider(
            0.01, 1.0, value=budget, step=0.01, label="budget: share of the tokens", elem_id="budget"
        )
    f.note = gr.HTML(elem_id="note", padding=False, **buttons.note(first))
    f.message = gr.HTML(elem_id="message", padding=False)
    with gr.Row(elem_id="panels"):
        f.panels = [gr.HTML(elem_id=f"panel-{name}", padding=False) for name in ("all", "a", "b")]
    gr.HTML(f"<small>{escape(LEGEND)} {times_html(explorer.tiny)}</small>")
    f.turn = gr.Number(0, visible="hidden", elem_id="turn", label="turn")
    return f


def _strategies(offered: Sequence[str], value: str, **kwargs: Any) -> gr.Dropdown:
    """A list of strategies, into which other names and names joined by "+" may be typed."""
    return gr.Dropdown([*offered], value=value, allow_custom_value=True, min_width=130, **kwargs)


def _connect(page: Any, f: SimpleNamespace, buttons: Controls) -> None:
    """Connect the parts of the page with their handlers; whatever changes `turn` asks the model."""
    own: dict[str, Any] = dict(api_visibility="private", show_progress="hidden", queue=True)
    many = own | dict(concurrency_limit=buttons.desks.most)
    chosen = [f.text, f.tries, f.a, f.b, f.note, f.message, f.turn]
    f.which.input(buttons.choose, [f.which, f.a, f.b, f.turn], chosen, **many)
    if f.upload is not None:
        taken = f.upload.upload(buttons.upload, [f.upload, f.a, f.b, f.turn], [f.which, *chosen], **many)
        # in an event of its own: one that changes `which` too would ask about the subject before it
        taken.success(buttons.ask_again, f.turn, f.turn, **many)
    f.tries.input(buttons.tried, [f.tries, f.turn], [f.text, f.turn], **many)
    f.share.change(None, None, f.turn, js=REST, trigger_mode="multiple", **own)
    asked = [f.turn.change, f.a.input, f.b.input, f.text.submit, f.go.click]
    model = own | dict(
        concurrency_limit=1,
        concurrency_id="model",
        trigger_mode="always_last",
        show_progress="hidden" if buttons.explorer.tiny else "minimal",
    )
    # one event: several of this mode on one trigger would call each other without an end
    gr.on(asked, buttons.show, [f.which, f.text, f.a, f.b, f.share], f.panels, **model)
    page.load(buttons.begin, None, f.turn, **many)
    page.unload(buttons.leave)


class Controls:
    """Event handlers of the page. All shown text is escaped."""

    def __init__(
        self,
        explorer: Explorer,
        desks: Desks[Visit],
        subjects: Sequence[Subject],
        wanted: Sequence[str],
        allow_uploads: bool,
    ) -> None:
        self.explorer, self.desks, self.wanted = explorer, desks, wanted
        self.subjects = {subject.name: subject for subject in subjects}
        self.allow_uploads = allow_uploads

    def first_question(self, subject: Subject) -> str:
        return subject.asked[0][0] if subject.asked else ""

    def tries(self, subject: Subject) -> dict[str, Any]:
        """The questions to try, as a radio group shows them."""
        known = [question for question, truth in subject.asked if truth]
        return dict(choices=known, value=known[0] if known else None, visible=bool(known))

    def note(self, subject: Subject) -> dict[str, Any]:
        """What a tiny model does not know of a file, as the page shows it."""
        shown = self.explorer.tiny and subject.own
        return dict(value=f'<p role="status">{escape(TINY_KNOWS)}</p>' if shown else "", visible=shown)

    def begin(self) -> int:
        return 1

    def choose(self, name: str, a: str, b: str, turn: float, request: gr.Request) -> tuple[Any, ...]:
        subject = self._subject(name, request)
        if subject is None:
            return *(gr.skip() for _ in range(5)), escape(GONE), gr.skip()
        one, two = self.explorer.two(subject.kind, [a, b, *self.wanted])
        offered = self.explorer.strategies(subject.kind)
        return (
            self.first_question(subject),
            gr.Radio(**self.tries(subject)),
            _strategies(offered, one),
            _strategies(offered, two),
            gr.HTML(**self.note(subject)),
            "",
            turn + 1,
        )

    def upload(self, path: str, a: str, b: str, turn: float, request: gr.Request) -> tuple[Any, ...]:
        kept = tuple(gr.skip() for _ in range(6))
        if not self.allow_uploads:
            return *kept, escape("This page takes no files."), gr.skip()
        try:
            desk = self.desks.open(request.session_hash)
            desk.take(self.explorer.read(Path(path), "what is shown here?"))
        except ValueError as error:
            Path(path).unlink(missing_ok=True)
            return *kept, escape(" ".join(str(error).split())), gr.skip()
        assert desk.subject is not None
        names = [*self.subjects, desk.subject.name]
        which = gr.Dropdown(names, value=desk.subject.name)
        return which, *self.choose(desk.subject.name, a, b, turn, request)[:-1], gr.skip()

    def ask_again(self, turn: float) -> float:
        return turn + 1

    def tried(self, question: str, turn: float) -> tuple[str, float]:
        return question, turn + 1

    def show(
        self, name: str, question: str, a: str, b: str, budget: float, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        """The panels of all tokens, of A and of B, as they come; a strategy's report says what all cost."""
        subject, a, b = self._subject(name, request), tidy(a), tidy(b)
        if subject is None:
            gone = Outcome("", refused=GONE)
            yield tuple(panel(title, gone, gone) for title in (ALL, a, b))
            return
        truth = subject.truth(question)
        one = self.explorer.outcome(subject, question, a, budget)
        dense = self.explorer.everything(subject, question)
        left = panel(a, one, dense, truth=truth)
        yield panel(ALL, dense, dense, one, truth), left, gr.skip()
        two = self.explorer.outcome(subject, question, b, budget)
        told = two if one.report is None else one
        yield panel(ALL, dense, dense, told, truth), left, panel(b, two, dense, truth=truth)

    def leave(self, request: gr.Request) -> None:
        self.desks.leave(request.session_hash)

    def _subject(self, name: str, request: gr.Request) -> Subject | None:
        desk = self.desks.of(request.session_hash)
        if desk is not None and desk.subject is not None and desk.subject.name == name:
            return desk.subject
        return self.subjects.get(name)


__all__ = ["CSS", "MAX_UPLOAD", "Visit", "build_page"]
