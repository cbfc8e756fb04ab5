"""Two strategies under one budget: its division, fitting pairs, and the answer of a model."""

from __future__ import annotations

import pytest
import torch

import vtoken
from tests.mechanism.common import assert_same, clean, expected, run, subject
from tests.mechanism.fixed import patched
from tests.models import FAMILIES
from vtoken import TowerInfo
from vtoken.strategies import (
    Composite,
    FastV,
    HiRED,
    MustDrop,
    PyramidDrop,
    Random,
    SparseVLM,
    STCCacher,
    Uniform,
    combine,
)

from .common import image, video


# -- the shared budget ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("budget", [0.04, 0.25, 0.81, 1.0])
def test_both_drop_by_the_same_factor(budget):
    both = combine(["random", "fastv"], budget)
    assert both.first.budget == pytest.approx(budget**0.5) and both.then.budget == budget
    assert both.is_identity == (budget == 1.0)


def test_split():
    assert combine(["random", "fastv"], 0.2, split=0).first.budget == 1.0
    assert combine(["random", "fastv"], 0.2, split=1).first.budget == pytest.approx(0.2)
    whole = combine(["random", "fastv"], 0.25, split=0)
    assert len(whole.select(image(4, 4)).keep) == 16 and not whole.is_identity


def test_whole_numbers_split_geometrically():
    both = combine(["random", "fastv"], 4)
    assert len(both.select(image(8, 8)).keep) == 16  # 64 * (4 / 64) ** 0.5
    assert both.counts(image(8, 8).segments) == [16]
    assert both.counts(image(8, 8).segments, 0.25) == [32]
    assert FastV(0.2).counts(image(8, 8).segments) == [64]  # all enter the LLM
    frames = video(4, 4, 4)
    assert len(combine(["uniform", "fastv"], 4).select(frames).keep) == 4 * 8
    assert len(combine(["random", "fastv"], 400).select(image(8, 8)).keep) == 64
    assert both.then.budget == 4


def test_a_derived_budget_has_four_digits_in_the_text():
    assert combine(["random", "fastv"], 0.2).describe() == (
        "random(budget=0.4472) then fastv(budget=0.2), sharing budget=0.2"
    )
    assert combine(["random", "fastv"], 1.0).describe().count("budget=1.0") == 3
    assert "random(budget=1.0) then" in combine(["random", "fastv"], 0.25, split=0).describe()
    assert combine(["random", "fastv"], 4, split=0.25).describe() == (
        "random(budget=4) then fastv(budget=4), sharing budget=4, split=0.25"
    )
    own = combine(["stc_cacher", "fastv"], 0.2, stc_cacher=dict(budget=0.123456))
    assert own.describe() == "stc_cacher(budget=0.1235) then fastv(budget=0.2), sharing budget=0.2"
    assert (
        combine([FastV(0.3), Random(0.123456)]).describe() == "random(budget=0.1235) then fastv(budget=0.3)"
    )


def test_what_enters_the_llm_moves_the_cuts_of_an_average():
    both, alone = combine([Random(0.3), PyramidDrop(0.2)]), PyramidDrop(0.2)
    assert both.prefill_layers(32) == alone.prefill_layers(32, 0.3) != alone.prefill_layers(32)
    both.check_depth(4)
    with pytest.raises(ValueError, match="choose more"):
        SparseVLM(0.05).check_depth(32)
    combine([Random(0.3), SparseVLM(0.05)]).check_depth(32)


def test_reuse_in_the_tower_lets_everything_into_the_llm():
    """Its budget is no share of what the LLM reads."""
    both = combine(["stc_cacher", "pyramiddrop"], 0.2, stc_cacher=dict(budget=0.25))
    assert both.prefill_layers(32) == PyramidDrop(0.2).prefill_layers(32)
    with pytest.raises(ValueError, match="choose more"):
        combine([STCCacher(0.05), SparseVLM(0.05)]).check_depth(32)


def test_a_part_written_without_entering_is_asked_without_it():
    class Old(FastV):
        def prefill_layers(self, num_layers):
            return (num_layers - 1,)

        def check_depth(self, num_layers):
            raise ValueError(f"asked about {num_layers}")

    both = Composite(0.25, [Random(), Old()])
    assert both.prefill_layers(8) == (7,)
    with pytest.raises(ValueError, match="asked about 8"):
        both.check_depth(8)


def test_without_a_budget_every_part_keeps_its_own():
    both = combine([FastV(0.3), Random(0.6)])
    assert (both.first.budget, both.then.budget) == (0.6, 0.3)
    assert isinstance(both.first, Random) and isinstance(both.then, FastV)
    assert combine(["hired", "fastv"]).then.budget == FastV().budget


