"""The tiny encoders that ship, and the data that they are measured on."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vtoken import tiny
from vtoken.tiny.captions import LONGEST, WORDS, caption, describe, retrieval_set
from vtoken.tiny.clips import make_clip
from vtoken.tiny.encoders import Preprocess, WordTokenizer
from vtoken.tiny.retrieval import recalls, text_embeddings, video_embeddings
from vtoken.tiny.topmost import CLASSES, MARGIN, labelled

TOKENIZER = WordTokenizer(list(WORDS), LONGEST + 2)


def told(name):
    return json.loads((tiny.HERE / name / "training_log.json").read_text())


def test_encoders_are_listed_apart_from_the_language_models():
    assert tiny.encoder_names() == ["clip", "vit"]
    assert not set(tiny.names()) & set(tiny.encoder_names()) and "llava" in tiny.names()
    with pytest.raises(ValueError, match="shipped encoders are clip, vit"):
        tiny.load_encoder("llava")


@pytest.mark.parametrize("name", tiny.encoder_names())
def test_encoder_is_small_and_stored_in_bfloat16(name):
    folder = tiny.HERE / name
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 4e6
    assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    model = tiny.load_encoder(name)[0]
    assert not model.training and {p.dtype for p in model.parameters()} == {torch.float32}
    assert told(name)["parameters"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "library", "extra"), [("vit", "timm", "timm"), ("clip", "open_clip", "open_clip")]
)
def test_missing_library_names_the_extra(name, library, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf"vtoken\[{extra}\]"):
        tiny.load_encoder(name)


@torch.no_grad()
def test_vit_reaches_the_figures_of_its_card():
    model, preprocess, tokenizer = tiny.load_encoder("vit")
    assert tokenizer is None and type(model).__module__ == "timm.models.vision_transformer"
    assert model.patch_embed.num_patches == 144 and len(model.blocks) >= 8
    some = [labelled(20_000 + i, "test") for i in range(150)]
    said = model(torch.stack([preprocess(scene.image) for scene, _ in some])).argmax(-1)
    right = (said == torch.tensor([label for _, label in some])).float().mean()
    claimed = told("vit")["top1"]["class"]
    assert claimed > 0.9 and right > claimed - 0.08


def test_clip_reaches_the_figures_of_its_card():
    model, preprocess, tokenizer = tiny.load_encoder("clip")
    assert type(model).__module__ == "open_clip.model" and len(model.visual.transformer.resblocks) >= 8
    clips, texts = retrieval_set(60, seed=3)
    similarity = text_embeddings(model, tokenizer, texts) @ video_embeddings(model, preprocess, clips).T
    found, claimed = recalls(similarity), told("clip")["recalls"]["12 frames"]
    assert claimed["t2v_r1"] > 40 and found["t2v_r1"] > claimed["t2v_r1"] - 10  # of 60, not of 500
    assert found["t2v_r1"] < 100 or found["v2t_r1"] < 100 or claimed["rsum"] < 600


def test_label_is_the_topmost_object():
    for i in range(60):
        scene, label = labelled(i, "test" if i % 2 else "train")
        first, *rest = sorted(scene.objects, key=lambda o: o.box[1] + o.box[3])
        assert CLASSES[label] == f"{first.colour} {first.shape}"
        assert all(o.box[1] + o.box[3] - first.box[1] - first.box[3] >= 2 * MARGIN for o in rest)
    assert len({labelled(i)[0].seed for i in range(60)}) == 60
    with pytest.raises(ValueError, match="0 or more"):
        labelled(-1)


def test_captions_say_what_the_moments_show_in_order():
    for i in range(60):
        clip = make_clip(i, "train", 12)
        parts = caption(clip).split(" then ")
        assert len(parts) == len(clip.moments)
        for part, moment in zip(parts, clip.moments):
            words = set(part.split())
            assert words - {"a", "and"} == {w for w in (moment.digit, moment.shape, moment.colour) if w}
        ids = TOKENIZER([caption(clip)])[0]
        assert len(ids) == LONGEST + 2 and ids.argmax() == (ids > 0).sum() - 1
    assert describe(None) == "nothing"


def test_clips_of_a_retrieval_set_differ_whatever_the_order():
    clips, texts = retrieval_set(40, frames=6)
    assert len(clips) == 40 == len({tuple(sorted(text.split(" then "))) for text in texts})
    assert texts == [caption(clip) for clip in clips] == retrieval_set(40, frames=6)[1]
    assert {clip.split for clip in clips} == {"test"} and {len(clip.media) for clip in clips} == {6}
    assert not {c.seed for c in retrieval_set(5, frames=6, seed=1)[0]} & {c.seed for c in clips}
    with pytest.raises(ValueError, match="n >= 1"):
        retrieval_set(0)


def test_tokenizer_refuses_what_it_does_not_know():
    assert TOKENIZER("a red circle, then a 4").shape == (1, LONGEST + 2)
    assert len(set(TOKENIZER.ids.values()) | {0, TOKENIZER.start, TOKENIZER.end}) == len(WORDS) + 3
    with pytest.raises(ValueError, match="does not know the word 'dog'"):
        TOKENIZER(["a dog"])
    with pytest.raises(ValueError, match="at most 31 words, got 40"):
        TOKENIZER(["a " * 40])


def test_preprocess_makes_pixels_of_any_image():
    preprocess = Preprocess(96, 0.5, 0.5)
    grey = preprocess(Image.new("L", (200, 50), 255))
    assert grey.shape == (3, 96, 96) and grey.dtype == torch.float32 and bool((grey == 1).all())
    red = preprocess(Image.new("RGB", (96, 96), (255, 0, 0)))
    assert red[:, 0, 0].tolist() == [1, -1, -1]


def test_recalls_count_ranks_both_ways():
    perfect = recalls(torch.eye(20))
    assert perfect["rsum"] == pytest.approx(600)
    second = torch.eye(20) + 2 * torch.eye(20).roll(1, 1)  # one other is ahead of each
    assert recalls(second)["t2v_r1"] == recalls(second)["v2t_r1"] == 0
    assert recalls(second)["t2v_r5"] == pytest.approx(100)
    assert recalls(torch.ones(20, 20))["t2v_r10"] == 0  # a model that says nothing finds nothing
    lop = torch.eye(3)
    lop[0] = torch.tensor([1.0, 5, 0])  # text 0 prefers video 1; video 1 prefers text 0
    assert recalls(lop)["t2v_r1"] == pytest.approx(200 / 3) == recalls(lop)["v2t_r1"]
    with pytest.raises(ValueError, match="square"):
        recalls(torch.ones(2, 3))


def test_video_embedding_is_the_mean_of_normalised_frames():
    class Brightness:
        """Embeds a frame as (its mean, 1), of any length."""

        def parameters(self):
            return iter([torch.zeros(1)])

        def encode_image(self, pixels):
            level = pixels.mean((1, 2, 3))
            return torch.stack([level, torch.ones_like(level)], -1)

    clips, _ = retrieval_set(3, frames=4)
    made = video_embeddings(Brightness(), Preprocess(96, 0.5, 0.5), clips, batch_size=2)
    for row, clip in zip(made, clips):
        frames = torch.stack([Preprocess(96, 0.5, 0.5)(frame) for frame in clip.media])
        units = torch.stack([v / v.norm() for v in Brightness().encode_image(frames)])
        torch.testing.assert_close(row, units.mean(0) / units.mean(0).norm())
    with pytest.raises(ValueError, match="one length"):
        video_embeddings(Brightness(), None, [make_clip(0, frames=4), make_clip(0, frames=6)])
