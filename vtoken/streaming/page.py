"""A page in the browser: a stream plays, what was kept is drawn on it, and questions are answered at any moment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from .command import SYNTHETIC
from .player import Player
from .session import StreamSession

PLOTS = {  # column -> title
    "tokens": "visual tokens kept per step",
    "saved": "tower FLOPs saved (%)",
    "memory": "memory (MiB)",
    "latency": "latency per step (ms)",
}
EVERY = 0.5  # seconds between two looks at the stream
WINDOW = 120  # readings in a plot
LEGEND = "Outlined: visual tokens that were kept. Red dots: cells that the vision tower computed anew."


class Desk:
    """What the buttons of the page act on: one session at a time, and the player that feeds it.

    Args:
        make_session: `make_session(strategy, budget) -> StreamSession`.
        fps: frames per second to take from a source.
        speed: how many times faster than life a recording plays.
    """

    def __init__(
        self, make_session: Callable[[str, float], StreamSession], fps: float = 2.0, speed: float = 1.0
    ) -> None:
        self.make_session, self.fps, self.speed = make_session, fps, speed
        self.session: StreamSession | None = None
        self.player: Player | None = None
        self.wanted: tuple[str, str, float, float] | None = None

    def play(self, source: str, strategy: str, budget: float, fps: float | None = None) -> None:
        """Begin a stream, or go on with the one that was paused if nothing has changed.

        Raises:
            ValueError: for a source that cannot be opened or a strategy that does not fit.
        """
        wanted = (source.strip(), strategy, budget, fps or self.fps)
        if self.player is not None and self.wanted == wanted and not self.player.ended:
            self.player.resume()
            return
        self.close()
        self.session = self.make_session(strategy, budget)
        name = int(wanted[0]) if wanted[0].isdigit() else wanted[0]
        self.player = Player(self.session, name, fps=wanted[3], speed=self.speed)
        self.wanted = wanted

    def pause(self) -> None:
        if self.player is not None:
            self.player.pause()

    def close(self) -> None:
        """End the stream and forget it."""
        if self.player is not None:
            self.player.close()
        if self.session is not None:
            self.session.close()
        self.player = self.session = None

    def answer(self, question: str) -> Iterator[str]:
        """The answer so far, again and again while it grows; at the end with what it took."""
        if self.session is None or self.player is None or not self.player.readings:
            yield "There is no frame to ask about yet: press Play first."
            return
        try:
            pieces, said = self.session.stream_answer(question), ""
            for piece in pieces:
                said += piece
                yield said
        except ValueError as error:
            yield str(error)
            return
        answer = pieces.answer
        assert answer is not None
        yield (
            f"{answer.text}\n\n<sub>at {answer.time:.1f} s, from {len(answer.frames_used)} frames and "
            f"{answer.visual_tokens} visual tokens, first word after {answer.first_token_seconds * 1000:.0f} ms</sub>"
        )

    def status(self) -> str:
        """One line of Markdown about the stream."""
        if self.player is None or self.session is None:
            return "Nothing is playing."
        stats = self.session.stats
        state = "playing" if self.player.playing else "ended" if self.player.ended else "paused"
        words = [
            f"**{state}**",
            f"{stats['last'] or 0:.1f} s",
            f"{stats['frames']} frames",
            f"{stats['tokens']} of at most {stats['max_tokens']} visual tokens in memory",
            f"{stats['forgotten']} steps forgotten",
        ]
        if self.player.live.stats.dropped:
            words.append(f"{self.player.live.stats.dropped} frames dropped")
        return " · ".join(words) + (f"\n\n⚠ {self.player.error}" if self.player.error else "")

    def table(self) -> Any:
        """The latest readings as a data frame: `seconds` and the columns of `PLOTS`."""
        import pandas as pd

        readings = list(self.player.readings)[-WINDOW:] if self.player is not None else []
        rows = [(r.seconds, r.tokens, 100 * r.saved, r.nbytes / 2**20, 1000 * r.latency) for r in readings]
        return pd.DataFrame(rows, columns=["seconds", *PLOTS], dtype=float)


def build_page(desk: Desk, strategies: list[str], source: str = SYNTHETIC, budget: float = 0.5) -> Any:
    """The page as a `gradio.Blocks`, not launched yet.

    Args:
        desk: what its buttons act on.
        strategies: names to choose from; the first is chosen.
        source: what the source field holds at first.
        budget: where the budget slider stands at first.

    Raises:
        ImportError: without gradio.
    """
    try:
        import gradio as gr
    except ImportError:
        raise ImportError("The page needs gradio: pip install 'vtoken[stream]', or use --terminal.") from None

    def play(source: str, strategy: str, budget: float, fps: float) -> None:
        try:
            desk.play(source, strategy, budget, fps)
        except (ValueError, OSError, ImportError) as error:
            raise gr.Error(str(error)) from None

    def look() -> tuple[Any, ...]:
        table = desk.table()
        picture = desk.player.picture() if desk.player is not None else None
        highest = (table[name].max() if len(table) else 0 for name in PLOTS)
        return picture, desk.status(), *(gr.LinePlot(table, y_lim=[0, 1.1 * top or 1]) for top in highest)

    def ask(question: str, chat: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        if not question.strip():
            yield question, chat
            return
        chat = [*chat, {"role": "user", "content": question}]
        for said in desk.answer(question):
            yield "", [*chat, {"role": "assistant", "content": said}]

    with gr.Blocks(title="vtoken: questions to a live stream", analytics_enabled=False) as page:
        gr.Markdown("## Questions to a live stream\n" + LEGEND)
        with gr.Row():
            with gr.Column(scale=3):
                frame = gr.Image(label="stream", interactive=False, buttons=[], height=500, elem_id="frame")
                status = gr.Markdown(desk.status(), elem_id="status")
            with gr.Column(scale=2):
                chat = gr.Chatbot(label="answers", height=420, buttons=["copy"], elem_id="chat")
                question = gr.Textbox(
                    placeholder="Ask at any moment, then press Enter", show_label=False, elem_id="question"
                )
                send = gr.Button("Ask", variant="primary", elem_id="ask")
        with gr.Row():
            where = gr.Textbox(
                source,
                label="source",
                info="a file, an rtsp or http address, the number of a camera, or synthetic://SEED",
                elem_id="source",
            )
            which = gr.Dropdown(strategies, value=strategies[0], label="strategy", elem_id="strategy")
            share = gr.Slider(0.05, 1.0, value=budget, step=0.05, label="budget")
            rate = gr.Number(desk.fps, label="frames per second", minimum=0.1)
            upload = gr.UploadButton("Open a file", file_types=["video"])
        with gr.Row():
            start = gr.Button("Play", variant="primary", elem_id="play")
            pause = gr.Button("Pause", elem_id="pause")
            stop = gr.Button("Stop and forget", elem_id="stop")
        with gr.Row():
            plots = [
                gr.LinePlot(x="seconds", y=name, title=title, height=200, min_width=220, elem_id=f"plot-{name}")
                for name, title in PLOTS.items()
            ]
        upload.upload(lambda path: str(path), upload, where)
        start.click(play, [where, which, share, rate], None)
        pause.click(desk.pause)
        stop.click(desk.close)
        gr.on([send.click, question.submit], ask, [question, chat], [question, chat])
        gr.Timer(EVERY).tick(look, None, [frame, status, *plots], show_progress="hidden")
    return page
