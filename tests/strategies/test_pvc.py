"""PVC: causal attention across frames in the tower, and a connector that knows the time step."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
import torch.nn.functional as F

import vtoken
from tests.models import FAMILIES
from tests.oracle import clone
from tests.strategies.trained import doubled, logits, randomise
from vtoken.strategies.common.pooling import RepeatOrder, pooled
from vtoken.strategies.common.time_steps import TemporalAttention, TimeEmbedding, shuffled
from vtoken.strategies.trained import trained_part
from vtoken.tokens import Segment

from .common import build

CLIPS = ["llava_onevision/video", "llava_next_video/video", "video_llava/video"]


def patched(name, **options):
    """A model in float64 with random PVC weights."""
    return randomise(vtoken.patch(FAMILIES[name].build().double(), "pvc", **options))


def features(model, inputs, modality="video"):
    """What the LLM reads of every video, and the tower's states."""
    seen = []
    part = trained_part(vtoken.patching.patch_of(model).strategy)
    select = type(part).select

    def noted(self, tokens):
        out = select(self, tokens)
        seen.append((out.features, tokens.states(tokens.tower.feature_layer)))
        return out

    type(part).select = noted
    try:
        logits(model, inputs)
    finally:
        type(part).select = select
    return seen


ROUNDED = ("cohere2_vision", "ovis2")  # their pooled features differ in the last bit, by the order of sums


@pytest.mark.parametrize("name", [n for n in FAMILIES if "/" not in n or n in CLIPS])
@pytest.mark.parametrize("position", ["before", "after"])
def test_untrained_it_is_pooling_bit_for_bit(name, position):
    model, inputs = FAMILIES[name].build(), FAMILIES[name].batch("ragged")
    if "pvc" not in vtoken.list_strategies(model=model):
        pytest.skip("its tower reads no frames in rows")
    with vtoken.applied(model, "pool", budget=0.3):
        pool = logits(model, inputs)
    plain = logits(model, inputs)
    vtoken.patch(model, "pvc", budget=0.3, image_repeats=1, temporal_position=position, side=2)
    same = logits(model, inputs)
    assert torch.equal(same, pool) or (name in ROUNDED and torch.allclose(same, pool, rtol=0, atol=1e-3))
    assert not torch.equal(pool, plain)
    assert torch.equal(logits(vtoken.unpatch(model), inputs), plain)


@pytest.mark.parametrize("name", CLIPS)
def test_later_frames_change_nothing(name):
    inputs = doubled(FAMILIES[name].batch("one"))
    if "pvc" not in vtoken.list_strategies(model=FAMILIES[name].build()):
        pytest.skip("its tower reads no frames in rows")
    model = patched(name, budget=0.3, side=2, tau_kind="index")
    key = next(k for k in inputs if k.startswith("pixel_values"))
    changed = clone(inputs)
    at = changed[key].shape[1] - 2
    changed[key][:, at] += 1.0
    ((was, states),) = features(model, inputs)
    ((now, others),) = features(model, changed)
    per = len(was) // len(states)
    assert torch.equal(was[: at * per], now[: at * per]) and torch.equal(states[:at], others[:at])
    assert all(not torch.allclose(states[t], others[t]) for t in range(at, len(states)))


def reference_attention(block: TemporalAttention, x, time):
    """Frame by frame and place by place, in the order of the formulas."""
    out, heads = x.clone(), block.heads
    shift, scale = block.norm.modulation(F.silu(time)).chunk(2, -1)
    width = x.shape[-1]
    for n in range(x.shape[1]):
        normed = torch.stack(
            [F.layer_norm(x[t, n], (width,), eps=1e-6) * (1 + scale[t]) + shift[t] for t in range(len(x))]
        )
        q, k, v = (normed @ w.T + b for w, b in zip(block.qkv.weight.chunk(3), block.qkv.bias.chunk(3)))
        for t in range(len(x)):
            first = 0 if block.window is None else max(0, t - block.window + 1)
            mixed = []
            for part in torch.arange(width).chunk(heads):
                logits = k[first : t + 1, part] @ q[t, part] / len(part) ** 0.5
                mixed.append(logits.softmax(0) @ v[first : t + 1, part])
            out[t, n] += block.gate * block.out(torch.cat(mixed))
    return out


@pytest.mark.parametrize("window", [None, 1, 3])
def test_temporal_attention_is_the_formula(window):
    torch.manual_seed(0)
    block, times = TemporalAttention(8, 2, 6, "vector", window).double(), TimeEmbedding(6).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x, time = torch.randn(6, 3, 8, dtype=torch.float64), times(torch.arange(6))
    whole, _ = block(x, time)
    assert torch.allclose(whole, reference_attention(block, x, time), atol=1e-12)
    pieces, past = [], ()
    for t in range(6):
        made, past = block(x[t : t + 1], time[t : t + 1], past)
        pieces.append(made)
        assert window is None or past[0].shape[2] <= max(0, window - 1)
    assert torch.allclose(torch.cat(pieces), whole, atol=1e-12)


def test_equal_frames_differ_by_their_time_step():
    torch.manual_seed(0)
    block, times = TemporalAttention(8, 2, 6, "scalar", None), TimeEmbedding(6)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(1, 3, 8).expand(4, -1, -1)
    same, _ = block(x, times(torch.zeros(4)))
    assert torch.allclose(same, same[:1].expand_as(same), atol=1e-6)
    other, _ = block(x, times(torch.arange(4)))
    assert all(not torch.allclose(other[t], other[0], atol=1e-3) for t in range(1, 4))


