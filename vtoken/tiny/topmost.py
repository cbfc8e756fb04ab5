"""Scenes with one class each: the colour and the shape of the topmost object, such as ``red circle``.

The class needs all objects of a scene: which one is topmost is seen only by comparing them.
"""

from __future__ import annotations

from itertools import count

from .assets import SHAPES
from .scenes import COLOURS, Scene, SceneObject, make_scene

CLASSES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
MARGIN = 6  # px between the heights of the topmost object and the next one
_ROOM = 64  # seeds of scenes per labelled scene; about every fourth scene has too small a margin


def topmost(scene: Scene) -> SceneObject | None:
    """The object with the highest middle, or None if another one comes within ``MARGIN`` px of its height."""
    first, second = sorted(scene.objects, key=_height)[:2]
    return first if _height(second) - _height(first) >= MARGIN else None


def _height(item: SceneObject) -> float:
    return (item.box[1] + item.box[3]) / 2


def labelled(seed: int, split: str = "train") -> tuple[Scene, int]:
    """The labelled scene ``seed`` (an int >= 0) of a split: the scene and its place in ``CLASSES``.

    Raises:
        ValueError: unknown split or negative seed.
    """
    for number in count(seed * _ROOM):
        scene = make_scene(number, split)
        found = topmost(scene)
        if found:
            return scene, CLASSES.index(f"{found.colour} {found.shape}")
    raise AssertionError("count has no end")
