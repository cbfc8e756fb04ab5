"""The generic adapter: what it answers equals the oracle, or it says in one sentence what it cannot tell."""

from __future__ import annotations

import pytest
import torch
import transformers

import vtoken
from tests.mechanism.common import assert_moved, assert_same, clean, expected, run, subject
from tests.mechanism.fixed import Fixed, Spy
from tests.models import FAMILIES
from vtoken.adapters import registry
from vtoken.adapters.generic import GenericAdapter
from vtoken.adapters.qwen_vl import QwenVLAdapter
from vtoken.strategies.registry import modalities_of

# features per image, per crop, in a list, in one tensor with and without grids; videos; DeepStack; hybrid
ALIKE = (
    "llava",
    "llava_next",
    "internvl",
    "llava_onevision/video",
    "mistral3",
    "idefics3",
    "gemma3",
    "qwen2_5_vl",
    "qwen2_5_vl/video",
    "qwen3_vl",
    "qwen3_5",
    "glm4v/video",
    "cohere2_vision",
)
LONGER = transformers.__version__.startswith("5.17.") and "llava_onevision/video"  # features without newlines
NAMES = [name for name in ALIKE if name in FAMILIES and name != LONGER]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layers", [(), (2,)], ids=["before", "both"])
def test_equals_the_oracle(name, layers):
    if layers and not FAMILIES[name].inside:
        pytest.skip("no drops inside this LLM")
    model, inputs = subject(name), FAMILIES[name].batch("ragged")
    strategy = Fixed(layers=layers)
    spy = Spy(strategy)
    with vtoken.applied(model, strategy, adapter="generic"):
        out = run(model, inputs)
    assert_same(out, inputs, expected(name, inputs, spy))
    assert_moved(out, name, inputs)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen2_5_vl/video", "video_llava/video"])
def test_sees_the_images_and_frames_of_the_own_adapter(name):
    model, inputs = subject(name), FAMILIES[name].batch("ragged")
    seen = []
    for adapter in (None, "generic"):
        spy = Spy(Fixed())
        with vtoken.applied(model, spy.strategy, adapter=adapter):
            out = run(model, inputs, 1)
            report = vtoken.report(model)
        seen.append(([n for n, _ in spy.items], out.logits[0], report.tokens_out))
    assert seen[0][0] == seen[1][0] and torch.equal(seen[0][1], seen[1][1]) and seen[0][2] == seen[1][2]
    frames = []
    for adapter in (None, "generic"):
        with vtoken.applied(model, "uniform", 2, adapter=adapter):  # so many per image or frame
            run(model, inputs, 1)
            frames.append(vtoken.report(model).tokens_out)
    assert frames[0] == frames[1]


@pytest.mark.filterwarnings("ignore:The weights of voco are new")
def test_a_type_without_adapter(monkeypatch):
    """It is offered, never chosen by itself."""
    monkeypatch.setitem(registry._adapters, "qwen2_5_vl", None)
    monkeypatch.delitem(registry._adapters, "qwen2_5_vl")
    model, inputs = FAMILIES["qwen2_5_vl"].build(), FAMILIES["qwen2_5_vl"].batch("ragged")
    with pytest.raises(ValueError, match=r'no adapter for model type .qwen2_5_vl.: pass adapter="generic"'):
        vtoken.patch(model, "divprune")
    fit = vtoken.list_strategies(model=model, adapter="generic")
    assert {"divprune", "fastv", "random", "uniform"} <= set(fit)
    assert not {"pool", "visionzip", "hired", "tome", "pvc", "ts_llava"} & set(fit)
    for name in sorted(n for n in fit if "image" in modalities_of(n)):
        with vtoken.applied(model, name, adapter="generic"):
            run(model, inputs, 1)
    with vtoken.applied(model, "divprune", 0.5, adapter=QwenVLAdapter):
        own = run(model, inputs, 1).logits[0]
    vtoken.patch(model, "divprune", 0.5, adapter="generic")
    assert torch.equal(run(model, inputs, 1).logits[0], own)
    assert not torch.equal(own, run(clean("qwen2_5_vl"), inputs, 1).logits[0])
    vtoken.unpatch(model)


@pytest.mark.parametrize(("strategy", "reason"), [("pool", "places"), ("visionzip", "keys")])
def test_refuses_what_it_does_not_read(strategy, reason):
    with pytest.raises(
        ValueError, match=rf"{strategy} needs .*{reason}.* the generic adapter does .* leave out adapter= "
    ):
        vtoken.patch(subject("llava"), strategy, adapter="generic")


@pytest.mark.parametrize(("adapter", "error"), [("other", ValueError), (3, TypeError), (Fixed, TypeError)])
def test_refuses_other_adapters(adapter, error):
    with pytest.raises(error, match=r'adapter must be "generic" or an Adapter class, found'):
        vtoken.patch(subject("llava"), "random", adapter=adapter)


def test_refuses_an_object():
    with pytest.raises(TypeError, match="adapter must be a class: pass GenericAdapter itself"):
        vtoken.patch(subject("llava"), "random", adapter=GenericAdapter(clean("llava")))


def test_needs_a_model():
    with pytest.raises(ValueError, match="pass model= as well"):
        vtoken.list_strategies(adapter="generic")


def test_refuses_a_model_without_pictures():
    model = transformers.LlamaForCausalLM(FAMILIES["llava"].config().text_config)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM .* reads no images or videos"):
        vtoken.patch(model, "random", adapter="generic")


# placeholders of another modality, features in another field, features of another length
UNREAD = {
    "nemotron_h_omni/video": (NotImplementedError, "encoded videos, of which vtoken found no placeholder"),
    "granite4_vision": (NotImplementedError, "no pooler_output: the generic adapter does not fit"),
    "video_llama_3/video": (ValueError, "16 video tokens but the features have 18: the generic adapter does"),
    "perception_lm/video": (RuntimeError, "without their layout: .* the generic adapter does not fit"),
}


@pytest.mark.parametrize("name", [name for name in UNREAD if name in FAMILIES])
@pytest.mark.parametrize("call", [lambda model, inputs: model(**inputs), lambda *given: run(*given, 1)])
def test_says_what_it_cannot_read(name, call):
    error, reason = UNREAD[name]
    model, inputs = subject(name), FAMILIES[name].batch("one")
    with vtoken.applied(model, "uniform", 0.5, adapter="generic"), pytest.raises(error, match=reason):
        call(model, inputs)


def test_features_that_cannot_be_told_apart():
    """Two images of different sizes in one tensor, without their grids."""
    adapter = GenericAdapter(FAMILIES["llava"].build())
    features = transformers.modeling_outputs.BaseModelOutputWithPooling(pooler_output=torch.zeros(7, 4))
    pixels = dict(pixel_values=torch.zeros(2, 3, 8, 8))
    with pytest.raises(NotImplementedError, match="which of the 7 image tokens belong to which of 2 images"):
        adapter.split_features("image", features, pixels)
    grid = torch.tensor([[1, 4, 4], [1, 3, 4]])
    assert [
        len(f) for f in adapter.split_features("image", features, pixels | dict(image_grid_thw=grid))
    ] == [4, 3]


def test_videos_that_cannot_be_told_apart():
    """Frames as items of the features, of a video in one tensor of pixels."""
    adapter = GenericAdapter(FAMILIES["llava_onevision"].build())
    frames = [torch.zeros(4, 8)] * 3
    with pytest.raises(NotImplementedError, match="found 3 videos in the features and 1 in the pixels"):
        adapter.layouts("video", frames, dict(pixel_values_videos=torch.zeros(1, 3, 3, 8, 8)))
