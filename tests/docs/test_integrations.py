"""The code of docs/integrations: fewer visual tokens, gradients that flow, and the answers of the plain path."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import vtoken
from vtoken.patching import patch_of
from vtoken.tiny import questions, scenes

from .test_guides import run

PAIRS = scenes.held_out(4)
FOLDER = vtoken.tiny.path("llava")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def tiny():
    """A model beside those of the pages, unpatched between tests."""
    return vtoken.tiny.load("llava")


@pytest.fixture(scope="module")
def inputs(tiny):
    return questions.prepare(tiny[1], PAIRS)


def fresh():
    return vtoken.tiny.load("llava")[0]


def answers(tiny, strategy: str, budget: float) -> list[str]:
    """The plain path: `generate` of a patched model."""
    with vtoken.applied(tiny[0], strategy, budget=budget):
        return questions.answers(*tiny, PAIRS)


@torch.no_grad()
def logits(model, inputs) -> torch.Tensor:
    return model.eval()(**inputs).logits


def read(model) -> tuple[int, int]:
    """Visual tokens of the last prompt before and after pruning."""
    report = vtoken.report(model)
    return report.tokens_in, report.tokens_out


# -- transformers' pipeline ----------------------------------------------------------------------------------
def test_pipeline(monkeypatch, tiny):
    guide = run("docs/integrations/pipeline.md", monkeypatch)
    assert read(guide.pipe.model) == (4 * 144, 4 * 7) and len(vtoken.report(guide.model).visuals) == 4
    assert guide.answers == answers(tiny, "hired", 0.05)

    def said(pipe, **options):
        outputs = pipe(text=guide.chats, return_full_text=False, max_new_tokens=6, **options)
        return [output[0]["generated_text"].strip() for output in outputs]

    want, plain = answers(tiny, "uniform", 2), questions.answers(*tiny, PAIRS)
    assert want != plain
    with vtoken.applied(guide.model, "uniform", budget=2):
        assert said(guide.pipe) == said(guide.pipe, batch_size=2) == want
        with vtoken.disabled(guide.model):
            assert said(guide.pipe) == plain
    patched = vtoken.patch(fresh(), "uniform", budget=2)
    assert said(guide.pipeline("image-text-to-text", model=patched, processor=tiny[1])) == want
    loaded = guide.pipeline("image-text-to-text", model=str(FOLDER))
    vtoken.patch(loaded.model, "uniform", budget=2)
    assert said(loaded) == want
    with pytest.raises(TypeError, match=r"Pipeline, which is none but holds one: pass its \.model"):
        vtoken.patch(guide.pipe, "uniform")


# -- PEFT ----------------------------------------------------------------------------------------------------
def test_peft(monkeypatch, inputs):
    peft = pytest.importorskip("peft")
    guide = run("docs/integrations/peft.md", monkeypatch)
    assert guide.losses[-1] < guide.losses[0] / 2 and read(guide.model) == (8 * 144, 8 * 2)
    want = logits(guide.fresh, inputs)
    with vtoken.disabled(guide.fresh):
        dense = logits(guide.fresh, inputs)
    with guide.fresh.disable_adapter():
        untrained = logits(guide.fresh, inputs)
    assert min((want - other).abs().max() for other in (dense, untrained)) > 0.1
    assert torch.allclose(logits(guide.merged, inputs), want, atol=1e-3) and read(guide.merged) == (576, 8)

    late = peft.PeftModel.from_pretrained(vtoken.patch(fresh(), "hired", budget=2), "adapter")
    assert torch.equal(logits(late, inputs), want)
    own = vtoken.patch(fresh(), "hired", budget=2)
    own.load_adapter("adapter")
    assert torch.equal(logits(own, inputs), want)

    late.save_pretrained("patched")
    vtoken.unpatch(late).save_pretrained("unpatched")
    one, other = (load_file(Path(name) / "adapter_model.safetensors") for name in ("patched", "unpatched"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_modules_that_peft_saves(inputs):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["multi_modal_projector"])
    model = peft.get_peft_model(vtoken.patch(fresh(), "hired", budget=2), config)
    labels = inputs["input_ids"].clone()
    labels[:, :-1] = -100
    before = logits(model, inputs)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(trained, lr=0.1)
    model.train()(**inputs, labels=labels).loss.backward()
    copies = [p for name, p in model.named_parameters() if "modules_to_save" in name]
    assert copies and all(p.grad.abs().max() > 0 for p in copies)
    optimiser.step()
    after = logits(model, inputs)
    model.save_pretrained("adapter")
    again = vtoken.patch(peft.PeftModel.from_pretrained(fresh(), "adapter"), "hired", budget=2)
    assert torch.equal(logits(again, inputs), after) and not torch.allclose(before, after, atol=1e-2)


# -- Accelerate ----------------------------------------------------------------------------------------------
@pytest.fixture
def accelerate():
    module = pytest.importorskip("accelerate")
    module.state.AcceleratorState._reset_state(True)
    yield module
    module.state.AcceleratorState._reset_state(True)


def test_accelerate(monkeypatch, capsys, tiny, accelerate):
    guide = run("docs/integrations/accelerate.md", monkeypatch)
    assert [said.strip() for said in guide.answers] == answers(tiny, "fastv", 0.1)
    printed = capsys.readouterr().out
    assert "visual tokens per LLM layer, 4 prompts together: 576 576 56 56" in printed
    assert printed.rstrip().endswith("\n56")
    changed = [p.grad.abs().max() > 0 for p in guide.model.parameters() if p.grad is not None]
    assert sum(changed) > 100 and patch_of(guide.model) is None


PARTS = ("model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head")


@pytest.mark.parametrize("strategy", ["hired", "fastv"])
def test_device_maps(strategy, tiny, inputs, tmp_path, accelerate):
    """Every part on the disk in turn, bit for bit; two devices of one kind are all that a CPU has."""
    dense = logits(tiny[0], inputs)
    with vtoken.applied(tiny[0], strategy, budget=0.1):
        want = logits(tiny[0], inputs)
    assert (want - dense).abs().max() > 0.1
    for folder, on_disk in (("tower", PARTS[:2]), ("llm", PARTS[2:])):
        places = {part: "disk" if part in on_disk else "cpu" for part in PARTS}
        early = vtoken.patch(fresh(), strategy, budget=0.1)
        early = accelerate.dispatch_model(
            early, places, main_device="cpu", offload_dir=str(tmp_path / folder)
        )
        late = AutoModelForImageTextToText.from_pretrained(
            FOLDER, device_map=places, offload_folder=str(tmp_path / f"{folder} late")
        )
        vtoken.patch(late, strategy, budget=0.1)
        for model in (early, late):
            part = model.get_submodule(on_disk[0])
            assert next(part.parameters()).device.type == "meta"
            assert torch.equal(logits(model, inputs), want)
            assert vtoken.report(model).visual_per_layer[-1] == 56


# -- Gradio --------------------------------------------------------------------------------------------------
def test_gradio(monkeypatch, tmp_path, tiny):
    pytest.importorskip("gradio")
    client_of = pytest.importorskip("gradio_client")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    guide = run("docs/integrations/gradio.md", monkeypatch)
    scene, question = PAIRS[0]
    scene.image.save(tmp_path / "scene.png")
    _, url, _ = guide.page.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    try:
        client = client_of.Client(url, verbose=False)
        picture = client_of.handle_file(str(tmp_path / "scene.png"))
        budgets = {0.25: 36, 0.125: 18, 1.0: 144}
        jobs = [client.submit(picture, question.text, budget, api_name="/ask") for budget in budgets]
        for job, tokens in zip(jobs, budgets.values(), strict=True):
            answer, report, drawn = job.result(60)
            assert f"144 -> {tokens} visual tokens" in report and Path(drawn).is_file()
            assert answer == question.answer
    finally:
        guide.page.close()
    assert patch_of(guide.model) is None
