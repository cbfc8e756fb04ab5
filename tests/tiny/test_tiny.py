from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.release.contents import LARGEST, LEFT_OUT_OF_THE_WHEEL
from training.tiny.evaluate import pruned_accuracy
from training.tiny.language import SLOTS, choose, layout, pack
from training.tiny.models import build_tokenizer
from training.tiny.recipes import llava
from training.tiny.tower import localisation, view
from vtoken import tiny
from vtoken.tiny import scenes
from vtoken.tiny.assets import FILE, PHOTOGRAPHS, SHAPES
from vtoken.tiny.questions import answers, prompt, score
from vtoken.tiny.scenes import COLOURS, KINDS, NUMBERS, held_out, make_scene, questions


@pytest.fixture(scope="module")
def shipped():
    return tiny.load("llava")


def test_what_ships_is_bfloat16_and_small():
    package = Path(tiny.__file__).parents[1]
    files = [p for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert sum(p.stat().st_size for p in files if p.name not in LEFT_OUT_OF_THE_WHEEL) < LARGEST
    for name in tiny.names():
        assert {t.dtype for t in load_file(tiny.path(name) / "model.safetensors").values()} == {
            torch.bfloat16
        }
        assert tiny.load(name)[0].dtype == torch.float32


def digest(scene):
    return hashlib.sha256(scene.image.tobytes()).hexdigest()[:16]


def test_scenes_are_a_function_of_seed_and_split():
    assert digest(make_scene(5)) == digest(make_scene(5))
    assert make_scene(5).objects == make_scene(5).objects
    assert len({digest(make_scene(i, split)) for i in range(50) for split in ("train", "test")}) == 100
    assert questions(make_scene(5)) == questions(make_scene(5))


def test_scenes_are_the_same_bytes_on_every_machine():
    assert digest(make_scene(0)) == "0ee3011ded85450a"
    assert digest(make_scene(0, "test")) == "178f0a54753b69c7"


def test_bad_requests_get_one_sentence():
    with pytest.raises(ValueError, match="train or test"):
        make_scene(0, "valid")
    with pytest.raises(ValueError, match="0 or more"):
        make_scene(-1)
    with pytest.raises(ValueError, match="llava"):
        tiny.load("blip")


def test_test_split_has_its_own_glyphs_and_photographs():
    assert not set(PHOTOGRAPHS["train"]) & set(PHOTOGRAPHS["test"])
    with np.load(FILE) as stored:
        seen = {glyph.tobytes() for shape in stored["glyphs_train"] for glyph in shape}
        held = {glyph.tobytes() for shape in stored["glyphs_test"] for glyph in shape}
    assert len(held) == len(SHAPES) * 32
    assert not seen & held
    used = {split: {make_scene(i, split).background for i in range(60)} for split in ("train", "test")}
    assert not used["train"] & used["test"]


def right_answers(scene, text):
    """All answers that the objects of a scene support, read from the words of the question alone."""
    words = text.rstrip("?.").split()
    colours = [w for w in words if w in COLOURS]
    shapes = [w for w in words if w in SHAPES]
    fit = [
        o for o in scene.objects if all(o.colour == c for c in colours) and all(o.shape == s for s in shapes)
    ]
    if words[0] == "how":
        return {NUMBERS[len(scene.objects)]}
    if words[:2] in (["is", "there"], ["do", "you"]):
        return {"yes" if fit else "no"}
    if "shape" in words:
        return {o.shape for o in fit}
    if "colour" in words or "color" in words:
        return {o.colour for o in fit}
    middles = [((o.box[0] + o.box[2]) / 2, (o.box[1] + o.box[3]) / 2) for o in fit]
    return {f"{'top' if y < 48 else 'bottom'} {'left' if x < 48 else 'right'}" for x, y in middles}


def test_every_question_has_exactly_its_answer():
    forms = np.random.default_rng(0)
    words = set(scenes.vocabulary())
    for i in range(150):
        scene = make_scene(i, "test" if i % 2 else "train")
        for question in questions(scene, forms if i % 3 else None):
            assert right_answers(scene, question.text) == {question.answer}
            assert set(question.text.replace("?", " ?").replace(".", " .").split()) <= words
            assert set(question.answer.split()) <= words and question.kind in KINDS


def test_objects_are_where_their_boxes_say():
    for i in range(60):
        scene = make_scene(i)
        pixels = np.asarray(scene.image).astype(int)
        assert 2 <= len(scene.objects) <= 4
        assert (
            len({o.colour for o in scene.objects})
            == len({o.shape for o in scene.objects})
            == len(scene.objects)
        )
        for item in scene.objects:
            left, top, right, bottom = item.box
            assert (
                0 <= left < right <= 96 and 0 <= top < bottom <= 96 and max(right - left, bottom - top) <= 23
            )
            assert min(abs((left + right) / 2 - 48), abs((top + bottom) / 2 - 48)) > 3
            near = abs(pixels[top:bottom, left:right] - COLOURS[item.colour]).max(-1) <= 16
            assert 0.2 < near.mean() <= 1
        assert set(view(scene).owners()) == {-1, *range(len(scene.objects))}


def test_held_out_questions_are_balanced():
    pairs = held_out(50)
    kinds = [question.kind for _, question in pairs]
    assert all(kinds.count(kind) == 10 for kind in KINDS)
    assert all(scene.split == "test" for scene, _ in pairs)
    assert [q for _, q in held_out(50)] == [q for _, q in pairs] != [q for _, q in held_out(50, seed=1)]


def test_tokenizer_knows_every_word_and_decodes_clean_text():
    tokenizer = build_tokenizer()
    ids = tokenizer("What shape is the RED one? Assistant: top left").input_ids
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids[-2:]) == "top left"
    assert tokenizer.tokenize("user: <image>\nfind the star.") == [
        "user",
        ":",
        "<image>",
        "find",
        "the",
        "star",
        ".",
    ]


