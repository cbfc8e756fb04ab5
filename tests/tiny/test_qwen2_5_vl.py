from __future__ import annotations

import numpy as np
import pytest
import torch

from training.tiny.language import layout
from training.tiny.qwen_language import (
    SLOTS,
    WIDTHS,
    choose_about_clip,
    choose_about_scene,
    language_batch,
    positions,
    train_language,
    visual_tokens,
    warm_start,
)
from training.tiny.qwen_tower import (
    OBJECTS,
    crowd,
    encode,
    image_patches,
    owners,
    targets,
    train_tower,
    video_patches,
)
from training.tiny.reading import SIZES, ReadingHeads, clip_targets, look_targets, places, stack
from training.tiny.recipes import qwen2_5_vl as recipe
from vtoken import tiny
from vtoken.tiny import clips, scenes
from vtoken.tiny.assets import SHAPES
from vtoken.tiny.clips import Frames, make_clip
from vtoken.tiny.digits import DIGITS
from vtoken.tiny.questions import answers, held_out, prepare, score
from vtoken.tiny.scenes import Question, make_scene


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    model, processor = recipe.build(width=32, tower_width=32, tower_layers=4, llm_layers=2)
    return model.eval(), processor


@pytest.fixture(scope="module")
def shipped():
    return tiny.load("qwen2_5_vl")


def frames_of(clip):
    return np.stack([np.asarray(frame) for frame in clip.media])


def test_visual_tokens_and_seconds(small):
    _, processor = small
    inputs = prepare(processor, [(make_scene(0), Question("where is the star?", "", ""))])
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 100
    inputs = prepare(
        processor, [(make_clip(0, frames=8, fps=1.0), Question("which digit came first?", "", ""))]
    )
    assert (inputs["input_ids"] == processor.video_token_id).sum() == 4 * 36
    assert inputs["second_per_grid_ts"].tolist() == [2.0]
    assert processor.tokenizer.unk_token_id not in inputs["input_ids"]
    words = processor.tokenizer(" ".join([*clips.vocabulary(), *scenes.vocabulary()])).input_ids
    assert processor.tokenizer.unk_token_id not in words


