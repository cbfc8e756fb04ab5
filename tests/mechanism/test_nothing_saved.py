"""A warning if no visual token is saved although the strategy was to drop some."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

import vtoken
from tests.models import FAMILIES
from tests.oracle import clone
from vtoken.strategies.registry import _registry

from .common import run


def features_of(output) -> torch.Tensor:
    return torch.cat([f.flatten(0, -2) for f in output.pooler_output])


def merged(model, name: str, inputs: dict, change=lambda features: features) -> dict:
    """Embeddings of a prompt, merged by hand: text and the features that the model's own method gives."""
    inputs = clone(inputs)
    ids, mask, modality = inputs.pop("input_ids"), inputs.pop("attention_mask"), FAMILIES[name].modality
    inputs.pop("mm_token_type_ids", None)
    with torch.no_grad():
        features = change(features_of(getattr(model.base_model, f"get_{modality}_features")(**inputs)))
        embeds = model.get_input_embeddings()(ids)
    places = FAMILIES[name].visual(dict(input_ids=ids))
    embeds = embeds.masked_scatter(places[..., None].expand_as(embeds), features.to(embeds))
    return dict(inputs_embeds=embeds, attention_mask=mask)


def nothing_said(call) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        call()


@pytest.mark.parametrize("how", ["forward", "generate", "base", "language model"])
@pytest.mark.parametrize(
    ("name", "strategy"),
    [("llava", "hired"), ("llava", "fastv"), ("llava_next", "uniform"), ("qwen2_5_vl/video", "random")],
)
def test_embeddings_merged_by_hand(name, strategy, how):
    model, inputs = FAMILIES[name].build(), FAMILIES[name].batch("ragged" if name == "llava" else "one")
    vtoken.patch(model, strategy, budget=0.3)
    calls = {
        "forward": lambda **given: model(**given),
        "generate": lambda **given: model.generate(**given, max_new_tokens=2),
        "base": lambda **given: model.base_model(**given),
        "language model": lambda **given: model.get_decoder()(**given),
    }
    with pytest.warns(
        UserWarning, match=f"{strategy} saved no visual token.*Pass input_ids and pixel_values"
    ) as seen:
        calls[how](**merged(model, name, inputs))
        calls[how](**merged(model, name, inputs))
    assert len([w for w in seen if "saved no visual token" in str(w.message)]) == 1


def test_other_uses_of_features_are_nobodys_business():
    """Features that the LLM never reads, or that the user has pruned; prompts of text; a disabled patch; the
    whole budget.
    """
    name, inputs = "llava", FAMILIES["llava"].batch("one")
    model, text = FAMILIES[name].build(), FAMILIES[name].prompt([[]])
    vtoken.patch(model, "hired", budget=0.3)
    embeds = merged(model, name, inputs)
    text = {k: text[k] for k in ("input_ids", "attention_mask")}
    pooled = merged(model, name, inputs, lambda f: f.roll(1, 1))
    nothing_said(lambda: model(**pooled))
    nothing_said(lambda: model(**text))
    nothing_said(lambda: model(inputs_embeds=model.get_input_embeddings()(text["input_ids"])))
    nothing_said(lambda: model.generate(**clone(inputs), max_new_tokens=2))
    half = {k: v[:, 12:] for k, v in embeds.items()}  # a part of the features only
    nothing_said(lambda: model(**half))
    with vtoken.disabled(model):
        nothing_said(lambda: model(**merged(model, name, inputs)))
    vtoken.unpatch(model)
    nothing_said(lambda: model(**embeds))
    vtoken.patch(model, "hired", budget=1.0)
    nothing_said(lambda: model(**merged(model, name, inputs)))


def test_features_that_generate_encodes_and_a_model_merges_itself():
    """A model whose preparation of inputs merges by hand: the LLM is given no visual tokens by name."""
    model, inputs = FAMILIES["llava"].build(), FAMILIES["llava"].batch("one")
    if "mm_encoder_outputs" not in inspect.signature(model.base_model.forward).parameters:
        pytest.skip("this release encodes inside of forward")
    prepare = model.prepare_inputs_for_generation

    def merging(*args, **kwargs):
        given = prepare(*args, **kwargs)
        outputs = given.pop("mm_encoder_outputs", None)
        if outputs:
            ids = given.pop("input_ids")
            embeds = model.get_input_embeddings()(ids)
            places = FAMILIES["llava"].visual(dict(input_ids=ids))[..., None].expand_as(embeds)
            given["inputs_embeds"] = embeds.masked_scatter(places, 0.5 * features_of(outputs["image"]))
        return given

    model.prepare_inputs_for_generation = merging
    vtoken.patch(model, "hired", budget=0.3)
    with pytest.warns(UserWarning, match="hired saved no visual token"):
        run(model, inputs)
    nothing_said(lambda: run(model, inputs))  # once
    del model.prepare_inputs_for_generation
    vtoken.unpatch(model)
    vtoken.patch(model, "hired", budget=0.3)
    nothing_said(lambda: run(model, inputs))


# -- strategies that do nothing ------------------------------------------------------------------------------
@dataclass
class Nothing(vtoken.Strategy):
    """Forgets to write `select`."""

    info = vtoken.StrategyInfo("nothing", "Nothing.", ("projector",))


@dataclass
class NeverAsked(Nothing):
    def select_in_prefill(self, tokens):
        return vtoken.Selection.everything(1)


