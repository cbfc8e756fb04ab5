"""What the page of `vtoken demo explore` asks about: generated scenes and clips, and files."""

from __future__ import annotations

import mimetypes
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..images import open_image
from ..limits import Limits
from ..tiny import clips, clutter, long_clips, names, pages, scenes
from ..tiny.questions import held_out
from ..video import SampledVideo, sample

EXAMPLES, TRIES = 6, 4  # generated pictures and clips, and questions proposed for each
FRAMES = 8  # of a video file
DRAWN = 480  # px of the longer side of a clip's frame on the page
SIDE = 1024  # px of the longer side of an uploaded picture, as the model gets it
UPLOAD = Limits(pixels=2**25, frames=2**17, nbytes=2**28, seconds=20.0)


@dataclass(frozen=True, eq=False)
class Subject:
    """A picture or a clip, as the page lists it.

    Attributes:
        name: plain text, not escaped.
        media: an RGB picture, or frames that are ready for a processor.
        asked: questions to try, each with its right answer, "" where that is not known.
        own: whether it is a file of the owner or of a visitor, not a generated example.
    """

    name: str
    media: Image.Image | SampledVideo
    asked: tuple[tuple[str, str], ...] = ()
    own: bool = False

    @property
    def kind(self) -> str:
        """ "image" or "video"."""
        return "image" if isinstance(self.media, Image.Image) else "video"

    @cached_property
    def frames(self) -> list[Image.Image]:
        """The frames of a clip, of up to `DRAWN` px, to be drawn on."""
        assert isinstance(self.media, SampledVideo)
        found = []
        for frame in self.media.frames:
            picture = Image.fromarray(frame.permute(1, 2, 0).numpy())
            picture.thumbnail((DRAWN, DRAWN))
            found.append(picture)
        return found

    def truth(self, question: str) -> str:
        """The right answer to a question, "" if it is not known."""
        return dict(self.asked).get(question.strip(), "")


def reads_videos(processor: Any) -> bool:
    """Whether a processor takes videos."""
    return getattr(processor, "video_processor", None) is not None


def examples(model_id: str | None, processor: Any) -> list[Subject]:
    """Held-out pictures and clips, of the kind that a tiny model knows; small scenes for other models."""
    known = model_id if model_id in names() else "qwen2_5_vl" if reads_videos(processor) else "llava"
    found, counts = [], {"image": 0, "video": 0}
    for example, question in held_out(known, EXAMPLES):
        media = example.media if isinstance(example.media, Image.Image) else _sampled(example)
        subject = Subject("", media, _tries(known, example, question))
        counts[subject.kind] += 1
        words = f"picture {counts['image']}" if subject.kind == "image" else f"clip {counts['video']}"
        length = "" if subject.kind == "image" else f", {len(example.media)} frames"
        found.append(Subject(words + length, media, subject.asked))
    return found


def _tries(known: str, example: Any, first: scenes.Question) -> tuple[tuple[str, str], ...]:
    """Questions about an example, one of each kind, and `first` before them."""
    if known == "llava_clutter":
        found = [question for question, _ in clutter.questions(example)]
    elif isinstance(example, pages.Page):
        found = pages.questions(example)
    elif isinstance(example, long_clips.LongClip):
        found = long_clips.questions(example, passing=False)
    elif isinstance(example, clips.Clip):
        found = clips.questions(example)
    else:
        found = scenes.questions(example)
    kinds = {question.kind: question for question in reversed(found)} | {first.kind: first}
    others = [question for kind, question in kinds.items() if kind != first.kind]
    return tuple((question.text, question.answer) for question in [first, *others[::-1]][:TRIES])


def _sampled(clip: clips.Clip) -> SampledVideo:
    """All frames of a generated clip."""
    from transformers.video_utils import VideoMetadata

    pixels = np.stack([np.asarray(frame) for frame in clip.media])
    count, height, width, _ = pixels.shape
    facts = VideoMetadata(
        total_num_frames=count,
        fps=clip.fps,
        width=width,
        height=height,
        duration=count / clip.fps,
        video_backend="generated",
        frames_indices=list(range(count)),
    )
    frames = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    return SampledVideo(frames, clip.seconds, tuple(range(count)), facts, "generated", "It is made here.")


def of_the_owner(image: str | None, video: str | None, question: str, processor: Any) -> Subject | None:
    """The file that the command line names, None if it names none.

    Raises:
        ValueError: it cannot be read, or the model reads no videos.
    """
    if image is not None:
        return Subject(Path(image).name, open_image(image), ((question, ""),), own=True)
    if video is None:
        return None
    _check_video(processor)
    clip = sample(video, frames=FRAMES, processor=processor)
    return Subject(Path(video).name, clip, ((question, ""),), own=True)


def of_a_visitor(path: Path, question: str, processor: Any) -> Subject:
    """An uploaded file: within bounds that are closer than those of the library, and made small.

    The ending of its name says whether it is a video.

    Raises:
        ValueError: one sentence, it is no picture or video, damaged, or too large.
    """
    name = f"yours: {path.name[:60]}"
    if (mimetypes.guess_type(path.name)[0] or "").startswith("video/"):
        _check_video(processor)
        clip = sample(path, FRAMES, processor=processor, backend="pyav", scaled=True, limits=UPLOAD)
        return Subject(name, clip, ((question, ""),), own=True)
    picture = open_image(path, UPLOAD, "your file")
    picture.thumbnail((SIDE, SIDE))
    return Subject(name, picture, ((question, ""),), own=True)


def _check_video(processor: Any) -> None:
    if not reads_videos(processor):
        raise ValueError("This model reads no videos: give it a picture, or choose another --model.")
