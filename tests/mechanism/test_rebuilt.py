"""A model rebuilt after `patch` (adapters, quantised layers, new towers) answers as one rebuilt before."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import vtoken
from tests.models import FAMILIES
from tests.oracle import CACHE, clone

from .common import EFFECT


class LowRank(nn.Module):
    """A linear layer with an adapter, as LoRA puts it around one; it has none of the attributes of
    `nn.Linear`.
    """

    def __init__(self, base: nn.Linear, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.base = base
        self.down = nn.Parameter(torch.randn(2, base.in_features, generator=generator))
        self.up = nn.Parameter(torch.randn(base.out_features, 2, generator=generator) / base.in_features**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


class Rounded(nn.Module):
    """A linear layer whose weight is 4-bit integers and a scale."""

    def __init__(self, base: nn.Linear, seed: int) -> None:
        super().__init__()
        self.scale = base.weight.detach().abs().amax(1, keepdim=True) / 7
        self.levels = (base.weight.detach() / self.scale).round().to(torch.int8)
        self.bias = base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.levels * self.scale, self.bias)


def replace_linears(module: nn.Module, kind: type) -> None:
    for i, (name, child) in enumerate(list(module.named_modules())):
        if type(child) is nn.Linear:
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, kind(child, i))


def shaken(module: nn.Module, by: float = 0.3) -> nn.Module:
    """A copy with other weights and without the hooks of the patch; those of transformers stay."""
    other = copy.deepcopy(module)
    for part in other.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks):
            for key in [k for k, hook in hooks.items() if is_ours(hook)]:
                del hooks[key]
        part.__dict__.pop("forward", None)
    generator = torch.Generator().manual_seed(5)
    for p in other.parameters():
        p.data += by * p.data.std().nan_to_num(0.1) * torch.randn(p.shape, generator=generator)
    return other


def is_ours(hook) -> bool:
    return getattr(hook, "func", hook).__module__.startswith("vtoken")


def tower_of(model):
    base = model.base_model
    name = next(n for n in ("vision_tower", "visual", "vision_model") if hasattr(base, n))
    return base, name, getattr(base, name)


def list_in(module: nn.Module) -> tuple[nn.Module, str]:
    """The owner and name of the list of transformer layers."""
    name = next(n for n, m in module.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 2)
    owner, _, leaf = name.rpartition(".")
    return module.get_submodule(owner), leaf


def adapters_on_the_tower(model) -> None:
    replace_linears(tower_of(model)[2], LowRank)


def quantised_tower(model) -> None:
    replace_linears(tower_of(model)[2], Rounded)


def other_tower_layers(model) -> None:
    owner, name = list_in(tower_of(model)[2])
    layers = getattr(owner, name)
    for i in range(len(layers)):
        layers[i] = shaken(layers[i])


def another_list_of_tower_layers(model) -> None:
    owner, name = list_in(tower_of(model)[2])
    setattr(owner, name, nn.ModuleList(shaken(layer) for layer in getattr(owner, name)))


def another_tower(model) -> None:
    owner, name, tower = tower_of(model)
    setattr(owner, name, shaken(tower))


def adapters_in_the_llm(model) -> None:
    replace_linears(model.get_decoder(), LowRank)


def another_list_of_llm_layers(model) -> None:
    decoder = model.get_decoder()
    decoder.layers = nn.ModuleList(shaken(layer) for layer in decoder.layers)


def everything(model) -> None:
    for change in (another_tower, adapters_on_the_tower, another_list_of_llm_layers, quantised_tower):
        change(model)


TOWER = [
    adapters_on_the_tower,
    quantised_tower,
    other_tower_layers,
    another_list_of_tower_layers,
    another_tower,
    everything,
]
LLM = [adapters_in_the_llm, another_list_of_llm_layers, everything]
READERS = [  # every way in which something is read or done inside a tower
    ("llava", "hired", {}),
    ("llava", "visionzip", {}),
    ("llava", "mustdrop", {}),
    ("qwen2_5_vl", "visionzip", {}),
    ("internvl", "visionzip", {}),
    ("idefics3", "visionzip", {}),
    ("llava_onevision/video", "stc_cacher", {}),
    ("mistral3", "visionzip", {}),
    ("qwen2_5_vl/video", "stc_cacher", {}),
]
CASES = [(*reader, change) for reader in READERS[::3] for change in TOWER]
CASES += [
    (*reader, change)
    for reader in READERS[1::3] + READERS[2::3]
    for change in (adapters_on_the_tower, everything)
]
CASES += [
    (name, strategy, {}, change)
    for name in ("llava", "gemma3")
    for strategy in ("fastv", "sparsevlm")
    for change in LLM
]


def answer(model, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        return model(**clone(inputs)).logits


@pytest.mark.parametrize(
    ("name", "strategy", "options", "change"), CASES, ids=[f"{n}-{s}-{c.__name__}" for n, s, _, c in CASES]
)
def test_rebuilt_after_the_patch(name, strategy, options, change):
    """Patched and then rebuilt: the very answer of a model that was rebuilt and then patched."""
    family = FAMILIES[name]
    inputs, model, other = family.batch("one"), family.build(), family.build()
    before = answer(vtoken.patch(model, strategy, budget=0.3, **options), inputs)
    change(model)
    change(other)
    dense = answer(other, inputs)
    want = answer(vtoken.patch(other, strategy, budget=0.3, **options), inputs)
    assert (want - before).abs().max() > EFFECT and (want - dense).abs().max() > 0
    assert torch.equal(answer(model, inputs), want)
    assert torch.equal(answer(vtoken.unpatch(model), inputs), dense)
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert not any(map(is_ours, hooks))


def test_rebuilt_between_two_turns_of_a_conversation():
    """The LLM's layers are replaced while a pruned prompt waits in its cache: hooks of later turns move
    along.
    """
    family = FAMILIES["llava"]
    inputs, answers = family.batch("ragged"), []
    for rebuild in (False, True):
        model = vtoken.patch(family.build(), "fastv", budget=0.3)
        with torch.no_grad():
            cache = model(**clone(inputs), use_cache=True)
            cache = cache.get("cache", cache.get("past_key_values"))
            if rebuild:
                layers = model.get_decoder().layers
                for i in range(len(layers)):
                    fresh = shaken(layers[i], 0.0)
                    layers[i] = fresh
            ids = torch.tensor([[7], [8]])
            mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
            answers.append(model(input_ids=ids, attention_mask=mask, **{CACHE: cache}).logits)
    assert torch.equal(*answers)


class Fused(nn.Module):
    """An attention that no longer has separate projections."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.qkv = nn.Linear(attention.q_proj.in_features, 3 * attention.q_proj.out_features)
        self.num_heads, self.head_dim = attention.num_heads, attention.head_dim

    def forward(self, hidden_states, *args, **kwargs):
        return self.qkv(hidden_states).chunk(3, -1)[0], None


