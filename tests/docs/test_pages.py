"""Code of the pages of the site runs, page by page; `NOT_RUN` says what cannot, and why."""

from __future__ import annotations

import copy
import re
from types import SimpleNamespace

import pytest
import torch
import transformers

import vtoken
from tests.video.media import write
from vtoken.strategies import create, list_names, strategy_info
from vtoken.tiny import clips, scenes
from vtoken.tiny.questions import prepare

from .test_guides import ROOT, run

STRATEGIES = [n for n in list_names() if strategy_info(n).cls.__module__.startswith("vtoken.")]
IMAGES = ("llava", "llava_next")  # read no clips
NOT_RUN = {"docs/serving.md": "starts vLLM, which has an environment of its own: tests/vllm"}


def test_code_of_every_page_runs():
    """A page with code is run by a test of this folder, or it is named above."""
    pages = [str(p.relative_to(ROOT)) for p in sorted((ROOT / "docs").rglob("*.md"))]
    with_code = {p for p in pages if re.search(r"^```python$", (ROOT / p).read_text("utf-8"), re.M)}
    tests = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "tests/docs").glob("test_*.py"))
    ran = {*re.findall(r'run\("([\w/-]+\.md)"', tests), *(f"docs/strategies/{n}.md" for n in STRATEGIES)}
    assert with_code - ran == set(NOT_RUN) and set(NOT_RUN) <= with_code


@pytest.fixture(scope="module")
def tiny():
    """Shipped models with a prompt about a picture and, where they read clips, one about a clip."""
    made = {}
    for name in ("llava", "llava_next", "qwen2_5_vl", "llava_onevision"):
        model, processor = vtoken.tiny.load(name)
        asked = {"image": scenes.held_out(1)} | ({} if name in IMAGES else {"video": clips.held_out(1)})
        inputs = {kind: {**prepare(processor, pairs), "max_new_tokens": 2} for kind, pairs in asked.items()}
        made[name] = SimpleNamespace(model=model, processor=processor, inputs=inputs)
    config = copy.deepcopy(made["llava"].model.config)  # deep enough for a cut after two layers of eight
    config.text_config.update({"num_hidden_layers": 8, "layer_types": None})
    made["deep"] = SimpleNamespace(
        **vars(made["llava"]) | {"model": type(made["llava"].model)(config).eval()}
    )
    return made


def encoder(name: str):
    """An encoder for a strategy that merges, and its images: CLIP where frames are fused."""
    if name == "tempme":
        pytest.importorskip("open_clip")
        return vtoken.tiny.load_encoder("clip")[0].visual, torch.rand(12, 3, 96, 96)
    timm = pytest.importorskip("timm")
    shape = dict(img_size=64, patch_size=8, embed_dim=32, depth=4, num_heads=2)
    return timm.models.vision_transformer.VisionTransformer(**shape).eval(), torch.rand(2, 3, 64, 64)


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_page_of_a_strategy(name, tiny, monkeypatch, capsys):
    text = (ROOT / f"docs/strategies/{name}.md").read_text(encoding="utf-8")
    if "model(images)" in text:
        model, images = encoder(name)
        run(f"docs/strategies/{name}.md", monkeypatch, vtoken=vtoken, model=model, images=images)
    else:
        kinds = create(name).needs(None).modalities
        fits = (t for t in tiny.values() if name in vtoken.list_strategies(name, model=t.model))
        model, inputs = next((t.model, t.inputs[k]) for t in fits for k in kinds if k in t.inputs)
        run(f"docs/strategies/{name}.md", monkeypatch, vtoken=vtoken, model=model, inputs=inputs)
    vtoken.unpatch(model)
    assert name in capsys.readouterr().out


