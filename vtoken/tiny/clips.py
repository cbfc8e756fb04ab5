"""Short labelled clips and endless streams of digits and shapes, and questions about them.

On a photograph that stands still or drifts slowly, under a little camera noise, there are *moments*: for a
while a digit, a coloured shape or both are on screen; between moments there is the photograph alone. A clip
has 2 to 4 moments, no digit twice, no colour twice; a shape may come again in another colour. Clips are 96 x
96 px and a function of ``(seed, split)`` and their length alone: stored bytes, PCG64 and integer arithmetic.
The ``test`` split uses other photographs and shape masks than the ``train`` split (`vtoken.tiny.assets`) and
other fonts (`vtoken.tiny.digits`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from .assets import SHAPES
from .clip_moments import Camera, Moment, draw_moment
from .digits import DIGITS
from .scenes import COLOURS, NUMBERS, SPLITS, Question, Scene, balanced

KINDS = ("order", "moment", "presence", "now", "digits")
FORMS = {  # the first form is the one that `questions` uses; a recipe may draw from all of them
    "first digit": ("which digit came first?", "what digit came first?"),
    "last digit": ("which digit came last?", "what digit came last?"),
    "first shape": ("which shape came first?", "what shape came first?"),
    "last shape": ("which shape came last?", "what shape came last?"),
    "after": ("which digit came after the {colour} {shape}?", "what digit came after the {colour} {shape}?"),
    "digit with": (
        "which digit was shown with the {colour} {shape}?",
        "which digit was shown when the {shape} was {colour}?",
    ),
    "shape with": ("which shape was shown with the {digit}?", "what shape was shown with the {digit}?"),
    "colour with": ("which colour was shown with the {digit}?", "what colour was shown with the {digit}?"),
    "was": ("was there a {name}?", "did you see a {name}?"),
    "digit now": ("which digit is shown now?", "what digit is shown now?"),
    "shape now": ("which shape is shown now?", "what shape is shown now?"),
    "digits": ("how many digits were shown?", "how many digits came?"),
}
KIND_OF = dict(zip(FORMS, ("order",) * 5 + ("moment",) * 3 + ("presence", "now", "now", "digits")))


class Frames(list):
    """A list of PIL images with the time of each in ``seconds`` (a tuple of floats)."""

    def __init__(self, images: Sequence[Image.Image], seconds: Sequence[float]) -> None:
        super().__init__(images)
        self.seconds = tuple(seconds)


@dataclass(frozen=True)
class Clip:
    """A finite clip: its frames (96 x 96 RGB, with ``.seconds``), its moments and where it comes from."""

    media: Frames = field(repr=False, compare=False)
    moments: tuple[Moment, ...]
    seed: int
    split: str
    background: str
    fps: float

    @property
    def seconds(self) -> tuple[float, ...]:
        """The time of each frame."""
        return self.media.seconds

    def scene(self, index: int) -> Scene:
        """Frame ``index`` and the objects on it."""
        shown = [o for m in self.moments if m.start <= index < m.stop for o in m.objects]
        return Scene(self.media[index], tuple(shown), self.seed, self.split, self.background)


def _check(split: str, seed: int, fps: float, hold: int) -> None:
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: use {' or '.join(SPLITS)}")
    if seed < 0:
        raise ValueError(f"the seed of a clip must be 0 or more, got {seed}")
    if not fps > 0 or hold < 1:
        raise ValueError(f"a clip needs fps > 0 and hold >= 1, got fps={fps}, hold={hold}")


def make_clip(seed: int, split: str = "train", frames: int = 8, fps: float = 2.0, hold: int = 2) -> Clip:
    """Composes clip ``seed`` (an int >= 0) of a split (``train`` or ``test``).

    Args:
        frames: length, a multiple of ``hold`` and at least twice that.
        fps: frames per second; says when frames are, changes nothing else.
        hold: moments start and end at multiples of this many frames.

    Raises:
        ValueError: unknown split, negative seed, or a length that does not fit.
    """
    _check(split, seed, fps, hold)
    if frames % hold or frames < 2 * hold:
        raise ValueError(f"a clip needs a multiple of {hold} frames and at least {2 * hold}, got {frames}")
    rng = np.random.Generator(np.random.PCG64([seed, SPLITS.index(split), 3, frames, hold]))
    camera, units = Camera(rng, split), frames // hold
    count = int(rng.integers(2, min(4, units) + 1))
    spans = np.zeros(2 * count + 1, int)  # gap, moment, gap, moment, ..., gap
    spans[1::2] = 1
    np.add.at(spans, rng.integers(len(spans), size=units - count), 1)
    edges = np.concatenate([[0], spans.cumsum()]) * hold
    shows = [(True, True), (True, bool(rng.integers(2)))]
    shows += [((True, True), (True, False), (False, True))[int(rng.integers(3))] for _ in range(count - 2)]
    shows = [shows[i] for i in rng.permutation(count)]
    digits, colours = rng.permutation(len(DIGITS)), rng.permutation(len(COLOURS))
    shapes = rng.permutation(len(SHAPES))[:count]
    for i in range(1, count):
        if rng.integers(3) == 0:
            shapes[i] = shapes[i - 1]
    moments = tuple(
        draw_moment(
            rng,
            split,
            int(edges[2 * i + 1]),
            int(edges[2 * i + 2]),
            DIGITS[digits[i]] if shows[i][0] else None,
            SHAPES[shapes[i]] if shows[i][1] else None,
            tuple(COLOURS)[colours[i]],
        )
        for i in range(count)
    )
    images = [
        camera.frame(i, [o for m in moments if m.start <= i < m.stop for o in m.objects])
        for i in range(frames)
    ]
    media = Frames(images, [i / fps for i in range(frames)])
    return Clip(media, moments, int(seed), split, camera.name, float(fps))


def _ask(
    moments: Sequence[Moment], now: int, rng: np.random.Generator, forms: np.random.Generator | None
) -> list[tuple[Question, int]]:
    """Questions after frame ``now``, each with the frame after which nothing changes its answer any more."""
    asked: list[tuple[Question, int]] = []

    def ask(form: str, answer: str, until: int = now + 1, **words: str) -> None:
        number = 0 if forms is None else int(forms.integers(len(FORMS[form])))
        asked.append(
            (Question(FORMS[form][number].format(**words), answer, KIND_OF[form]), min(until, now + 1))
        )

    with_digit = [m for m in moments if m.digit]
    with_shape = [m for m in moments if m.shape]
    digits = [m.digit for m in with_digit]
    pairs = [(m.colour, m.shape) for m in with_shape]
    if len(with_digit) > 1:
        ask("first digit", digits[0], with_digit[0].stop)
        ask("last digit", digits[-1])
    if len(with_shape) > 1:
        ask("first shape", with_shape[0].shape, with_shape[0].stop)
        ask("last shape", with_shape[-1].shape)
    for m in with_shape:
        if pairs.count((m.colour, m.shape)) > 1:
            continue
        words = {"colour": m.colour, "shape": m.shape}
        later = [d for d in with_digit if d.start > m.start]
        if later:
            ask("after", later[0].digit, later[0].stop, **words)
        if m.digit:
            ask("digit with", m.digit, m.stop, **words)
    for m in with_digit:
        if m.shape and digits.count(m.digit) == 1:
            ask("shape with", m.shape, m.stop, digit=m.digit)
            ask("colour with", m.colour, m.stop, digit=m.digit)
    seen = {
        name: m.stop
        for m in moments
        for name in (m.digit, m.shape, m.shape and f"{m.colour} {m.shape}")
        if name
    }
    names = [*DIGITS, *SHAPES, *(f"{m.colour} {shape}" for m in with_shape for shape in SHAPES)]
    names += [f"{colour} {m.shape}" for m in with_shape for colour in COLOURS]
    unseen = [name for name in dict.fromkeys(names) if name not in seen]
    for name in seen:
        ask("was", "yes", seen[name], name=name)
        alike = [
            other
            for other in unseen
            if (other in DIGITS, len(other.split())) == (name in DIGITS, len(name.split()))
        ]
        if alike:
            ask("was", "no", name=alike[int(rng.integers(len(alike)))])
    current = next((m for m in moments if m.start <= now < m.stop), None)
    ask("digit now", (current and current.digit) or "none")
    ask("shape now", (current and current.shape) or "none")
    if len(digits) == len(set(digits)) < len(NUMBERS):
        ask("digits", NUMBERS[len(digits)])
    return asked


def questions(
    clip: Clip, forms: np.random.Generator | None = None, seen_before: float | None = None
) -> list[Question]:
    """All questions about a clip, each with exactly one right answer, asked after its last frame.

    Args:
        forms: a numpy generator draws the wording from ``FORMS``; without it the first wording is used.
        seen_before: only questions with a final answer in the frames before this time (in seconds): later
            frames neither show the answer again nor could change it.
    """
    rng = np.random.Generator(np.random.PCG64([clip.seed, SPLITS.index(clip.split), 4]))
    asked = _ask(clip.moments, len(clip.media) - 1, rng, forms)
    return [question for question, until in asked if seen_before is None or until / clip.fps <= seen_before]


def held_out(
    n: int, seed: int = 0, frames: int | Sequence[int] = 8, fps: float = 2.0, hold: int = 2
) -> list[tuple[Clip, Question]]:
    """``n`` questions about ``n`` different clips of the test split, balanced over ``KINDS``.

    ``seed`` picks a disjoint set of clips (a million apart). Of several ``frames`` each length takes its
    turn.
    """
    lengths, first = (frames,) if isinstance(frames, int) else tuple(frames), seed * 1_000_000

    def example(i: int) -> Clip:
        return make_clip(first + i, "test", lengths[i // len(KINDS) % len(lengths)], fps, hold)

    return balanced(n, seed, (5,), KINDS, example, questions)


def vocabulary() -> list[str]:
    """Every word and mark of the questions and answers, sorted."""
    text = " ".join(form for forms in FORMS.values() for form in forms).replace("?", " ")
    words = {word for word in text.split() if "{" not in word}
    return sorted(
        words | {"?", "yes", "no", "none"} | set(DIGITS) | set(NUMBERS) | set(SHAPES) | set(COLOURS)
    )


@dataclass(frozen=True)
class StreamFrame:
    """One frame of a stream: a 96 x 96 RGB image, its time, its number and the moments begun by then."""

    image: Image.Image = field(repr=False, compare=False)
    seconds: float
    index: int
    moments: tuple[Moment, ...] = field(repr=False)


class Stream:
    """An endless clip: a function of ``(seed, split, hold)``, drawn frame by frame.

    Moments last ``hold`` to ``3 * hold`` frames, with gaps of ``hold`` to ``4 * hold`` frames between them.
    Digits and shapes come again, so that `questions_at` asks only questions with one answer at that time.

    >>> live = iter(Stream(0))
    >>> frame = next(live)

    Raises:
        ValueError: unknown split or negative seed.
    """

    def __init__(self, seed: int, split: str = "test", fps: float = 2.0, hold: int = 2) -> None:
        _check(split, seed, fps, hold)
        self.seed, self.split, self.fps, self.hold = seed, split, float(fps), hold
        self._rng = np.random.Generator(np.random.PCG64([seed, SPLITS.index(split), 6, hold]))
        self._camera = Camera(self._rng, split)
        self.background = self._camera.name
        self._moments: list[Moment] = []

    def __iter__(self) -> Iterator[StreamFrame]:
        index = 0
        while True:
            yield self.frame(index)
            index += 1

    def moments(self, index: int) -> tuple[Moment, ...]:
        """The moments that begin at or before frame ``index``."""
        while not self._moments or self._moments[-1].start <= index:
            self._moments.append(self._next())
        return tuple(m for m in self._moments if m.start <= index)

    def _next(self) -> Moment:
        rng, before = self._rng, self._moments[-1] if self._moments else None
        start = (before.stop if before else 0) + self.hold * int(rng.integers(1, 5))
        stop = start + self.hold * int(rng.integers(1, 4))
        kind = int(rng.integers(4))  # half of the moments show a digit and a shape
        digit = DIGITS[int(rng.integers(len(DIGITS)))] if kind else None
        shape = SHAPES[int(rng.integers(len(SHAPES)))] if kind != 1 else None
        colour = tuple(COLOURS)[int(rng.integers(len(COLOURS)))]
        return draw_moment(rng, self.split, start, stop, digit, shape, colour)

    def frame(self, index: int) -> StreamFrame:
        """Frame ``index`` (0 or more), the same whenever it is asked for."""
        if index < 0:
            raise ValueError(f"the number of a frame must be 0 or more, got {index}")
        moments = self.moments(index)
        shown = [o for m in moments if index < m.stop for o in m.objects]
        return StreamFrame(self._camera.frame(index, shown), index / self.fps, index, moments)

    def questions_at(
        self, seconds: float, seen_before: float | None = None, since: float | None = None
    ) -> list[Question]:
        """Questions at a time, with exactly one right answer given the frames up to then and no later one.

        ``seen_before`` as in `questions`: facts that were shown only early. ``since``: given the frames from
        this time on, for those who have forgotten the earlier ones.
        """
        now = int(seconds * self.fps + 1e-6)
        rng = np.random.Generator(np.random.PCG64([self.seed, SPLITS.index(self.split), 7, max(now, 0)]))
        first = 0 if since is None else int(since * self.fps + 1e-6)
        asked = _ask([m for m in self.moments(now) if m.stop > first], now, rng, None)
        return [
            question for question, until in asked if seen_before is None or until / self.fps <= seen_before
        ]

    def answer_to(self, question: str, seconds: float, since: float | None = None) -> str | None:
        """The answer to a question in its first wording at a time, as `questions_at` counts; else None."""
        for known in self.questions_at(seconds, since=since):
            if known.text == question:
                return known.answer
        before, after = FORMS["was"][0].split("{name}")
        name = question.removeprefix(before).removesuffix(after)
        kinds = {*DIGITS, *SHAPES, *(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)}
        if name not in kinds or question != FORMS["was"][0].format(name=name):
            return None
        first = 0 if since is None else int(since * self.fps + 1e-6)
        seen = [m for m in self.moments(int(seconds * self.fps + 1e-6)) if m.stop > first]
        return "yes" if any(name in (m.digit, m.shape, f"{m.colour} {m.shape}") for m in seen) else "no"


def stream(seed: int, split: str = "test", fps: float = 2.0, hold: int = 2) -> Stream:
    """An endless stream of labelled frames, see `Stream`."""
    return Stream(seed, split, fps, hold)