def test_import_is_cheap():
    code = "import sys, vtoken.tiny; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_packed_questions_see_the_image_and_themselves_only():
    mask, position = layout(image_tokens=4, prefix=2)
    seen = mask[0, 0] == 0
    assert seen[6 + 10 + 3].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 16, 17, 18, 19]
    assert position[0, 16:20].tolist() == [6, 7, 8, 9]


@torch.no_grad()
def test_packed_logits_equal_single_prompts():
    torch.manual_seed(0)
    model, processor = llava.build(width=32, tower_layers=5, llm_layers=2)
    scene = make_scene(0)
    asked = choose(scene, np.random.default_rng(0))
    assert len(asked) == SLOTS
    vocabulary = processor.tokenizer.get_vocab()
    ids, labels = pack([asked], vocabulary)
    inputs = [
        processor(images=scene.image, text=prompt(processor, q.text), return_tensors="pt") for q in asked
    ]
    image = model.eval().model.get_image_features(inputs[0]["pixel_values"]).pooler_output[0]
    before = model.get_input_embeddings()(torch.tensor([vocabulary["user"], vocabulary[":"]]))
    mask, position = layout()
    hidden = model.model.language_model(
        inputs_embeds=torch.cat([before, image, model.get_input_embeddings()(ids[0])])[None],
        attention_mask=mask,
        position_ids=position,
    ).last_hidden_state[0, 146:]
    for slot, single in list(enumerate(inputs))[::3]:
        first = slot * 10 + (labels[0, slot * 10 : slot * 10 + 10] >= 0).nonzero()[0, 0]
        torch.testing.assert_close(
            model.lm_head(hidden[first]), model(**single).logits[0, -1], atol=1e-4, rtol=1e-4
        )


def test_a_few_steps_reduce_the_loss(monkeypatch):
    torch.manual_seed(0)
    for plan in (llava.TOWER, llava.LANGUAGE):
        monkeypatch.setitem(plan, "batch", 4)
    model, processor = llava.build(width=32, tower_layers=5, llm_layers=2)
    log: list[dict] = []
    llava.train_tower(model, log, steps=21, checks=8)
    llava.train_language(model, processor, log, steps=21, checks=8)
    for stage in ("tower", "language"):
        losses = [entry["loss"] for entry in log if entry["stage"] == stage]
        assert losses[-1] < 0.9 * losses[0]


def test_shipped_model_answers_held_out_questions(shipped):
    model, processor = shipped
    pairs = held_out(100, seed=3)
    said = answers(model, processor, pairs)
    assert score(pairs, said)["all"] >= 0.9
    single = [answers(model, processor, [pair])[0] for pair in pairs[:10]]
    assert single == said[:10]


def test_shipped_model_looks_at_the_objects(shipped):
    pixels, goal = llava.tower_batch(0, 60, "test", 0)
    found = localisation(shipped[0].model.vision_tower, pixels, goal["owner"] >= 0)
    assert found["layer -2"] > 0.8 and found["mean"] > 0.8


def test_cls_attention_keeps_more_answers_than_chance(shipped):
    by_cls, by_chance = (pruned_accuracy(*shipped, 0.2, by, n=60)["all"] for by in ("cls", "random"))
    assert by_cls > by_chance + 0.1


def test_shipped_model_is_an_ordinary_folder(shipped):
    model, processor = shipped
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert sum(f.stat().st_size for f in tiny.path().iterdir()) < 10e6
    assert processor._get_num_multimodal_tokens(image_sizes=[(96, 96)])["num_image_tokens"] == [144]
