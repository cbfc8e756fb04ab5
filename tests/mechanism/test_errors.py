"""A user's mistake is refused by `patch` with one sentence that says what would work."""

from __future__ import annotations

import pytest
import torch
import transformers

import vtoken
from tests.models import FAMILIES
from tests.models.siglip import siglip

from .common import subject
from .fixed import Fixed
from .test_isolation import traces


def llava_without_cls():
    config = FAMILIES["llava"].config()
    config.vision_config, config.vision_feature_select_strategy = siglip(), "full"
    return transformers.LlavaForConditionalGeneration(config)


def a_text_model():
    return transformers.LlamaForCausalLM(FAMILIES["llava"].config().text_config)


def flexible():
    model = FAMILIES["llava"].build()
    model.config.get_text_config()._attn_implementation_internal = "flex_attention"
    return model


def llava():
    return subject("llava")


MISTAKES = {
    "unknown strategy": (llava, ("hirde",), {}, ["'hirde'", "hired"]),
    "far from any name": (llava, ("zzz",), {}, ["'zzz'", "random"]),
    "no strategy at all": (llava, (17,), {}, ["17", "name"]),
    "budget 0": (llava, ("random", 0), {}, ["0", "(0, 1]"]),
    "budget 0.0": (llava, ("random", 0.0), {}, ["0.0", "(0, 1]"]),
    "negative share": (llava, ("random", -0.5), {}, ["-0.5", "(0, 1]"]),
    "negative number": (llava, ("random", -3), {}, ["-3", "(0, 1]"]),
    "share above one": (llava, ("random", 1.5), {}, ["1.5", "(0, 1]"]),
    "boolean": (llava, ("random", True), {}, ["True", "(0, 1]"]),
    "not a number": (llava, ("random", float("nan")), {}, ["nan", "(0, 1]"]),
    "infinite": (llava, ("random", float("inf")), {}, ["inf", "(0, 1]"]),
    "a word": (llava, ("random", "half"), {}, ["half", "(0, 1]"]),
    "unknown option": (llava, ("random",), dict(sed=3), ["sed", "seed"]),
    "unknown positions": (llava, ("random",), dict(positions="new"), ["new", "original", "renumber"]),
    "model second": (lambda: "random", (torch.nn.Linear(2, 2),), {}, ["second", "vtoken.patch(model"]),
    "budget for an object": (llava, (vtoken.strategies.Random(0.5), 0.2), {}, ["budget", "Random"]),
    "option for an object": (llava, (vtoken.strategies.Random(0.5),), dict(seed=1), ["seed", "Random"]),
    "no adapter": (a_text_model, ("random",), {}, ["'llama'", "llava"]),
    "no CLS": (llava_without_cls, ("vtc_cls",), {}, ["CLS", "random"]),
    "flex attention": (flexible, ("random",), {}, ["flex", "sdpa"]),
    "no model": (lambda: torch.nn.Linear(2, 2), ("random",), {}, ["Linear", "from_pretrained"]),
    "a string": (lambda: "llava", ("random",), {}, ["str", "from_pretrained"]),
    "nothing": (lambda: None, ("random",), {}, ["None", "from_pretrained"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_one_sentence_at_patch_time(case):
    make, args, kwargs, mentions = MISTAKES[case]
    model = make()
    before = traces(model) if isinstance(model, torch.nn.Module) else None
    with pytest.raises((ValueError, TypeError)) as raised:
        vtoken.patch(model, *args, **kwargs)
    message = str(raised.value)
    assert all(word in message for word in mentions), message
    assert message[-1] in ".?)" and "\n" not in message
    if before is not None:
        assert traces(model) == before


def test_already_patched():
    model = vtoken.patch(FAMILIES["llava"].build(), Fixed())
    with pytest.raises(ValueError, match=r"patched with fixed already.*unpatch.*applied"):
        vtoken.patch(model, "random")
    assert vtoken.patch(vtoken.unpatch(model), "random") is model


def test_renumbering_a_multimodal_rope():
    with pytest.raises(ValueError, match=r"renumber.*rope.*original"):
        vtoken.patch(subject("qwen2_vl"), Fixed(positions="renumber"))


def test_report_needs_a_patched_model_that_was_called():
    model = FAMILIES["llava"].build()
    with pytest.raises(ValueError, match=r"not patched.*patch"):
        vtoken.report(model)
    with pytest.raises(ValueError, match="has not read visual tokens"):
        vtoken.report(vtoken.patch(model, "random"))


@pytest.mark.parametrize("strategy", ["farcover", "divprune"])
def test_features_that_are_no_numbers_are_told(strategy):
    model = vtoken.patch(FAMILIES["llava"].build(), strategy, budget=0.4)
    model.model.multi_modal_projector.linear_2.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match=f"{strategy} chooses by features .* that are not finite numbers"):
        model(**FAMILIES["llava"].batch("one"))
