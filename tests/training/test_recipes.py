"""Properties of every tiny model, and those of LLaVA-NeXT and LLaVA-OneVision."""

from __future__ import annotations

import hashlib
import json
from functools import partial

import pytest
import torch
from transformers import AutoProcessor

from training.tiny import recipes
from training.tiny.language import layout
from training.tiny.loop import optimise
from training.tiny.recipes import llava_next, llava_onevision
from training.tiny.tower import to_pixels
from vtoken import tiny
from vtoken.tiny import clips
from vtoken.tiny.questions import answers, held_out, prepare, prompt, score
from vtoken.tiny.scenes import COLOURS, questions
from vtoken.tiny.scenes_wide import LARGE, SMALL, cut, make_wide

GROWN = {"llava_next": llava_next, "llava_onevision": llava_onevision}


@pytest.fixture(scope="module", params=tiny.names())
def shipped(request):
    return request.param, *tiny.load(request.param)


def small(name):
    torch.manual_seed(0)
    return GROWN[name].build(width=32, tower_layers=5, llm_layers=4)


def digest(example):
    media = example.media if isinstance(example.media, list) else [example.media]
    return hashlib.sha256(b"".join(image.tobytes() for image in media)).hexdigest()


def test_every_shipped_model_has_a_recipe():
    assert {"llava", "llava_next"} <= set(tiny.names()) <= set(recipes.names())
    for ask in (tiny.path, recipes.recipe):
        with pytest.raises(ValueError, match="unknown tiny model 'gpt'"):
            ask("gpt")


@pytest.mark.parametrize("name", recipes.names())
def test_held_out_questions_are_a_function_of_the_seed(name):
    first, again, other = held_out(name, 20), held_out(name, 20), held_out(name, 20, seed=1)
    assert [(digest(e), q) for e, q in first] == [(digest(e), q) for e, q in again]
    assert not {digest(e) for e, _ in first} & {digest(e) for e, _ in other}
    assert all(example.split == "test" for example, _ in first)
    assert len({question.kind for _, question in first}) >= 3


@pytest.mark.parametrize("name", recipes.names())
def test_processor_survives_saving(name, tmp_path):
    processor = recipes.recipe(name).build()[1]
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is type(processor)
    for pair in held_out(name, 4):
        mine, theirs = prepare(processor, [pair]), prepare(loaded, [pair])
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(torch.as_tensor(mine[k]), torch.as_tensor(theirs[k])) for k in mine)
        assert processor.tokenizer.unk_token_id not in mine["input_ids"]


def test_shipped_model_is_small_and_answers(shipped):
    name, model, processor = shipped
    assert sum(f.stat().st_size for f in tiny.path(name).iterdir()) <= 10e6
    pairs = held_out(name, 24, seed=5)
    said = answers(model, processor, pairs, batch_size=8)
    told = json.loads((tiny.path(name) / "training_log.json").read_text())["accuracy"]
    assert told["all"] > 0.95 and min(told.values()) > 0.8
    assert score(pairs, said)["all"] >= 0.9
    single = [answers(model, processor, [pair])[0] for pair in pairs[:4]]
    assert single == said[:4]


def test_base_image_alone_is_not_enough():
    model, processor = tiny.load("llava_next")
    pairs = held_out("llava_next", 30, seed=6)
    alone = answers(model, processor, pairs, change=partial(llava_next.hide, model, "crops"))
    assert score(pairs, alone)["all"] <= score(pairs, answers(model, processor, pairs))["all"] - 0.2


@pytest.mark.parametrize(("plan", "build"), [(SMALL, llava_next.build), (LARGE, llava_onevision.build)])
def test_no_object_is_cut_and_masks_are_where_the_crops_show_them(plan, build):
    processor = build(width=32, tower_layers=1, llm_layers=1)[1]
    for i in range(40):
        scene = make_wide(i, "test" if i % 2 else "train", plan)
        masks = cut(scene, plan.tile)
        assert (masks[1:].any((2, 3)).sum(0) == 1).all()
        assert masks[0].any((1, 2)).all()
        crops = processor.image_processor(scene.image, return_tensors="pt")["pixel_values"][0]
        assert len(crops) == len(masks)
        pixels = crops[1:].permute(0, 2, 3, 1).numpy() * 127.5 + 127.5
        for item, mask in zip(scene.objects, masks[1:].transpose(1, 0, 2, 3)):
            assert abs(pixels[mask >= 1] - COLOURS[item.colour]).max() < 15.1


def test_places_of_wide_scenes_are_quadrants_of_the_canvas():
    for i in range(60):
        scene = make_wide(i)
        width, height = scene.image.size
        assert (width, height) == SMALL.canvases[i % 4]
        for item in scene.objects:
            x, y = (item.box[0] + item.box[2]) / 2, (item.box[1] + item.box[3]) / 2
            assert (
                item.place
                == f"{'top' if y < height / 2 else 'bottom'} {'left' if x < width / 2 else 'right'}"
            )
            assert min(abs(x - width / 2), abs(y - height / 2)) > 3