def test_shuffling_reads_squares_row_by_row():
    rows, columns, side = 2, 3, 2
    y, x = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
    maps = torch.stack([y, x], -1)[None].float()
    out = shuffled(maps, rows, columns, side)
    assert out.shape == (1, 6, 8)
    for r in range(rows):
        for c in range(columns):
            cells = [(r * 2 + dy, c * 2 + dx) for dy in range(2) for dx in range(2)]
            assert out[0, r * columns + c].tolist() == [float(v) for cell in cells for v in cell]


@pytest.mark.parametrize("name", ["llava", "llava_onevision", "internvl"])
def test_an_image_is_a_static_video(name):
    """The repeats in the tower are what a video of equal frames would be, and all of them reach the LLM."""
    inputs = doubled(FAMILIES[name].batch("one"))
    model = patched(name, budget=0.5, side=2, image_repeats=3)
    ((features_, states),) = features(model, inputs)
    assert states.shape[1] == 3 and not torch.allclose(states[:, 0], states[:, 1])
    single = patched(name, budget=0.5, side=2, image_repeats=1)
    ((_, alone),) = features(single, inputs)
    assert torch.allclose(states[:, :1], alone, atol=1e-9)  # the first frame sees itself alone
    report = vtoken.report(model).visuals[0]
    assert len(features_) == report.tokens_out <= 0.5 * report.tokens_in


def test_a_stream_equals_the_whole_video():
    name = "llava_next_video/video"
    inputs = doubled(FAMILIES[name].batch("one"))
    model = patched(name, budget=0.3, side=2, window=3)
    pixels = inputs["pixel_values_videos"]
    with torch.no_grad():
        whole = vtoken.patching.patch_of(model)
        seen = encoded(model, whole, pixels)
        with vtoken.stream(model) as state:
            parts = [encoded(model, whole, pixels[:, t : t + 1]) for t in range(pixels.shape[1])]
            size = state.nbytes
            encoded(model, whole, pixels[:, :2])
            assert state.nbytes == size  # it does not grow
    assert torch.allclose(torch.cat(parts), seen, atol=1e-9)
    with vtoken.stream(model) as state, torch.no_grad():
        pieces = [encoded(model, whole, pixels[:, :2]), encoded(model, whole, pixels[:, 2:])]
    assert torch.allclose(torch.cat(pieces), seen, atol=1e-9)


def encoded(model, patch, pixels):
    """What a session would keep of a video's frames."""
    output = model.get_video_features(pixels)  # named otherwise in older releases
    return patch.encode(output, torch.cat([f.flatten(0, -2) for f in output.pooler_output]))[1]


def test_a_session_keeps_what_the_strategy_writes():
    name = "llava_next_video/video"
    inputs = doubled(FAMILIES[name].batch("one"))
    model = patched(name, budget=0.3, side=2)
    ((written, _),) = features(model, inputs)
    with torch.no_grad():
        kept = encoded(model, vtoken.patching.patch_of(model), inputs["pixel_values_videos"])
    assert torch.allclose(kept, written, atol=1e-9)


@pytest.mark.parametrize("budget", [1, 2, 3, 0.01])
def test_frames_of_an_image_share_a_small_budget(budget):
    inputs = doubled(FAMILIES["llava"].batch("ragged"))
    model = patched("llava", budget=budget, image_repeats=4)
    logits(model, inputs)
    for item in vtoken.report(model).visuals:
        assert item.tokens_out <= max(1, budget if budget >= 1 else int(budget * item.tokens_in))


def test_an_image_in_a_stream_is_one_frame():
    inputs = doubled(FAMILIES["llava"].batch("one"))
    model = patched("llava", budget=0.5, side=2)
    with torch.no_grad(), vtoken.stream(model):
        for _ in range(2):
            output = model.get_image_features(inputs["pixel_values"])
            rows = torch.cat([f.flatten(0, -2) for f in output.pooler_output])
            assert len(vtoken.patching.patch_of(model).encode(output, rows)[0]) == len(rows) // 2
    model, inputs = patched("llava_next", budget=0.5), doubled(FAMILIES["llava_next"].batch("one"))
    with torch.no_grad(), vtoken.stream(model), pytest.raises(ValueError, match="cuts into crops"):
        model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])


def test_repeats_are_ordered_by_place_tile_or_repeat():
    """Two tiles of 2 x 4 cells, read as two and three static frames, in one row of two rectangles each."""
    tokens = build([Segment("crop", (2, 4)), Segment("crop", (2, 4), (0, 1))])
    parts = pooled(tokens, [2, 2])
    made = [torch.arange(2 * n).view(n, 2, 1) + 100.0 * i for i, n in enumerate((2, 3))]
    found = {order: parts.selection(made, order) for order in get_args(RepeatOrder)}
    for selection in found.values():
        assert selection.keep.tolist() == found["place"].keep.tolist() == sorted(selection.keep.tolist())
    read = {order: selection.features[:, 0].tolist() for order, selection in found.items()}
    assert read["tile"] == [0, 1, 2, 3, 100, 101, 102, 103, 104, 105]
    assert read["repeat"] == [0, 1, 100, 101, 2, 3, 102, 103, 104, 105]
    assert sorted(read["place"]) == sorted(read["tile"])
    groups = parts.group[found["place"].keep].tolist()
    assert [g % 2 for g in groups] == [int(x) % 2 for x in read["place"]]
