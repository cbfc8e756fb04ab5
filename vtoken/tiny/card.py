"""Writes the model card and the curve of a training run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# A tiny LLaVA for tests, demos and studies of visual tokens

A real `LlavaForConditionalGeneration` ({parameters:.2f} M parameters: a CLIP tower with CLS, a two-layer projector, a
Llama) that answers questions about coloured shapes on photographs. It reads 144 visual tokens (96 px, patch 8) and was
trained from scratch on ordinary, full sequences: it has never seen a dropped token.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor
model, processor = (c.from_pretrained("vtoken/tiny/llava") for c in (AutoModelForImageTextToText, AutoProcessor))
```

## Accuracy

Exact answers to {questions} held-out questions (greedy `generate`, all tokens); the second row always gives the most
frequent answer of its kind.

{accuracy}

Accuracy over all kinds on the same questions when only a share of the visual tokens is fed, at their original
positions:

{pruned}

## CLS attention

Share of the object patches found among the 20 % of patches with most CLS attention (mean over heads, 500 held-out
scenes); a random choice finds 0.20. `layer -2` is the layer whose output the language model reads.

{localisation}

## Data

Scenes of 2 to 4 shapes (of 8, in 7 colours, 15 to 19 px across, none twice) on crops of photographs that scikit-image
ships (CC0 or public domain, listed in `vtoken/tiny/assets.py`), composed by `vtoken/tiny/scenes.py`. The test split
uses other glyphs and other photographs than the training split. Five kinds of question: what shape is the red one, what
colour is the star, where is it, how many objects are there, is there a red star.

## Recipe

`python -m vtoken.tiny.train {model} --seed {seed}`: {minutes} minutes of training on {machine} (python {python}, torch
{torch}, transformers {transformers}).

1. Tower, {tower}:
   the patches of an object name its shape, colour, quadrant and the number of objects; half-way up they draw the
   outline around them. The CLS state after each of the last four layers names the pairs of shape and colour that are
   present; in training it starts again before some of those layers, so that each of them looks at the objects. In the
   last third of the steps a further term asks the CLS attention of layers -4 to -2 (mean over heads) to cover all
   patches of the objects evenly.
2. Projector and language model with the tower frozen, {language}:
   ten questions per scene in one sequence, each of which sees the image and itself only.

![loss and accuracy](curve.png)

Every 20th step is in `training_log.json`. The held-out curves are measured on scenes of the test split other than those
of the tables above.

## Limits

It knows about 60 words and the scenes above, nothing else: one image per prompt, one question per prompt. Its answers
to other images say nothing about the world. Numbers measured on it compare methods of token reduction in kind, not in
degree: large models on natural images behave differently. In particular its CLS attention was trained to find the
objects, and all the questions are about objects: methods that read CLS attention have an easy time here.
"""


def table(columns: dict[str, Any], rows: dict[str, list[float]]) -> str:
    """A Markdown table with numbers to three places."""
    head = "| " + " | ".join(["", *columns]) + " |\n|" + "---|" * (len(columns) + 1)
    return "\n".join([head, *("| " + " | ".join([n, *(f"{v:.3f}" for v in vs)]) + " |" for n, vs in rows.items())])


def write_card(out: Path, report: dict[str, Any], log: list[dict]) -> None:
    """``README.md`` and, where matplotlib is installed, ``curve.png`` in ``out``."""
    accuracy, blind, located = report["accuracy"], report["most_frequent_answer"], report["localisation"]
    shares = (0.5, 0.2, 0.1)
    pruned = {by: [report["pruned"][f"{by} {share}"] for share in shares] for by in ("cls", "random")}

    def plan(stage: str) -> str:
        chosen = report["recipe"][stage]
        last = max(e["step"] for e in log if e["stage"] == stage) + 1
        return f"{last} steps of {chosen['batch']} scenes, Muon {chosen['muon_rate']:g} and AdamW {chosen['rate']:g}"

    text = CARD.format(
        model=report["model"],
        seed=report["seed"],
        parameters=report["parameters"] / 1e6,
        questions=report["questions"],
        accuracy=table(accuracy, {"model": [*accuracy.values()], "most frequent": [*blind.values()]}),
        pruned=table(
            {f"{share:.0%}": 0 for share in shares},
            {"most CLS attention (layer -2)": pruned["cls"], "random": pruned["random"]},
        ),
        localisation=table(located, {"found": [*located.values()]}),
        minutes=report["training_minutes"],
        machine=report["machine"],
        tower=plan("tower"),
        language=plan("language"),
        **report["versions"],
    )
    (out / "README.md").write_text(text)
    draw(out / "curve.png", log)


def draw(file: Path, log: list[dict]) -> None:
    """Loss and held-out measures of both stages over the steps."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no curve is drawn")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axis, stage, measures in zip(
        axes, ("tower", "language"), (("held_out_shape", "layer -2", "mean"), ("held_out_answers",))
    ):
        some = [e for e in log if e["stage"] == stage]
        axis.plot([e["step"] for e in some], [e["loss"] for e in some], color="0.6", lw=1)
        axis.set(title=f"stage: {stage}", xlabel="step", ylabel="training loss", ylim=(0, None))
        right = axis.twinx()
        for measure in measures:
            points = [(e["step"], e[measure]) for e in some if measure in e]
            right.plot(*zip(*points), marker=".", label=measure.replace("_", " "))
        right.set(ylim=(0, 1.02), ylabel="held-out share")
        right.legend(loc="center right", fontsize=8)
    figure.savefig(file, dpi=90)
    plt.close(figure)
