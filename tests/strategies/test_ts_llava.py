"""TS-LLaVA: the indices, the collage, the order, and the thumbnail on models whose prompt is a video."""

from __future__ import annotations

import pytest
import torch

import vtoken
from tests.mechanism.common import assert_same, expected, run
from tests.mechanism.fixed import patched
from tests.models import FAMILIES
from vtoken.strategies import create
from vtoken.strategies.ts_llava import collage, frame_indices, grid_shape, sample_indices

from .common import answer, anyres, kept_per_segment, separators_kept, video


def test_published_sample():
    index = sample_indices(50 * 576, 2880)
    steps = index.diff()
    assert len(index) == 2880 and index[0] == 0 and index[-1] == 50 * 576 - 1
    assert set(steps.tolist()) == {10, 11}
    per_frame = torch.bincount(index // 576)
    assert len(per_frame) == 50 and int(per_frame.min()) >= 57 and int(per_frame.max()) <= 58


@pytest.mark.parametrize(("n", "count"), [(1, 1), (7, 7), (576, 576), (100, 1), (100, 37), (5000, 4999)])
def test_samples(n, count):
    index = sample_indices(n, count)
    assert len(index) == count and index[0] == 0 and (count == 1 or index[-1] == n - 1)
    assert count == 1 or int(index.diff().min()) >= 1
    assert n != count or index.tolist() == list(range(n))


def test_frames_are_midpoints():
    assert frame_indices(11, 5) == [1, 3, 5, 7, 9]
    assert frame_indices(3, 10) == [(0 + 1) // 2, (1 + 1) // 2, (1 + 2) // 2] == [0, 1, 1]
    assert (
        frame_indices(1000, 50)[0] == 10
        and max(frame_indices(1000, 50)) < 999
        and len(frame_indices(1000, 50)) == 50
    )
    assert sample_indices(20, 6).tolist() == [0, 4, 8, 11, 15, 19]  # the frames of a collage


@pytest.mark.parametrize(
    ("cells", "shape"),
    [(1, (1, 1)), (4, (2, 2)), (6, (3, 2)), (8, (4, 2)), (9, (3, 3)), (12, (4, 3)), (7, (7, 1))],
)
def test_grid(cells, shape):
    assert grid_shape(cells) == shape


def test_collage_is_row_by_row_in_order_of_time():
    frames = torch.arange(6.0)[:, None, None, None].expand(6, 3, 336, 336)
    out = collage(frames, 6)
    assert out.shape == (1, 3, 336, 336)
    for i in range(6):
        top, left = 112 * (i // 2), 168 * (i % 2)
        assert bool((out[0, :, top : top + 112, left : left + 168] == i).all())


def test_cells_are_block_means():
    frames = torch.randn(6, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    out = collage(frames, 6)
    want = frames.unflatten(-1, (6, 2)).unflatten(-3, (4, 3)).mean((-1, -3))
    torch.testing.assert_close(out[0, :, 4:8, 6:12], want[3])


def test_what_the_cells_leave_is_zero_and_few_frames_make_a_smaller_collage():
    frames = torch.ones(9, 3, 14, 14)
    out = collage(frames, 9)  # cells of 4 x 4
    assert bool((out[0, :, :12, :12] == 1).all()) and not out[0, :, 12:].any() and not out[0, :, :, 12:].any()
    assert bool(collage(frames[:5], 6).bool().all())  # 2 x 2 of 7 x 7
    assert torch.equal(collage(frames[:1], 6), frames[:1])
    assert collage(frames.half(), 6).dtype == torch.float16


@pytest.mark.parametrize("first", [False, True])
def test_sample_and_thumbnail(first):
    tokens = video(6, 2, 4, trailing=1)
    strategy = create("ts_llava", budget=0.5, thumbnail_first=first)
    chosen = answer(strategy, tokens)
    sampled = tokens.features[sample_indices(48, 16)]
    thumb = tokens.encode(collage(tokens.pixels, 6))[0]
    assert len(chosen.keep) == 24 and separators_kept(tokens, chosen) == 0
    assert torch.equal(chosen.features, torch.cat([thumb, sampled] if first else [sampled, thumb]))
    assert kept_per_segment(tokens, chosen) == strategy.counts(tokens.segments)
    free = sorted(set(range(48)) - set(sample_indices(48, 16).tolist()))
    assert set(free[:8] if first else free[-8:]) | set(sample_indices(48, 16).tolist()) == set(
        chosen.keep.tolist()
    )


@pytest.mark.parametrize(("budget", "count"), [(1 / 12, 4), (1 / 6, 8), (4, 24), (99, 48)])
def test_budgets(budget, count):
    tokens = video(6, 2, 4)
    chosen = answer(create("ts_llava", budget=budget), tokens)
    assert len(chosen.keep) == count and (chosen.features is None) == (count <= 8)
    plain = answer(create("ts_llava", budget=budget, thumbnail=False), tokens)
    assert plain.features is None and plain.keep.tolist() == sample_indices(48, count).tolist()


def test_of_an_image_in_crops_the_whole_view_is_the_frame():
    tokens = anyres(2, 2, 4)
    chosen = answer(create("ts_llava", budget=0.1), tokens)
    assert (
        kept_per_segment(tokens, chosen)
        == [8, 0, 0, 0, 0]
        == create("ts_llava", budget=0.1).counts(tokens.segments)
    )


def test_frames_out_of_range():
    with pytest.raises(ValueError, match="frames must be a whole number"):
        create("ts_llava", frames=0)


NAMES = [
    "llava",
    "llava_next",
    "llava_onevision",
    "llava_onevision/video",
    "llava_next_video/video",
    "video_llava/video",
]


def thumbnail(name: str, inputs: dict) -> torch.Tensor:
    """Features of the first row's collage, made by hand and encoded by the unpatched model: (V, d)."""
    model, video_of = FAMILIES[name].build(), name.endswith("/video")
    if video_of:
        frames = inputs["pixel_values_videos"][0]
    else:
        frames = inputs["pixel_values"][:3]
        frames = frames[:, 0] if frames.ndim == 5 else frames
    if len(frames) == 5:  # four of them: 2 x 2
        a, b, c, d = (torch.nn.functional.avg_pool2d(frames[i], 2) for i in (0, 1, 3, 4))
        picture = torch.cat([torch.cat([a, b], -1), torch.cat([c, d], -1)], -2)
    else:  # two of three, one above the other
        picture = torch.cat([torch.nn.functional.avg_pool2d(frames[i], (2, 1)) for i in (0, 2)], -2)
    with torch.no_grad():
        if video_of:
            out = model.base_model.get_video_features(picture[None, None]).pooler_output
            return out[0][1:] if name.startswith("video_llava") else out[0][:4]
        if name == "llava":
            return model.base_model.get_image_features(picture[None]).pooler_output[0]
        tiles = picture.expand(1, 3, *picture.shape)
        return model.base_model.get_image_features(tiles, image_sizes=torch.tensor([[28, 28]])).pooler_output[
            0
        ][:16]


@pytest.mark.parametrize("name", NAMES)
def test_on_models(name):
    """The images of a prompt are a video; the collage is encoded in addition to its frames."""
    family, model = FAMILIES[name], FAMILIES[name].build()
    inputs = family.prompt([[0, 1, 2], [1]] if family.modality == "image" else [[0], [1]])
    with patched(model, create("ts_llava", budget=0.3 if name == "llava_next" else 0.6)) as spy:
        out = run(model, inputs, 3)
        report = vtoken.report(model)
    assert_same(out, inputs, expected(name, inputs, spy, 3, features=spy.by_row(family, inputs)))
    _, first = spy.items[0]
    want = thumbnail(name, inputs)
    torch.testing.assert_close(first.features[-len(want) :], want, rtol=0, atol=1e-5)
    assert len(report.visuals) == 2 and len(spy.items) == 2
    assert report.visuals[0].tokens_out == len(first.keep) == len(first.features)
    alone = family.prompt([[0, 1, 2]] if family.modality == "image" else [[0]])
    with patched(model, create("ts_llava", budget=0.3 if name == "llava_next" else 0.6)) as spy:
        run(model, alone, 1)
    torch.testing.assert_close(spy.items[0][1].features, first.features)


def test_the_tower_reads_one_picture_more():
    family, model, sizes = FAMILIES["llava"], FAMILIES["llava"].build(), []
    handle = model.base_model.vision_tower.register_forward_pre_hook(
        lambda m, args: sizes.append(len(args[0]))
    )
    with patched(model, create("ts_llava", budget=0.6)):
        run(model, family.prompt([[0, 1, 2]]), 1)
    handle.remove()
    assert sorted(sizes) == [1, 3]


def test_models_without_square_frames():
    model = FAMILIES["qwen2_5_vl/video"].build()
    with pytest.raises(
        ValueError, match=r"ts_llava needs square frames of one size.*pass thumbnail=False, or use"
    ):
        vtoken.patch(model, "ts_llava")
    inputs = FAMILIES["qwen2_5_vl/video"].batch("one")
    with patched(model, create("ts_llava", budget=0.5, thumbnail=False)) as spy:
        out = run(model, inputs, 2)
    assert_same(out, inputs, expected("qwen2_5_vl/video", inputs, spy, 2))
    assert spy.items[0][1].keep.tolist() == sample_indices(18, 9).tolist()


def test_chunked_prefill_is_refused():
    family, model = FAMILIES["llava"], FAMILIES["llava"].build()
    with (
        patched(model, create("ts_llava", budget=0.6)),
        pytest.raises(NotImplementedError, match="whole prompt"),
    ):
        run(model, family.prompt([[0, 1, 2]]), 1, prefill_chunk_size=8)