def shown(name, processor):
    """Something of each kind that a model of that name reads, as in training and as an example."""
    if name == "llava_next":
        for k in range(len(SMALL.canvases)):
            yield llava_next.language_batch(processor, 0, 1, "train", k)[0], make_wide(k)
        return
    some = processor.image_processor([make_wide(2, layout=LARGE).image], return_tensors="pt")
    yield (some["pixel_values"], some["image_sizes"]), make_wide(2, layout=LARGE)
    clip = clips.make_clip(3, frames=6)
    yield (to_pixels(clip.media)[None], None), clip


@torch.no_grad()
@pytest.mark.parametrize("name", GROWN)
def test_packed_sequences_read_what_the_model_reads(name):
    model, processor = small(name)
    vocabulary = processor.tokenizer.get_vocab()
    for inputs, example in shown(name, processor):
        question = (clips.questions if isinstance(example, clips.Clip) else questions)(example)[3]
        kind = "video" if isinstance(example, clips.Clip) else "image"
        words = prompt(processor, question.text, kind).partition("\n")[2]
        ids = torch.tensor([vocabulary[w] for w in words.replace("?", " ?").replace(":", " :").split()])
        visual = GROWN[name].visual_tokens(model.eval(), inputs)
        embed = model.get_input_embeddings()
        before = embed(torch.tensor([vocabulary["user"], vocabulary[":"]]))[None]
        mask, position = layout(visual.shape[1], 2, 1, len(ids))
        hidden = model.model.language_model(
            inputs_embeds=torch.cat([before, visual, embed(ids)[None]], 1),
            attention_mask=mask,
            position_ids=position,
        ).last_hidden_state
        single = model(**prepare(processor, [(example, question)])).logits
        torch.testing.assert_close(model.lm_head(hidden), single, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if i == 0 else pytest.mark.product) for i, n in enumerate(GROWN)]
)
def test_a_few_steps_reduce_the_loss(name, monkeypatch):
    recipe = GROWN[name]
    for plan in (recipe.TOWER, recipe.LANGUAGE):
        monkeypatch.setitem(plan, "batch", 4 if plan is recipe.TOWER else 1)
    model, processor = small(name)
    log: list[dict] = []
    recipe.train_tower(model, processor, log, steps=21, checks=4)
    recipe.train_language(model, processor, log, steps=21, checks=1)
    for stage in ("tower", "language"):
        losses = [entry.get("held_out_loss", entry["loss"]) for entry in log if entry["stage"] == stage]
        assert losses[-1] < 0.9 * losses[0]


@torch.no_grad()
@pytest.mark.parametrize("name", GROWN)
def test_warm_start_takes_over_the_words_and_what_the_tower_sees(name):
    model, _ = GROWN[name].build()
    GROWN[name].warm_start(model)
    old = tiny.load("llava")[0]
    rows = len(old.lm_head.weight)
    assert torch.equal(model.lm_head.weight[:rows], old.lm_head.weight)
    pixels = to_pixels([make_wide(3, layout=LARGE).image])
    side = model.config.vision_config.image_size
    then = old.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    now = model.model.vision_tower(pixels[..., :side, :side], output_hidden_states=True)
    now = now.hidden_states[model.config.vision_feature_layer]
    if name == "llava_next":  # a quarter of the image: its surroundings differ
        now, then = now[:, 1:], then.unflatten(1, (12, 12))[:, : side // 8, : side // 8].flatten(1, 2)
    assert torch.cosine_similarity(now, then, -1).mean() > (0.9 if name == "llava_onevision" else 0.6)


def test_training_goes_on_where_it_was_interrupted(tmp_path):
    def run(steps, keep):
        torch.manual_seed(0)
        parameters = {
            "a.layers.0": torch.nn.Parameter(torch.randn(4, 4)),
            "bias": torch.nn.Parameter(torch.zeros(4)),
        }

        def loss_of(item, done):
            if item >= steps:
                raise KeyboardInterrupt
            generator = torch.Generator().manual_seed(item)
            x = torch.randn(8, 4, generator=generator)
            return ((x @ parameters["a.layers.0"] + parameters["bias"] - x.flip(1)) ** 2).mean(), {}

        log: list[dict] = []
        try:
            optimise(
                "fit",
                parameters,
                int,
                loss_of,
                {"steps": 120, "rate": 0.01, "muon_rate": 0.02},
                log,
                keep=keep,
            )
        except KeyboardInterrupt:
            return None
        return parameters, [(entry["step"], entry["loss"]) for entry in log]

    (whole, log), _ = run(120, None), run(70, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["fit.safetensors"]
    again, same = run(120, tmp_path)
    assert log[-1][1] < 0.8 * log[0][1] and log == same
    assert all(torch.equal(whole[name], again[name]) for name in whole)
