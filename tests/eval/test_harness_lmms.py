"""lmms-eval: patched classes on stand-ins, and with `-m harness` on the real package and a local task."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

import vtoken
from vtoken import tiny
from vtoken.eval.harness import lmms
from vtoken.eval.harness.patched import Calls, patch_arguments, patch_counted, split
from vtoken.tiny.questions import answers, prompt
from vtoken.tiny.scenes import held_out


class HarnessModel:
    """As lmms-eval's classes are: keyword arguments that it does not know are an error, the model is in
    `.model`.
    """

    def __init__(self, pretrained: str, device: str = "cpu", **kwargs):
        assert kwargs == {}, f"Unexpected kwargs: {kwargs}"
        self.model, self.processor = tiny.load(pretrained)
        self.device = device

    def generate_until(self, requests):
        return answers(self.model, self.processor, requests, batch_size=2)


@pytest.fixture
def logged(monkeypatch):
    """A stand-in for the parts of lmms-eval that vtoken imports; yields what reaches its results file."""
    names = ("", ".models", ".models.registry_v2", ".models.model_utils", ".models.model_utils.gen_metrics")
    modules = {n: ModuleType("lmms_eval" + n) for n in names}
    seen = []
    modules[".models.model_utils.gen_metrics"].log_metrics = lambda *a: seen.append(a)
    modules[".models"].AVAILABLE_SIMPLE_MODELS = {
        "llava_hf": "LlavaHf",
        "qwen2_vl": "Qwen2_VL",
        "vila": "VILA",
    }
    modules[".models"].AVAILABLE_CHAT_TEMPLATE_MODELS = {"llava_hf": "LlavaHf", "internvl_hf": "InternVLHf"}
    modules[".models"].get_model = lambda name, force_simple: type(
        f"{name}{force_simple}", (HarnessModel,), {}
    )
    modules[".models.registry_v2"].ModelManifest = SimpleNamespace
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, "lmms_eval" + name, module)
    modules[""].models = modules[".models"]
    return seen


def test_our_arguments_are_taken_out_of_theirs():
    ours, theirs = split(
        {"pretrained": "x", "vtoken_strategy": "hired", "vtoken_budget": 0.2, "device": "cpu"}
    )
    assert ours == {"strategy": "hired", "budget": 0.2} and theirs == {"pretrained": "x", "device": "cpu"}


def test_arguments_of_patch():
    assert patch_arguments({"strategy": "fastv", "budget": 64, "layer": 3}) == {
        "strategy": "fastv",
        "budget": 64,
        "layer": 3,
    }
    joined = patch_arguments({"strategy": "visionzip+fastv", "fastv": '{"layer": 3}'})
    assert joined == {"strategy": ["visionzip", "fastv"], "fastv": {"layer": 3}}


@pytest.mark.parametrize(
    "ours, sentence",
    [
        ({"budget": 0.2}, "vtoken_strategy=hired"),
        ({"strategy": "hirde"}, "hired"),
        ({"strategy": "hired", "x": "{1"}, "vtoken_x must be"),
    ],
)
def test_bad_arguments_get_a_sentence(ours, sentence):
    with pytest.raises(ValueError, match=sentence):
        patch_arguments(ours)


def test_a_patched_class_answers_and_counts_as_vtoken_does(logged, capsys):
    pairs = held_out(5, seed=6)
    made = lmms.patched_class(HarnessModel)(pretrained="llava", vtoken_strategy="uniform", vtoken_budget=0.25)
    said = made.generate_until(pairs)
    with vtoken.applied(model := tiny.load("llava")[0], "uniform", budget=0.25):
        assert said == answers(model, made.processor, pairs)
    calls = made.vtoken_calls
    assert (calls.calls, calls.tokens_in, calls.tokens, calls.failed) == (3, 5 * 144, 5 * 36, 0)
    assert 0.2 < calls.flops / calls.flops_dense < 0.3
    assert f"3 calls, {144 * 5 / 3:.1f} -> {36 * 5 / 3:.1f} visual tokens" in capsys.readouterr().out
    assert logged[0][3] == calls.per_call() and logged[0][3]["visual_tokens"] == 60


def test_manifests_name_classes_that_are_made_on_demand(logged, monkeypatch):
    found = {m.model_id: m for m in lmms.manifests()}
    assert set(found) == {"vtoken_llava_hf", "vtoken_qwen2_vl", "vtoken_internvl_hf"}
    assert not hasattr(found["vtoken_qwen2_vl"], "chat_class_path")
    paths = [found["vtoken_llava_hf"].simple_class_path, found["vtoken_llava_hf"].chat_class_path]
    for path, simple in zip(paths, (True, False)):
        module, _, name = path.rpartition(".")
        monkeypatch.delitem(lmms.__dict__, name, raising=False)
        made = getattr(sys.modules[module], name)
        assert made.__name__ == f"VTokenllava_hf{simple}" and made is getattr(lmms, name)
        monkeypatch.delitem(lmms.__dict__, name)
    with pytest.raises(AttributeError):
        lmms.chat_of_two_models  # noqa: B018


def test_a_refused_call_ends_the_run_and_another_error_is_counted():
    model, processor = tiny.load("llava")
    calls = patch_counted(model, {"strategy": "fastv", "budget": 0.5})
    scene, question = held_out(1)[0]
    inputs = processor(images=[scene.image], text=[prompt(processor, question.text)], return_tensors="pt")
    with pytest.raises(SystemExit, match=r"refused a call: .*image"):
        model.generate(
            **{**inputs, "pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1)}, max_new_tokens=1
        )
    assert calls.failed == 0
    with pytest.raises(RuntimeError):
        model.generate(**{**inputs, "input_ids": inputs["input_ids"].float()}, max_new_tokens=1)
    assert calls.failed == 1 and calls.calls == 0
    assert str(calls) == "vtoken: no call with images or videos yet, 1 failed"
    model.generate(**inputs, max_new_tokens=1)
    model.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=1)  # text alone: nothing to count
    assert calls.calls == 1 and "1 calls, 144.0 -> " in str(calls)
    assert Calls().per_call()["visual_tokens"] == 0


TASK = """
task: scenes_on_disk
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {parquet}
test_split: test
output_type: generate_until
doc_to_visual: !function scenes.visual
doc_to_text: !function scenes.text
doc_to_target: answer
process_results: !function scenes.right
generation_kwargs: {{max_new_tokens: 6, temperature: 0, do_sample: false}}
metric_list:
  - metric: right
    aggregation: mean
    higher_is_better: true