def test_start(tiny, monkeypatch, tmp_path, capsys):
    """The model of the Hub is replaced by a shipped one of its family."""
    of = {"Qwen/Qwen2.5-VL-3B-Instruct": tiny["qwen2_5_vl"]}
    monkeypatch.setattr(
        transformers.AutoModelForImageTextToText, "from_pretrained", lambda name, **_: of[name].model
    )
    scenes.make_scene(1, "test").image.save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    own, load = of["Qwen/Qwen2.5-VL-3B-Instruct"].processor, vtoken.tiny.load
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda name: own)
    monkeypatch.setattr(vtoken.tiny, "load", lambda name: (tiny[name].model, tiny[name].processor))
    run("docs/start.md", monkeypatch)
    monkeypatch.setattr(vtoken.tiny, "load", load)
    said = capsys.readouterr().out
    shown = re.search(r"```text\n(.*?)```", (ROOT / "docs/start.md").read_text("utf-8"), re.S)[1]
    assert said.startswith(shown) and "farcover" in said


def test_choosing(tiny, monkeypatch, capsys):
    qwen = tiny["qwen2_5_vl"]
    run("docs/choosing.md", monkeypatch, vtoken=vtoken, model=qwen.model, inputs=qwen.inputs["video"])
    vtoken.unpatch(qwen.model)
    said = capsys.readouterr().out
    assert all(name in said for name in ("still_patches", "farcover", "vidkv"))


def test_cache(tiny, monkeypatch, capsys):
    llava = tiny["llava"]
    run("docs/cache.md", monkeypatch, vtoken=vtoken, model=llava.model, inputs=llava.inputs["image"])
    vtoken.unpatch(llava.model)
    assert "vidkv" in capsys.readouterr().out


def test_evaluation(monkeypatch, tmp_path, capsys):
    pytest.importorskip("pandas")
    monkeypatch.chdir(tmp_path)
    guide = run("docs/evaluation.md", monkeypatch)
    assert guide.outcome.cell.tokens < 144 and "hired" in capsys.readouterr().out


def test_security(monkeypatch, tmp_path):
    scenes.make_scene(0, "test").image.save(tmp_path / "gigapixel.tiff")
    write(str(tmp_path / "mine.mp4"), 5)
    monkeypatch.chdir(tmp_path)
    run("docs/security.md", monkeypatch)


def synthetic(*source, **options):
    return vtoken.video.SyntheticReader(0, fps=2, frames=4)


def test_streaming(tiny, monkeypatch, capsys):
    """A synthetic stream takes the place of the camera."""
    monkeypatch.setattr(vtoken.video, "open_video", synthetic)
    qwen = tiny["qwen2_5_vl"]
    run("docs/streaming.md", monkeypatch, model=qwen.model, processor=qwen.processor)
    assert capsys.readouterr().out.strip()


def test_video(tiny, monkeypatch, tmp_path, capsys):
    """A short clip of 22 s; a synthetic stream takes the place of the camera."""
    live = vtoken.video.LiveReader
    monkeypatch.setattr(vtoken.video, "LiveReader", lambda source, fps: live("synthetic://0?fps=2&frames=3"))
    write(str(tmp_path / "clip.mp4"), 110, fps=5, size=(128, 96))
    monkeypatch.chdir(tmp_path)
    qwen = tiny["qwen2_5_vl"]
    content = [{"type": "video"}, {"type": "text", "text": "which digit is shown?"}]
    prompt = qwen.processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    space = dict(vtoken=vtoken, model=qwen.model, processor=qwen.processor, prompt=prompt)
    guide = run("docs/video.md", monkeypatch, **space)
    assert guide.inputs["video_grid_thw"][0, 0] == 16 and "still_patches" in capsys.readouterr().out


def test_trained_compressors(monkeypatch, tmp_path):
    class Trainer:
        def __init__(self, model, args, train_dataset):
            assert all(p.requires_grad == ("vtoken_strategy" in n) for n, p in model.named_parameters())

        def train(self):
            pass

    monkeypatch.chdir(tmp_path)
    model, other = (vtoken.tiny.load("llava_onevision")[0] for _ in range(2))
    space = dict(vtoken=vtoken, model=model, other=other, Trainer=Trainer, args=None, data=None)
    guide = run("docs/trained-compressors.md", monkeypatch, **space)
    assert (tmp_path / "my-pvc" / "vtoken_strategy.safetensors").is_file()
    assert "pvc" in vtoken.patching.patch_of(guide.model).strategy.describe()