class Uncalled(nn.Module):
    """An attention that has the projections and does not call them."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.q_proj, self.k_proj = attention.q_proj, attention.k_proj
        self.num_heads, self.head_dim = attention.num_heads, attention.head_dim

    def forward(self, hidden_states, *args, **kwargs):
        return nn.functional.linear(hidden_states, self.q_proj.weight), None


def fused_attention(model) -> None:
    owner, name = list_in(tower_of(model)[2])
    for layer in getattr(owner, name):
        layer.self_attn = Fused(layer.self_attn)


def uncalled_projections(model) -> None:
    owner, name = list_in(tower_of(model)[2])
    for layer in getattr(owner, name):
        layer.self_attn = Uncalled(layer.self_attn)


def fewer_tower_layers(model) -> None:
    owner, name = list_in(tower_of(model)[2])
    setattr(owner, name, nn.ModuleList([*getattr(owner, name)][:-1]))


def no_tower(model) -> None:
    model.base_model.vision_tower.encoder = nn.Identity()


def fewer_llm_layers(model) -> None:
    model.get_decoder().layers = nn.ModuleList([*model.get_decoder().layers][:-1])


def another_llm(model) -> None:
    model.base_model.language_model = shaken(model.base_model.language_model)


def another_base(model) -> None:
    model.model = shaken(model.model)


@pytest.mark.parametrize(
    ("change", "strategy"),
    [
        (fused_attention, "visionzip"),
        (uncalled_projections, "hired"),
        (fewer_tower_layers, "visionzip"),
        (no_tower, "hired"),
        (fewer_llm_layers, "fastv"),
        (another_llm, "random"),
        (another_base, "random"),
    ],
)
def test_what_cannot_be_read_is_a_true_sentence(change, strategy):
    inputs, model = FAMILIES["llava"].batch("one"), FAMILIES["llava"].build()
    vtoken.patch(model, strategy, budget=0.3)
    change(model)
    for call in (answer, lambda m, i: m.generate(**clone(i), max_new_tokens=2)):
        with pytest.raises(RuntimeError, match=r"rebuilt after it was patched; call vtoken.unpatch\(model\)"):
            call(model, inputs)
    assert vtoken.unpatch(model) is model
    assert "generate" not in model.__dict__ and not model._forward_pre_hooks


def test_a_strategy_that_reads_nothing_takes_any_tower():
    inputs, model = FAMILIES["llava"].batch("one"), FAMILIES["llava"].build()
    vtoken.patch(model, "uniform", budget=0.3)
    fused_attention(model)
    answer(model, inputs)
    assert vtoken.report(model).tokens_out < vtoken.report(model).tokens_in
