"""Recipes of the tiny encoders."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from training.tiny.encoders import clip, clip_data, vit
from training.tiny.encoders.__main__ import train
from training.tiny.encoders.dense import FORMS, TINTS, owners, targets
from vtoken.tiny import encoders
from vtoken.tiny.captions import retrieval_set
from vtoken.tiny.retrieval import text_embeddings, video_embeddings
from vtoken.tiny.scenes import make_scene

SMALL = {vit: dict(width=32, depth=5, heads=2), clip: dict(width=32, layers=4, text_width=32, text_layers=1)}


def small(recipe, seed=0):
    torch.manual_seed(seed)
    return recipe.build(**SMALL[recipe])


def run(recipe, monkeypatch, seed=0, steps=2):
    for name, size in (("PLAN", 4), ("FRAMES", 8), ("CLIPS", 4)):
        if hasattr(recipe, name):
            monkeypatch.setitem(getattr(recipe, name), "batch", size)
    model, preprocess, tokenizer, _ = small(recipe, seed)
    log: list[dict] = []
    recipe.train(model, preprocess, tokenizer, log, seed, steps=steps, checks=4)
    return model, log


@pytest.mark.parametrize(
    "recipe", [pytest.param(n, marks=() if i == 0 else pytest.mark.product) for i, n in enumerate(SMALL)]
)
def test_a_few_steps_reduce_the_loss(recipe, monkeypatch):
    _, log = run(recipe, monkeypatch, steps=41)
    stages = ["classes"] if recipe is vit else ["frames", "clips"]
    assert list(dict.fromkeys(entry["stage"] for entry in log)) == stages
    losses = [entry["loss"] for entry in log if entry["stage"] == stages[0]]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("recipe", SMALL)
def test_training_depends_on_the_seed_alone(recipe, monkeypatch):
    first, again, other = (
        list(run(recipe, monkeypatch, seed, steps=2)[0].parameters()) for seed in (0, 0, 1)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not all(torch.equal(a, b) for a, b in zip(first, other))


@pytest.mark.parametrize("name", ["vit", "clip"])
def test_a_trained_encoder_is_saved_and_loads_again(name, monkeypatch, tmp_path):
    recipe = {"vit": vit, "clip": clip}[name]
    built = small(recipe)
    monkeypatch.setattr(recipe, "build", lambda: built)
    monkeypatch.setattr(recipe, "train", lambda *a, **k: a[3].extend(LOG[name]))
    report = train(name, tmp_path, device="cpu", n=10)
    model, preprocess, tokenizer = encoders.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), built[0].parameters()))
    assert report["training_minutes"] == 1.0 * len(LOG[name])
    text = (tmp_path / "README.md").read_text()
    assert f"python -m training.tiny.encoders {name} --seed 0" in text and "{" not in text
    saved = json.loads((tmp_path / "training_log.json").read_text())
    assert saved["parameters"] == report["parameters"] and saved["steps"] == LOG[name]
    if tokenizer:
        clips, texts = retrieval_set(3)
        assert text_embeddings(model, tokenizer, texts).shape == (3, 128)
        assert video_embeddings(model, preprocess, clips).shape == (3, 128)


LOG = {
    "vit": [{"stage": "classes", "step": 9, "seconds": 60.0, "loss": 1.0, "held_out_classes": 0.5}],
    "clip": [
        {"stage": "frames", "step": 9, "seconds": 60.0, "loss": 1.0, "held_out_frames": 0.5},
        {"stage": "clips", "step": 9, "seconds": 60.0, "loss": 1.0, "held_out_t2v_r1": 0.5},
    ],
}


def test_an_unknown_encoder_gets_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="recipes are clip, vit"):
        train("llava", tmp_path)


@pytest.mark.parametrize("patch", [8, 12])
def test_patches_know_their_object(patch):
    side = 96 // patch
    for i in range(20):
        scene = make_scene(i)
        own = owners(scene.masks(), patch).reshape(side, side)
        names, around = targets([scene], patch)
        assert set(own.flatten().tolist()) == {-1, *range(len(scene.objects))}
        for k, item in enumerate(scene.objects):
            left, top, right, bottom = item.box
            rows, columns = np.nonzero(own == k)
            assert (columns * patch).max() <= right and ((columns + 1) * patch).min() >= left
            assert (rows * patch).max() <= bottom and ((rows + 1) * patch).min() >= top
            on = torch.from_numpy(own.flatten() == k)
            assert set(names[0][on][:, 0].tolist()) == {FORMS.index(item.shape)}
            assert set(names[0][on][:, 1].tolist()) == {TINTS.index(item.colour)}
        assert around.shape == (1, side * side, 144) and around[0, own.flatten() >= 0].amax(1).min() > 0


def test_chosen_frames_stand_for_the_whole_clip():
    rng = np.random.default_rng(0)
    for i in range(30):
        made = clip_data.make_clip(i, "train", 12)
        some = clip_data.chosen(made, rng)
        assert sum(share for _, share, _ in some) == pytest.approx(1)
        for frame, _, text in some:
            shown = {o.shape for o in made.scene(frame).objects}
            assert shown == {w for w in text.split() if w in FORMS}


def test_a_frame_drawn_anew_shows_the_same_objects_otherwise():
    rng = np.random.default_rng(0)
    made = clip_data.make_clip(4, "train", 12)
    frame = made.moments[0].start
    anew = clip_data.redrawn(made, frame, clip_data.Camera(rng, "train"), rng)
    old = made.scene(frame)
    assert [(o.shape, o.colour) for o in anew.objects] == [(o.shape, o.colour) for o in old.objects]
    assert all((a.mask != b.mask).any() for a, b in zip(anew.objects, old.objects))
    assert anew.image.tobytes() != old.image.tobytes()
    item = clip_data.clip_batch(*small(clip)[1:3], 0, 4, "train", 0)
    assert torch.allclose(item["shares"].sum(1), torch.ones(4)) and len(item["pixels"]) == len(item["which"])


def test_a_caption_that_two_images_share_is_right_for_both():
    model, _, tokenizer, _ = small(clip)
    ids, which = clip_data.distinct(["a 4", "a 5", "a 4"], tokenizer)
    assert ids.shape[0] == 2 and which.tolist() == [0, 1, 0]
    texts = model.encode_text(ids, normalize=True)
    loss, right = clip.contrast(model, texts[which], ids, which)
    assert right == 1
    wrong, none = clip.contrast(model, texts[1 - which], ids, which)
    assert none == 0 and wrong > loss
