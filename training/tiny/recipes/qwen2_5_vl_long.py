"""Recipe of the tiny Qwen2.5-VL for long clips: 32 and 64 frames with one short event (`vtoken.tiny.long_clips`).

It starts from the shipped tiny Qwen2.5-VL, whose tower reads digits and shapes already and stays as it is; the
merger and the language model learn to find the event among 576 or 1,152 visual tokens. Answers alone teach that
slowly. After the second and third layer of the language model every visual token also predicts in which third of
the clip it is, whether it shows a part of the event, the lasting shape or neither, and, if of the event, which
digit, shape and colour its moment has.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from vtoken import tiny
from vtoken.tiny import clips, long_clips
from vtoken.tiny.long_clips import LENGTHS, LongClip, make_long
from vtoken.tiny.questions import answers, held_out, score
from vtoken.tiny.scenes import SIZE, Question, Scene

from ..card import FRONT, accuracy, plan, run, snippet, table
from ..evaluate import most_frequent
from ..language import answer_loss, choose_kinds, pack
from ..loop import optimise
from ..models import build_tokenizer, start_from
from ..qwen_language import WIDTHS, positions, visual_tokens
from ..qwen_tower import owners, video_patches
from ..reading import SIZES, clip_targets
from . import qwen2_5_vl

__all__ = ["build", "card", "measure", "train"]

LANGUAGE = {"steps": 900, "batch": 3, "rate": 1e-3, "muon_rate": 0.01, "reading": 0.1}
SLOTS, WIDTH = 16, WIDTHS["video"]  # questions per clip and tokens per question
LAYERS = (1, 2)  # after these layers of the language model the visual tokens are read
READ = {"third": 3, "shows": 3, **{name: SIZES[name] for name in ("digit", "shape", "colour")}}
LATER = 100_000_000  # clips of one seed of the training


def build(**sizes: int) -> tuple[Any, Any]:
    """An untrained Qwen2.5-VL as of `training.tiny.recipes.qwen2_5_vl`, ``sizes`` too, that knows more words.

    Returns:
        ``(Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor)`` in float32.
    """
    model, processor = qwen2_5_vl.build(**sizes)
    words = [*clips.vocabulary(), *long_clips.vocabulary()]
    processor.tokenizer = build_tokenizer(qwen2_5_vl.MARKS, words)
    model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    return model, processor


def warm_start(model: Any) -> None:
    """Copy the shipped tiny Qwen2.5-VL where names and shapes agree, and embeddings of the words it knows."""
    start_from(model.named_parameters(), dict(tiny.load("qwen2_5_vl")[0].named_parameters()))


def choose(clip: LongClip, rng: np.random.Generator) -> list[Question]:
    """Sixteen questions about a long clip, or all, in drawn wordings; those about its lasting shape among them."""

    def kind(question: Question) -> str:
        return "lasting" if question.text.endswith("time?") else question.kind

    wanted = {"lasting": 2, "when": 4, "what": 4, "order": 4}
    return choose_kinds(long_clips.questions(clip, rng), rng, wanted, SLOTS, kind)


def targets(clip: LongClip, side: int = 6) -> np.ndarray:
    """What the read-outs ``READ`` of a clip's visual tokens are asked, -100 where nothing is asked.

    ``(5, frames / 2 * side * side)`` int64. ``shows`` is 1 on the event and 2 on the lasting shape; the last
    three are those of `training.tiny.reading.clip_targets`.
    """
    frames = range(0, len(clip.media), 2)
    third, shows = np.zeros((2, len(frames), side * side), int)
    third[:] = np.arange(len(frames))[:, None] * 3 // len(frames)
    if clip.lasting:
        alone = Scene(clip.media[0], (clip.lasting,), clip.seed, clip.split, clip.background)
        shows[:, owners(alone, side) >= 0] = 2
    for step, frame in enumerate(frames):
        shows[step, owners(clip.scene(frame), side) >= 0] = 1
    known = {"third": third, "shows": shows, **clip_targets(clip, 2, side)}
    return np.stack([known[name] for name in READ]).reshape(len(READ), -1)


class Reading(nn.Module):
    """Linear read-outs of the visual tokens in the language model; used in training only and never shipped."""

    def __init__(self, model: Any, prefix: int) -> None:
        super().__init__()
        width, layers = model.config.text_config.hidden_size, model.model.language_model.layers
        self.read = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(READ.values()))) for _ in LAYERS
        )
        self.prefix, self.states = prefix, []
        self.hooks = [layers[i].register_forward_hook(self._keep) for i in LAYERS]

    def _keep(self, layer: nn.Module, args: Any, out: Any) -> None:
        self.states.append(out[0] if isinstance(out, tuple) else out)

    def forward(self, goal: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss of the last forward pass on ``goal``, ``(n, 5, tokens)``; the share that is read right."""
        states, self.states, loss, right = self.states, [], torch.zeros(()), {}
        goal = goal.to(states[0].device)
        on = goal[:, 1] > 0
        for read, state in zip(self.read, states):
            logits = read(state[:, self.prefix : self.prefix + goal.shape[-1]])
            for i, (name, said) in enumerate(zip(READ, logits.split(list(READ.values()), -1))):
                wanted = goal[:, i]
                for asked in (on, ~on) if name == "shows" else (wanted >= 0,):
                    loss = loss + F.cross_entropy(said[asked], wanted[asked])
                asked = on if name == "shows" else wanted >= 0
                right[name] = (said.argmax(-1) == wanted)[asked].float().mean().item()
        return loss / len(LAYERS), right


