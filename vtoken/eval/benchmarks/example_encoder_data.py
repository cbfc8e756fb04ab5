"""Small generated data sets for plain encoders, in the exact layout of the real ones.

They are the test splits of the tiny encoders that ship: `vtoken.tiny.topmost` and `vtoken.tiny.captions`.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from ...tiny.captions import retrieval_set
from ...tiny.topmost import CLASSES, labelled
from .example_data import write_mp4
from .msrvtt import COLUMNS, FILE


def write_imagenet(
    folder: str | Path, classes: Sequence[str], pictures: Iterable[tuple[int, Image.Image]]
) -> Path:
    """Write an ImageFolder, `val/<index> <class>/<number>.png`; returns the folder.

    Args:
        folder: made if needed.
        classes: their names, in the order of the model's outputs; each gets a folder, empty or not.
        pictures: with the index of the class of each.
    """
    folders = [Path(folder) / "val" / f"{i:03} {name}" for i, name in enumerate(classes)]
    for one in folders:
        one.mkdir(parents=True, exist_ok=True)
    for number, (label, image) in enumerate(pictures):
        image.save(folders[label] / f"{number:05}.png")
    return Path(folder)


def imagenet(folder: str | Path, images: int = 32) -> Path:
    """An ImageFolder of labelled scenes, classified by their topmost object; returns the folder."""
    scenes = (labelled(i, "test") for i in range(images))
    return write_imagenet(folder, CLASSES, [(label, scene.image) for scene, label in scenes])


def write_msrvtt(
    folder: str | Path, captions: Mapping[str, str], clips: Mapping[str, Sequence[Image.Image]], fps: int = 8
) -> Path:
    """Write MSR-VTT's layout: the CSV of JSFusion and `videos/all/<video_id>.mp4`; returns the folder.

    Args:
        folder: made if needed.
        captions: per video_id.
        clips: per video_id the frames, of even width and height.
        fps: of the files.
    """
    videos = Path(folder) / "videos" / "all"
    videos.mkdir(parents=True, exist_ok=True)
    with (Path(folder) / FILE).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for i, (video, caption) in enumerate(captions.items()):
            writer.writerow([f"ret{i}", f"msr{video.removeprefix('video')}", video, caption])
    for video, frames in clips.items():
        write_mp4(videos / f"{video}.mp4", frames, fps)
    return Path(folder)


def msrvtt(folder: str | Path, videos: int = 12) -> Path:
    """Clips of twelve frames at one frame per second, and what is seen in them; returns the folder."""
    clips, captions = retrieval_set(videos, "test", 12)
    names = [f"video{7000 + i}" for i in range(videos)]
    frames = {name: list(clip.media) for name, clip in zip(names, clips, strict=True)}
    return write_msrvtt(folder, dict(zip(names, captions, strict=True)), frames, fps=1)
