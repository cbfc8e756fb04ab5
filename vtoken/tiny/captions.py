"""Captions of clips, and sets of clips for retrieval between text and video.

A caption says what a clip shows, in order: ``a red circle and a 4 then a blue star then a 7``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

from .assets import SHAPES
from .clip_moments import Moment
from .clips import Clip, make_clip
from .digits import DIGITS
from .scenes import COLOURS

WORDS = ("a", "and", "then", "nothing", *DIGITS, *COLOURS, *SHAPES)
LONGEST = 31  # words: four moments of "a red circle and a 4" with "then" between them


def describe(moment: Moment | None) -> str:
    """What a moment shows, ``a red circle and a 4``; ``nothing`` for the time between moments."""
    shown = [f"a {moment.colour} {moment.shape}"] if moment and moment.shape else []
    shown += [f"a {moment.digit}"] if moment and moment.digit else []
    return " and ".join(shown) or "nothing"


def caption(clip: Clip) -> str:
    """What a clip shows, moment after moment, in the words of ``WORDS``."""
    return " then ".join(describe(moment) for moment in clip.moments)


def retrieval_set(
    n: int, split: str = "test", frames: int = 12, seed: int = 0
) -> tuple[Sequence[Clip], list[str]]:
    """``n`` clips, no two of which show the same, and their captions.

    Two captions that name the same moments in another order count as one: the mean over frames, which is how
    CLIP4Clip (arXiv:2104.08860) reads a video, cannot tell them apart.

    Args:
        n: number of clips, 1 or more.
        split: ``train`` or ``test``.
        frames: length of each clip; see `vtoken.tiny.clips.make_clip`.
        seed: picks a disjoint set of clips (a million apart).

    Raises:
        ValueError: ``n`` below 1, unknown split, negative seed, or a length that does not fit.
    """
    if n < 1 or seed < 0:
        raise ValueError(f"retrieval_set needs n >= 1 and seed >= 0, got n={n}, seed={seed}")
    found: dict[tuple[str, ...], Clip] = {}
    for number in count(seed * 1_000_000):
        clip = make_clip(number, split, frames)
        found.setdefault(tuple(sorted(describe(moment) for moment in clip.moments)), clip)
        if len(found) == n:
            break
    return list(found.values()), [caption(clip) for clip in found.values()]
