"""LoRA around the attention of open_clip towers, and the training of TempMe for text-video retrieval."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn

import vtoken
from vtoken.retrieval_training import add_lora, retrieval_loss, train
from vtoken.strategies import TempMe

from . import oracle_tempme
from .models import DEPTH, OPEN_CLIP, WIDTH, images

peft = pytest.importorskip("peft")
SIX = dict(frames=6, r=3, layers=(1, 2), fuse=(2, 3))
CASE = OPEN_CLIP["tok"]
TEXT_WIDTH, TEXT_DEPTH = 16, 1


def randomised(model, std=0.2):
    """The model with LoRA factors that matter."""
    generator = torch.Generator().manual_seed(4)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = std * torch.randn(p.shape, generator=generator).to(p)
    return model


def outputs(model, strategy, x):
    with torch.no_grad(), vtoken.applied(model, strategy):
        return model.encode_image(x)


def pairs(videos=4, frames=6):
    texts = torch.randint(1, 50, (videos, 8), generator=torch.Generator().manual_seed(6))
    return images(videos * frames).unflatten(0, (videos, frames)), texts


def test_lora_of_zeros_changes_no_bit():
    clip, x = CASE.build(), images(6)
    _, texts = pairs()
    before, words = outputs(clip, TempMe(**SIX), x), clip.encode_text(texts)
    tuned = add_lora(clip)
    assert torch.equal(outputs(tuned, TempMe(**SIX), x), before)
    torch.testing.assert_close(clip.encode_text(texts), words)


def test_only_lora_requires_a_gradient_and_its_size():
    clip = CASE.build()
    tuned = add_lora(clip, rank=3)
    free = {n: p for n, p in tuned.named_parameters() if p.requires_grad}
    assert all("lora_A" in n or "lora_B" in n for n in free) and not clip.logit_scale.requires_grad
    assert sum(p.numel() for p in free.values()) == 3 * 4 * (DEPTH * WIDTH + TEXT_DEPTH * TEXT_WIDTH)
    assert all(not p.any() for n, p in free.items() if "lora_B" in n)


def test_parameters_of_the_published_model():
    open_clip = pytest.importorskip("open_clip")
    with torch.device("meta"):
        vision = dict(image_size=224, layers=12, width=768, patch_size=32)
        clip = open_clip.CLIP(512, vision, dict(width=512, heads=8, layers=12))
    free = sum(p.numel() for p in add_lora(clip).parameters() if p.requires_grad)
    positions = TempMe(frames=12).make_frame_positions(768)
    assert free == 294_912 + 196_608
    assert free + sum(p.numel() for p in positions) == 507_648


@pytest.mark.parametrize("name", ["tok", "layer_scale", "sequence_first", "coca"])
@pytest.mark.parametrize("strategy", [TempMe(**SIX), vtoken.strategies.ToMe(r=4)], ids=["tempme", "tome"])
def test_lora_is_read_unfolded_and_folds_exactly(name, strategy):
    clip, x = OPEN_CLIP[name].build().double(), images(6).double()
    before = outputs(clip, strategy, x)
    tuned = randomised(add_lora(clip))
    apart = outputs(tuned, strategy, x)
    assert (apart - before).abs().max() > 1e-2
    tuned.merge_adapter()
    torch.testing.assert_close(outputs(tuned, strategy, x), apart, rtol=0, atol=1e-10)
    tuned.unmerge_adapter()
    with tuned.disable_adapter():
        torch.testing.assert_close(outputs(tuned, strategy, x), before, rtol=0, atol=1e-10)
    folded = tuned.merge_and_unload()
    assert folded is clip and type(OPEN_CLIP[name].layers(clip)[0].attn) is nn.MultiheadAttention
    torch.testing.assert_close(outputs(clip, strategy, x), apart, rtol=0, atol=1e-10)


def test_the_folded_model_is_the_oracle():
    clip, strategy, x = CASE.build().double(), TempMe(**SIX), images(6).double()
    tuned = randomised(add_lora(clip))
    apart = outputs(tuned, strategy, x)
    reference = copy.deepcopy(tuned).merge_and_unload()
    with torch.no_grad():
        video = oracle_tempme.tempme(
            CASE.blocks(reference), CASE.entering(reference, x), 1, {1: 2, 2: 3}, r=3
        )
        tokens = video.spread(6)
        want = torch.stack([CASE.head(reference, each, torch.ones(len(each)).double()) for each in tokens])
    torch.testing.assert_close(apart, want, rtol=0, atol=1e-9)


def test_lora_on_the_output_projection_is_refused_until_it_is_merged():
    clip, x = CASE.build().double(), images(6).double()
    vtoken.patch(clip, TempMe(**SIX))  # before the attention is wrapped
    names = [n for n, m in clip.named_modules() if n.startswith("visual.") and n.endswith(".attn")]
    tuned = randomised(peft.get_peft_model(clip, peft.LoraConfig(r=4, target_modules=names)))
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="Linear around its output projection, and only LoRA with"),
    ):
        clip.encode_image(x)
    vtoken.unpatch(clip)
    with pytest.raises(ValueError, match="has Linear around its output projection"):
        vtoken.patch(clip, TempMe(**SIX))
    tuned.merge_and_unload()
    assert torch.isfinite(outputs(clip, TempMe(**SIX), x)).all()


def test_gradients_reach_lora_and_positions():
    clip, strategy = CASE.build().double(), TempMe(**SIX)
    tuned, positions = randomised(add_lora(clip)), strategy.make_frame_positions(WIDTH)
    folded = copy.deepcopy(tuned).merge_and_unload()
    weights = [m.attn.in_proj_weight.requires_grad_() for m in CASE.layers(folded)]
    x = images(6).double()
    with vtoken.applied(clip, strategy):
        clip.encode_image(x).square().sum().backward()
    with vtoken.applied(folded, strategy):
        want = torch.autograd.grad(folded.encode_image(x).square().sum(), weights)
    for layer, g in zip(CASE.layers(clip), want, strict=True):  # dL/dB = dL/dW A^T
        a, b = (getattr(layer.attn, n)["default"].weight for n in ("lora_A", "lora_B"))
        torch.testing.assert_close(b.grad, g @ a.T, rtol=1e-8, atol=1e-8)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in positions)


class Wrapper(nn.Module):
    """An adapter of another kind around an attention."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer

    def forward(self, *args, **kwargs):
        return self.base_layer(*args, **kwargs)


