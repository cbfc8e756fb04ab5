"""Data sets of encoders on disk, models by name, and what is refused with one sentence."""

from __future__ import annotations

import io
import json

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.video.media import number
from vtoken.eval.benchmarks import encoder_models, example_encoder_data
from vtoken.eval.benchmarks.encoder_models import encode_texts
from vtoken.eval.benchmarks.imagenet import ImageNet, class_indices, classes_of
from vtoken.eval.benchmarks.imagenet import load as images
from vtoken.eval.benchmarks.msrvtt import FILE, MSRVTT
from vtoken.eval.benchmarks.msrvtt import load as pairs
from vtoken.eval.benchmarks.task import Unreadable
from vtoken.tiny.topmost import labelled

from .encoders import CAPTIONS, classifier, colour, dual_encoder, image_folder, preprocess, video_folder


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def parquet(path, labels, column="label", split="validation"):
    """Hub files of two rows each, in row groups of one."""
    path.mkdir(parents=True, exist_ok=True)
    for part in range(0, len(labels), 2):
        rows = [
            {"image": {"bytes": png(colour(part + i)), "path": f"{part + i}.JPEG"}, column: label}
            for i, label in enumerate(labels[part : part + 2])
        ]
        pq.write_table(pa.Table.from_pylist(rows), path / f"{split}-0000{part}.parquet", row_group_size=1)
    return path


def test_an_image_folder(tmp_path):
    root = image_folder(tmp_path / "val", classes=3, images=2)
    for source in (root, tmp_path):
        samples = images(source, 3)
        assert [(s.name, s.truth) for s in samples][1:4] == [
            ("class_0/1.png", "0"),
            ("class_1/0.png", "1"),
            ("class_1/1.png", "1"),
        ]
    pixels = ImageNet(samples, preprocess).open(samples[3])
    assert torch.equal(pixels, preprocess(colour(11)))
    assert [s.name for s in images(root, 3, limit=3)] == ["class_0/0.png", "class_1/0.png", "class_2/0.png"]


def test_parquet_files(tmp_path):
    root = parquet(tmp_path / "data", [4, 0, 3])
    parquet(tmp_path / "data", [1, 1], split="train")
    samples = images(tmp_path, 5)
    assert [s.truth for s in samples] == ["4", "0", "3"]
    task = ImageNet(samples, preprocess)
    for i, sample in enumerate(samples):
        assert torch.equal(task.open(sample), preprocess(colour(i)))
    assert [s.truth for s in images(root / "validation-00002.parquet", 5)] == ["3"]


def test_folders_named_by_wordnet_ids_keep_their_index():
    assert class_indices(["n01440764", "n15075141"], 1000, None) == {"n01440764": 0, "n15075141": 999}
    assert class_indices(["b", "a"], 2, None) == {"a": 0, "b": 1}
    for names in (["n01440764", "strange"], ["n01440764", "n00000000"]):
        with pytest.raises(ValueError, match=rf"2 folders, '{names[1]}' among them.*1000 classes"):
            class_indices(names, 1000, "x")
    with pytest.raises(ValueError, match=r"2 folders, 'a' among them, and the model has 3 classes"):
        class_indices(["a", "b"], 3, "x")


def test_pictures_are_read_as_timm_reads_them(tmp_path):
    """In RGB, and not turned by EXIF."""
    root = image_folder(tmp_path, classes=1, images=1)
    exif = Image.Exif()
    exif[0x0112] = 6
    colour(5).save(root / "class_0" / "0.png", exif=exif)
    colour(6).convert("L").save(root / "class_0" / "1.png")
    (root / "class_0" / "2.jpg").write_bytes(b"no picture")
    first, second, third = images(root, 1)
    task = ImageNet([first, second, third], preprocess)
    assert torch.equal(task.open(first), preprocess(colour(5)))
    assert torch.equal(task.open(second), preprocess(colour(6).convert("L").convert("RGB")))
    with pytest.raises(Unreadable, match=r"The image class_0/2.jpg cannot be decoded"):
        task.open(third)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: p / "nowhere", "There is no data set"),
        (lambda p: (p / "x.csv").touch() or p / "x.csv", "is a file, but no .parquet"),
        (lambda p: p, "has no folders of classes"),
        (lambda p: (p / "a").mkdir() or p, "has an image"),
        (lambda p: parquet(p, [1, 2], column="class"), "lacks the column label: it has image, class"),
        (lambda p: parquet(p, [0, 7]), "has the label 7: this model needs a whole number from 0 to 0"),
        (lambda p: parquet(p, [0, -1]), "has the label -1"),
        (lambda p: parquet(p, [0, None]), "has the label None"),
    ],
)
def test_image_data_that_are_none(tmp_path, make, words):
    with pytest.raises(ValueError, match=words):
        images(make(tmp_path), 1)


