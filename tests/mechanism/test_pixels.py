"""Places that do not change on the pixels skip the tower: compared with a slow second writing in float64."""

from __future__ import annotations

import pickle

import pytest
import torch

import vtoken
from tests.models import FAMILIES
from vtoken import StreamState

from .reuse_oracle import (
    CLOSE,
    GRID,
    THRESHOLD,
    TOWERS,
    anatomy,
    build,
    check_flops,
    check_gradients,
    facts,
    features,
    feed,
    film,
    layers_of,
    patched_with,
    places_of,
    run,
    shared_models,
    turn,
)

models = shared_models()
patched = patched_with("still_patches")


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return sum(abs(float(x)) for x in a - b) / len(a)


@torch.no_grad()
def naive(model, kind: str, video, threshold: float, margin: int, refresh=None, grid=GRID):
    """After every layer (frames * n, C), and per frame the set of computed tokens, frame after frame."""
    geometry, layers = facts(model, kind, video[0], grid), layers_of(model)
    prefix, kept, pixels, computed_of = int(kind == "clip"), [{} for _ in layers], {}, []
    outs = [[] for _ in range(len(layers) + 1)]
    for number, frame in enumerate(video):
        computed, new = set(), number == 0 or (refresh is not None and number % refresh == 0)
        places = places_of(kind, frame, grid)
        moved = [p for p, (now, _) in places.items() if new or distance(now, pixels[p]) > threshold]
        for (row, column), (now, tokens) in places.items():
            if any(abs(row - r) <= margin and abs(column - c) <= margin for r, c in moved):
                pixels[row, column] = now
                computed |= {prefix + t for t in tokens}
        computed |= set(range(prefix)) if computed else set()
        computed_of.append(computed)
        x = run(model, kind, [frame], grid=grid)[0]
        outs[0].append(x)
        for i, layer in enumerate(layers):
            seen, rotary = geometry[i]
            q, k, v, project, norm2, mlp, heads = anatomy(layer, x)
            for t in range(len(x)):
                if t not in computed:
                    k[t], v[t] = kept[i][t][:2]
            q, k, v = (y.double().reshape(len(x), heads, -1) for y in (q, k, v))
            turned = [y if rotary is None else turn(y, rotary) for y in (q, k)]
            logits = torch.einsum("qhd,khd->hqk", *turned) / q.shape[-1] ** 0.5
            weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
            y = x + project(torch.einsum("hqk,khd->qhd", weights, v).flatten(1).to(x.dtype))
            y = y + mlp(norm2(y))
            for t in range(len(x)):
                if t in computed:
                    kept[i][t] = k[t].flatten().clone(), v[t].flatten().clone(), y[t]
            x = torch.stack([kept[i][t][2] for t in range(len(x))])
            outs[i + 1].append(x)
    return [torch.cat(o) for o in outs], computed_of


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize(
    ("threshold", "margin", "refresh"),
    [(THRESHOLD, 0, None), (THRESHOLD, 0, 3), (0.8, 1, None), (0.0, 1, None), (9.0, 1, 4)],
)
def test_equals_the_second_writing(models, patched, kind, threshold, margin, refresh):
    video = film(kind, 6)
    want, computed = naive(vtoken.unpatch(models(kind)), kind, video, threshold, margin, refresh)
    dense = run(vtoken.unpatch(models(kind)), kind, video)[-1]
    model, state = patched(kind, threshold=threshold, margin=margin, refresh=refresh), StreamState()
    got = run(model, kind, video)
    for layer, (a, b) in enumerate(zip(got[1:], want[1:], strict=True)):
        torch.testing.assert_close(a, b, **CLOSE, msg=f"layer {layer}")
    with vtoken.stream(model, state):
        run(model, kind, video)
    assert state.last.recomputed == [len(c) for c in computed]
    n = len(want[0]) // len(video)
    sizes = {len(c) for c in computed[1:]}
    if 0 < threshold < 9:
        assert any(0 < size < n for size in sizes) and (dense - want[-1]).abs().max() > 0.02
    assert sizes == ({n} if threshold == 0 else {0, n} if threshold == 9 else sizes)
    if threshold == 0:
        assert torch.equal(got[-1], dense)


