"""Long labelled clips with one short event, and questions about them: when, what and in which order.

A clip lasts 16 seconds: a photograph that stands still or drifts, under a little camera noise. Once in it
there is an *event*: two moments right after one another, each with a digit or with a digit and a coloured
shape, for 2 or 4 frames. Half of the clips also show a *lasting* shape in every frame; two questions ask for
it, all others mean what comes and goes. Nothing else happens, so that a budget spread evenly over time goes
mostly to frames that answer nothing. Moments begin at whole seconds, not in the first one; the event lies
inside the first, the middle or the last third of the clip, away from the borders between them.

Clips are 96 x 96 px and a function of ``(seed, split, frames)`` alone, composed as those of
`vtoken.tiny.clips` and with the same two sets of photographs, shape masks and fonts. In the ``test`` split a
second passes between two of an event's moments; in the ``train`` split the next moment begins at the next
whole second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from . import clips
from .assets import SHAPES
from .clip_moments import Camera, Moment, draw_moment, draw_object
from .clips import Clip, Frames
from .digits import DIGITS
from .scenes import COLOURS, SIZE, Question, SceneObject, balanced, generator

SECONDS = 16
LENGTHS = (32, 64)  # frames
KINDS = ("when", "what", "order")
FORMS = {  # the first form is the one that `questions` uses; the others are those of `vtoken.tiny.clips`
    "when": ("when was the {name} shown?", "when did you see the {name}?"),
    "lasting": ("which {what} was shown all the time?", "what {what} did you see all the time?"),
}
THIRDS = {"begin": (1, 5), "middle": (6, 10), "end": (11, 16)}  # seconds: first, and the one after the last
LONGEST = 4  # seconds of an event


@dataclass(frozen=True)
class LongClip(Clip):
    """A clip with, perhaps, a shape that every frame shows besides its moments."""

    lasting: SceneObject | None = field(default=None, compare=False)

    @property
    def third(self) -> str:
        """The third of the clip with its event: ``begin``, ``middle`` or ``end``."""
        middle = (self.moments[0].start + self.moments[-1].stop) / 2
        return tuple(THIRDS)[int(3 * middle / len(self.media))]


def _layout(rng: np.random.Generator, split: str, frames: int) -> list[tuple[int, int]]:
    """First and last + 1 frame of each moment of an event."""
    beat = frames // SECONDS
    while True:
        shown = 2 * rng.integers(1, 3, size=2)
        taken = -(-shown // beat)
        if split == "test":
            taken[int(rng.integers(len(taken) - 1))] += 1
        if taken.sum() <= LONGEST:
            break
    first, stop = tuple(THIRDS.values())[int(rng.integers(3))]
    starts = int(rng.integers(first, stop - int(taken.sum()) + 1)) + taken.cumsum() - taken
    return [(int(start) * beat, int(start) * beat + int(n)) for start, n in zip(starts, shown)]


def _quadrant(item: SceneObject) -> int:
    return item.origin[0] * 2 // SIZE + item.origin[1] * 2 // SIZE * 2


def make_long(seed: int, split: str = "train", frames: int = 32) -> LongClip:
    """Composes the long clip ``seed`` (an int >= 0) of a split (``train`` or ``test``).

    Args:
        frames: length, a multiple of 32; at ``frames / 16`` frames per second.

    Raises:
        ValueError: unknown split, negative seed, or another length.
    """
    if frames < 32 or frames % 32:
        raise ValueError(f"a long clip needs a multiple of 32 frames, got {frames}")
    rng = generator(seed, split, 11, frames)
    camera, spans = Camera(rng, split), _layout(rng, split, frames)
    count = len(spans)
    digits, shapes, colours = (
        [names[i] for i in rng.permutation(len(names))] for names in (DIGITS, SHAPES, tuple(COLOURS))
    )
    lasting = None
    if rng.integers(2):
        lasting = draw_object(rng, split, shapes[count], colours[count], int(rng.integers(4)))
    shows = [(True, True), (True, bool(rng.integers(2)))]
    moments: list[Moment] = []
    for i, which in enumerate(rng.permutation(count)):
        digit, shape = (name if on else None for name, on in zip((digits[i], shapes[i]), shows[which]))
        moment = None
        while moment is None or (lasting and _quadrant(lasting) in map(_quadrant, moment.objects)):
            moment = draw_moment(rng, split, *spans[i], digit, shape, colours[i])
        moments.append(moment)
    always = [lasting] if lasting else []
    images = [
        camera.frame(i, always + [o for m in moments if m.start <= i < m.stop for o in m.objects])
        for i in range(frames)
    ]
    fps = frames / SECONDS
    media = Frames(images, [i / fps for i in range(frames)])
    return LongClip(media, tuple(moments), int(seed), split, camera.name, fps, lasting)


def questions(
    clip: LongClip, forms: np.random.Generator | None = None, passing: bool = True
) -> list[Question]:
    """All questions about a long clip, each with exactly one right answer, asked after its last frame.

    Args:
        forms: a numpy generator draws the wording from the known ones; without it the first is used.
        passing: whether the answer may be the shape or the colour of a moment.
    """
    asked: list[Question] = []

    def ask(form: str, answer: str, kind: str, **words: str) -> None:
        number = 0 if forms is None else int(forms.integers(len(FORMS[form])))
        asked.append(Question(FORMS[form][number].format(**words), answer, kind))

    for m in clip.moments:
        for name in (m.digit, m.shape, m.shape and f"{m.colour} {m.shape}"):
            if name:
                ask("when", clip.third, "when", name=name)
    if clip.lasting:
        ask("lasting", clip.lasting.shape, "what", what="shape")
        ask("lasting", clip.lasting.colour, "what", what="colour")
    kinds = {"moment": "what", "order": "order"}
    known = clips.questions(clip, forms)
    known = [q for q in known if q.kind in kinds and (passing or q.answer in DIGITS)]
    return asked + [replace(q, kind=kinds[q.kind]) for q in known]


def held_out(n: int, seed: int = 0, frames: int | Sequence[int] = LENGTHS) -> list[tuple[LongClip, Question]]:
    """``n`` questions about ``n`` different long clips of the test split, balanced over ``KINDS``.

    ``seed`` picks a disjoint set of clips (a million apart). Of several ``frames`` each length takes its
    turn. Moments are named by their digits, and their shapes asked for by time alone: of the shapes and
    colours that pass in 2 or 4 frames the shipped model names 7 of 10, with all visual tokens.
    """
    lengths, first = (frames,) if isinstance(frames, int) else tuple(frames), seed * 1_000_000

    def example(i: int) -> LongClip:
        return make_long(first + i, "test", lengths[i // len(KINDS) % len(lengths)])

    return balanced(n, seed, (13,), KINDS, example, partial(questions, passing=False))


def vocabulary() -> list[str]:
    """Every word and mark of the questions and answers, sorted."""
    text = " ".join(form for forms in FORMS.values() for form in forms).replace("?", " ?")
    words = {word for word in text.split() if "{" not in word}
    return sorted(words | set(THIRDS) | set(clips.vocabulary()))