def test_another_wrapper_is_refused():
    clip = CASE.build()
    vtoken.patch(clip, TempMe(**SIX))
    block = CASE.layers(clip)[1]
    block.attn = Wrapper(block.attn)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="A patched layer has Wrapper around its attention, and only"),
    ):
        clip.encode_image(images(6))
    vtoken.unpatch(clip)
    with pytest.raises(ValueError, match="it has Wrapper around its attention, and only LoRA"):
        vtoken.patch(clip, TempMe(**SIX))


def test_models_without_packed_projections_are_refused():
    with pytest.raises(ValueError, match="both towers, found 4 in the image tower and 0 in the text tower"):
        clip = CASE.build()
        clip.transformer = nn.Identity()
        add_lora(clip)


def test_peft_is_asked_for_by_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'vtoken\[tempme\]'"):
        add_lora(CASE.build())


# -- training ------------------------------------------------------------------------------------------------
def test_the_loss_is_that_of_both_directions():
    generator = torch.Generator().manual_seed(0)
    v, t = (nn.functional.normalize(torch.randn(3, 5, generator=generator), dim=1) for _ in range(2))
    want = 0.0
    for i in range(3):
        rows, columns = (7 * t[i] @ v.T).exp(), (7 * t @ v[i]).exp()
        want -= (rows[i] / rows.sum()).log() / 6 + (columns[i] / columns.sum()).log() / 6
    torch.testing.assert_close(retrieval_loss(v, t, torch.tensor(7.0)), want)
    assert retrieval_loss(torch.eye(3), torch.eye(3), torch.tensor(100.0)) < 1e-6


def test_training_learns_pairs_and_changes_nothing_else():
    clip, strategy, batch = CASE.build(), TempMe(**SIX), pairs()
    before = {n: p.detach().clone() for n, p in clip.named_parameters()}
    tuned = add_lora(clip, rank=4)
    losses = train(tuned, strategy, [batch] * 12, 12, lr=5e-3)
    assert len(losses) == 12 and losses[-1] < 0.7 * losses[0]
    assert all(p.abs().max() > 0 for p in strategy.trained_positions)
    for name, p in clip.named_parameters():
        if "lora_" not in name:
            assert torch.equal(p, before[name.replace(".base_layer", "")]), name
    apart = outputs(tuned, strategy, batch[0].flatten(0, 1))
    torch.testing.assert_close(outputs(tuned.merge_and_unload(), strategy, batch[0].flatten(0, 1)), apart)


def test_a_mask_changes_the_loss():
    clip, strategy = CASE.build(), TempMe(**SIX)
    videos, texts = pairs()
    mask = torch.ones(4, 6)
    mask[:, 3:] = 0
    kept = [copy.deepcopy(strategy), copy.deepcopy(strategy)]
    with_mask = train(add_lora(copy.deepcopy(clip)), kept[0], [(videos, texts, mask)], 1)
    assert with_mask != train(add_lora(copy.deepcopy(clip)), kept[1], [(videos, texts)], 1)


def test_a_whole_model_may_be_trained_but_for_its_scale():
    clip, strategy = CASE.build(), TempMe(**SIX)
    scale, weight = clip.logit_scale.detach().clone(), clip.visual.proj.detach().clone()
    train(clip, strategy, [pairs()] * 3, 3, warmup=0.0)
    assert torch.equal(clip.logit_scale, scale) and not torch.equal(clip.visual.proj, weight)


def test_another_strategy_is_refused():
    with pytest.raises(TypeError, match="train takes a TempMe, found"):
        train(CASE.build(), vtoken.strategies.ToMe(r=2), [pairs()], 1)


def test_batches_that_do_not_fit():
    clip, strategy = CASE.build(), TempMe(**SIX)
    with pytest.raises(ValueError, match="The batches ended after 1 of 3 steps"):
        train(clip, strategy, [pairs()], 3)
    with pytest.raises(ValueError, match=r"videos \(n, 6, 3, H, W\), found \(4, 5, 3, 35, 35\)"):
        train(clip, strategy, [pairs(frames=5)], 1)
