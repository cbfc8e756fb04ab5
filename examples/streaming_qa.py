"""Ask about a stream while it runs: `python examples/streaming_qa.py [VIDEO or rtsp address]`.

Without an argument the stream is a synthetic one of digits and coloured shapes, watched by a tiny model that ships with
vtoken, and its questions and right answers come with it. `--model` takes any model that reads videos. The page with the
same inside is `vtoken demo stream`.
"""

from __future__ import annotations

import argparse

import vtoken
from vtoken import tiny
from vtoken.streaming.player import passes_by
from vtoken.tiny.clips import stream as synthetic
from vtoken.video import LiveReader

parser = argparse.ArgumentParser()
parser.add_argument("source", nargs="?", help="file, camera or address; default: a synthetic stream")
parser.add_argument("--model", help="Hub id or folder; default: the tiny model")
parser.add_argument("--question", default="What is happening now?")
parser.add_argument("--every", type=float, default=10.0, help="seconds between questions")
parser.add_argument("--until", type=float, default=30.0, help="seconds of the stream")
args = parser.parse_args()

if args.model:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype="auto").eval()
    processor = AutoProcessor.from_pretrained(args.model)
else:
    model, processor = tiny.load("qwen2_5_vl")

labels = None if args.source else synthetic(0)
source = args.source or ((frame.image, frame.seconds) for frame in synthetic(0))
with (
    vtoken.StreamSession(model, processor, "stc", budget=0.5) as session,
    LiveReader(source, fps=2, speed=None, drop=passes_by(source)) as live,
):
    due = args.every
    for frame in live:
        session.push(frame)
        if frame.seconds >= due:
            due += args.every
            asked = [(args.question, None)]
            if labels is not None:
                asked = [(q.text, q.answer) for q in labels.questions_at(frame.seconds) if q.kind == "now"]
            for question, right in asked:
                answer = session.ask(question, max_new_tokens=16)
                hint = "" if right is None else f"  (right: {right})"
                print(f"{frame.seconds:5.1f} s  {question}  {answer.text}{hint}  [{answer.visual_tokens} visual tokens]")
        if frame.seconds >= args.until:
            break
    print(session.stats)