@pytest.mark.parametrize("kind", TOWERS)
def test_identical_frames_are_one_frame(models, patched, kind):
    frame = film(kind, 1)[0]
    (one,) = run(vtoken.unpatch(models(kind)), kind, [frame])[-1:]
    model, passed = patched(kind, threshold=0.0), []
    handles = [
        layer.mlp.register_forward_hook(lambda m, a, o: passed.append(o)) for layer in layers_of(model)
    ]
    assert torch.equal(run(model, kind, [frame] * 5)[-1], one.repeat(5, 1))
    assert len(passed) == len(layers_of(model))
    state, per_frame = StreamState(), passed[0][..., 0].numel()
    assert torch.equal(feed(model, kind, [frame] * 5, state), one.repeat(5, 1))
    assert len(passed) == 2 * len(layers_of(model)) and {p[..., 0].numel() for p in passed} == {per_frame}
    assert state.recomputed == len(one) and state.frames == 5
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("kind", ["qwen2", "qwen2.5", "qwen3"])
def test_another_grid_is_a_new_reference(patched, kind):
    model, state, small = patched(kind, margin=0, threshold=THRESHOLD), StreamState(), (4, 12)
    frames, others = film(kind, 3), film(kind, 2, grid=small)
    feed(model, kind, frames, state)
    got = feed(model, kind, others, state, small)
    assert state.last.recomputed < state.last.tokens
    assert torch.equal(got, feed(model, kind, others, StreamState(), small))
    feed(model, kind, frames[:1], state)
    assert state.last.references == 1 and state.frames == 6


@pytest.mark.parametrize("kind", TOWERS)
def test_flops_fall_as_reported(patched, kind):
    video, model, state = film(kind, 5), patched(kind, margin=0, threshold=THRESHOLD), StreamState()
    check_flops(kind, model, state, lambda: run(model, kind, video))
    use = state.last
    assert (state.frames, state.tokens, state.recomputed) == (5, sum(use.tokens), sum(use.recomputed))


@pytest.mark.parametrize("kind", TOWERS)
def test_layers_that_are_read_give_the_same(patched, kind):
    """A layer whose attention is read for the projector strategy is computed for all tokens."""
    video, state = film(kind, 5), StreamState()
    want = run(patched(kind, margin=0, threshold=THRESHOLD), kind, video)[-1]
    name = "divprune" if kind != "clip" else "visionzip"
    reading = "vispruner" if kind == "clip" else "hiprune"
    for other in (name, reading):
        model = patched(
            kind, ["still_patches", other], budget=0.25, still_patches=dict(margin=0, threshold=THRESHOLD)
        )
        torch.testing.assert_close(run(model, kind, video)[-1], want, **CLOSE)
        torch.testing.assert_close(feed(model, kind, video), want, **CLOSE)
        with vtoken.stream(model, state):
            run(model, kind, video)
        assert sum(state.last.recomputed) < sum(state.last.tokens)


@pytest.mark.parametrize("kind", TOWERS)
def test_state_can_be_pickled_and_does_not_grow(patched, kind):
    model, state, video = patched(kind, margin=0, threshold=THRESHOLD), StreamState(), film(kind, 9)
    sizes = []
    for frame in video[:6]:
        feed(model, kind, [frame], state)
        sizes.append(state.nbytes)
    assert len(set(sizes)) == 1
    again = pickle.loads(pickle.dumps(state))
    assert torch.equal(feed(model, kind, video[6:], again), feed(model, kind, video[6:], state))


