"""State of a patched model between calls, and in copies, pickles and other processes."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
import weakref

import pytest
import torch

import vtoken
from tests.models import FAMILIES
from tests.oracle import clone

STRATEGIES = ["visionzip", "fastv", "mustdrop", ["hired", "pyramiddrop"], "stc_cacher", "pool", "cdpruner"]


def fits(model, strategy) -> bool:
    names = strategy if isinstance(strategy, list) else [strategy]
    return set(names) <= set(vtoken.list_strategies(model=model))


CASES = [
    (name, strategy)
    for name in ("llava", "qwen2_5_vl", "llava_onevision/video", "idefics3")
    for strategy in STRATEGIES
    if fits(FAMILIES[name].build(), strategy)
]


def patched(name: str, strategy):
    return vtoken.patch(FAMILIES[name].build(), strategy, budget=0.3)


def answer(model, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        return model(**clone(inputs)).logits


@pytest.mark.parametrize(("name", "strategy"), CASES)
def test_a_copy_after_a_training_step(name, strategy):
    model, inputs = patched(name, strategy), FAMILIES[name].batch("one")
    model.train()
    model(**clone(inputs)).logits.square().mean().backward()
    model.zero_grad()
    model(**clone(inputs))  # and one whose graph was not used
    other = copy.deepcopy(model)
    assert vtoken.report(other).tokens_in == vtoken.report(model).tokens_in
    model.eval(), other.eval()
    assert torch.equal(answer(other, inputs), answer(model, inputs))
    dense = answer(vtoken.unpatch(model), inputs)
    assert not torch.equal(answer(other, inputs), dense) or strategy == "stc_cacher"
    assert torch.equal(answer(vtoken.unpatch(other), inputs), dense)


@pytest.mark.parametrize(("name", "strategy"), CASES)
def test_no_features_stay_alive_between_calls(name, strategy):
    model, inputs = patched(name, strategy), FAMILIES[name].batch("one")
    alive: list[weakref.ref] = []

    def note(module, args, out):
        if isinstance(out, torch.Tensor) and out.is_floating_point():
            alive.append(weakref.ref(out))

    towers = [
        m
        for n, m in model.named_modules()
        if "vision" in n or "visual" in n or "projector" in n or "connector" in n
    ]
    handles = [m.register_forward_hook(note) for m in {id(m): m for m in towers}.values()]
    model(**clone(inputs))
    model.generate(**clone(inputs), max_new_tokens=2)
    [h.remove() for h in handles]
    gc.collect()
    assert alive and not [ref().shape for ref in alive if ref() is not None]
    report = vtoken.report(model)
    tensors = [t for v in report.visuals for t in vars(v).values() if isinstance(t, torch.Tensor)]
    assert tensors and all(t.dtype == torch.int64 and not t.requires_grad for t in tensors)


LOAD = """
import sys, torch
model, inputs, want, dense = torch.load(sys.argv[1], weights_only=False)
type(model)._from_config(model.config)  # transformers needs it of every model with hidden states, patched or not
with torch.no_grad():
    assert (model(**inputs).logits - want).abs().max() < 1e-4
    import vtoken
    with vtoken.applied(model, "uniform", budget=0.3):
        model(**inputs)
    assert (model(**inputs).logits - want).abs().max() < 1e-4
    assert vtoken.report(model).tokens_in > 0
    vtoken.unpatch(model)
    assert (model(**inputs).logits - dense).abs().max() < 1e-4
assert not any("vtoken" in str(v) for m in model.modules() for v in vars(m).values() if not isinstance(v, torch.Tensor))
"""


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("llava", ["hired", "pyramiddrop"]),
        pytest.param("qwen2_5_vl/video", "stc_cacher", marks=pytest.mark.product),
    ],
)
def test_another_process_loads_a_patched_model(name, strategy, tmp_path):
    """Saved by torch.save with the patch on, before transformers has put hooks of its own there, which no
    pickle takes.
    """
    inputs = FAMILIES[name].batch("one")
    dense, want = answer(FAMILIES[name].build(), inputs), answer(patched(name, strategy), inputs)
    torch.save((patched(name, strategy), inputs, want, dense), tmp_path / "model.pt")
    out = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path / "model.pt")], capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr


@pytest.mark.parametrize(("name", "strategy"), CASES)
def test_pickles(name, strategy):
    """Also inside blocks, and of the base model: what was pickled has the patch that was in use."""
    inputs, want = FAMILIES[name].batch("one"), answer(patched(name, strategy), FAMILIES[name].batch("one"))
    model = patched(name, "uniform")
    with vtoken.applied(model, strategy, budget=0.3):
        files = [io.BytesIO(), io.BytesIO()]
        torch.save(model, files[0])
        torch.save([model.base_model, model], files[1])
    for file in files:
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        loaded = loaded[1] if isinstance(loaded, list) else loaded
        assert torch.equal(answer(loaded, inputs), want)
        vtoken.unpatch(loaded)
        assert "generate" not in loaded.__dict__
        assert torch.equal(answer(loaded, inputs), answer(FAMILIES[name].build(), inputs))


def test_a_pickle_after_calls():
    """Qwen2.5-VL, on which transformers leaves no hooks: with its report."""
    name = "qwen2_5_vl"
    model, inputs = patched(name, "visionzip"), FAMILIES[name].batch("one")
    want = answer(model, inputs)
    model(**clone(inputs)).logits.sum().backward()
    loaded = pickle.loads(pickle.dumps(model))
    assert str(vtoken.report(loaded)).splitlines()[:-1] == str(vtoken.report(model)).splitlines()[:-1]
    assert torch.equal(answer(loaded, inputs), want)
