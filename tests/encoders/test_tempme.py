"""TempMe of vtoken against the oracle, and the properties that the paper's formulation has."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import vtoken
from vtoken.patching import patch_of
from vtoken.strategies import TempMe
from vtoken.tokens import EncoderShape

from . import oracle_tempme
from .models import CASES, GRID, images, open_clip_case

PATCHES = GRID * GRID
FLOAT32, FLOAT64 = dict(rtol=1e-5, atol=2e-5), dict(rtol=0, atol=1e-9)
TOWERS = (
    *("open_clip-tok", "open_clip-quick_gelu", "open_clip-layer_scale", "open_clip-avg", "open_clip-coca"),
    *("open_clip-sequence_first", "timm-plain", "timm-registers", "timm-distilled", "timm-cls_avg"),
    *("timm-cls_map", "timm-qk_norm", "timm-eva", "timm-eva_half", "timm-eva_registers"),
    *("hf-CLIPVisionModel-sdpa", "hf-ViTModel-eager", "hf-Dinov2WithRegistersModel-sdpa"),
)
FEW = ("open_clip-tok", "timm-registers", "timm-eva", "hf-CLIPVisionModel-sdpa")
SIX = dict(frames=6, r=3, layers=(1, 2), fuse=(2, 3))


def clip12(size=49):
    """open_clip with 12 layers and 7 x 7 patches."""
    return open_clip_case(layers=12, image_size=size)


def random_positions(strategy, width=32):
    positions = strategy.make_frame_positions(width)
    for i, p in enumerate(positions):
        p.data = 0.5 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).double()
    return positions


def compare(case, options, videos=2, dtype=torch.float64, size=35, positions=False):
    """Tokens after the last block and outputs of a patched model, and those of the oracle."""
    model = case.build().to(dtype)
    strategy = TempMe(**options)
    factors = dict(zip(strategy._fusing(len(case.layers(model))), strategy.factors))
    vectors = random_positions(strategy) if positions else None
    x = images(videos * strategy.frames, size).to(dtype)
    named = {k: v for k, v in options.items() if k in ("r", "cross", "intra", "prop_attn")}
    with torch.no_grad():
        reference = copy.deepcopy(model).double()
        entering = case.entering(reference, x.double()).unflatten(0, (videos, -1))
        rope = None if case.rope is None else case.rope(reference)
        extra = dict(rope=rope, half=case.half, positions=vectors)
        results = [
            oracle_tempme.tempme(case.blocks(reference), each, case.prefix, factors, **named, **extra)
            for each in entering
        ]
        tokens = torch.cat([each.spread(strategy.frames) for each in results])
        ones = torch.ones(tokens.shape[1]).double()
        want = torch.stack([case.head(reference, each, ones) for each in tokens])
        vtoken.patch(model, strategy)
        after, out = case.leaving(model, x), case.call(model, x)
    tolerance = FLOAT64 if dtype == torch.float64 else FLOAT32
    torch.testing.assert_close(after, tokens.to(dtype), **tolerance)
    torch.testing.assert_close(out, want.to(dtype), **tolerance)
    return model, results, out


# -- against the oracle --------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", TOWERS)
def test_every_tower_is_the_oracle(name):
    model, results, out = compare(CASES[name], SIX)
    report = vtoken.report(model)
    assert report.tokens_per_layer == pytest.approx([n * clips / 6 for n, clips in results[0].trace])
    assert report.frames == 6 and report.images == 12
    vtoken.unpatch(model)
    plain = CASES[name].call(model, images(12).double())
    assert (plain - out).abs().max() > 1e-3  # merging matters here


@pytest.mark.parametrize("name", FEW)
def test_towers_in_float32(name):
    compare(CASES[name], SIX, dtype=torch.float32)


@pytest.mark.parametrize("name", FEW)
def test_frame_positions(name):
    _, _, moved = compare(CASES[name], SIX, positions=True)
    _, _, still = compare(CASES[name], SIX)
    assert (moved - still).abs().max() > 1e-3


def test_the_published_setting():
    model, results, _ = compare(clip12(), dict(frames=12), videos=1, size=49)
    assert results[0].trace == [*[(n, 12) for n in range(48, 32, -2)], (44, 6), (56, 3), (107, 1), (97, 1)]
    assert vtoken.report(model).tokens_per_layer == pytest.approx([n * c / 12 for n, c in results[0].trace])


@pytest.mark.parametrize(
    "options",
    [
        dict(SIX, r=100),  # capped at half of the patches
        dict(SIX, cross=0.9, intra=0.9),
        dict(SIX, cross=0.0),
        dict(SIX, intra=0.0, r=0),
        dict(SIX, cross=0.29, intra=0.07),
        dict(SIX, prop_attn=False),
        dict(frames=12, layers=(0, 3), fuse=(3, 4)),
        dict(frames=8, layers=(1, 3), fuse=(2, 2)),  # two clips are left, a plain layer between
        dict(frames=5, layers=(2,), fuse=(5,)),
        dict(frames=3, layers=(), fuse=(), r=4),  # ToMe in every frame
    ],
    ids=str,
)
def test_settings(options):
    model, results, _ = compare(CASES["open_clip-tok"], options)
    frames = options["frames"]
    assert vtoken.report(model).tokens_per_layer == pytest.approx(
        [n * c / frames for n, c in results[0].trace]
    )


def test_gradients_are_the_oracle_s():
    case, strategy = CASES["open_clip-tok"], TempMe(**SIX)
    model, positions = case.build().double(), random_positions(strategy)
    x = images(6).double()
    read = (model.visual.transformer.resblocks[0].attn.in_proj_weight, model.visual.positional_embedding)
    video = oracle_tempme.tempme(
        case.blocks(model), case.entering(model, x), 1, {1: 2, 2: 3}, r=3, positions=positions
    )
    weight = torch.randn(6, PATCHES + 1, 32, generator=torch.Generator().manual_seed(9)).double()
    want = torch.autograd.grad((video.spread(6) * weight).sum(), [*read, *positions])
    vtoken.patch(model, strategy)
    found = torch.autograd.grad((case.leaving(model, x) * weight).sum(), [*read, *positions])
    for a, b in zip(found, want, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["hf-CLIPVisionModel-sdpa", "timm-plain"])
def test_maps_of_inner_layers_have_all_tokens(name):
    model, results, _ = compare(CASES[name], SIX)
    x = images(12).double()
    with torch.no_grad():
        if name.startswith("hf"):
            maps = model(pixel_values=x, output_hidden_states=True).hidden_states[1:-1]
        else:
            maps = model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)[:-1]
    for layer, found in enumerate(maps):
        want = torch.cat([each.spread(6, layer) for each in results])
        torch.testing.assert_close(found, want[:, want.shape[1] - found.shape[1] :], **FLOAT64)


# -- the plan ------------------------------------------------------------------------------------------------
def vit_b(patches, size):
    width = 768
    return EncoderShape(12, patches, 1, 4 * width**2, 8 * width**2, width, 3 * size**2 * width)


def work(strategy, shape):
    """Multiply-adds per video, and tokens at the end, of the plan."""
    tokens, clips, total = (
        shape.patches + 1,
        strategy.frames,
        strategy.frames * shape.patches * shape.embedding_macs,
    )
    for step in strategy.encoder_plan(shape):
        clips, attend = clips // step.fuse, tokens * step.fuse - step.before
        tokens = attend - step.after
        total += clips * shape.layer_macs(attend, tokens)
    return total, tokens * clips


@pytest.mark.parametrize(
    "shape,options,tokens,dense,merged",
    [
        (vit_b(49, 32), dict(), 97, 52.9, 34.7),
        (vit_b(196, 16), dict(r=10, cross=0.4, intra=0.2), 127, 210.8, 121.1),
    ],
    ids=["B/32", "B/16"],
)
def test_work_of_the_published_models(shape, options, tokens, dense, merged):
    found, left = work(TempMe(**options), shape)
    assert left == tokens
    assert 12 * shape.macs([0] * 12) / 1e9 == pytest.approx(dense, rel=0.005)
    assert found / 1e9 == pytest.approx(merged, rel=0.005)


def fusing(depth, **options):
    steps = TempMe(**options).encoder_plan(EncoderShape(depth, 49, 1))
    return {i: s.fuse for i, s in enumerate(steps) if s.fuse > 1}


def test_default_layers_and_factors():
    assert fusing(12, frames=12) == {8: 2, 9: 2, 10: 3}
    assert fusing(24, frames=12) == {18: 2, 20: 2, 22: 3}
    assert fusing(12, frames=64) == {8: 4, 9: 4, 10: 4}
    assert fusing(12, frames=7) == {10: 7}
    assert fusing(12, frames=1) == {}


@pytest.mark.parametrize("budget", [0.2, 0.145, 0.1, 0.2, 9])
def test_a_budget_takes_the_least_r_that_meets_it(budget):
    shape = EncoderShape(12, 49, 1)

    def left(**options):
        tokens, prefix, clips = 50, 1, 12
        for s in TempMe(**options).encoder_plan(shape):
            tokens, prefix, clips = tokens * s.fuse - s.before - s.after, prefix * s.fuse, clips // s.fuse
        return (tokens - prefix) * clips / 12 / 49

    share = budget / 49 if isinstance(budget, int) else budget
    r = next(r for r in range(25) if left(r=r) <= share)
    assert TempMe(budget=budget).encoder_plan(shape) == TempMe(r=r).encoder_plan(shape)
    assert 0 < r < 24 and left(r=r - 1) > share


# -- properties ----------------------------------------------------------------------------------------------
def test_nothing_merged_is_the_mean_of_the_frames():
    case = CASES["open_clip-tok"]
    model, x = case.build(), images(12)
    with torch.no_grad():
        plain = case.call(model, x)
        vtoken.patch(model, "tempme", frames=6, r=0, cross=0.0, intra=0.0, fuse=())
        found = case.call(model, x)
    assert torch.equal(found, plain)
    mean = F.normalize(F.normalize(plain, dim=1).view(2, 6, -1).mean(1), dim=1)
    torch.testing.assert_close(vtoken.video_embeddings(found, 6), mean)


@pytest.mark.parametrize("name", TOWERS)
def test_equal_frames_that_are_fused_see_what_one_frame_sees(name):
    case = CASES[name]
    model, x = case.build(), images(2).repeat_interleave(6, 0)
    with torch.no_grad():
        plain = case.call(model, x)
        vtoken.patch(model, "tempme", **SIX | dict(r=0), cross=0.0, intra=0.0)
        found = case.call(model, x)
    assert vtoken.report(model).frames == 6
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)


def recorded(strategy):
    """Sizes and prefix of every merge between attention and MLP."""
    seen, original = [], strategy.merge_in_encoder

    def merge(tokens):
        seen.append((tokens.sizes, tokens.prefix))
        return original(tokens)

    strategy.merge_in_encoder = merge
    return seen


@pytest.mark.parametrize("still", [False, True])
def test_sizes_count_all_patches_and_class_tokens_stay_alone(still):
    case, strategy = clip12(35), TempMe(frames=12)
    model, seen = case.build(), recorded(strategy)
    vtoken.patch(model, strategy)
    x = images(1).expand(24, -1, -1, -1) if still else images(24)
    with torch.no_grad():
        out, again = case.call(model, x), case.call(model, x)
    assert torch.equal(out, again)
    assert len(seen) == 24 and [p for _, p in seen][6:12] == [1, 1, 2, 4, 12, 12]
    for sizes, prefix in seen:
        assert torch.equal(sizes.reshape(2, -1).sum(1), torch.full((2,), 12.0 * (PATCHES + 1)))
        assert (sizes[:, :prefix] == 1).all()
    run = patch_of(model).runs.last
    owner = run.owner().view(2, 12, PATCHES + 1)
    assert torch.equal(owner[..., 0], torch.arange(12).expand(2, -1)) and owner[..., 1:].min() == 12
    assert run.sizes[:, :12].unique().tolist() == [1.0] and run.sizes.sum() == 24 * (PATCHES + 1)


@pytest.mark.parametrize("fuse", [(2, 2, 3), (3, 4), (2, 3, 2)])
def test_frames_keep_their_order(fuse):
    case = clip12(35)
    model, x = case.build(), images(24)
    with torch.no_grad():
        for block in model.visual.transformer.resblocks:  # identities: a class token stays what it is
            for last in (block.attn.out_proj, block.mlp.c_proj):
                last.weight.zero_(), last.bias.zero_()
        model.visual.class_embedding.zero_()
        positions = torch.randn(24, 1, 32, generator=torch.Generator().manual_seed(5))
        tag = model.visual.transformer.register_forward_pre_hook(
            lambda _, args: (torch.cat([positions, args[0][:, 1:]], 1),)
        )
        plain = case.call(model, x)
        vtoken.patch(model, "tempme", frames=12, fuse=fuse)
        found = case.call(model, x)
    tag.remove()
    assert torch.pdist(plain).min() > 0.1
    torch.testing.assert_close(found, plain)


def test_videos_do_not_see_each_other():
    case = CASES["open_clip-tok"]
    model, x = case.build(), images(18)
    vtoken.patch(model, "tempme", **SIX)
    with torch.no_grad():
        together = case.call(model, x)
        for i in range(3):
            part = slice(6 * i, 6 * i + 6)
            torch.testing.assert_close(case.call(model, x[part]), together[part], rtol=1e-4, atol=1e-5)
        order = torch.tensor([2, 0, 1])
        moved = case.call(model, x.unflatten(0, (3, 6))[order].flatten(0, 1))
        torch.testing.assert_close(
            moved, together.unflatten(0, (3, 6))[order].flatten(0, 1), rtol=1e-4, atol=1e-5
        )


def test_which_frames_are_neighbours_matters():
    case = CASES["open_clip-tok"]
    model, x = case.build(), images(6)
    swapped = [0, 2, 1, 3, 4, 5]  # across the border of the first two clips
    vtoken.patch(model, "tempme", **SIX)
    with torch.no_grad():
        plain, moved = case.call(model, x), case.call(model, x[swapped])
    assert (plain[swapped] - moved).abs().max() > 1e-3


@pytest.mark.parametrize("cross", [0.0, 0.3])
def test_positions_count_only_where_clips_are_merged(cross):
    case, outs = CASES["open_clip-tok"], {}
    for kind in ("none", "zero", "random"):
        strategy = TempMe(**SIX, cross=cross)
        if kind == "zero":
            strategy.make_frame_positions(32)
        elif kind == "random":
            random_positions(strategy)
        with torch.no_grad(), vtoken.applied(model := case.build(), strategy):
            outs[kind] = case.call(model, images(6))
    assert torch.equal(outs["none"], outs["zero"])
    assert torch.equal(outs["none"], outs["random"]) == (cross == 0)


def test_masked_frames_do_not_count():
    frames = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    found = vtoken.video_embeddings(frames, 3, mask)
    torch.testing.assert_close(found[0], F.normalize(F.normalize(frames[:2], dim=1).mean(0), dim=0))
    assert torch.equal(found[1], torch.zeros(8))
    assert torch.equal(
        vtoken.video_embeddings(frames, 3, torch.ones(2, 3)), vtoken.video_embeddings(frames, 3)
    )
    with pytest.raises(ValueError, match=r"takes \(videos \* 4, D\), found \(6, 8\)"):
        vtoken.video_embeddings(frames, 4)
    with pytest.raises(ValueError, match=r"one entry per frame, \(2, 3\), found \(2, 2\)"):
        vtoken.video_embeddings(frames, 3, mask[:, :2])


# -- files of positions, and what is refused -----------------------------------------------------------------
def test_positions_from_a_file(tmp_path):
    case, first = CASES["open_clip-tok"], TempMe(**SIX)
    with pytest.raises(ValueError, match="no frame positions to save"):
        first.save_frame_positions(tmp_path / "none.safetensors")
    random_positions(first)
    path = str(tmp_path / "positions.safetensors")
    first.save_frame_positions(path)
    model, x = case.build().double(), images(6).double()
    outs = []
    for strategy in (first, TempMe(**SIX, frame_positions=path)):
        with torch.no_grad(), vtoken.applied(model, strategy):
            outs.append(case.call(model, x))
    assert torch.equal(*outs)
    with pytest.raises(ValueError, match="of 8, 4 vectors of one width, found"):
        vtoken.patch(model, "tempme", frames=8, layers=(1, 2), fuse=(2, 2), frame_positions=path)
    with pytest.raises(ValueError, match="cannot be read as a safetensors file"):
        vtoken.patch(model, "tempme", **SIX, frame_positions=str(tmp_path / "missing.safetensors"))
    (tmp_path / "odd.safetensors").write_bytes(b"odd")
    with pytest.raises(ValueError, match="cannot be read as a safetensors file"):
        vtoken.patch(model, "tempme", **SIX, frame_positions=str(tmp_path / "odd.safetensors"))


def test_positions_of_another_shape_are_refused():
    case, strategy = CASES["open_clip-tok"], TempMe(**SIX)
    strategy.make_frame_positions(24)
    model = vtoken.patch(case.build(), strategy)
    with pytest.raises(ValueError, match=r"shape \(6, 32\), found those of \[\(6, 24\), \(3, 24\)\]"):
        case.call(model, images(6))


def test_a_batch_that_is_no_whole_number_of_videos():
    case = CASES["open_clip-tok"]
    model = vtoken.patch(case.build(), "tempme", **SIX)
    with pytest.raises(ValueError, match="videos of 6 frames, and 7 images are no whole number"):
        case.call(model, images(7))
    assert case.call(model, images(6)).shape == (6, 16)


@pytest.mark.parametrize(
    "options,words",
    [
        (dict(frames=6, fuse=(2, 2)), r"product divides frames=6, found \(2, 2\)"),
        (dict(frames=6, fuse=(1, 6)), "factors of at least 2"),
        (dict(frames=6, layers=(1,)), r"one ascending layer for each of the 2 factors \(2, 3\)"),
        (dict(frames=6, layers=(2, 1)), "ascending"),
        (dict(frames=6, layers=(2, 4)), r"fuses in layers \(2, 4\), and this encoder has 0..3"),
        (dict(frames=6, layers=(-1, 2)), "this encoder has 0..3"),
        (dict(frames=210, fuse=(2, 3, 5, 7)), "fewer factors"),
        (dict(frames=0), "frames lies in 1..65536"),
        (dict(r=-1), "r is 0 or more"),
        (dict(cross=1.0), r"lie in \[0, 1\)"),
        (dict(SIX, budget=0.9), r"leaves between 0\.\d+ and 0\.\d+ of the patch tokens"),
        (dict(SIX, budget=0.001), "leaves between"),
    ],
    ids=str,
)
def test_options_that_do_not_fit(options, words):
    with pytest.raises(ValueError, match=words) as error:
        vtoken.patch(CASES["open_clip-tok"].build(), "tempme", **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["timm-no_cls_avg", "hf-SiglipVisionModel-sdpa"])
def test_an_encoder_without_class_token_is_refused(name):
    model = CASES[name].build()
    with pytest.raises(ValueError, match="tempme needs a class token"):
        vtoken.patch(model, "tempme", **SIX)
    assert "tempme" not in vtoken.list_strategies(model=model)
