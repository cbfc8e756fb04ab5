"""Every strategy on every model family: the oracle's answer, or a refusal with a reason by `patch`.

One batch holds it all: rows of different lengths, several images in one prompt, a row without images; then a
second turn on the same cache. A new strategy joins by being registered (with a line in OPTIONS if its
defaults do not fit four layers and a few dozen tokens), a new family by its row in tests/models. Families of
`WHOLE` run every strategy, the others one of each place in the model; the rest has the marker `product`.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import vtoken
from tests import oracle
from tests.mechanism.common import EFFECT, PATCHABLE, assert_close, assert_same, clean, expected, run, subject
from tests.mechanism.fixed import patched
from tests.mechanism.test_turns import first_turn
from tests.models import FAMILIES
from tests.record import note
from vtoken.adapters.registry import adapter_for
from vtoken.fit import lacking_of, needs_of
from vtoken.requested import make_strategy
from vtoken.strategies.composition import REFERENCE_TOWER
from vtoken.strategies.registry import list_names, strategy_info

# vidkv's groups are longer than the prompts here: tests/mechanism/test_packed_cache.py has shorter ones
OPTIONS: dict[str, dict] = {
    "still_patches": {"threshold": 9.0},
    "blank_patches": {"threshold": 9.0},
    "vidkv": {"group": 1024, "residual": 1024},
}
COMBINED = {
    "visionzip + fastv": ["visionzip", "fastv"],
    "hired + zipvl": ["hired", "zipvl"],
    "tome + fastv + zipvl": ["tome", "fastv", "zipvl"],
}
ROWS = {name: name for name in list_names()} | COMBINED
EQUAL_FRAMES = ("evs", "flashvid", "v_cast", "vidcom2")
# one that reads the tower's attention and merges, one inside the tower, one inside the LLM
STAGES = ("visionzip", "tome", "fastv")
WHOLE = ("llava", "llava_onevision/video", "qwen3_vl/video")


def make(row: str):
    options = dict(OPTIONS.get(row, {}))
    without = row in list_names() and "budget" not in strategy_info(row).defaults
    return make_strategy(ROWS[row], options.pop("budget", None if without else 0.5), options)


@functools.cache
def batch(family: str) -> dict:
    rows = [[0], [1, 2], []]
    return FAMILIES[family].prompt([row[: FAMILIES[family].per_prompt] for row in rows])


@functools.cache
def dense(family: str) -> torch.Tensor:
    """First logits of the unpatched model."""
    return run(clean(family), batch(family), 1).logits[0]


@functools.cache
def converses(family: str) -> bool:
    """Whether a second turn of the unpatched model is what it would be without a cache."""
    whole, again = first_turn(clean(family), batch(family), steps=2)
    try:
        assert_same(run(clean(family), again, 2), whole, oracle.generate(clean(family), whole, steps=2))
    except AssertionError:
        return False
    return True


def cells() -> list[Any]:
    return [
        pytest.param(
            family,
            row,
            id=f"{family}-{row}",
            marks=() if row in STAGES or family in WHOLE else pytest.mark.product,
        )
        for family in PATCHABLE
        for row in ROWS
    ]


@pytest.mark.parametrize(("family", "row"), cells())
def test_equals_the_oracle_or_refuses(family, row, sighted):
    model, inputs, strategy = subject(family), batch(family), make(row)
    parts = ROWS[row] if isinstance(ROWS[row], list) else [row]
    try:
        vtoken.unpatch(vtoken.patch(model, strategy))
    except ValueError as refusal:
        assert not set(parts) <= set(vtoken.list_strategies(model=model)), refusal
        assert str(refusal).endswith(".") and any(word in str(refusal) for word in ("use ", "choose ")), (
            refusal
        )
        note(sighted, FAMILIES[family], row, False)
        return
    modality = FAMILIES[family].modality
    if modality not in needs_of(adapter_for(model), strategy, modality).modalities:
        with (
            patched(model, strategy),
            pytest.raises(ValueError, match=f"{row} is not defined for {modality} input.*use"),
        ):
            run(model, inputs, 1)
        return
    if "merging" in lacking_of(adapter_for(model), strategy, modality):
        with (
            patched(model, strategy),
            pytest.raises(ValueError, match=f"cannot shorten its {modality} input.*choose"),
        ):
            run(model, inputs, 1)
        note(sighted, FAMILIES[family], row, False)
        return
    if (
        family == "video_llama_3/video" and row in EQUAL_FRAMES
    ):  # its processor leaves out still parts of frames
        with patched(model, strategy), pytest.raises(ValueError, match=r"frames of equal size.*: use"):
            run(model, inputs, 1)
        return
    with patched(model, strategy) as spy:
        whole, again = first_turn(model, inputs, steps=2)
        made = {"encoder", "pixels"} & stages(parts) or any(
            answer.features is not None for _, answer in spy.items
        )
        seen = dict(features=spy.by_row(FAMILIES[family], inputs)) if made else {}
        planes = spy.planes_by_row(FAMILIES[family], inputs)
        second = run(model, again, 2)
    seen |= dict(deepstack=planes) if planes else {}
    ids, logits = expected(family, inputs, spy, 2, **seen)
    still = modality == "image" and compares_frames(strategy)
    still |= strategy.acts_on_cache and not strategy.acts_on_projector  # the prompt is read whole
    start = inputs["input_ids"].shape[1]
    assert whole["input_ids"][:, start : start + 2].tolist() == ids.tolist()
    first = dense(family)
    for b, visual in enumerate(FAMILIES[family].visual(inputs)):
        if visual.any() and not still:
            assert (logits[0, b] - first[b]).abs().max() > EFFECT
        else:
            assert_close(logits[0, b], first[b])
    note(sighted, FAMILIES[family], row, True)
    if converses(family):
        assert_same(second, whole, expected(family, whole, spy, 2, read=start, **seen))


def compares_frames(strategy) -> bool:
    """Whether it does nothing but reuse earlier frames: then it leaves images as they are."""
    reuse = None if strategy.acts_on_projector else strategy.reuse(REFERENCE_TOWER)
    return reuse is not None and reuse.interval > 1


def stages(parts: list[str]) -> set[str]:
    return {stage for part in parts for stage in vtoken.strategy_info(part).stages}