def test_pairs_of_captions_and_videos(tmp_path):
    samples = pairs(video_folder(tmp_path))
    assert {s.name: s.truth for s in samples} == CAPTIONS  # one has a comma
    assert [s.name for s in pairs(tmp_path, limit=2)] == ["video7020", "video7024"]
    for place in ("videos", "."):
        (tmp_path / "videos/all/video7020.mp4").rename(tmp_path / place / "video7020.mp4")
        assert pairs(tmp_path)[0].media == tmp_path / place / "video7020.mp4"
        (tmp_path / place / "video7020.mp4").rename(tmp_path / "videos/all/video7020.mp4")
    (tmp_path / "annotations").mkdir()
    (tmp_path / FILE).rename(tmp_path / "annotations" / FILE)
    assert len(pairs(tmp_path)) == 5


def test_frames_of_a_video(tmp_path):
    """video7024 has 14 frames at 4 per second: 4 positions of a second; video7020 has 6 frames."""
    samples = pairs(video_folder(tmp_path))
    task = MSRVTT(samples, lambda image: torch.tensor([number(np.asarray(image)) % 40]), frames=3)
    assert task.open(samples[2]).flatten().tolist() == [0, 4, 12]
    assert task.open(samples[0]).flatten().tolist() == [0, 2, 5]
    four = MSRVTT(samples, task.preprocess, frames=4)
    assert four.open(samples[2]).flatten().tolist() == [0, 4, 8, 12]


def _edit(root, change):
    path = root / FILE
    path.write_text(change(path.read_text()))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda p: _edit(p, lambda t: t.replace("sentence", "caption")), "lacks the column sentence: it has"),
        (
            lambda p: _edit(p, lambda t: t + "ret9,msr9,video9999,a cat\n"),
            r"The video video9999.mp4 is not in",
        ),
        (
            lambda p: _edit(p, lambda t: t + "ret9,msr9,../../etc/x,a cat\n"),
            r"The video ../../etc/x.mp4 is not in",
        ),
        (lambda p: _edit(p, lambda t: t + "ret9,msr9,video7020,again\n"), "has 'video7020' twice"),
        (lambda p: _edit(p, lambda t: t + "ret9,msr9,video7020,\n"), "a row without a caption"),
        (lambda p: _edit(p, lambda t: t + "ret9,msr9,,a cat\n"), "a row without a video_id"),
        (lambda p: _edit(p, lambda t: t.splitlines()[0] + "\n"), "The data set is empty"),
        (lambda p: _edit(p, lambda t: t + "ret9,msr9,video7021,a cat, a dog\n"), "more cells than columns"),
        (lambda p: _edit(p, lambda t: t + 'ret9,msr9,video7021,"a cat\n'), "is no CSV that can be read"),
        (lambda p: (p / FILE).write_text(""), "lacks the column key, vid_key, video_id, sentence"),
        (lambda p: (p / FILE).unlink(), f"There is no {FILE}"),
        (lambda p: (p / FILE).write_bytes(b"\xff\xfe\x00"), "is no CSV that can be read"),
        (lambda p: (p / "videos").rename(p / "films"), r"The video video7020.mp4 and 4 more is not in"),
    ],
)
def test_retrieval_data_that_are_none(tmp_path, spoil, words):
    spoil(video_folder(tmp_path))
    with pytest.raises(ValueError, match=words):
        pairs(tmp_path)


def test_a_broken_video_is_named(tmp_path):
    root = video_folder(tmp_path)
    (root / "videos/all/video7021.mp4").write_bytes(b"no video")
    samples = pairs(root)
    with pytest.raises(Unreadable, match=r"The video video7021.mp4 cannot be decoded"):
        MSRVTT(samples, preprocess).open(samples[1])


def test_example_data_have_the_real_layouts(tmp_path):
    samples = images(example_encoder_data.imagenet(tmp_path / "i", images=10), 56)
    assert sorted(int(s.truth) for s in samples) == sorted(labelled(i, "test")[1] for i in range(10))
    assert ImageNet(samples, preprocess).open(samples[0]).shape == (3, 32, 32)
    classes = [f"class {i}" for i in range(12)]
    example_encoder_data.write_imagenet(tmp_path / "w", classes, [(11, colour(0)), (2, colour(1))])
    assert [s.truth for s in images(tmp_path / "w", 12)] == ["2", "11"]  # empty folders count
    made = pairs(example_encoder_data.msrvtt(tmp_path / "v", videos=2))
    assert MSRVTT(made, preprocess, frames=2).open(made[0]).shape == (2, 3, 32, 32)
    assert made[0].truth.startswith("a ") and len({s.truth for s in made}) == 2