def language_batch(batch: int, first: int, vocabulary: dict, step: int, split: str = "train") -> list[tuple]:
    """One step: patches, grid, seconds per grid step, packed questions, targets; of each number of frames.

    ``batch`` clips, twice as many of 32 frames as of 64.
    """
    some, start = [], first + step * batch
    for frames, share in zip(LENGTHS, (2, 1)):
        seeds = range(start, start + max(1, batch * share // 3))
        rng = np.random.Generator(np.random.PCG64([start, 14, frames]))
        seen = [make_long(seed, split, frames) for seed in seeds]
        asked = [choose(clip, rng) for clip in seen]
        pixels = np.stack([np.asarray(frame) for clip in seen for frame in clip.media])
        some.append(
            (
                video_patches(pixels).view(len(seen), -1, 384),
                (frames // 2, SIZE // 8, SIZE // 8),
                2 * long_clips.SECONDS / frames,
                pack(asked, vocabulary, SLOTS, WIDTH),
                torch.from_numpy(np.stack([targets(clip) for clip in seen])),
            )
        )
    return some


def train(model: Any, processor: Any, log: list[dict], seed: int = 0, checks: int = 6, **limits: Any) -> None:
    """The one stage, in place, with frozen tower blocks; appends to ``log``.

    Args:
        checks: held-out batches of the measures along the way.
        **limits: as in `training.tiny.loop.optimise`.
    """
    warm_start(model)
    vocabulary = processor.tokenizer.get_vocab()
    before = [vocabulary[token] for token in ("user", ":", "<|vision_start|>")]
    frozen = [model.model.visual.blocks, model.model.visual.patch_embed]
    for part in frozen:
        part.requires_grad_(False)
    reading = Reading(model, len(before)).to(model.device)

    def loss_of(item: Any, done: float = 0) -> tuple[torch.Tensor, dict[str, float]]:
        total, facts = 0, {}
        for patches, grid, seconds, (ids, labels), goal in item:
            where = positions(model, "video", grid, seconds, SLOTS, WIDTH)
            visual = visual_tokens(model, patches, grid)
            loss, right = answer_loss(model, visual, ids, labels, before, WIDTH, where)
            read, known = reading(goal)
            total = total + (loss + LANGUAGE["reading"] * read) / len(item)
            facts |= {f"{name}_{2 * grid[0]}": fact for name, fact in known.items()}
            facts[f"answers_{2 * grid[0]}"] = right.item()
        return total, facts

    @torch.no_grad()
    def facts() -> dict[str, float]:
        items = [language_batch(LANGUAGE["batch"], 7_000_000, vocabulary, i, "test") for i in range(checks)]
        found = [loss_of(item)[1] for item in items]
        return {f"held_out_{name}": float(np.mean([f[name] for f in found])) for name in found[0]}

    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parameters |= dict(reading.named_parameters(prefix="heads"))
    make = partial(language_batch, LANGUAGE["batch"], seed * LATER + LATER, vocabulary)
    optimise("language", parameters, make, loss_of, LANGUAGE, log, facts, **limits)
    for hook in reading.hooks:
        hook.remove()
    for part in frozen:
        part.requires_grad_(True)


def measure(model: Any, processor: Any, n: int = 500) -> dict[str, Any]:
    """Blind accuracy, and accuracy on other clips of each length."""
    seen = [question for i in range(200) for question in long_clips.questions(make_long(i))]
    lengths = {}
    for frames in LENGTHS:
        some = long_clips.held_out(n // 5, seed=1, frames=frames)
        lengths[str(frames)] = score(some, answers(model, processor, some, 10))
    return {
        "recipe": {"language": LANGUAGE},
        "most_frequent_answer": most_frequent(held_out("qwen2_5_vl_long", n), seen),
        "frames": lengths,
    }


def card(report: dict[str, Any], log: list[dict]) -> str:
    """The model card."""
    lengths = report["frames"]
    return FRONT + CARD.format(
        run=run(report),
        snippet=snippet("qwen2_5_vl_long"),
        parameters=report["parameters"] / 1e6,
        questions=report["questions"],
        accuracy=accuracy(report),
        each=report["questions"] // 5,
        lengths=table(
            lengths["32"], {f"{frames} frames": [*scores.values()] for frames, scores in lengths.items()}
        ),
        language=plan(LANGUAGE, log, "language").replace("scenes", "clips"),
        slots=SLOTS,
        **{f"third_{frames}": 100 * _last(log, f"held_out_third_{frames}") for frames in LENGTHS},
    )


def _last(log: list[dict], name: str) -> float:
    return [entry[name] for entry in log if name in entry][-1]


CARD = """
# A tiny Qwen2.5-VL for long clips

A real `Qwen2_5_VLForConditionalGeneration` ({parameters:.2f} M parameters) that answers questions about clips of 16
seconds in which one short event happens. It reads 36 visual tokens per pair of frames (96 px): 576 at 2 frames per
second (32 frames) and 1,152 at 4 (64 frames). It was trained on full sequences: it has never seen a dropped token.

{snippet}

## Accuracy

Exact answers to {questions} held-out questions, each about a clip of its own, half of the clips of 32 and half of 64
frames; greedy `generate`, all tokens. The second row gives the most frequent answer of each kind.

{accuracy}

By length, on {each} other clips of each:

{lengths}

## Data

`vtoken/tiny/long_clips.py`: a photograph that stands still or drifts, under a little noise. Once in a clip two
moments follow each other, each with a digit, or a digit and a coloured shape, for 2 or 4 frames: a tenth of the frames,
and a small part of each. Half of the clips also show a shape in every frame. Questions: in which third of the
clip a thing was shown (`when`), which digit was shown with another thing, which shape or colour all the time (`what`),
which digit came first, last or after another (`order`); training also asks for the shapes and colours that pass, which
it learns to 70 %. The test split uses other photographs, shape masks and font families than
the training split, and a second passes between two moments of an event, which training never shows.

## Recipe

{run}

The shipped weights come from two runs: `note` in `training_log.json` says which.

It starts from the weights of the tiny Qwen2.5-VL (`vtoken/tiny/qwen2_5_vl`). The tower's blocks stay as they are; merger
and language model learn in {language} (two of 32 frames, one of 64). Up to {slots} questions share a
sequence, each of which sees the clip and itself only, at the M-RoPE positions of a prompt with one question. After the
second and third layer, linear read-outs ask every visual token in which third of the clip it is, whether it shows the
event, the lasting shape or neither, and, if the event, which digit, shape and colour its moment has; in the end they name
the third of {third_32:.0f}% (32 frames) and {third_64:.0f}% (64 frames) of the tokens of held-out clips.

![loss and accuracy](curve.png)

## Limits

It knows the clips above and nothing else: one video per prompt, one question per prompt, at the end. Moments begin with
a pair of frames, as the tower reads them. Its answers to other videos say nothing about the world. Numbers measured on
it compare methods of token reduction in kind, not in degree: here nearly everything that answers a question stands out
from a quiet background and changes, which methods that look for either find easily.
"""
