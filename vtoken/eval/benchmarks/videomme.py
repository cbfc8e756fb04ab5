"""Video-MME: multiple-choice questions about videos (Fu et al., arXiv 2405.21075)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from ..intervals import wilson
from ..protocols.multiple_choice import PROTOCOLS
from .datasets import read_parquet
from .task import Breakdown, Clip, Item, Prompt, Task, Unreadable, checked, fingerprint, one_line

HOW = (
    "get it with hf download lmms-lab/Video-MME --repo-type dataset --local-dir Video-MME, unpack its"
    " videos_chunked_*.zip into Video-MME/data and subtitle.zip into Video-MME/subtitle, and give --data"
    " Video-MME, or use --example."
)
COLUMNS = [
    "video_id",
    "duration",
    "domain",
    "sub_category",
    "url",
    "videoID",
    "question_id",
    "task_type",
    "question",
    "options",
    "answer",
]
DURATIONS = ("short", "medium", "long")
ENDINGS = (".mp4", ".MP4", ".mkv")


def load(source: str | Path, letters: str | None = None) -> list[Item]:
    """The questions of Video-MME, grouped by task type.

    Args:
        source: a folder with the parquet of the Hub, `data/<videoID>.mp4` and `subtitle/<videoID>.srt`.
        letters: of the options, "ABCD" for instance; as many as the longest list of options needs if None.

    Raises:
        ValueError: if the folder, a column, or every video is missing, a question is there twice, or an
            answer is not one of the letters. The sentence names the item.
    """
    folder = Path(source)
    if not folder.is_dir():
        raise ValueError(f"There is no data set folder {str(source)!r}: {HOW}") from FileNotFoundError(source)
    items = []
    for row in read_parquet(folder, COLUMNS, HOW):
        name, options = str(row["question_id"]), tuple(map(str, row["options"] or ()))
        answer = str(row["answer"] or "").strip().upper()
        known = letters or "ABCDEFGH"
        if not 2 <= len(options) <= len(known):
            raise ValueError(f"{name!r} has {len(options)} options, which the letters {known} cannot name.")
        if len(answer) != 1 or answer not in known[: len(options)]:
            raise ValueError(
                f"{name!r} has the answer {row['answer']!r}: it needs one of"
                f" {', '.join(known[: len(options)])}."
            )
        about = {key: str(row[key]) for key in ("duration", "domain", "sub_category", "videoID")}
        items.append(Item(name, str(row["question"]), answer, str(row["task_type"]), folder, options, about))
    checked(items)
    if not any(video_path(item) for item in items):
        raise ValueError(f"None of the videos is in {str(folder / 'data')!r}: {HOW}")
    return items


def _beside(item: Item, sort: str, endings: tuple[str, ...]) -> Path | None:
    # a name with a separator would lead out of the folder
    names = [item.about["videoID"] + end for end in endings]
    return next(
        (p for name in names if Path(name).name == name and (p := item.media / sort / name).is_file()), None
    )


def video_path(item: Item) -> Path | None:
    """`data/<videoID>.mp4` or .mkv, None if it is not there."""
    return _beside(item, "data", ENDINGS)


class VideoMME(Task):
    """Video-MME under one protocol, a `Task` for the runner.

    Args:
        items: from `load`.
        protocol: "strict", "lmms-eval" or "vlmevalkit".
        frames: sampled per video; the protocol's number if None.
        subtitles: whether the prompt has the subtitles of the sampled frames.
        letters: of the options; as many as the longest list of options needs if None.
    """

    title = "Video-MME"

    def __init__(
        self,
        items: list[Item],
        protocol: str = "strict",
        frames: int | None = None,
        subtitles: bool = False,
        letters: str | None = None,
    ) -> None:
        if protocol not in PROTOCOLS:
            raise ValueError(f"There is no protocol {protocol!r}: use {', '.join(PROTOCOLS)}.")
        self.items, self.name, self.protocol = items, protocol, PROTOCOLS[protocol]
        self.frames, self.subtitles = frames or self.protocol.frames, subtitles
        self.letters = letters or "ABCDEFGH"[: max(len(item.options) for item in items)]
        self.max_new_tokens = self.protocol.max_new_tokens
        self._last: tuple[tuple[Path, int], Clip] | None = None

    def settings(self) -> dict[str, Any]:
        return {
            "task": "Video-MME",
            "protocol": self.name,
            "subtitles": self.subtitles,
            "letters": self.letters,
            "questions": len(self.items),
            "data": fingerprint(self.items),
        }

    def clip(self, item: Item, frames: int) -> Clip:
        """Sampled frames of an item's video; those of the last video are cached for its next question.

        Raises:
            Unreadable: naming the item and the file.
        """
        path = video_path(item)
        if path is None:
            wanted = f"data/{item.about['videoID']}.mp4"
            raise Unreadable(
                f"The video of {item.name} is missing: there is no {wanted} in {str(item.media)!r}."
            )
        if self._last and self._last[0] == (path, frames):
            return self._last[1]
        from ...video import Limits, open_video

        try:
            # this benchmark has long videos and many frames
            with open_video(path, limits=Limits(nbytes=2**34, seconds=None)) as reader:
                try:
                    total = len(reader)  # type: ignore[arg-type]
                except TypeError:
                    total = round((reader.duration or 0) * reader.fps)
                if total < 1:
                    raise ValueError("it has no frames")
                indices = self.protocol.sample(total, frames)
                once = sorted(set(indices))
                images = dict(
                    zip(
                        once, (Image.fromarray(f.image) for f in reader.get_frames(indices=once)), strict=True
                    )
                )
                clip = Clip([images[i] for i in indices], indices, float(reader.fps), total)
        except ImportError:
            raise
        except Exception as error:
            raise Unreadable(
                f"The video of {item.name}, data/{path.name}, cannot be decoded: {one_line(error)}"
            ) from None
        self._last = (path, frames), clip
        return clip

    def said(self, item: Item, clip: Clip) -> str | None:
        """The subtitles that the protocol shows; None without subtitles."""
        if not self.subtitles:
            return None
        path = _beside(item, "subtitle", (".srt",))
        try:
            return self.protocol.said(path, clip.indices, clip.fps, clip.total)
        except ImportError:
            raise
        except Exception as error:
            where = f"subtitle/{item.about['videoID']}.srt"
            raise Unreadable(
                f"The subtitles of {item.name}, {where}, cannot be read: {one_line(error)}"
            ) from None

    def prompt(self, item: Item, frames: int | None = None) -> Prompt:
        clip = self.clip(item, frames or self.frames)
        question = "\n".join((item.question, *item.options))
        return Prompt(self.protocol.prompt(question, self.letters, self.said(item, clip)), clip=clip)

    def read(self, item: Item, text: str) -> str:
        return self.protocol.read(text, self.letters, item.options)

    def breakdown(self, right: dict[str, bool]) -> Breakdown:
        """Accuracy in % overall, per duration and per task type, domain and sub-category."""
        rows, columns = [["", "questions", "right", "accuracy", "95 % interval"]], {}
        scores: dict[str, Any] = {}

        def share(kind: str, name: str, some: list[bool]) -> str:
            accuracy = 100 * sum(some) / len(some)
            low, high = wilson(sum(some), len(some))
            scores.setdefault(kind, {})[name] = {"accuracy": accuracy, "right": sum(some), "asked": len(some)}
            between = f"{100 * low:.1f} to {100 * high:.1f}"
            rows.append([f"{kind}: {name}", str(len(some)), str(sum(some)), f"{accuracy:.1f}", between])
            return f"{accuracy:.1f}"

        share("overall", "all", list(right.values()))
        for kind in ("duration", "task_type", "domain", "sub_category"):
            groups: dict[str, list[bool]] = {}
            for item in self.items:
                value = item.group if kind == "task_type" else item.about[kind]
                groups.setdefault(value, []).append(right[item.name])
            first = {name: i for i, name in enumerate(DURATIONS)}
            for name in sorted(groups, key=lambda n: (first.get(n, 3), n)):
                shown = share(kind, name, groups[name])
                if kind == "duration":
                    columns[name] = shown
        return Breakdown(columns, rows, scores)