def test_models_of_timm(tmp_path):
    torch.manual_seed(3)
    weights = timm.create_model("test_vit").state_dict()
    save_file(weights, tmp_path / "vit.safetensors")
    made = encoder_models.load("timm:test_vit", str(tmp_path / "vit.safetensors"))
    assert torch.equal(made.model.head.weight.cpu(), weights["head.weight"]) and not made.model.training
    assert made.preprocess(colour(1)).shape == (3, 160, 160) and classes_of(made) == 1000
    assert len(made.weights) == 12 and made.tokenizer is None
    half = encoder_models.load("timm:test_vit", str(tmp_path / "vit.safetensors"), dtype="bfloat16")
    assert half.dtype == torch.bfloat16


@pytest.fixture
def small_clip(tmp_path):
    """The name of an open_clip architecture, and a file with weights of it."""
    vision = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    (tmp_path / "small.json").write_text(json.dumps({"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(tmp_path / "small.json")
    save_file(open_clip.create_model("small").state_dict(), tmp_path / "small.safetensors")
    yield "small", tmp_path / "small.safetensors"
    open_clip.factory._MODEL_CONFIGS.pop("small")
    open_clip.factory._MODEL_CONFIG_PATHS[:] = [
        p
        for p in open_clip.factory._MODEL_CONFIG_PATHS
        if p.parent != tmp_path and p != tmp_path / "small.json"
    ]


def test_models_of_open_clip(small_clip):
    arch, file = small_clip
    for name, checkpoint in ((f"open_clip:{arch}/{file}", None), (f"open_clip:{arch}", str(file))):
        made = encoder_models.load(name, checkpoint)
        assert made.preprocess(colour(1)).shape == (3, 32, 32)
        texts = encode_texts(made, ["a cat", "a dog", "a cow"], batch_size=2)
        assert texts.shape == (3, 8) and texts.norm(dim=1) == pytest.approx(torch.ones(3))
    with pytest.raises(ValueError, match="has no classifier"):
        classes_of(made)


def test_openai_weights_get_their_activation(monkeypatch):
    """The tag names QuickGELU, which the architecture of the same name does not have."""
    asked = []

    def create(arch, **options):
        asked.append(options)
        encoder = dual_encoder()
        return encoder.model, None, preprocess

    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    encoder_models.load("open_clip:ViT-B-32/openai")
    encoder_models.load("open_clip:ViT-B-32/laion2b_s34b_b79k")
    assert [(o["pretrained"], o["force_quick_gelu"]) for o in asked] == [
        ("openai", True),
        ("laion2b_s34b_b79k", False),
    ]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("resnet50", {}, r"Cannot tell what model 'resnet50' is: give timm:NAME"),
        ("timm:", {}, "Cannot tell what model"),
        ("timm:test_vit", {}, "needs its weights from one place, found neither"),
        ("timm:test_vit", {"checkpoint": "x.safetensors", "pretrained": True}, "found both"),
        ("timm:test_vot", {"pretrained": True}, "timm has no model 'test_vot': did you mean test_vit"),
        ("timm:hf-hub:a/b", {"checkpoint": "FILE"}, "is not among timm's own models"),
        ("timm:test_vit", {"checkpoint": "x.safetensors"}, "There is no file 'x.safetensors'"),
        ("timm:test_vit", {"checkpoint": "x.pth"}, "is no .safetensors file: weights in other formats"),
        ("timm:test_vit2", {"checkpoint": "FILE"}, "Cannot load the model 'timm:test_vit2': Error"),
        ("timm:test_vit", {"checkpoint": "FILE", "dtype": "int8"}, "There is no dtype 'int8'"),
        ("open_clip:ViT-B-33/openai", {}, "no architecture 'ViT-B-33': did you mean"),
        ("open_clip:ViT-B-32", {}, r"give open_clip:ViT-B-32/TAG with one of openai, "),
        ("open_clip:ViT-B-32/opanai", {}, "'opanai' is neither a safetensors file nor a tag of ViT-B-32"),
        ("open_clip:ViT-B-32/x.pt", {}, "is neither a safetensors file nor a tag"),
        ("open_clip:ViT-B-32/x.safetensors", {}, "There is no file 'x.safetensors'"),
        ("tiny:vit", {"pretrained": True}, "ships with its weights"),
    ],
)
def test_models_that_are_none(tmp_path, name, options, words):
    if options.get("checkpoint") == "FILE":
        save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
        options = options | {"checkpoint": str(tmp_path / "x.safetensors")}
    with pytest.raises(ValueError, match=words):
        encoder_models.load(name, **options)


def test_a_classifier_has_no_texts():
    with pytest.raises(ValueError, match="has no text tower"):
        encode_texts(classifier(), ["a cat"])