def test_a_call_that_fails_leaves_the_stream_as_it_was(patched):
    model, video, state = patched("qwen2.5", margin=0, threshold=THRESHOLD), film("qwen2.5", 4), StreamState()
    want = feed(model, "qwen2.5", video)
    feed(model, "qwen2.5", video[:2], state)

    def fail(module, args):
        raise KeyboardInterrupt

    handle = layers_of(model)[2].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        feed(model, "qwen2.5", video[2:3], state)
    handle.remove()
    assert torch.equal(feed(model, "qwen2.5", video[2:], state), want[-len(want) // 2 :])


def test_images_are_untouched_unless_they_are_a_stream():
    family = FAMILIES["llava"]
    clean = family.build(dtype=torch.float64)
    model = vtoken.patch(family.build(dtype=torch.float64), "still_patches", margin=0, threshold=THRESHOLD)
    pixels = torch.stack(film("clip", 5))

    def encoded(m, x):
        with torch.no_grad():
            return torch.stack(list(m.base_model.get_image_features(x).pooler_output))

    assert torch.equal(encoded(model, pixels), encoded(clean, pixels))
    with vtoken.stream(model) as state:
        whole = encoded(model, pixels)
    with vtoken.stream(model):
        torch.testing.assert_close(
            torch.cat([encoded(model, frame[None]) for frame in pixels]), whole, **CLOSE
        )
    assert state.last.references == 1 and (whole - encoded(clean, pixels))[1:].abs().max() > 0.01


@pytest.mark.parametrize("strategy", ["still_patches", "stc_cacher"])
def test_a_frame_is_not_compared_with_one_of_another_tower(strategy):
    """Video-LLaVA reads images with one tower and videos with another."""
    model, frame = FAMILIES["video_llava/video"].build(), torch.stack(film("clip", 1, dtype=torch.float32))
    with torch.no_grad():
        want = model.base_model.get_video_features(frame[:, None]).pooler_output
        with vtoken.stream(vtoken.patch(model, strategy)) as state:
            model.base_model.get_image_features(frame)
            got = model.base_model.get_video_features(frame[:, None]).pooler_output
    assert torch.equal(got, want) and state.last.references == 1


@pytest.mark.parametrize("name", ["qwen3_vl/video", "qwen2_5_vl/video", "llava_onevision/video"])
def test_features_of_a_still_video_are_those_of_one_frame(name):
    """The last features and, of Qwen3-VL, those of its middle layers."""
    kind = next(k for k, family in TOWERS.items() if family == name)
    model, frame = build(kind), film(kind, 1)[0]
    with torch.no_grad():
        one = features(model, kind, [frame])
        still = features(vtoken.patch(model, "still_patches"), kind, [frame] * 3)
    for a, b in zip(taps_of(one), taps_of(still), strict=True):
        a = a[: len(b) // 3] if kind != "siglip" else a[:-1]
        b = b if kind != "siglip" else b[:-1]
        assert torch.equal(torch.cat([a] * 3), b)


@pytest.mark.parametrize("name", ["glm4v/video", "glm46v/video", "qwen2_vl/video", "qwen3_vl_moe/video"])
def test_a_still_video_of_other_packed_towers(name):
    """GLM's tower has steps of its own between the last layer and the merger."""
    model = FAMILIES[name].build()
    vision = model.config.vision_config
    merge, width = vision.spatial_merge_size, 3 * vision.temporal_patch_size * vision.patch_size**2
    frame = torch.randn(6 * merge * merge, width, generator=torch.Generator().manual_seed(0))

    def features_of(frames: int) -> torch.Tensor:
        grid = torch.tensor([[frames, 2 * merge, 3 * merge]])
        out = model.base_model.get_video_features(frame.repeat(frames, 1), video_grid_thw=grid)
        return torch.cat(list(out.pooler_output))

    with torch.no_grad():
        one = features_of(1)
        vtoken.patch(model, "still_patches", threshold=0.0)
        torch.testing.assert_close(features_of(3), one.repeat(3, 1))


def taps_of(output) -> list[torch.Tensor]:
    """The features of one video, and those of middle layers."""
    return [output.pooler_output[0].flatten(0, -2), *(getattr(output, "deepstack_features", None) or [])]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["clip", "qwen2.5"])
def test_half_precision_and_inference_mode(kind, dtype):
    model = vtoken.patch(build(kind, dtype), "still_patches", margin=0, threshold=THRESHOLD)
    video, state = film(kind, 4, dtype=dtype), StreamState()
    with torch.inference_mode():
        feed(model, kind, video[:2], state)
    later = feed(model, kind, video[2:], state)
    assert later.dtype == dtype and bool(torch.isfinite(later).all())
    assert state.references is not None and not state.references.layers[0][0].is_inference()


@pytest.mark.parametrize("name", ["internvl", "smolvlm", "mistral3"])
def test_towers_that_cannot_serve_are_refused(name):
    with pytest.raises(ValueError, match=r"still_patches needs layers that can be computed in part.*use "):
        vtoken.patch(FAMILIES[name].build(), "still_patches")


def test_gradients_flow(patched):
    check_gradients(patched("siglip", margin=0, threshold=THRESHOLD), film("siglip", 4))


def test_the_report_tells_what_the_tower_computed():
    family = FAMILIES["qwen2_5_vl/video"]
    model, inputs = vtoken.patch(family.build(), "still_patches", threshold=9.0), family.batch("ragged")
    with torch.no_grad():
        model(**inputs)
    use = vtoken.report(model).tower["video"]
    assert use.tokens == [24] * 3 + [48] * 2 + [16] * 4
    assert use.recomputed == [24, 0, 0, 48, 0, 16, 0, 0, 0] and use.references == 3
    assert "video tower: 9 frames, 3 of them in full, 88 of 232 tokens computed" in str(vtoken.report(model))
