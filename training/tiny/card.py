"""Shared parts of the recipes' model cards: tables, training plan in words, curve of a training run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

FRONT = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---
"""


def snippet(name: str) -> str:
    """Code that loads the model ``name``, as a Markdown code block."""
    classes = "(AutoModelForImageTextToText, AutoProcessor)"
    return f"""```python
from transformers import AutoModelForImageTextToText, AutoProcessor
model, processor = (c.from_pretrained("vtoken/tiny/{name}") for c in {classes})
```"""


def table(columns: dict[str, Any], rows: dict[str, list[float]]) -> str:
    """A Markdown table with numbers to three places."""
    head = "| " + " | ".join(["", *columns]) + " |\n|" + "---|" * (len(columns) + 1)
    return "\n".join(
        [head, *("| " + " | ".join([n, *(f"{v:.3f}" for v in vs)]) + " |" for n, vs in rows.items())]
    )


def accuracy(report: dict[str, Any]) -> str:
    """The table of held-out accuracy, with the most frequent answer of each kind below."""
    scores, blind = report["accuracy"], report["most_frequent_answer"]
    return table(scores, {"model": [*scores.values()], "most frequent": [blind[kind] for kind in scores]})


def plan(chosen: dict[str, Any], log: list[dict], stage: str) -> str:
    """``900 steps of 32 scenes, Muon 0.02 and AdamW 0.002``: a stage in words, from its plan and the log."""
    last = max(e["step"] for e in log if e["stage"] == stage) + 1
    return (
        f"{last} steps of {chosen['batch']} scenes, Muon {chosen['muon_rate']:g} and AdamW {chosen['rate']:g}"
    )


def run(report: dict[str, Any], module: str = "training.tiny.train") -> str:
    """The command of a run, its time and its device."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    command = f"python -m {module} {report['model']} --seed {report['seed']}"
    return (
        f"`{command}`: {report['training_minutes']} minutes of training on {report['machine']}\n({versions})."
    )


def draw(file: Path, log: list[dict]) -> None:
    """Plot the loss of every stage over the steps, and the held-out measures that are shares."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no curve is drawn")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    stages = list(dict.fromkeys(entry["stage"] for entry in log))
    figure, axes = plt.subplots(
        1, len(stages), figsize=(4.5 * len(stages), 3.2), layout="constrained", squeeze=False
    )
    for axis, stage in zip(axes[0], stages):
        some = [e for e in log if e["stage"] == stage]
        axis.plot([e["step"] for e in some], [e["loss"] for e in some], color="0.6", lw=1)
        axis.set(title=f"stage: {stage}", xlabel="step", ylabel="training loss", ylim=(0, None))
        right = axis.twinx()
        for measure in held_out_measures(some):
            points = [(e["step"], e[measure]) for e in some if measure in e]
            right.plot(*zip(*points), marker=".", label=measure.replace("_", " "))
        right.set(ylim=(0, 1.02), ylabel="held-out share")
        right.legend(loc="lower right", fontsize=7, framealpha=0.6)
    figure.savefig(file, dpi=90)
    plt.close(figure)


def held_out_measures(entries: Iterable[dict]) -> list[str]:
    """The measures of a stage's log that are shares of held-out things."""
    names = dict.fromkeys(name for entry in entries for name in entry)
    return [n for n in names if n.startswith(("held_out", "layer", "mean")) and not n.endswith("loss")]
