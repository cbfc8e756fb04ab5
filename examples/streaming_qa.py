"""Ask about a stream while it runs: `python examples/streaming_qa.py [VIDEO or rtsp address]`.

Without an argument the stream is a synthetic one of digits and coloured shapes, watched by a tiny model that
ships with vtoken, and its questions and right answers come with it. The tiny model has learnt from clips of a
few seconds, so it remembers, and is asked about, the last two; `--model` takes any model that reads videos.
The page with the same inside is `vtoken demo stream`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import vtoken
from vtoken import tiny
from vtoken.cli.stream_player import passes_by
from vtoken.tiny.clips import Stream, StreamFrame
from vtoken.tiny.clips import stream as synthetic
from vtoken.tiny.scenes import Question
from vtoken.video import LiveReader

REACH = 2.0  # seconds that the tiny model is asked about
WINDOW = 2 * 18  # visual tokens that it remembers: two steps of two frames each, at half their tokens


def in_reach(labels: Stream, frame: StreamFrame) -> list[Question]:
    """Questions about a digit and the shape shown with it, both from the last seconds."""
    first = frame.index - int(REACH * labels.fps)  # the latest frame may wait for the other one of its step
    seen = [m for m in frame.moments if m.digit and m.shape and first < m.start < frame.index]
    ends = tuple(f"with the {name}?" for m in seen for name in (m.digit, f"{m.colour} {m.shape}"))
    return [q for q in labels.questions_at(frame.seconds) if q.kind == "moment" and q.text.endswith(ends)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", nargs="?", help="file, camera or address; default: a synthetic stream")
    parser.add_argument("--model", help="Hub id or folder; default: the tiny model")
    parser.add_argument("--question", default="What is happening now?", help="for a source of your own")
    parser.add_argument("--every", type=float, default=1.0, help="seconds between questions")
    parser.add_argument("--until", type=float, default=30.0, help="seconds of the stream")
    parser.add_argument("--seed", type=int, default=0, help="which synthetic stream")
    args = parser.parse_args(arguments)

    bounds = {}
    if args.model:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        model = AutoModelForImageTextToText.from_pretrained(args.model, dtype="auto").eval()
        processor = AutoProcessor.from_pretrained(args.model)
    else:
        model, processor = tiny.load("qwen2_5_vl")
        bounds = {"max_tokens": WINDOW, "memory_options": {"sinks": 0}}

    labels = None if args.source else synthetic(args.seed)
    source = args.source or ((frame.image, frame.seconds) for frame in synthetic(args.seed))
    with (
        vtoken.StreamSession(model, processor, "stc", budget=0.5, **bounds) as session,
        LiveReader(source, fps=2, speed=None, drop=passes_by(source)) as live,
    ):
        due, right, total, told = args.every, 0, 0, set()
        for number, frame in enumerate(live):
            session.push(frame)
            if frame.seconds >= due:
                due += args.every
                asked = (
                    [Question(args.question, "", "")]
                    if labels is None
                    else in_reach(labels, labels.frame(number))
                )
                for question in asked:
                    if labels is not None and question in told:
                        continue
                    told.add(question)
                    answer = session.ask(question.text, max_new_tokens=16)
                    hint = f"  (right: {question.answer})" if question.answer else ""
                    hint += f"  [{answer.visual_tokens} visual tokens]"
                    right, total = right + (answer.text == question.answer), total + 1
                    print(f"{frame.seconds:5.1f} s  {question.text}  {answer.text}{hint}")
            if frame.seconds >= args.until:
                break
        if labels is not None:
            print(f"{right} of {total} answers are right")
        print(session.stats)


if __name__ == "__main__":
    main()
