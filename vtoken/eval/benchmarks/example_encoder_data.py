"""Small generated data sets for plain encoders, in the exact layout of the real ones.

The pictures are made of the photographs and shapes of `vtoken.tiny.scenes`, test split.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ...tiny.assets import SHAPES
from ...tiny.scenes import COLOURS, SIZE, Scene, background, generator, make_scene, place_objects
from .example_data import write_mp4
from .msrvtt import COLUMNS, FILE


def picture(seed: int, shape: int) -> Image.Image:
    """A 96 x 96 picture of one shape, by its place in `SHAPES`, of a random colour at a random place."""
    rng = generator(seed, "test", 7)
    pixels, _ = background(rng, "test", SIZE, SIZE)
    x, y = (int(v) for v in rng.integers(16, SIZE - 16, size=2))
    place_objects(rng, pixels, "test", [shape], [int(rng.integers(len(COLOURS)))], [(x, y)])
    return Image.fromarray(pixels.astype(np.uint8))


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
    """An ImageFolder of pictures of one shape each, the shapes in turns; returns the folder."""
    labels = [i % len(SHAPES) for i in range(images)]
    return write_imagenet(folder, SHAPES, [(label, picture(i, label)) for i, label in enumerate(labels)])


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


def caption(scene: Scene) -> str:
    """The objects of a scene in words: "a red circle and a blue star"."""
    return " and ".join(f"a {item.colour} {item.shape}" for item in scene.objects)


def msrvtt(folder: str | Path, videos: int = 12) -> Path:
    """Two-second clips, each of one scene that stands still, and what is in it; returns the folder."""
    scenes = {f"video{7000 + i}": make_scene(200 + i, "test") for i in range(videos)}
    captions = {video: caption(scene) for video, scene in scenes.items()}
    return write_msrvtt(folder, captions, {video: [s.image] * 16 for video, s in scenes.items()})
