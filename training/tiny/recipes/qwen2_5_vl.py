"""Recipe of tiny Qwen2.5-VL: window-attention tower, 2 x 2 merger, M-RoPE; images and video.

Stage ``tower`` teaches the tower and its merger (`training.tiny.qwen_tower`); stage ``language`` freezes the
tower and teaches the merger and the language model, half of it on the scenes of `vtoken.tiny.scenes`, half on
`vtoken.tiny.clips` (`training.tiny.qwen_language`, with the read-outs of `training.tiny.reading`); stage
``streams`` teaches the language model what a few seconds of a long stream show, at low rates
(`training.tiny.qwen_streams`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from vtoken.tiny import clips, scenes
from vtoken.tiny.questions import answers, held_out, score

from ..card import accuracy, plan, run, table
from ..evaluate import most_frequent
from ..models import build_tokenizer, chat_template
from ..qwen_language import train_language, warm_start
from ..qwen_streams import make_window, train_streams
from ..qwen_tower import IMAGE_SIDE, start, train_tower

__all__ = ["build", "card", "measure", "train"]

TOWER = {"steps": 700, "batch": 32, "scenes": 10, "rate": 2e-3, "muon_rate": 0.02}
LANGUAGE = {"steps": 2500, "batch": 24, "rate": 2e-3, "muon_rate": 0.02, "reading": 0.1}
STREAMS = {"steps": 450, "batch": 24, "rate": 4e-4, "muon_rate": 0.004}
# stage two goes on with scenes that stage one has not seen, stage three with half of those
LATER = 50_000_000
FRESH = 9_000_000  # the first of the streams that windows are held out of
MARKS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")


def build(
    width: int = 128, tower_width: int = 96, tower_layers: int = 6, llm_layers: int = 4, heads: int = 4
) -> tuple[Any, Any]:
    """An untrained Qwen2.5-VL with 100 visual tokens per image (160 px) and 36 per pair of frames (96 px).

    Args:
        width: hidden size of the language model; ``width / heads`` is 32 or a multiple.
        tower_width: hidden size of the tower.
        tower_layers: its layers; every third attends to the whole image, the others within windows of 64 px.
        llm_layers: layers of the language model.
        heads: attention heads of both.

    Returns:
        ``(Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor)`` in float32.
    """
    from transformers import (
        GenerationConfig,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = build_tokenizer(MARKS, clips.vocabulary())
    pad, bos, eos, image, video, begin, end = tokenizer.convert_tokens_to_ids(
        ["<pad>", "<s>", "</s>", *MARKS]
    )
    half = width // heads // 2  # pairs of rotary frequencies
    tower = {
        "hidden_size": tower_width,
        "intermediate_size": tower_width * 8 // 3,
        "out_hidden_size": width,
        "depth": tower_layers,
        "num_heads": heads,
        "patch_size": 8,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 64,
        "fullatt_block_indexes": list(range(2, tower_layers, 3)),
        "tokens_per_second": 1,
        "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0},
    }
    llm = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": llm_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 20.0,
            "mrope_section": [half - 2 * (half * 5 // 16), half * 5 // 16, half * 5 // 16],
        },
        "initializer_range": 0.05,
        "pad_token_id": pad,
        "bos_token_id": bos,
        "eos_token_id": eos,
    }
    config = Qwen2_5_VLConfig(
        text_config=llm,
        vision_config=tower,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=begin,
        vision_end_token_id=end,
        tie_word_embeddings=False,
    )
    model = Qwen2_5_VLForConditionalGeneration(config).float()
    start(model.model.visual)
    model.generation_config = GenerationConfig(
        pad_token_id=pad, bos_token_id=bos, eos_token_id=eos, max_new_tokens=8, do_sample=False
    )
    pixels = {
        "patch_size": 8,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    template = chat_template(video=True)
    for kind in ("image", "video"):
        template = template.replace(f"<{kind}>", f"<|vision_start|><|{kind}_pad|><|vision_end|>")
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(
            **pixels, size={"shortest_edge": IMAGE_SIDE**2, "longest_edge": IMAGE_SIDE**2}
        ),
        video_processor=Qwen2VLVideoProcessor(
            **pixels,
            size={"shortest_edge": scenes.SIZE**2, "longest_edge": scenes.SIZE**2},
            min_frames=2,
            cap_pixels_per_frame=False,
        ),
        tokenizer=tokenizer,
        chat_template=template,
    )
    return model, processor


def train(
    model: Any, processor: Any, log: list[dict], seed: int = 0, seconds: float | None = None, **limits: Any
) -> None:
    """All stages, in place; appends to ``log``. Limits as in `training.tiny.loop.optimise`."""
    train_tower(model, processor, TOWER, log, seed * 2 * LATER, seconds=seconds and seconds * 0.45, **limits)
    torch.manual_seed(seed + 1)
    warm_start(model)
    first = seed * 2 * LATER + LATER
    train_language(model, processor, LANGUAGE, log, first, seconds=seconds and seconds * 0.45, **limits)
    torch.manual_seed(seed + 2)
    train_streams(
        model, processor, STREAMS, log, first + LATER // 2, seconds=seconds and seconds * 0.1, **limits
    )


def measure(model: Any, processor: Any, n: int = 500) -> dict[str, Any]:
    """Blind accuracy, and accuracy on longer clips than those held out and on windows of streams."""
    seen = [question for i in range(500) for question in scenes.questions(scenes.make_scene(i))]
    seen += [question for i in range(500) for question in clips.questions(clips.make_clip(i))]
    lengths, windows = {}, held_out_windows(n // 2)
    for frames in (10, 16):
        some = clips.held_out(50, seed=1, frames=frames)
        lengths[str(frames)] = score(some, answers(model, processor, some))["all"]
    return {
        "recipe": {"tower": TOWER, "language": LANGUAGE, "streams": STREAMS},
        "most_frequent_answer": most_frequent(held_out("qwen2_5_vl", n), seen),
        "frames": lengths,
        "windows": score(windows, answers(model, processor, windows)),
    }


def held_out_windows(n: int) -> list[tuple[Any, scenes.Question]]:
    """``n`` questions about windows of 8 frames of test streams, as many of each kind of `vtoken.tiny.clips`
    as can be.
    """
    drawn, rng, kinds, i = [], np.random.default_rng(0), clips.KINDS, 0
    while len(drawn) < n:
        window, kind = make_window(FRESH + i, "test"), kinds[len(drawn) % len(kinds)]
        fitting = [q for q in clips.questions(window) if q.kind == kind]
        if fitting:
            drawn.append((window, fitting[int(rng.integers(len(fitting)))]))
        i += 1
    return drawn


def card(report: dict[str, Any], log: list[dict]) -> str:
    """The model card."""
    told = report["accuracy"]
    halves = {
        f"questions about {name}": sum(told[kind] for kind in kinds) / len(kinds)  # as many of each
        for name, kinds in (("images", scenes.KINDS), ("clips", clips.KINDS))
    }
    return CARD.format(
        run=run(report),
        parameters=report["parameters"] / 1e6,
        questions=report["questions"],
        accuracy=accuracy(report),
        halves=table(halves, {"model": [*halves.values()]}),
        frames=table(report["frames"], {"model": [*report["frames"].values()]}),
        windows=table(report["windows"], {"model": [*report["windows"].values()]}),
        tower=plan(TOWER, log, "tower"),
        language=plan(LANGUAGE, log, "language"),
        streams=plan(STREAMS, log, "streams"),
    )


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# A tiny Qwen2.5-VL for tests, demos and studies of visual tokens

A real `Qwen2_5_VLForConditionalGeneration` ({parameters:.2f} M parameters: a tower with window attention and rotary
positions, a 2 x 2 merger, a Qwen2 with M-RoPE) that answers questions about coloured shapes on photographs and about
short clips in which digits and shapes come and go. It reads 100 visual tokens per image (enlarged to 160 px) and 36 per
pair of video frames (96 px), and was trained on ordinary, full sequences: it has never seen a dropped token.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor
folder = "vtoken/tiny/qwen2_5_vl"
model, processor = (c.from_pretrained(folder) for c in (AutoModelForImageTextToText, AutoProcessor))
```

## Accuracy

Exact answers to {questions} held-out questions, half about images and half about clips of 4, 6 and 8 frames at 2
frames per second (72, 108 and 144 visual tokens); greedy `generate`, all tokens. The second row always gives the most
frequent answer of its kind.

{accuracy}

{halves}

All questions about clips, on 50 other held-out clips of each greater length (in frames):

{frames}

Questions about windows of 8 frames, cut anywhere out of long streams of the test split, as many of each kind:

{windows}

## Data

Images: scenes of 2 to 4 shapes (of 8, in 7 colours, none twice), composed by `vtoken/tiny/scenes.py`. Clips: a
photograph that stands still or drifts slowly, under a little noise, on which 2 to 4 moments show a digit, a coloured
shape or both for one second or more (`vtoken/tiny/clips.py`). Windows: a few consecutive frames of an endless stream of
such moments, of which they show none, one or a part of it, or two. The photographs come with scikit-image (CC0 or public
domain, listed in `vtoken/tiny/assets.py`), the digits from fonts that come with matplotlib (`vtoken/tiny/digits.py`).
The test split uses other photographs, other shape masks and other font families than the training split.

Questions about images: what shape is the red one (`shape`), what colour is the star (`colour`), where is it (`where`),
how many objects are there (`count`), is there a red star (`exists`). About clips: which digit or shape came first, last
or after the red star (`order`), which digit, shape or colour was shown with another thing (`moment`), was there a 7
(`presence`), which digit or shape is shown now (`now`; the answer may be "none"), how many digits were shown
(`digits`).

## Recipe

{run}

1. Tower and merger, {tower} (22 of them pairs of frames, 10 enlarged images):
   the merged cells of an object name its shape or digit, its colour and the number of objects; half-way up, its patches
   name it and draw its outline. Where an object is the tower cannot know: its rotary positions are relative.
2. Merger and language model with the tower frozen, {language} (half scenes, half clips of 4 to 16 frames, at 1 or 2
   frames per second): ten questions per example in one sequence, each of which sees the image or clip and itself only,
   at the M-RoPE positions of a prompt with one question. The language model starts from the tiny LLaVA's Llama. After
   its second and third layer, linear read-outs ask the visual tokens in which half of the image they are, what else is
   on screen at their time, which and how many digits have come so far and which shape came before; a
   head of the third layer is to look from the word that names a thing at the tokens that show it
   (`training/tiny/reading.py`).
3. Language model with tower and merger frozen, {streams}, without read-outs: a quarter
   scenes, a quarter clips as before, half windows of 2 to 10 frames, which often show no digit or one
   (`training/tiny/qwen_streams.py`).

![loss and accuracy](curve.png)

Every 20th step is in `training_log.json`. The held-out curves are measured on examples of the test split other than
those of the tables above.

## Limits

It knows about 90 words and the scenes and clips above, nothing else: one image or one video per prompt, one question
per prompt, at the end. Moments begin with a pair of frames, as the tower reads them; a video whose moments begin in
the middle of a pair is new to it. Its answers to other images say nothing about the world. Numbers measured on it
compare methods of token reduction in kind, not in degree: large models on natural video behave differently. All
questions are about the few objects on a quiet background: methods that look for what stands out or changes have an
easy time here.
"""
