"""The code of the guides and of the README is run as it stands."""

from __future__ import annotations

import ast
import builtins
import re
import sys
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
    assert "odd_keys(budget=0.25)" in printed and "144 -> 36 visual tokens" in printed
    tower = guide.model.model.vision_tower
    pixels = torch.rand(1, 3, 96, 96)
    keys = {}
    layers = getattr(tower, "vision_model", tower).encoder.layers
    handles = [
        layers[i].self_attn.k_proj.register_forward_hook(lambda m, _, out, i=i: keys.update({i: out[0, 1:]}))
        for i in (3, 4)
    ]
    ids = torch.full((1, 148), guide.model.config.image_token_id)
    ids[0, -4:] = 5
    kept = {}
    for layer, (name, options) in {4: ("odd_keys", {}), 3: ("odd_keys_below", dict(back=1))}.items():
        with vtoken.applied(guide.model, name, budget=20, **options), torch.no_grad():
            guide.model(input_ids=ids, pixel_values=pixels)
            kept[layer] = vtoken.report(guide.model).visuals[0].keep
    for handle in handles:
        handle.remove()
    for layer, chosen in kept.items():
        x = keys[layer]
        like = torch.nn.functional.normalize(x, dim=-1) @ torch.nn.functional.normalize(x.mean(0), dim=0)
        assert chosen.tolist() == sorted(like.argsort()[:20].tolist())
    with vtoken.applied(guide.model, "halves"), torch.no_grad():
        guide.model(input_ids=ids, pixel_values=pixels)
        half = vtoken.report(guide.model).visuals[0]
        assert half.keep.tolist() == list(range(0, 144, 2)) and half.into.tolist() == [
            i // 2 for i in range(144)
        ]
    with vtoken.applied(guide.model, "asked_once", budget=0.5), torch.no_grad():
        guide.model(input_ids=ids, pixel_values=pixels)
        assert vtoken.report(guide.model).visual_per_layer == [144, 72, 72, 72]
    with pytest.raises(ValueError, match="back must be"):
        vtoken.strategies.create("odd_keys_below", back=-1)

    def logits(name):
        with vtoken.applied(guide.model, name, budget=0.25), torch.no_grad():
            return guide.model(input_ids=ids, pixel_values=pixels).logits

    with pytest.warns(UserWarning, match="The weights of mapped are new"):
        assert torch.equal(logits("mapped"), logits("pool"))


def test_adding_a_model(registries, monkeypatch, capsys):
    guide = run("docs/adding-a-model.md", monkeypatch)
    printed = capsys.readouterr().out
    assert "16 -> 4 visual tokens" in printed and "'visionzip'" in printed
    assert "'hired'" not in printed and "'fastv'" not in printed  # no CLS token; Cohere's rotary embeddings
    model, inputs = guide.model, guide.inputs
    with torch.no_grad():
        plain = model(**inputs).logits
        with vtoken.applied(model, "pool", budget=0.25, adapter=guide.Squares):
            assert not torch.equal(model(**inputs).logits, plain)
            assert vtoken.report(model).tokens_out == 4
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


def test_the_package_of_the_guide_joins_by_its_entry_point(registries, monkeypatch, tmp_path):
    """The two files as the guide shows them, with the metadata that an installer writes of them."""
    text = (ROOT / "docs/adding-a-strategy.md").read_text(encoding="utf-8")
    module = re.search(r"^```python\n(.*?)^```", text, re.M | re.S)[1]
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
    project = tomllib.loads(re.search(r"^```toml\n(.*?)^```", text, re.M | re.S)[1])["project"]
    assert len([line for line in module.split("@vtoken.register")[1].splitlines() if line]) <= 9
    (tmp_path / "vtoken_odd_keys.py").write_text(module)
    info = tmp_path / "vtoken_odd_keys-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    ((group, entries),) = project["entry-points"].items()
    lines = [f"{name} = {value}" for name, value in entries.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines]))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(strategies.plugins, "loaded", False)
    assert "odd_keys" in vtoken.list_strategies()
    assert strategies.strategy_info("odd_keys").cls.__module__ == "vtoken_odd_keys"
    del sys.modules["vtoken_odd_keys"]


# what is neither of vtoken nor of Python, but of transformers, of torch or of the guides themselves
FOREIGN = {
    *(
        "model.base_model",
        "model.get_decoder()",
        "base.get_placeholder_mask",
        "config.image_token_id",
        "pooler_output",
    ),
    *("get_image_features", "get_video_features"),
    *(
        "(frames, 3, H, W)",
        "odd_keys",
        "vtoken_odd_keys.py",
        "back=1.5",
        'strategy.back = "1"',
        "pip install .",
    ),
}
NO_NAMES = {"vtoken", "strategies", "adapters", "model", "with", "True", "False", "i", "n", "d", "k", "t"}
CODE = re.compile(r"^```.*?^```", re.M | re.S)


def names_of_the_package() -> set[str]:
    """Every name that code of vtoken, or of the families in its tests, defines, takes or sets as an
    attribute.
    """
    found: set[str] = set(dir(builtins)) | {"Literal"}
    for path in [*(ROOT / "vtoken").rglob("*.py"), *(ROOT / "tests/models").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                found.add(node.name)
            elif isinstance(node, ast.arg):
                found.add(node.arg)
            elif isinstance(node, ast.AnnAssign | ast.Assign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found |= {getattr(t, "attr", None) or getattr(t, "id", "") for t in targets}
    return found


def unknown(text: str, known: set[str]) -> list[str]:
    """What a page puts in backticks and nobody has: files by their path or name, names by every part of them."""
    files = {p.name for p in (ROOT / "vtoken").rglob("*.py")} | {
        p.name for p in (ROOT / "tests").rglob("*.py")
    }
    lost = []
    for quoted in re.findall(r"`([^`\n]+)`", CODE.sub("", text)):
        if quoted in FOREIGN or "<" in quoted:
            continue
        if quoted.startswith(("python ", "vtoken ", "make ")):
            there = all((ROOT / word).exists() for word in quoted.split() if "/" in word)
        elif "/" in quoted or quoted.endswith(".py"):
            there = (ROOT / quoted).exists() or quoted in files
        else:
            words = re.findall(r"[A-Za-z_]\w*", re.sub(r"\"[^\"]*\"", "", quoted))
            there = set(words) - NO_NAMES <= known
        lost += [] if there else [quoted]
    return lost


@pytest.mark.parametrize("page", ["docs/adding-a-strategy.md", "docs/adding-a-model.md"])
def test_what_a_guide_names_is_there(page):
    known = names_of_the_package()
    assert unknown("`multimodal_rope = True` and `vtoken/nowhere.py`, `Tower`", known) == [
        "multimodal_rope = True",
        "vtoken/nowhere.py",
    ]
    assert not unknown((ROOT / page).read_text(encoding="utf-8"), known)


def test_plain_encoders(monkeypatch, capsys, tmp_path):
    pytest.importorskip("timm")
    pytest.importorskip("open_clip")
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    guide = run("docs/encoders.md", monkeypatch)
    assert guide.logits.shape == (2, 1000) and guide.videos.shape == (2, 512)
    assert guide.picture.size[0] > 2 * 224
    assert len(guide.losses) == 2 and len(guide.learned.prune) == 8
    printed = capsys.readouterr().out
    assert "tome(r=13)" in printed and "12 of them in a sequence" in printed
