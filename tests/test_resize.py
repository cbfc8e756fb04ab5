"""The baseline of smaller images, on processors made here: no tokenizer or image processor is downloaded."""

from __future__ import annotations

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
    made.image_token, made.image_token_id, made.video_token, made.video_token_id = "<image>", IMG, "<video>", VID
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
        images, tokenizer(), patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def llava():
    images = tf.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    return tf.LlavaProcessor(
        images, tokenizer(), patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
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
