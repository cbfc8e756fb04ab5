"""Subtitles for sampled frames, chosen as each harness does."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

# from the file (None: there is none), the sampled frame numbers, frames per second and frames of the video
Said = Callable[[Path | None, Sequence[int], float, int], str]
FONT = re.compile(r'<font color="white" size=".72c">(.*?)</font>')


def _load(path: Path):  # type: ignore[no-untyped-def]
    try:
        import pysubs2
    except ImportError:
        raise ImportError("Subtitles need pysubs2: pip install 'vtoken[eval]'.") from None
    return pysubs2.load(str(path), encoding="utf-8")


def at_frames(path: Path | None, indices: Sequence[int], fps: float, total: int) -> str:
    """Every subtitle that is shown at a sampled frame, once, without markup; "" if there is no file."""
    if path is None:
        return ""
    times = [1000 * i / fps for i in indices]
    shown = [line for line in _load(path) if any(line.start <= t < line.end for t in times)]
    return "\n".join(text for line in shown if (text := " ".join(line.plaintext.split())))


def vlmevalkit(path: Path | None, indices: Sequence[int], fps: float, total: int) -> str:
    """Per sampled frame the first subtitle strictly around it; one that spans several frames is repeated."""
    if path is None:
        return ""
    import pysubs2

    lines, said = _load(path), []
    for index in indices:
        now = pysubs2.make_time(frames=index, fps=fps)
        text = next((line.text.replace("\\N", " ") for line in lines if line.start < now < line.end), "")
        said += [text] * bool(text.strip())
    return "\n".join(said)


def lmms_eval(path: Path | None, indices: Sequence[int], fps: float, total: int) -> str:
    """Subtitles at 32 frames, however many the model sees, and only text in a white <font> of the size .72c.

    Their order is that of a Python set of their numbers; of several with the same times the last one counts.
    """
    if path is None:
        return "No subtitles available"
    entries: dict[tuple[float, float], str] = {}
    for section in path.read_text(encoding="utf-8").split("\n\n"):
        lines = section.split("\n")
        if section.strip() and len(lines) >= 3:
            start, end = map(_seconds, lines[1].split(" --> "))
            entries[start, end] = " ".join(lines[2:])
    texts = list(entries.values())
    spans = [(int(start * fps), int(end * fps)) for start, end in entries]
    sampled = np.linspace(0, total - 1, 32, dtype=int).tolist()
    shown = list({i for frame in sampled for i, (start, end) in enumerate(spans) if start <= frame < end})
    return "\n".join(found[0] for i in shown if (found := FONT.findall(texts[i])))


def _seconds(time: str) -> float:
    hours, minutes, rest = time.split(":")
    seconds, thousandths = rest.split(",")
    return int(hours) * 3600 + int(minutes) * 60 + int(seconds) + int(thousandths) / 1000
