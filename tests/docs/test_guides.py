"""The code of the guides and of the README is run as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import vtoken
from vtoken.adapters import registry as adapters
from vtoken.strategies import registry as strategies

ROOT = Path(__file__).parents[2]


def run(page: str, monkeypatch, **space):
    """All python blocks of a page, one after the other in one namespace, as if they were a module."""
    monkeypatch.setitem(__import__("sys").modules, "guide", module := type(re)("guide"))
    module.__dict__.update(space)
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S))
    assert blocks, f"{page} shows no code"
    future = "from __future__ import annotations\n"
    for block in blocks:
        code = block[1] if future in block[1] else future + block[1]
        padding = "\n" * (text[: block.start()].count("\n") + (0 if code is not block[1] else 1))
        exec(compile(padding + code, page, "exec"), module.__dict__)
    return module


@pytest.fixture
def registries():
    """What a guide registers is gone afterwards."""
    adapters.list_families()
    before = dict(strategies._registry), dict(adapters._adapters)
    yield
    for table, was in zip((strategies._registry, adapters._adapters), before):
        table.clear()
        table.update(was)


def test_adding_a_strategy(registries, monkeypatch, capsys):
    guide = run("docs/adding-a-strategy.md", monkeypatch)
    printed = capsys.readouterr().out
    assert "odd_keys(budget=0.25, back=1)" in printed and "144 -> 36 visual tokens" in printed
    tower = guide.model.model.vision_tower
    pixels = torch.rand(1, 3, 96, 96)
    keys = {}
    layer = getattr(tower, "vision_model", tower).encoder.layers[3]
    handle = layer.self_attn.k_proj.register_forward_hook(lambda m, i, out: keys.update(out=out[0, 1:]))
    ids = torch.full((1, 148), guide.model.config.image_token_id)
    ids[0, -4:] = 5
    with vtoken.applied(guide.model, "odd_keys", budget=20, back=1), torch.no_grad():
        guide.model(input_ids=ids, pixel_values=pixels)
        kept = vtoken.report(guide.model).visuals[0].keep
    handle.remove()
    unlike = torch.nn.functional.normalize(keys["out"], dim=-1) @ torch.nn.functional.normalize(
        keys["out"].mean(0), dim=0
    )
    assert kept.tolist() == sorted(unlike.argsort()[:20].tolist())
    with vtoken.applied(guide.model, "asked_once", budget=0.5), torch.no_grad():
        guide.model(input_ids=ids, pixel_values=pixels)
        assert vtoken.report(guide.model).visual_per_layer == [144, 72, 72, 72]
    with pytest.raises(ValueError, match="back must be"):
        vtoken.strategies.create("odd_keys", back=-1)


def test_adding_a_model(registries, monkeypatch, capsys):
    guide = run("docs/adding-a-model.md", monkeypatch)
    printed = capsys.readouterr().out
    assert "16 -> 4 visual tokens" in printed and "'fastv'" in printed and "'hired'" not in printed
    model, inputs = guide.model, guide.inputs
    with torch.no_grad():
        plain = model(**inputs).logits
        with vtoken.applied(model, "fastv", budget=1.0):
            assert torch.equal(model(**inputs).logits, plain)
        attended = {}
        heads = model.config.vision_config.num_attention_heads
        tower = getattr(model.model.vision_tower, "vision_model", model.model.vision_tower)
        attention = tower.encoder.layers[-1].self_attn
        hooks = [
            getattr(attention, p).register_forward_hook(lambda m, i, out, p=p: attended.update({p: out[0]}))
            for p in ("q_proj", "k_proj")
        ]
        with vtoken.applied(model, "vtc_cls", score="received", layers=1, budget=5):
            model(**inputs)
            kept = vtoken.report(model).visuals[0].keep.tolist()
        for hook in hooks:
            hook.remove()
    q, k = (attended[p].unflatten(-1, (heads, -1)).transpose(0, 1) for p in ("q_proj", "k_proj"))
    received = (
        (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean((0, 1)).view(4, 2, 4, 2).mean((1, 3)).flatten()
    )
    assert kept == sorted(received.argsort(descending=True)[:5].tolist())