@pytest.mark.parametrize("inside", ["sparsevlm", "mustdrop", "pyramiddrop"])
def test_an_average_that_only_a_projector_strategy_makes_possible(inside):
    options = {inside: dict(merging=False, key_rate=0.0)} if inside == "mustdrop" else {}
    both = combine(["random", inside], 0.15, **options)
    both.check_depth(4)
    model, inputs = subject("llava"), FAMILIES["llava"].batch("one")
    with patched(model, both) as spy:
        out = run(model, inputs)
        report = vtoken.report(model)
    assert_same(out, inputs, expected("llava", inputs, spy))
    assert report.tokens_out == int(16 * 0.15**0.5)
    # 16 tokens are few: the average of 0.15 is met up to the one token that every layer keeps
    assert report.average_visual_tokens <= max(0.15 * 16, report.tokens_out / 4 + 0.75) + 1


# -- what fits -----------------------------------------------------------------------------------------------
REFUSED = {
    "two projector strategies": (["hired", "random"], {}, "both act between the tower and the LLM"),
    "two inside": (["fastv", "sparsevlm"], {}, "both act inside the LLM"),
    "two encoder strategies": (["tome", "diffrate"], {}, "both act inside the encoder"),
    "twice the same": (["fastv", "fastv"], {}, "can be there once"),
    "mustdrop merges itself": (["random", "mustdrop"], {}, "merging=False and key_rate=0"),
    "only one": (["fastv"], {}, "at least two"),
    "none": ([], {}, "at least two"),
    "positions": (
        [Random(0.5), FastV(0.5, positions="renumber")],
        {},
        "same positions, found random: original",
    ),
    "budget for what is configured": ([Random(0.5), FastV(0.5)], dict(budget=0.2), "configured already"),
    "an option of nobody": (["random", "fastv"], dict(layer=3), "one mapping per strategy, found layer"),
    "options that are no mapping": (["random", "fastv"], dict(fastv=3), "mapping such as"),
    "unknown option": (["random", "fastv"], dict(fastv=dict(depth=3)), "no option 'depth'"),
    "unknown name": (["random", "fastvv"], {}, "did you mean fastv"),
    "split": (["random", "fastv"], dict(split=2), "split must lie"),
    "budget": (["random", "fastv"], dict(budget=1.5), r"\(0, 1\]"),
    "three": (["random", "fastv", "llavolta"], {}, "both act inside"),
    "two between frames": (["stc_cacher", "stc"], {}, "both act between frames"),
    "merging and reuse": (["stc_cacher", "mustdrop"], {}, "mustdrop merges tokens in the vision tower"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    parts, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as error:
        combine(parts, **options)
    assert str(error.value).count(". ") == 0 and str(error.value).endswith(("?", "."))


def test_what_is_no_strategy():
    with pytest.raises(TypeError, match="found 3"):
        combine(["random", 3])


def test_mustdrop_without_its_first_stage_fits():
    off = dict(merging=False, key_rate=0.0)
    assert isinstance(combine(["hired", "mustdrop"], 0.3, mustdrop=off).then, MustDrop)


@pytest.mark.parametrize("parts", [["stc_cacher", "random"], ["random", "stc_cacher"]])
def test_reuse_between_frames_with_one_other(parts):
    both = combine(parts, 0.2, stc_cacher=dict(budget=0.5, interval=3))
    assert isinstance(both.first, Random) and both.first.budget == 0.2 and both.acts_on_projector
    assert both.reuse(both_towers()).interval == 3 and both.between.budget == 0.5
    assert both.info.stages == ("encoder", "projector") or both.info.stages == ("projector", "encoder")
    inside = combine(["stc_cacher", "fastv"], 0.2)
    assert inside.then.budget == 0.2 and not inside.acts_on_projector and inside.prefill_layers(4)
    assert inside.counts(video(2, 4, 4).segments) == [16, 16]
    assert combine(["stc_cacher", "random"], 1.0, stc_cacher=dict(interval=1)).is_identity


def test_reuse_between_frames_with_two_others():
    three = combine(["fastv", "stc_cacher", "random"], 0.25)
    assert (three.first.budget, three.then.budget, three.between.budget) == (0.5, 0.25, 0.25)
    assert [p.info.name for p in three.ordered] == ["stc_cacher", "random", "fastv"]
    stc = combine(["stc", "fastv"], 0.25, stc=dict(recompute=0.4))
    assert stc.between is stc.first and stc.first.budget == 0.5 and stc.first.recompute == 0.4
    off = combine(["stc_cacher", "mustdrop"], mustdrop=dict(merging=False, key_rate=0.0))
    assert off.reuse(both_towers()) is not None


def both_towers():
    return TowerInfo(4, 3, False, (0, 1, 2, 3))


@pytest.mark.parametrize(
    ("budget", "parts", "words"),
    [
        (0.5, 0.5, ("visionzip(budget=0.7071)", "sharing budget=0.5")),
        (1 / 3, 0.5, ("visionzip(budget=0.5774)", "fastv(budget=0.3333)", "sharing budget=0.3333")),
        (0.2, 0.3, ("visionzip(budget=0.617)", "sharing budget=0.2")),
        (0.99999, 0.5, ("visionzip(budget=0.99999", "sharing budget=0.99999")),
        (1.0, 0.5, ("visionzip(budget=1.0)", "sharing budget=1.0")),
        (123456, 0.5, ("fastv(budget=123456)", "sharing budget=123456")),
    ],
)
def test_budgets_in_words_have_four_digits(budget, parts, words):
    made = combine(["visionzip", "fastv"], budget, split=parts)
    assert all(w in made.describe() for w in words), made.describe()


# -- on models -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "llava_next", "internvl"])
def test_projector_then_prefill(name):
    family, model = FAMILIES[name], subject(name)
    inputs = family.batch("ragged")
    first = "random" if name == "qwen2_5_vl" else "vtc_cls"
    with patched(model, combine([first, "fastv"], 0.25, fastv={"layer": 1})) as spy:
        out = run(model, inputs)
        report = vtoken.report(model)
    assert_same(out, inputs, expected(name, inputs, spy))
    totals = [int(row.sum()) for row in family.visual(inputs)]
    assert report.visual_per_layer[-1] == sum(round(n * 0.25) for n in totals)
    assert report.visual_per_layer[0] == report.tokens_out < sum(totals)
    assert "(budget=0.5) then fastv(budget=0.25, layer=1), sharing budget=0.25" in str(report)


@pytest.mark.parametrize("name", ["llava_next_video/video", "qwen2_5_vl/video"])
def test_reuse_then_projector_then_prefill(name):
    """A layer that the projector strategy reads is computed in full, and it reads all of every frame."""
    family, model = FAMILIES[name], subject(name)
    inputs, cacher = family.batch("ragged"), dict(budget=0.3, interval=3)
    chain = combine(["stc_cacher", "visionzip", "fastv"], 0.5, stc_cacher=cacher, fastv={"layer": 1})
    with patched(model, chain) as spy:
        out = run(model, inputs, 2)
        use, text = vtoken.report(model).tower["video"], str(vtoken.report(model))
    assert_same(out, inputs, expected(name, inputs, spy, 2, features=spy.by_row(family, inputs)))
    assert use.flops < use.flops_dense and "stc_cacher(budget=0.3, interval=3) then " in text


def test_as_the_user_writes_it():
    model, inputs = subject("llava"), FAMILIES["llava"].batch("ragged")
    outs = []
    config = vtoken.VTokenConfig(["hired", "fastv"], 0.25, options={"fastv": {"layer": 1}})
    again = vtoken.VTokenConfig.from_dict(config.to_dict())
    ways = [
        lambda: vtoken.patch(model, ["hired", "fastv"], budget=0.25, fastv={"layer": 1}),
        lambda: vtoken.patch(model, ["fastv", "hired"], 0.25, fastv=dict(layer=1)),
        lambda: vtoken.patch(model, [HiRED, "fastv"], 0.25, fastv=dict(layer=1)),
        lambda: vtoken.patch(model, again),
        lambda: vtoken.patch(model, Composite(0.25, [HiRED(), FastV(layer=1)])),
        lambda: vtoken.patch(model, [HiRED(0.5), FastV(0.25, layer=1)]),
    ]
    for way in ways:
        way()
        outs.append(torch.stack(run(model, inputs, 2).logits))
        vtoken.unpatch(model)
    assert all(torch.equal(outs[0], other) for other in outs[1:])
    with vtoken.applied(model, ["hired", "fastv"], 0.25, fastv=dict(layer=1)):
        assert torch.equal(torch.stack(run(model, inputs, 2).logits), outs[0])


def test_a_list_of_one_is_that_one():
    model = subject("llava")
    vtoken.patch(model, ["fastv"], budget=0.3, layer=1)
    try:
        run(model, FAMILIES["llava"].batch("one"), 1)
        assert "fastv(budget=0.3, layer=1)" in str(vtoken.report(model))
    finally:
        vtoken.unpatch(model)


def test_whole_budget_is_the_unpatched_model():
    model, inputs = subject("llava"), FAMILIES["llava"].batch("ragged")
    with patched(model, combine(["random", "pyramiddrop"], 1.0)):
        out = run(model, inputs, 2)
    assert torch.equal(torch.stack(out.logits), torch.stack(run(clean("llava"), inputs, 2).logits))


def test_renumbered_together():
    model, inputs = subject("llava"), FAMILIES["llava"].batch("ragged")
    with patched(model, combine(["random", "fastv"], 0.25, positions="renumber", fastv=dict(layer=1))) as spy:
        out = run(model, inputs)
    assert_same(out, inputs, expected("llava", inputs, spy, renumber=True))


def test_needs_of_the_projector_strategy_are_asked_for():
    with pytest.raises(ValueError, match="CLS"):
        vtoken.patch(subject("qwen2_vl"), ["hired", "fastv"], 0.3)
    with pytest.raises(ValueError, match="LLM layer 9"):
        vtoken.patch(subject("llava"), ["random", "fastv"], 0.3, fastv=dict(layer=9))
    assert isinstance(Composite(0.3, [Uniform(), SparseVLM()]).then, SparseVLM)
    assert isinstance(Composite(0.3, [PyramidDrop(), Uniform()]).then, PyramidDrop)