@torch.no_grad()
def test_batched_tower_equals_the_models_own(small):
    model, processor = small
    tower = model.model.visual
    assert tower.fullatt_block_indexes == [2]
    some = [make_scene(i) for i in range(2)]
    inputs = processor.image_processor(images=[s.image for s in some], return_tensors="pt")
    expected = tower(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    torch.testing.assert_close(encode(tower, image_patches(processor, some))[0].flatten(0, 1), expected)
    frames = frames_of(make_clip(1, frames=6))
    inputs = processor.video_processor(videos=[frames], do_sample_frames=False, return_tensors="pt")
    expected = tower(inputs["pixel_values_videos"], inputs["video_grid_thw"]).pooler_output
    torch.testing.assert_close(encode(tower, video_patches(frames))[0].flatten(0, 1), expected)


@torch.no_grad()
def test_packed_logits_equal_single_prompts(small):
    model, processor = small
    plan = {"batch": 2}
    vocabulary, embed = processor.tokenizer.get_vocab(), model.get_input_embeddings()
    before = embed(torch.tensor([[vocabulary[t] for t in ("user", ":", "<|vision_start|>")]]))
    for kind, patches, grid, seconds, (ids, labels), _ in language_batch(processor, plan, 0, 3):
        width, visual = WIDTHS[kind], visual_tokens(model, patches, grid)
        mask, _ = layout(visual.shape[1], 3, SLOTS, width)
        hidden = model.model.language_model(
            inputs_embeds=torch.cat([before, visual, embed(ids)], 1),
            attention_mask=mask,
            position_ids=positions(model, kind, grid, seconds, SLOTS, width),
        ).last_hidden_state[0, -ids.shape[1] :]
        example = make_scene(3) if kind == "image" else make_clip(3, "train", 2 * grid[0], 2 / seconds)
        for slot in (0, 4, 9):
            row, told = ids[0, slot * width :][:width], labels[0, slot * width :][:width]
            first = int((told >= 0).nonzero()[0, 0])
            text = processor.tokenizer.decode(row[: first - 1])  # up to "assistant :"
            single = prepare(processor, [(example, Question(text, "", ""))])
            torch.testing.assert_close(
                model.lm_head(hidden[slot * width + first]),
                model(**single).logits[0, -1],
                atol=1e-4,
                rtol=1e-4,
            )


def test_targets_are_where_the_objects_are():
    for i in range(20):
        frames, scene = crowd(i, "test")
        assert 2 <= len(scene.objects) <= 4 and len(frames) == 2
        goal = targets([scene], 12)
        cells, patches = goal["cell_object"][0].view(6, 6), goal["patch_object"][0].view(6, 6, 2, 2)
        own = owners(scene, 12).reshape(12, 12)
        for index, item in enumerate(scene.objects):
            x, y = (item.box[0] + item.box[2]) // 2, (item.box[1] + item.box[3]) // 2
            assert cells[y // 16, x // 16] == OBJECTS.index(item.shape) + 1
            assert own[y // 8, x // 8] == index
            assert patches[y // 16, x // 16, y // 8 % 2, x // 8 % 2] == OBJECTS.index(item.shape) + 1
        assert set(goal["cell_count"][cells.view(1, -1) > 0].tolist()) == {len(scene.objects)}
        # the middle of 3 x 3: the patch
        outline = goal["outline"][0].view(6, 6, 2, 2, 12, 12)[:, :, :, :, 4:8, 4:8]
        drawn = outline.permute(0, 2, 4, 1, 3, 5).reshape(48, 48)
        expected = scene.masks().max(0).reshape(48, 2, 48, 2).mean((1, 3))
        np.testing.assert_allclose(drawn, expected, atol=1e-6)


@pytest.mark.parametrize("stride", [1, 2])
def test_read_outs_ask_for_what_has_been_shown_and_nothing_later(stride):
    for i in range(30):
        clip = make_clip(i, frames=8)
        goal = clip_targets(clip, stride)
        assert all(target.shape == (8 // stride, 36) for target in goal.values())
        for step in range(8 // stride):
            seen = [m for m in clip.moments if m.start <= stride * step]
            begun = sum(m.digit is not None for m in seen)
            assert goal["so_far"][step, -1] == begun and (np.diff(goal["so_far"].flatten()) >= 0).all()
            now = [m for m in seen if stride * step < m.stop]
            asked = (goal["digit"][step] >= 0).nonzero()[0]
            assert bool(len(asked)) == bool(now)
            for cell in asked:
                assert goal["digit"][step, cell] == (10 if now[0].digit is None else int(now[0].digit))
                assert goal["shape"][step, cell] == (
                    8 if now[0].shape is None else SHAPES.index(now[0].shape)
                )
                shown = {digit for digit in range(10) if goal["seen"][step, cell] >> digit & 1}
                assert shown == {int(m.digit) for m in seen if m.digit is not None}
                if now[0].start == stride * step:  # every object of the moment has a cell up to here
                    tops = [(o.box[1] + 5) // 16 * 6 + (o.box[0] + 5) // 16 for o in now[0].objects]
                    assert all(top <= cell + 7 for top in tops)
            for cell in (goal["shape_before"][step] >= 0).nonzero()[0]:
                before = [m.shape for m in seen if m.shape and m.start < now[0].start]
                assert goal["shape_before"][step, cell] == (SHAPES.index(before[-1]) if before else 8)
    halves = places(1, 10)
    assert halves["row"].reshape(10, 10).tolist() == [[0] * 10] * 5 + [[1] * 10] * 5
    assert (halves["column"].reshape(10, 10) == halves["row"].reshape(10, 10).T).all()


def test_questions_in_training_hold_what_is_hard_to_learn():
    for i in range(40):
        rng = np.random.default_rng(i)
        clip = make_clip(i, frames=8)
        asked = choose_about_clip(clip, rng, 10)
        assert len(asked) == len(set(asked)) == 10
        assert sum(q.text[-2] in DIGITS and q.kind == "presence" for q in asked) >= 2
        assert {q.kind for q in asked} == set(clips.KINDS)
        about = choose_about_scene(make_scene(i), rng)
        assert len(about) == 10 and sum(q.kind == "where" for q in about) >= 4


@pytest.mark.parametrize("stride", [1, 2])
def test_a_named_thing_is_looked_for_where_it_is_shown(stride):
    named = 0
    for i in range(20):
        clip = make_clip(i, frames=8)
        asked = choose_about_clip(clip, np.random.default_rng(i), 10)
        words, shows = look_targets(clip, asked, stride, 12)
        assert words.shape == (12, 2) and shows.shape == (12, 2, 8 // stride * 36) and not shows[10:].any()
        for question, (word, end), (where, read) in zip(asked, words, shows.reshape(12, 2, -1, 6, 6)):
            told = question.text.replace("?", " ?").split()
            assert end == (-1 if word < 0 else f"{' '.join(told)} assistant :".split().index(":"))
            if "after" in told:
                assert read.any() and not (read & where).any()
                answers_at = [m for m in clip.moments if m.digit == question.answer]
                assert {s for s in range(8 // stride) if read[s].any()} == {
                    s for m in answers_at for s in range(8 // stride) if m.start <= s * stride < m.stop
                }
            else:
                assert (read == where).all()
            names = {w for w in told if w in (*DIGITS, *SHAPES, *scenes.COLOURS)}
            assert (word >= 0) == bool(names) and (word < 0 or told[word] in names)
            named += bool(names)
            if question.kind == "presence":
                assert where.any() == (question.answer == "yes")
            for step, frame in enumerate(range(0, 8, stride)):
                objects = [o for m in clip.moments if m.start <= frame < m.stop for o in m.objects]
                fits = [o for o in objects if names and names <= {o.shape, o.colour}]
                assert where[step].any() == bool(fits)
                for o in fits:
                    assert where[step, (o.box[1] + o.box[3]) // 32, (o.box[0] + o.box[2]) // 32]
    assert named > 50


@torch.no_grad()
@pytest.mark.parametrize("wrong", [None, 4])
def test_a_read_out_of_what_has_been_seen_is_right_only_as_a_whole(wrong):
    heads = ReadingHeads(recipe.build(width=32, tower_width=32, tower_layers=3, llm_layers=4)[0], 3)
    heads.remove()
    goal = stack([clip_targets(make_clip(0, frames=8), 2)])
    bits = (goal["seen"][..., None] >> torch.arange(10) & 1) * 2.0 - 1
    if wrong is not None:
        bits[..., wrong] *= -1
    before = sum(list(SIZES.values())[: list(SIZES).index("seen")])
    for read in heads.read:
        read[0] = torch.nn.Identity()
        read[1].weight.zero_()
        read[1].bias.zero_()
        read[1].weight[before : before + 10, :10] = torch.eye(10)
    state = torch.nn.functional.pad(bits, (0, 22, 3, 0))
    heads.states[:] = [state, state]
    assert heads(goal)[1]["seen"] == (wrong is None) and not heads.states


def test_a_few_steps_reduce_the_loss():
    torch.manual_seed(0)
    model, processor = recipe.build(width=32, tower_width=32, tower_layers=3, llm_layers=4)
    start = model.model.visual.blocks[0].attn.qkv.weight.clone()
    log: list[dict] = []
    tower = {**recipe.TOWER, "batch": 5, "scenes": 1}
    train_tower(model, processor, tower, log, 0, steps=21, checks=1)
    learnt = model.model.visual.blocks[0].attn.qkv.weight.clone()
    train_language(model, processor, {**recipe.LANGUAGE, "batch": 4}, log, 0, steps=21, checks=1)
    for stage in ("tower", "language"):
        losses = [entry["loss"] for entry in log if entry["stage"] == stage]
        assert losses[-1] < 0.9 * losses[0]
    assert not any(module._forward_hooks for module in model.modules())
    assert not learnt.equal(start) and model.model.visual.blocks[0].attn.qkv.weight.equal(learnt)


def test_warm_start_takes_what_fits():
    model, _ = recipe.build()
    warm_start(model)
    old = tiny.load("llava")[0]
    torch.testing.assert_close(model.lm_head.weight[:60], old.lm_head.weight)
    for name, p in old.model.language_model.named_parameters():
        torch.testing.assert_close(dict(model.model.language_model.named_parameters())[name][: len(p)], p)


def test_held_out_takes_images_and_clips_in_turn():
    pairs = held_out("qwen2_5_vl", 41)
    assert [isinstance(example, scenes.Scene) for example, _ in pairs] == [True, False] * 20 + [True]
    kinds = [question.kind for _, question in pairs]
    assert all(kinds.count(kind) == 4 for kind in (*scenes.KINDS[1:], *clips.KINDS))
    assert {len(example.media) for example, _ in pairs[1::2]} == {4, 6, 8}
    assert held_out("qwen2_5_vl", 41)[7][1] == pairs[7][1] != held_out("qwen2_5_vl", 41, seed=1)[7][1]


def test_shipped_model_answers_held_out_questions(shipped):
    assert [type(part).__name__ for part in shipped] == [
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLProcessor",
    ]
    pairs = held_out("qwen2_5_vl", 80, seed=3)
    said = answers(*shipped, pairs)
    assert score(pairs[::2], said[::2])["all"] >= 0.95
    assert score(pairs[1::2], said[1::2])["all"] >= 0.9


def test_shipped_model_sees_the_order_of_frames(shipped):
    first, last = (Question(f"which digit came {when}?", "", "order") for when in ("first", "last"))
    right = []
    for i in range(12):
        clip = make_clip(3_000_000 + i, "test")
        shown = [m.digit for m in clip.moments if m.digit]
        turned = Frames(
            [frame for k in range(6, -1, -2) for frame in clip.media[k : k + 2]], clip.media.seconds
        )
        backwards = clips.Clip(turned, clip.moments, clip.seed, clip.split, clip.background, clip.fps)
        said = answers(*shipped, [(clip, first), (backwards, first), (clip, last), (backwards, last)])
        right.append(said == [shown[0], shown[-1], shown[-1], shown[0]])
    assert sum(right) >= 10
