"""The card of a strategy's weights."""

from __future__ import annotations

from typing import Any

import vtoken

NAMES = {"llava_onevision": "LLaVA-OneVision", "qwen2_5_vl": "Qwen2.5-VL"}
CARD = """---
license: apache-2.0
library_name: vtoken
---

# Weights of {strategy} for the tiny {title}

{parameters:.2f} M parameters, trained while the model was frozen; options {options}. {summary}

```python
from vtoken import VTokenConfig, patch, tiny

model, processor = tiny.load("{model}")
patch(model, VTokenConfig.from_pretrained(tiny.trained("{model}")["{strategy}"]), budget=0.0625)
```

Exact answers in % to {questions} held-out questions, half about clips, half about images:

{table}

`python -m training.compressors.train {strategy} {model}`: {minutes} minutes on {machine}
({versions}), {steps}. A step draws a budget: {budgets}. Every 20th step is in `training_log.json`.

![loss and answers](curve.png)

It serves this model alone, and says nothing about larger ones.
"""


def card(report: dict[str, Any], log: list[dict[str, Any]]) -> str:
    """The text of README.md."""
    accuracy, recipe = report["accuracy"], report["recipe"]
    kinds = list(next(iter(accuracy.values())))
    rows = [["budget", *kinds], ["---"] * (len(kinds) + 1)]
    rows += [[budget, *(f"{100 * some[kind]:.0f}" for kind in kinds)] for budget, some in accuracy.items()]
    ends = {entry["stage"]: entry["step"] + 1 for entry in log}
    asked = recipe["asked"]["questions"]
    each = {s: asked if f"{s} blind" in ends else recipe["questions"] for s in ends}
    return CARD.format(
        strategy=report["strategy"],
        title=NAMES[report["model"]],
        model=report["model"],
        parameters=report["parameters"] / 1e6,
        options=", ".join(f"`{name}={value!r}`" for name, value in report["options"].items()),
        summary=vtoken.strategy_info(report["strategy"]).summary,
        questions=report["questions"],
        table="\n".join(f"| {' | '.join(row)} |" for row in rows),
        minutes=report["training_minutes"],
        machine=report["machine"],
        versions=", ".join(f"{name} {number}" for name, number in report["versions"].items()),
        steps=", then ".join(
            f"{n} steps of {recipe['batch']} pictures with up to {each[s]} questions each"
            + (" without the question" if s.endswith("blind") else "")
            for s, n in ends.items()
        ),
        budgets=", ".join(f"{share:g} in {part:.0%} of the steps" for share, part in recipe["budgets"]),
    )