"""
FUNCTIONS = """
import io
from PIL import Image

def visual(doc):
    return [Image.open(io.BytesIO(doc["image"]["bytes"])).convert("RGB")]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def right(doc, results):
    return {"right": float(results[0].strip() == doc["answer"])}
"""


def write_task(folder, pairs):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for scene, question in pairs:
        scene.image.save(stream := io.BytesIO(), "PNG")
        rows.append(
            {"image": {"bytes": stream.getvalue()}, "question": question.text, "answer": question.answer}
        )
    pq.write_table(pa.Table.from_pylist(rows), folder / "test.parquet")
    (folder / "scenes.py").write_text(FUNCTIONS)
    (folder / "scenes.yaml").write_text(TASK.format(parquet=folder / "test.parquet"))


@pytest.mark.harness
def test_every_manifest_resolves_in_the_real_lmms_eval():
    from lmms_eval.models import MODEL_REGISTRY_V2

    for base in lmms.BASES:
        manifest = MODEL_REGISTRY_V2.get_manifest(f"vtoken_{base}")
        assert manifest.simple_class_path or manifest.chat_class_path
        for simple in (True, False):
            made = MODEL_REGISTRY_V2.get_model_class(manifest.model_id, force_simple=simple)
            assert made.__mro__[1].__module__.startswith("lmms_eval.models.") and made.__name__.startswith(
                "VToken"
            )


def lmms_eval(given: str) -> list[str]:
    """The start of a command line with these model arguments."""
    return [
        sys.executable,
        "-m",
        "lmms_eval",
        "--model",
        "vtoken_llava_hf",
        "--model_args",
        given,
        "--device",
        "cpu",
    ]


@pytest.mark.harness
@pytest.mark.parametrize("simple", [True, False], ids=["simple", "chat"])
def test_the_real_lmms_eval_scores_what_vtoken_answers(tmp_path, simple):
    pairs = held_out(12, seed=5)
    write_task(tmp_path, pairs)
    given = f"pretrained={tiny.path('llava')},device_map=cpu,vtoken_strategy=uniform,vtoken_budget=0.1"
    command = lmms_eval(given)
    command += [
        "--tasks",
        "scenes_on_disk",
        "--include_path",
        tmp_path,
        "--output_path",
        tmp_path / "out",
        "--log_samples",
    ]
    command += ["--force_simple"] if simple else []
    quiet = {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "disabled",
    }
    ran = subprocess.run(
        command, env=os.environ | quiet, cwd=tmp_path, capture_output=True, text=True, timeout=500
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    results = json.loads(next((tmp_path / "out").rglob("*_results.json")).read_text())
    samples = [
        json.loads(line)
        for line in next((tmp_path / "out").rglob("*_samples_*.jsonl")).read_text().splitlines()
    ]

    model, processor = tiny.load("llava")
    with vtoken.applied(model, "uniform", budget=0.1):
        said = answers(model, processor, pairs, batch_size=1)
        tokens = vtoken.report(model).average_visual_tokens
    heard = [s["filtered_resps"] for s in sorted(samples, key=lambda s: s["doc_id"])]
    assert [(h if isinstance(h, str) else h[0]).strip() for h in heard] == said
    right = sum(text == question.answer for text, (_, question) in zip(said, pairs)) / len(pairs)
    assert 0 < right < 1 and results["results"]["scenes_on_disk"]["right,none"] == pytest.approx(right)
    assert (
        results["throughput"]["avg_visual_tokens"]
        == tokens
        < 0.2 * results["throughput"]["avg_visual_tokens_unpatched"]
    )
    assert "12 calls, 144.0 -> " in ran.stdout


@pytest.mark.harness
def test_the_real_lmms_eval_stops_at_a_refusal(tmp_path):
    write_task(tmp_path, held_out(1))
    given = f"pretrained={tiny.path('llava')},device_map=cpu,vtoken_strategy=hierd"
    command = lmms_eval(given)
    command += ["--tasks", "scenes_on_disk", "--include_path", tmp_path, "--verbosity", "DEBUG"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert ran.returncode != 0 and "hired" in ran.stdout + ran.stderr
