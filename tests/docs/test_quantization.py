"""The code of docs/integrations/quantization.md: the quantised model's own features and attention choose."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForImageTextToText

import vtoken
from vtoken.tiny import questions

from .test_guides import run
from .test_integrations import FOLDER, PAIRS, logits, read

for module in ("bitsandbytes", "torchao", "peft"):
    pytest.importorskip(module)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
def test_quantization(monkeypatch):
    tiny = vtoken.tiny.load("llava")
    inputs = questions.prepare(tiny[1], PAIRS)
    guide = run("docs/integrations/quantization.md", monkeypatch)
    learnt = [p.grad.abs().max() > 0 for name, p in guide.model.named_parameters() if "lora_B" in name]
    assert len(learnt) == 8 and all(learnt) and read(guide.model) == (576, 56)
    for name in ("int8", "torchao"):
        assert vtoken.report(guide.models[name]).visual_per_layer[-1] == 56 < read(guide.models[name])[1]
        assert_the_model_chooses(vtoken.unpatch(guide.models[name]), inputs, guide.plain[name])
    nf4 = AutoModelForImageTextToText.from_pretrained(
        FOLDER,
        quantization_config=guide.forms["nf4"],
        device_map="cpu",
        dtype="float32",
        attn_implementation="eager",
    )
    assert nf4.model.language_model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    assert_the_model_chooses(nf4, inputs, guide.plain["nf4"])


def assert_the_model_chooses(model, inputs, answered) -> None:
    """Kept tokens are the most attended ones by the attention that the quantised model itself gives out."""
    dense = logits(model, inputs)
    with torch.no_grad():
        rows = model(**inputs, output_attentions=True).attentions[1].mean(1)[:, -1]
        tower = model.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions
    seen = inputs["input_ids"] == model.config.image_token_id
    by = {
        "fastv": torch.stack([row[where] for row, where in zip(rows, seen, strict=True)]),
        "vtc_cls": tower[model.config.vision_feature_layer].mean(1)[:, 0, 1:],
    }
    for strategy, options in {"fastv": {}, "vtc_cls": {"layers": 1}}.items():
        with vtoken.applied(model, strategy, budget=14, **options):
            got = logits(model, inputs)
            visuals = vtoken.report(model).visuals
        for visual, scores in zip(visuals, by[strategy], strict=True):
            kept = visual.layers[-1].keep if strategy == "fastv" else visual.keep
            assert kept.tolist() == sorted(scores.argsort(descending=True)[:14].tolist())
        assert (got - dense).abs().max() > 0.1
        with vtoken.applied(model, strategy, budget=1.0, **options):
            assert torch.equal(logits(model, inputs), dense)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), answered)
