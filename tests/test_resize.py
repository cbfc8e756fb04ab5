"""The baseline of smaller images, on processors made here: no tokenizer or image processor is downloaded."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image

import vtoken
from tests.models import FAMILIES, SPECIAL
from tests.models.common import END, IMG, START, VID
from vtoken.resize import count_tokens

PINPOINTS = [[56, 112], [112, 56], [112, 112], [56, 168]]


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(120)}
    names = {IMG: "<image>", VID: "<video>", START: "<vs>", END: "<ve>"}
    words = {names.get(i, w): i for w, i in words.items()}
    inner = Tokenizer(models.WordLevel(words, unk_token="w3"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = tf.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0", unk_token="w3")
    made.add_special_tokens({"additional_special_tokens": list(names.values())})
    made.image_token, made.image_token_id, made.video_token, made.video_token_id = (
        "<image>",
        IMG,
        "<video>",
        VID,
    )
    return made


def qwen():
    images = tf.Qwen2VLImageProcessor(patch_size=7, merge_size=2, min_pixels=14 * 14, max_pixels=280 * 280)
    videos = tf.Qwen2VLVideoProcessor(patch_size=7, merge_size=2)
    return tf.Qwen2VLProcessor(images, tokenizer(), videos)


def llava_next():
    images = tf.LlavaNextImageProcessor(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=PINPOINTS
    )
    return tf.LlavaNextProcessor(
        images,
        tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def llava():
    images = tf.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    return tf.LlavaProcessor(
        images,
        tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def picture(height, width):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def tokens_of(inputs):
    return [int((row == IMG).sum()) for row in inputs["input_ids"]]


@pytest.mark.parametrize("budget", [0.5, 0.25, 0.1, 40, 7])
@pytest.mark.parametrize("size", [(280, 140), (97, 211), (140, 140), (400, 30)])
def test_qwen_images_fit_the_budget(budget, size):
    processor = qwen()
    full = count_tokens(processor, *size)
    small = vtoken.resized(processor, budget)
    wanted = max(1, int(full * budget)) if isinstance(budget, float) else min(full, budget)
    shape = dict(text=["<image> w5"], images=[picture(*size)], return_tensors="pt")
    made = tokens_of(small(**shape))[0]
    assert made <= wanted and made >= 0.5 * wanted - 2
    assert tokens_of(processor(**shape)) == [full]  # the original is as it was


def test_a_shape_that_cannot_be_made_small_enough():
    with pytest.raises(ValueError, match="400 x 30 px makes 58 tokens and no fewer than"):
        vtoken.resized(qwen(), 1)(text=["<image>"], images=[picture(400, 30)], return_tensors="pt")


def test_an_image_that_is_small_enough_is_untouched():
    processor, image = qwen(), picture(56, 56)
    a = vtoken.resized(processor, 500)(text=["<image>"], images=[image], return_tensors="pt")
    b = processor(text=["<image>"], images=[image], return_tensors="pt")
    assert torch.equal(a["pixel_values"], b["pixel_values"]) and torch.equal(a["input_ids"], b["input_ids"])
    whole = vtoken.resized(processor, 1.0)(text=["<image>"], images=[image], return_tensors="pt")
    assert torch.equal(whole["pixel_values"], b["pixel_values"])


def test_every_image_has_its_own_budget():
    small = vtoken.resized(qwen(), 0.25)
    images = [[picture(140, 140), picture(280, 56)], [picture(84, 168)]]
    inputs = small(text=["<image> w5 <image>", "<image>"], images=images, padding=True, return_tensors="pt")
    per_image = inputs["image_grid_thw"].prod(1) // 4
    full = [count_tokens(qwen(), *s) for s in ((140, 140), (280, 56), (84, 168))]
    assert all(n <= int(f * 0.25) for n, f in zip(per_image.tolist(), full))
    assert sum(tokens_of(inputs)) == int(per_image.sum())


@pytest.mark.parametrize("kind", ["array", "channels first", "tensor", "grey"])
def test_kinds_of_images(kind):
    array = np.asarray(picture(140, 280))
    image = {
        "array": array,
        "channels first": array.transpose(2, 0, 1).copy(),
        "tensor": torch.tensor(array).permute(2, 0, 1),
        "grey": picture(140, 280).convert("L"),
    }[kind]
    inputs = vtoken.resized(qwen(), 50)(text=["<image>"], images=[image], return_tensors="pt")
    assert 25 <= tokens_of(inputs)[0] <= 50


def test_anyres_chooses_a_smaller_canvas():
    processor = llava_next()
    full = count_tokens(processor, 224, 224)
    small = vtoken.resized(processor, 0.7)
    inputs = small(text=["<image>"], images=[picture(224, 224)], return_tensors="pt")
    assert tokens_of(inputs)[0] <= int(0.7 * full)
    with pytest.raises(ValueError, match="no fewer than"):
        vtoken.resized(processor, 0.1)(text=["<image>"], images=[picture(224, 224)], return_tensors="pt")


def test_a_tower_of_one_size_is_refused():
    with pytest.raises(ValueError, match="16 tokens of an image of any size"):
        vtoken.resized(llava(), 0.5)


def test_bad_input():
    with pytest.raises(ValueError, match="budget"):
        vtoken.resized(qwen(), 0.0)
    with pytest.raises(TypeError, match="found str"):
        vtoken.resized("Qwen/Qwen2-VL", 0.5)
    with pytest.raises(NotImplementedError, match="not videos"):
        video = np.zeros((4, 56, 56, 3), dtype=np.uint8)
        vtoken.resized(qwen(), 0.5)(text=["<video>"], videos=[video], return_tensors="pt")


def test_a_model_reads_what_the_smaller_image_makes():
    model = FAMILIES["qwen2_vl"].build()
    small = vtoken.resized(qwen(), 12)
    inputs = small(text=["w5 <vs> <image> <ve> w7"], images=[picture(140, 98)], return_tensors="pt")
    inputs = {k: v for k, v in inputs.items() if k != "token_type_ids"}
    assert 6 <= tokens_of(inputs)[0] <= 12
    out = model.generate(**inputs, max_new_tokens=2, do_sample=False, suppress_tokens=SPECIAL)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 2


# -- copied, pickled, printed, saved -------------------------------------------------------------------------
MAKERS = {
    "qwen": (qwen, 0.25, (140, 280)),
    "qwen, a number": (qwen, 30, (280, 140)),
    "anyres": (llava_next, 0.7, (224, 224)),
}
COPIES = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x))}


def read_by(processor, size):
    return processor(text=["<image> w5"], images=[picture(*size)], return_tensors="pt")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", MAKERS)
def test_copies_make_the_same_tokens(kind, how):
    make, budget, size = MAKERS[kind]
    small = vtoken.resized(make(), budget)
    copied = COPIES[how](small)
    assert same(read_by(small, size), read_by(copied, size))
    assert not torch.equal(read_by(make(), size)["pixel_values"], read_by(copied, size)["pixel_values"])


def test_a_fresh_process_loads_it(tmp_path):
    small = vtoken.resized(qwen(), 0.25)
    (tmp_path / "small.pickle").write_bytes(
        pickle.dumps((small, picture(140, 280), read_by(small, (140, 280))))
    )
    code = (
        "import pickle, sys, torch; small, image, want = pickle.load(open(sys.argv[1], 'rb'))\n"
        "made = small(text=['<image> w5'], images=[image], return_tensors='pt')\n"
        "assert all(torch.equal(made[k], want[k]) for k in want), made"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "small.pickle")]
    out = subprocess.run(command, capture_output=True, text=True, cwd=Path(vtoken.__file__).parents[1])
    assert out.returncode == 0, out.stderr


@pytest.mark.parametrize("kind", MAKERS)
def test_what_is_saved_is_the_processor_it_was(kind, tmp_path):
    make, budget, size = MAKERS[kind]
    original = make()
    small = vtoken.resized(original, budget)
    with pytest.warns(UserWarning, match=rf"not saved: .*vtoken.resized\(processor, {budget}\)") as caught:
        small.save_pretrained(tmp_path / "small")
    assert len([w for w in caught if "not saved" in str(w.message)]) == 1
    original.save_pretrained(tmp_path / "original")
    for path in (tmp_path / "original").iterdir():
        assert (tmp_path / "small" / path.name).read_bytes() == path.read_bytes()
    assert small.to_json_string() == original.to_json_string()
    loaded = type(original).from_pretrained(tmp_path / "small")
    again = vtoken.resized(loaded, budget)
    for a, b in ((loaded, original), (again, small)):  # the tokenizer made here does not save its image token
        pixels = [x.image_processor([picture(*size)], return_tensors="pt") for x in (a, b)]
        assert same(*pixels)
    with pytest.warns(UserWarning, match="not saved"):
        small.image_processor.save_pretrained(tmp_path / "part")
    assert (
        type(original.image_processor).from_pretrained(tmp_path / "part").to_dict()
        == original.image_processor.to_dict()
    )


@pytest.mark.parametrize("kind", MAKERS)
def test_it_says_what_it_is(kind):
    make, budget, _ = MAKERS[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        text = repr(vtoken.resized(make(), budget))
    assert f"made smaller to a budget of {budget}" in text and type(make().image_processor).__name__ in text


def test_a_setting_of_the_copy_reaches_its_images_and_not_the_original():
    original = qwen()
    small = vtoken.resized(original, 40)
    before = tokens_of(read_by(small, (140, 280)))
    small.image_processor.size = {"shortest_edge": 14 * 14, "longest_edge": 14 * 14 * 9}
    assert tokens_of(read_by(small, (140, 280)))[0] <= 9 < before[0]
    assert original.image_processor.size["longest_edge"] == 280 * 280


def test_the_other_way_into_an_image_processor_shrinks_as_well():
    small = vtoken.resized(qwen(), 0.25)
    images = [picture(140, 280)]
    a = small.image_processor(images, return_tensors="pt")
    b = small.image_processor.preprocess(images, return_tensors="pt")
    assert same(a, b) and int(a["image_grid_thw"].prod()) // 4 <= count_tokens(qwen(), 140, 280) // 4


@pytest.mark.parametrize("budget", ["0.5", None, True, float("nan"), 0, -1, [0.5], np.array([0.5])])
def test_budgets_that_are_none(budget):
    with pytest.raises(ValueError, match="budget") as caught:
        vtoken.resized(qwen(), budget)
    assert "\n" not in str(caught.value)
    assert vtoken.resized(qwen(), np.float32(0.5)).image_processor._budget == 0.5
