"""The code of docs/integrations/trl.md, and training with adapters."""

from __future__ import annotations

import math

import pytest
import torch

import vtoken

from .test_guides import run
from .test_integrations import PAIRS, fresh, read

trl = pytest.importorskip("trl")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def test_trl(monkeypatch):
    guide = run("docs/integrations/trl.md", monkeypatch)
    assert len(guide.losses) == 2 and all(math.isfinite(loss) for loss in guide.losses)
    assert read(guide.model) == (4 * 144, 4 * 14)
    weights = fresh().state_dict()
    moved = [name for name, p in guide.model.named_parameters() if not torch.equal(p, weights[name])]
    assert any("vision_tower" in name for name in moved) and any("language_model" in name for name in moved)

    batch = next(iter(guide.trainer.get_train_dataloader()))
    plain = fresh()
    plain.load_state_dict(guide.model.state_dict())

    def kept(model):
        return [visual.keep.tolist() for visual in vtoken.report(model).visuals]

    vtoken.patch(plain, "farcover", budget=0.1)
    with torch.no_grad():
        want = plain.eval()(**batch).loss
        chosen = kept(plain)
        got = guide.trainer.compute_loss(guide.model.eval(), dict(batch))
        assert torch.allclose(got, want, rtol=1e-3, atol=1e-5) and kept(guide.model) == chosen
        plain(**{name: value for name, value in batch.items() if name != "labels"})
        assert kept(plain) != chosen  # what an answer in the question would change

    told = [{"image": row["image"], "messages": row["prompt"] + row["completion"]} for row in guide.rows]
    told = guide.Dataset.from_list(told)
    trainer = trl.SFTTrainer(
        vtoken.patch(fresh(), "farcover", budget=0.1),
        guide.args,
        train_dataset=told,
        processing_class=guide.processor,
    )
    with pytest.raises(ValueError, match="found labels that count from the first token"):
        trainer.train()


@pytest.mark.parametrize("late", [False, True], ids=["patch, then trainer", "trainer, then patch"])
def test_trl_with_adapters(late):
    """Adapters of trl's own making, with gradient checkpointing."""
    peft, datasets = pytest.importorskip("peft"), pytest.importorskip("datasets")
    (model, processor), rows = vtoken.tiny.load("llava"), []
    for scene, question in PAIRS:
        prompt, answer = (
            [{"role": role, "content": text}]
            for role, text in (("user", question.text), ("assistant", question.answer))
        )
        rows.append({"image": scene.image, "prompt": prompt, "completion": answer})
    args = trl.SFTConfig(
        "trained",
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=0.1,
        max_length=None,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        gradient_checkpointing=True,
        disable_tqdm=True,
    )
    if not late:
        vtoken.patch(model, "farcover", budget=2)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"])
    trainer = trl.SFTTrainer(
        model,
        args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=processor,
        peft_config=lora,
    )
    if late:
        vtoken.patch(trainer.model, "farcover", budget=2)
    trainer.train()
    learnt = [p.abs().max() > 0 for name, p in trainer.model.named_parameters() if "lora_B" in name]
    # the last layer of the tower makes no features
    assert learnt.count(True) == 9 == len(learnt) - 1 and read(trainer.model) == (4 * 144, 4 * 2)
