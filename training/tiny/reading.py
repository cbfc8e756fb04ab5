"""Read-outs of visual tokens inside the language model of the tiny video models, in training only.

A tower sees one frame, or one pair of frames, at a time; the language model must learn time and
neighbours itself (and place, if the tower's positions are relative). Answers alone teach that slowly, so
after two of its layers every visual token also predicts

- ``row``, ``column``: in which half of the image it is;
- ``digit``, ``shape``, ``colour``: what is on screen at its time (tokens of objects, once all of it has been
  read);
- ``seen``: which digits have been shown up to then (the same tokens);
- ``so_far``: how many digits have been shown up to it;
- ``shape_before``, ``colour_before``: the last shape shown before this digit.

And a question that names an object trains attention: one head of a layer learns to look from the word ("7",
or the last of "purple triangle") at the tokens that show it, or at the start of the prompt if none does; a
head of the last layer learns the same from the question's end, where the answer is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from vtoken.tiny.assets import SHAPES
from vtoken.tiny.clip_moments import Moment
from vtoken.tiny.clips import Clip
from vtoken.tiny.digits import DIGITS
from vtoken.tiny.scenes import COLOURS, Question

from .qwen_tower import owners

COLOUR_NAMES = tuple(COLOURS)
SIZES = {
    "row": 2,
    "column": 2,
    "digit": len(DIGITS) + 1,  # the last class is "none", also for shape and colour
    "shape": len(SHAPES) + 1,
    "colour": len(COLOURS) + 1,
    "seen": len(DIGITS),
    "so_far": 5,
    "shape_before": len(SHAPES) + 1,
    "colour_before": len(COLOURS) + 1,
}
NAMES = (*SHAPES, *COLOURS)
LAYERS = (1, 2)  # after these layers of the language model
# the first head of these layers looks, from the word that names a thing and from the question's end
LOOKS = (2, 3)


def places(steps: int, side: int) -> dict[str, np.ndarray]:
    """Targets ``(steps, side * side)`` of ``row`` and ``column``; -100, for "not asked", of the others."""
    half = np.arange(side) * 2 // side
    rows = np.broadcast_to(half[:, None], (side, side)).flatten()
    columns = np.broadcast_to(half, (side, side)).flatten()
    goal = {name: np.full((steps, side * side), -100) for name in SIZES}
    goal["row"][:], goal["column"][:] = rows, columns
    return goal


def clip_targets(clip: Clip, stride: int, side: int = 6) -> dict[str, np.ndarray]:
    """Targets ``(steps, side * side)`` int64 of a clip read ``stride`` frames at a time.

    Nothing is asked that the next tokens decide. ``seen`` is a bit per digit.
    """
    goal, cells = places(len(clip.media) // stride, side), np.arange(side * side)
    for step, frame in enumerate(range(0, len(clip.media), stride)):
        goal["so_far"][step] = sum(m.start < frame and m.digit is not None for m in clip.moments)
        now = next((m for m in clip.moments if m.start <= frame < m.stop), None)
        if now is None:
            continue
        own = owners(clip.scene(frame), side)
        first = [int((own == i).argmax()) for i in range(len(now.objects))]
        fresh = now.start == frame
        on = (own >= 0) & (cells >= max(first) if fresh else True)
        for name, known, value in (("digit", DIGITS, now.digit), ("shape", SHAPES, now.shape)):
            goal[name][step][on] = len(known) if value is None else known.index(value)
        begun = {DIGITS.index(m.digit) for m in clip.moments if m.digit is not None and m.start <= frame}
        goal["seen"][step][on] = sum(1 << digit for digit in begun)
        goal["colour"][step][on] = len(COLOUR_NAMES) if now.colour is None else COLOUR_NAMES.index(now.colour)
        if now.digit is None:
            continue
        if fresh:
            goal["so_far"][step] += cells >= first[0]
        before = [m for m in clip.moments if m.shape is not None and m.start < now.start]
        goal["shape_before"][step][own == 0] = SHAPES.index(before[-1].shape) if before else len(SHAPES)
        goal["colour_before"][step][own == 0] = (
            COLOUR_NAMES.index(before[-1].colour) if before else len(COLOUR_NAMES)
        )
    return goal


def look_targets(
    clip: Clip, asked: Sequence[Question], stride: int, slots: int, side: int = 6
) -> tuple[np.ndarray, np.ndarray]:
    """Attention targets: from which words of each question a head looks, at which visual tokens.

    ``(slots, 2)`` int64, the numbers of the word that names a thing and of the question's end, -1 where it
    names none, and ``(slots, 2, visual tokens)`` bool: the tokens that show the thing, and those that the
    answer is read from, which are the same but for what came after it.
    """
    starts = range(0, len(clip.media), stride)
    own = [owners(clip.scene(frame), side) for frame in starts]
    words, shows = np.full((slots, 2), -1), np.zeros((slots, 2, len(own), side * side), bool)

    def mark(place: np.ndarray, moment: Moment, which: int) -> None:
        for step, frame in enumerate(starts):
            if moment.start <= frame < moment.stop:
                place[step] |= own[step] == which

    for slot, question in enumerate(asked):
        text = question.text.replace("?", " ?").split()
        named = {word: i for i, word in enumerate(text) if word in DIGITS + NAMES}
        if not named:
            continue
        words[slot] = max(named.values()), len(text) + 1  # after the text come "assistant" and ":"
        found = [m for m in clip.moments if m.digit in named or named.keys() <= {m.shape, m.colour}]
        for m in found:
            mark(shows[slot, 0], m, 0 if m.digit in named else len(m.objects) - 1)  # the digit is drawn first
        if "after" in text:
            mark(shows[slot, 1], next(m for m in clip.moments if m.digit and m.start > found[0].start), 0)
        else:
            shows[slot, 1] = shows[slot, 0]
    return words, shows.reshape(slots, 2, -1)


def stack(
    goals: list[dict[str, np.ndarray]], looks: list[tuple[np.ndarray, np.ndarray]] | None = None
) -> dict[str, torch.Tensor]:
    """Join targets of one grid: ``(n, visual tokens)`` int64; ``word``, ``shows`` as in `look_targets`."""
    out = {name: torch.from_numpy(np.stack([goal[name].flatten() for goal in goals])) for name in SIZES}
    if looks:
        out |= {
            name: torch.from_numpy(np.stack(parts)) for name, parts in zip(("word", "shows"), zip(*looks))
        }
    return out


class ReadingHeads(nn.Module):
    """The linear read-outs after the layers ``LAYERS``; used in training only and never shipped."""

    def __init__(self, model: Any, prefix: int) -> None:
        super().__init__()
        width = model.config.text_config.hidden_size
        self.read = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(SIZES.values()))) for _ in LAYERS
        )
        self.prefix, self.states = prefix, []
        language = model.model.language_model
        self.hooks = [language.layers[i].register_forward_hook(self._keep) for i in LAYERS]
        self.rows: list[torch.Tensor] = []
        self.hooks += [language.layers[i].self_attn.register_forward_hook(self._keep_rows) for i in LOOKS]
        self.config, self.implementation = language.config, language.config._attn_implementation
        self.config._attn_implementation = "eager"  # which returns its attention

    def remove(self) -> None:
        """Take the hooks off the model."""
        for hook in self.hooks:
            hook.remove()
        self.config._attn_implementation = self.implementation

    def _keep_rows(self, attention: nn.Module, args: Any, out: Any) -> None:
        self.rows.append(out[1][:, 0])

    def look(
        self, seen: list[torch.Tensor], goal: dict[str, torch.Tensor], width: int = 13
    ) -> tuple[torch.Tensor, float]:
        """Divergence of the words' attention from their target tokens, and its share on the targets."""
        slots, _, count = goal["shows"].shape[1:]
        rows = torch.stack([row[:, -slots * width :, : self.prefix + count] for row in seen], 2)
        rows = rows.unflatten(1, (slots, width)).transpose(2, 3)  # (n, slots, 2, width, prefix + count)
        asked = goal["word"] >= 0
        at = goal["word"].clamp(min=0)[..., None, None].expand(-1, -1, -1, 1, rows.shape[-1])
        rows = rows.gather(3, at)[..., 0, :][asked]
        wanted = torch.nn.functional.pad(goal["shows"], (self.prefix, 0))[asked]
        wanted[:, : self.prefix] = ~wanted.any(1, keepdim=True)
        found = (rows * wanted).sum(1)
        return -found.clamp(min=1e-30).log().mean(), found.mean().item()

    def _keep(self, layer: nn.Module, args: Any, out: Any) -> None:
        self.states.append(out[0] if isinstance(out, tuple) else out)

    def forward(self, goal: dict[str, torch.Tensor] | None = None) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss of the language model's last forward passes, and the share of right read-outs.

        ``goal`` is from `stack`; without one nothing is asked.
        """
        states, rows, self.states, self.rows = self.states, self.rows, [], []
        loss, right = states[0].new_zeros(()), {}
        if goal is None:
            return loss, right
        goal = {name: value.to(loss.device) for name, value in goal.items()}
        count = goal["row"].shape[1]
        for read, state in zip(self.read, states):
            logits = read(state[:, self.prefix : self.prefix + count])
            for name, part in zip(SIZES, logits.split(list(SIZES.values()), -1)):
                asked = goal[name] >= 0
                if not asked.any():
                    continue
                said, wanted = part[asked], goal[name][asked]
                if name == "seen":
                    bits = wanted[:, None] >> torch.arange(len(DIGITS), device=wanted.device) & 1
                    loss = loss + 3 * F.binary_cross_entropy_with_logits(said, bits.float())
                    right[name] = ((said > 0) == bits.bool()).all(-1).float().mean().item()
                else:
                    loss = loss + F.cross_entropy(said, wanted)
                    right[name] = (said.argmax(-1) == wanted).float().mean().item()
        if "word" in goal:
            missed, right["look"] = self.look(rows, goal)
            loss = loss + 5 * missed
        return loss, right