@dataclass
class AskedInVain(Nothing):
    def prefill_layers(self, num_layers):
        return (1,)


@dataclass
class NoLayers(Nothing):
    def merge_in_encoder(self, tokens):
        return None


@dataclass
class Misspelt(Nothing):
    where: list = field(default_factory=list)

    def selct(self, tokens):
        return vtoken.Selection.everything(1)


CLASSES = {
    Nothing: "writes none of select",
    Misspelt: "writes none of select",
    NeverAsked: "select_in_prefill without prefill_layers",
    AskedInVain: "writes none of select",
    NoLayers: "merge_in_encoder without encoder_layers",
}


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_a_strategy_that_would_drop_nothing(cls):
    model = FAMILIES["llava"].build()
    with pytest.raises(TypeError, match=CLASSES[cls]):
        vtoken.register("nothing", summary="Nothing.", stages=("projector",))(cls)
    assert "nothing" not in _registry
    for use in (vtoken.patch, lambda *a: vtoken.applied(*a).__enter__()):
        with pytest.raises(TypeError, match=CLASSES[cls]):
            use(model, cls(budget=0.3))
    assert "generate" not in model.__dict__


# -- wrappers ------------------------------------------------------------------------------------------------
class Adapted(nn.Module):
    """Looks like peft's PeftModel: `base_model` is no transformers model, `get_base_model()` is."""

    def __init__(self, model) -> None:
        super().__init__()
        self.base_model = nn.ModuleDict({"model": model})
        self.config = model.config

    def get_base_model(self):
        return self.base_model["model"]

    def forward(self, **given):
        return self.get_base_model()(**given)

    def generate(self, **given):
        return self.get_base_model().generate(**given)


WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "adapted": Adapted,
    "compiled and adapted": lambda model: torch.compile(Adapted(model), backend="eager"),
    "base": lambda model: model.base_model,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_and_its_model_are_one(wrapper):
    family = FAMILIES["llava"]
    model, inputs = family.build(), family.batch("one")
    outer, dense = WRAPPERS[wrapper](model), torch.stack(run(model, inputs).logits)
    pairs = [(outer, model), (model, outer), (outer, outer)]
    for on, off in pairs:
        assert vtoken.patch(on, "hired", budget=0.3) is on
        pruned = torch.stack(run(model, inputs).logits)
        assert not torch.equal(pruned, dense)
        assert str(vtoken.report(outer)) == str(vtoken.report(model))
        for twice in (model, outer):
            with pytest.raises(ValueError, match="patched with hired already"):
                vtoken.patch(twice, "random")
        with vtoken.disabled(off):
            assert torch.equal(torch.stack(run(model, inputs).logits), dense)
        with vtoken.applied(off, "random", budget=0.3) as given:
            assert given is off
            assert not torch.equal(torch.stack(run(model, inputs).logits), pruned)
        if wrapper != "base" and hasattr(outer, "generate"):
            assert torch.equal(torch.stack(run(outer, inputs).logits), pruned)
        assert vtoken.unpatch(off) is off
        assert torch.equal(torch.stack(run(model, inputs).logits), dense)
        assert "get_image_features" not in model.base_model.__dict__
    assert vtoken.list_strategies(model=outer) == vtoken.list_strategies(model=model)


def test_a_stream_of_a_wrapper():
    family, states = FAMILIES["llava_onevision/video"], []
    inputs = family.batch("one")
    for wrap in (lambda model: model, Adapted):
        model = wrap(family.build())
        vtoken.patch(model, "stc_cacher", budget=0.3)
        with vtoken.stream(model) as state:
            run(model, inputs)
        states.append((state.frames, state.recomputed))
    assert states[0] == states[1] and states[0][0] > 0


def test_head_and_base_are_not_patched_both():
    for first, second in ((0, 1), (1, 0)):
        model = FAMILIES["llava"].build()
        both = (model, model.base_model)
        vtoken.patch(both[first], "hired", budget=0.3)
        with pytest.raises(ValueError, match="shares its modules with this"):
            vtoken.patch(both[second], "hired", budget=0.3)
        vtoken.unpatch(both[second])
        vtoken.patch(both[second], "hired", budget=0.3)


def replica_of(model: nn.Module) -> nn.Module:
    """As `nn.parallel.replicate` makes one per GPU, here on the CPU."""
    modules = list(model.modules())
    copies = {module: module._replicate_for_data_parallel() for module in modules}
    for module, twin in copies.items():
        for name, child in module._modules.items():
            twin._modules[name] = None if child is None else copies[child]
        for name, parameter in module._parameters.items():
            twin._parameters[name] = parameter
    return copies[model]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "idefics3"])
@pytest.mark.parametrize("strategy", ["visionzip", "random", "fastv"])
def test_data_parallel_is_refused(name, strategy):
    model, inputs = FAMILIES[name].build(), FAMILIES[name].batch("one")
    with pytest.raises(TypeError, match="use DistributedDataParallel"):
        vtoken.patch(nn.DataParallel(model), strategy)
    vtoken.patch(model, strategy, budget=0.3)
    with pytest.raises(NotImplementedError, match="use DistributedDataParallel"):
        replica_of(model)(**clone(inputs))
    model(**clone(inputs))
    vtoken.unpatch(nn.DataParallel(model))
    assert "get_image_features" not in model.base_model.__dict__
