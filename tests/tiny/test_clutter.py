from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest
import torch

from training.tiny.looking import Look
from training.tiny.optimiser import Muon
from training.tiny.recipes import llava_clutter
from training.tiny.tower import hidden_states
from vtoken import tiny
from vtoken.tiny.clutter import KINDS, LAYOUTS, SIDE, SIZES, held_out, make_clutter, questions, size_of
from vtoken.tiny.questions import answers, score


def digest(scene):
    return hashlib.sha256(scene.image.tobytes()).hexdigest()[:16]


def test_scenes_are_a_function_of_seed_and_split():
    assert digest(make_clutter(3)) == digest(make_clutter(3)) != digest(make_clutter(3, "test"))
    assert (
        digest(make_clutter(0)) == "1113d873e0e3a5c4"
        and digest(make_clutter(0, "test")) == "fd33832cc10992a3"
    )
    with pytest.raises(ValueError, match="train or test"):
        make_clutter(0, "valid")


@pytest.mark.parametrize("split", LAYOUTS)
def test_objects_are_many_apart_and_inside(split):
    sizes = Counter()
    for seed in range(40):
        scene = make_clutter(seed, split)
        assert scene.image.size == (SIDE, SIDE) and 15 <= len(scene.objects) <= 30
        assert len({(o.shape, o.colour) for o in scene.objects}) == len(scene.objects)
        sizes.update(map(size_of, scene.objects))
        covered = (scene.masks() > 0.9).sum(0)
        assert covered.max() == 1, f"objects of scene {seed} lie on each other"
    assert set(sizes) == set(SIZES)


def test_splits_share_no_layout():
    cells = {split: {tuple(layout.cells()) for layout in some} for split, some in LAYOUTS.items()}
    assert not cells["train"] & cells["test"]


def test_every_question_has_one_answer():
    for seed in range(30):
        scene = make_clutter(seed, "test")
        seen = {}
        for question, item in questions(scene):
            assert seen.setdefault(question.text, question.answer) == question.answer
            words = question.text.replace("?", " ").split()
            named = [o for o in scene.objects if o.shape in words and o.colour in words]
            assert named == ([] if question.answer == "no" else [item])


def test_held_out_questions_are_balanced():
    pairs = held_out(15, seed=2)
    assert Counter(q.kind for _, q in pairs) == dict.fromkeys(KINDS, 5)
    assert len({digest(scene) for scene, _ in pairs}) == 15
    assert held_out(3, seed=2)[2][1] == pairs[2][1]
    with pytest.raises(ValueError, match="n >= 0"):
        held_out(-1)


def test_the_shipped_model_answers():
    model, processor = tiny.load("llava_clutter")
    pairs = held_out(50, seed=5)
    inputs = processor(text="user: <image>\n", images=pairs[0][0].image, return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 576
    assert score(pairs, answers(model, processor, pairs))["all"] >= 0.84


def test_the_recipe_shows_the_tokens_of_the_object_that_is_named():
    _, processor = llava_clutter.build(width=32, tower_layers=2, llm_layers=4)
    vocabulary = processor.tokenizer.get_vocab()
    _, (ids, labels), goal = llava_clutter.language_batch(0, 2, "train", vocabulary, 0)
    names = {i: word for word, i in vocabulary.items()}
    for row, at in zip(ids, goal["at"], strict=True):
        assert all(names[int(row[i])] == ":" for i in at)
        assert all(int(labels[0, i]) >= 0 for i in goal["at"][0])
    shown = goal["shows"].any(-1)
    answered = labels.gather(1, goal["at"]) != vocabulary["no"]
    assert torch.equal(shown, answered)


def test_look_reads_the_attention_of_the_first_head():
    model, _ = llava_clutter.build(width=32, tower_layers=2, llm_layers=4)
    model.model.language_model.config._attn_implementation = "eager"
    look = Look(model, (1, 2))
    visual = torch.randn(2, 5, 32)
    rows = {}
    for i in (1, 2):
        attention = model.model.language_model.layers[i].self_attn
        attention.register_forward_hook(lambda module, args, out, i=i: rows.__setitem__(i, out[1][:, 0]))
    from training.tiny.language import answer_loss

    ids = torch.randint(9, 20, (2, 2 * 4))
    labels = torch.where(torch.arange(8) % 4 == 3, ids, -100)
    answer_loss(model, visual, ids, labels, [0, 1], 4)
    at = torch.tensor([[2, 6], [3, -1]])
    shows = torch.zeros(2, 2, 5, dtype=torch.bool)
    shows[0, 0, 1:3] = True
    loss, facts = look({"at": at, "shows": shows})
    expected = [
        [rows[i][0, 9, 3:5].sum().item(), rows[i][0, 13, 0].item(), rows[i][1, 10, 0].item()] for i in (1, 2)
    ]
    found = torch.tensor(expected)
    torch.testing.assert_close(loss, -found.log().mean(), atol=1e-5, rtol=1e-4)
    assert facts["look"] == pytest.approx(found.mean().item(), rel=1e-4)


def test_muon_is_torchs_but_for_its_dtype():
    torch.manual_seed(0)
    for shape in ((8, 12), (12, 8)):
        mine = torch.nn.Parameter(torch.randn(shape))
        theirs = torch.nn.Parameter(mine.detach().clone())
        a, b = (
            Muon([mine], lr=0.02, weight_decay=0.01),
            torch.optim.Muon([theirs], lr=0.02, weight_decay=0.01),
        )
        start = mine.detach().clone()
        for _ in range(4):
            mine.grad = theirs.grad = torch.randn(shape)
            a.step(), b.step()
        torch.testing.assert_close(mine, theirs, atol=2e-3, rtol=0)
        assert (mine - start).abs().max() > 0.01


def test_towers_with_named_sizes_have_no_count():
    pixels, goal = llava_clutter.tower_batch(0, 2, "train", 0)
    scene = make_clutter(0)
    assert "count" not in goal and goal["size"].shape == goal["owner"].shape == (2, 576)
    on = goal["owner"][0] >= 0
    sizes = np.array([list(SIZES).index(size_of(o)) for o in scene.objects])
    assert (goal["size"][0][on].numpy() == sizes[goal["owner"][0][on]]).all()
    assert goal["present"].shape[1] == 8 * 7 + 8 + 7 and pixels.shape == (2, 3, SIDE, SIDE)
    model, _ = llava_clutter.build(width=32, tower_layers=4)
    states = hidden_states(model.model.vision_tower, pixels)
    assert len(states) == 5
