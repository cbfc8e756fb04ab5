"""Helpers of the mechanism's tests: run a model, compare it with the oracle."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers
from torch import Tensor

from tests import oracle
from tests.models import FAMILIES, SPECIAL, Family
from tests.oracle import STEPS, clone
from vtoken.adapters.registry import list_families

from .fixed import Spy

TOLERANCE = 1e-4  # of the largest logit, float32
EFFECT = 1e-2  # what pruning must at least do to the logits, or the test would pass without it
PATCHABLE = [name for name, family in FAMILIES.items() if family.config().model_type in list_families()]


FRONT: dict = dict()
BOTH = dict(layers=(2,), budget=0.6)
ALIGNED = dict(layers=(1, 3), aligned=(0, 1, 2), budget=0.6)
INSIDE = [name for name in PATCHABLE if FAMILIES[name].inside]
ONE_ROPE = [
    name
    for name in PATCHABLE
    if "rope" in (text := str(FAMILIES[name].config().text_config)) and "mrope_section" not in text
]
SOME = [name for name in ("llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "idefics3") if name in PATCHABLE]


PRODUCT = ("llava", "llava_next", "llava_onevision", "internvl", "qwen2_5_vl", "qwen3_vl")
OPTIONS = dict(before=FRONT, both=BOTH, aligned=ALIGNED, merge=dict(merge=True))


def everywhere(never: tuple[str, ...] = (), **few: dict) -> pytest.MarkDecorator:
    """Parametrises over `name` and `options` of `Fixed`: drops before and inside the LLM for every family,
    before alone where the LLM allows no drops inside, further options for some of them; under the marker
    `product` all options but `never` for the families of `PRODUCT`.
    """
    cheap = [(name, "both" if name in INSIDE else "before") for name in PATCHABLE]
    cheap += [(name, key) for key in few for name in SOME]
    more = [
        (name, key) for name in PRODUCT for key in OPTIONS if key not in never and (name, key) not in cheap
    ]
    rows = [(case, ()) for case in cheap] + [(case, (pytest.mark.product,)) for case in more]
    params = [pytest.param(n, OPTIONS[key], id=f"{n}-{key}", marks=marks) for (n, key), marks in rows]
    return pytest.mark.parametrize(("name", "options"), params)


@functools.cache
def clean(name: str, attn: str = "sdpa", dtype: torch.dtype = torch.float32):
    """A model that no test may patch."""
    return FAMILIES[name].build(attn, dtype)


@functools.cache
def subject(name: str, attn: str = "sdpa", dtype: torch.dtype = torch.float32):
    """The same model to be patched, and unpatched again by whoever does."""
    return FAMILIES[name].build(attn, dtype)


def recurrent(name: str) -> bool:
    """Whether the LLM has layers with a state of fixed size, by the cache that transformers makes for it."""
    cache = transformers.DynamicCache(config=clean(name).config)
    return any(hasattr(layer, "conv_states") for layer in cache.layers)


def checkpointing(model):
    """The same model, which keeps no activations of its layers for backward; transformers 5.24 renamed the
    method.
    """
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    return model


def run(model, inputs: dict, steps: int = STEPS, **kwargs):
    """generate() with exactly ``steps`` greedy tokens, their logits kept."""
    fixed = dict(max_new_tokens=steps, min_new_tokens=steps, do_sample=False, suppress_tokens=SPECIAL)
    return model.generate(
        **clone(inputs), **fixed, return_dict_in_generate=True, output_logits=True, **kwargs
    )


def new_ids(out, inputs: dict) -> Tensor:
    return out.sequences[:, inputs["input_ids"].shape[1] :]


def assert_close(got: Tensor, want: Tensor, tolerance: float = TOLERANCE) -> None:
    error, scale = (got.double() - want.double()).abs().max().item(), want.abs().max().item()
    assert error <= tolerance * scale, f"off by {error:.2e} where the largest logit is {scale:.1f}"


def assert_same(out, inputs: dict, want: tuple[Tensor, Tensor]) -> None:
    """generate()'s tokens and logits are the oracle's."""
    ids, logits = want
    assert new_ids(out, inputs).tolist() == ids.tolist()
    assert_close(torch.stack(out.logits), logits)


def assert_moved(out, name: str, inputs: dict) -> None:
    """Pruning moved the first logits of every row that has visual tokens, and of no other row."""
    got, dense = out.logits[0], run(clean(name), inputs, 1).logits[0]
    for b, row in enumerate(FAMILIES[name].visual(inputs)):
        if row.any():
            assert (got[b] - dense[b]).abs().max() > EFFECT
        else:
            assert_close(got[b], dense[b])


def expected(
    name: str, inputs: dict, spy: Spy, steps: int = STEPS, model=None, **kwargs
) -> tuple[Tensor, Tensor]:
    """The oracle's answer for what a strategy was seen to choose."""
    family, model = FAMILIES[name], clean(name) if model is None else model
    keep, merge = spy.in_front(family, inputs) if spy.items else (None, None)
    everything = torch.ones_like(inputs["attention_mask"]).bool()
    drop, mix = spy.inside(family, inputs, everything if keep is None else keep)
    alive = functools.reduce(torch.logical_and, drop.values(), everything)
    evict = dict.fromkeys(spy.strategy.aligned_layers(4), alive) if drop else {}
    hide = spy.hidden(family, inputs) if getattr(spy.strategy, "hides_pictures", False) else None
    attended = spy.inside_attention(family, inputs) if spy.attended else {}
    keeps = bool(attended) and not spy.strategy.attention().evicts
    inside = dict(drop=drop, mix=mix, evict=evict, hide=hide, attended=attended, keeps=keeps)
    return oracle.generate(model, inputs, keep, steps, merge=merge, **inside, **kwargs)


def consistent(name: str, inputs: dict, **kwargs) -> bool:
    """Whether the unpatched model gives the same answer with and without an option of generate()."""
    try:
        plain, other = run(clean(name), inputs), run(clean(name), inputs, **kwargs)
    except Exception:
        return False
    scale = torch.stack(plain.logits).abs().max()
    same = torch.equal(plain.sequences, other.sequences)
    return same and bool(
        (torch.stack(plain.logits) - torch.stack(other.logits)).abs().max() < TOLERANCE * scale
    )


def random_keep(family: Family, inputs: dict, share: float = 0.4, seed: int = 7) -> Tensor:
    """Bool (batch, L): all text and a random share of every row's visual tokens."""
    visual, generator = family.visual(inputs), torch.Generator().manual_seed(seed)
    keep = ~visual
    for b, row in enumerate(visual):
        places = row.nonzero()[:, 0]
        count = max(1, round(len(places) * share)) if len(places) else 0
        keep[b, places[torch.randperm(len(places), generator=generator)[:count]]] = True
    return keep
