"""Reuse of earlier frames inside the tower: compared with a slow oracle; state of a stream."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import vtoken
from tests.models import FAMILIES
from vtoken import StreamState
from vtoken.adapters.registry import adapter_for

from .common import checkpointing
from .reuse_oracle import (
    CLOSE,
    GRID,
    SDPA,
    THRESHOLD,
    TOWERS,
    build,
    features,
    feed,
    film,
    layers_of,
    oracle,
    patched_with,
    run,
    shared_models,
)

models = shared_models()
patched = patched_with("stc_cacher")
EITHER = [  # of the two strategies, options under which some tokens are computed
    ("stc_cacher", dict(budget=0.3, interval=3)),
    ("still_patches", dict(margin=0, threshold=THRESHOLD)),
    ("still_patches", dict(margin=0, threshold=THRESHOLD, refresh=3)),
]


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize(
    ("interval", "ratio", "shared"),
    [(2, 0.25, False), (4, 0.5, False), (3, 5, False), (3, 0.3, True), (9, 0.01, False)],
)
def test_equals_the_oracle(models, patched, kind, interval, ratio, shared):
    video = film(kind, 6)
    want, picked = oracle(vtoken.unpatch(models(kind)), kind, video, interval, ratio, shared)
    model = patched(kind, budget=ratio, interval=interval, share_selection=shared)
    got = run(model, kind, video)
    for layer, (a, b) in enumerate(zip(got, want, strict=True)):
        torch.testing.assert_close(a, b, **CLOSE, msg=f"layer {layer}")
    dense = run(vtoken.unpatch(model), kind, video)[-1]
    assert (dense - want[-1]).abs().max() > 0.05
    # what differs from the dense tower is what was not computed
    assert all(s.all() for s in picked[0]) and not all(s.all() for s in picked[1])


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize(("strategy", "options"), EITHER)
def test_frame_by_frame_equals_one_call(patched, kind, strategy, options):
    video, model = film(kind, 7), patched(kind, strategy, **options)
    whole = run(model, kind, video)[-1]
    torch.testing.assert_close(feed(model, kind, video), whole, **CLOSE)
    with vtoken.stream(model):  # in pieces
        pieces = torch.cat([run(model, kind, part)[-1] for part in (video[:1], video[1:5], video[5:])])
    torch.testing.assert_close(pieces, whole, **CLOSE)


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize(("strategy", "options"), EITHER[:2])
def test_videos_of_a_batch_are_streams_of_their_own(patched, kind, strategy, options):
    one, other = film(kind, 4), film(kind, 4, seed=1)
    model = patched(kind, strategy, **options)
    both = run(model, kind, one, other)[-1]
    torch.testing.assert_close(both, torch.cat([run(model, kind, v)[-1] for v in (one, other)]), **CLOSE)
    with pytest.raises(ValueError, match="one video per call, found 2"), vtoken.stream(model):
        run(model, kind, one, other)


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize("options", [dict(interval=1), dict(budget=1.0)])
def test_interval_1_and_ratio_1_are_the_plain_tower(patched, kind, options):
    video, model = film(kind, 4), patched(kind, **options)
    got = [run(model, kind, video)[-1], feed(model, kind, video)]
    vtoken.unpatch(model)
    assert torch.equal(got[0], run(model, kind, video)[-1])
    assert torch.equal(got[1], torch.cat([run(model, kind, [frame])[-1] for frame in video]))


@pytest.mark.parametrize("kind", TOWERS)
def test_references_are_plain_and_a_still_frame_is_exact(patched, kind):
    video = film(kind, 5)
    still = [video[0]] * 3 + video[3:4] + [video[4]] * 2
    model = patched(kind, budget=0.1, interval=4)
    got = feed(model, kind, still)
    vtoken.unpatch(model)
    want = torch.cat([run(model, kind, [frame])[-1] for frame in still])
    each = list(zip(got.chunk(6), want.chunk(6), strict=True))
    assert torch.equal(*each[0]) and torch.equal(*each[4])
    for i in (1, 2, 5):
        torch.testing.assert_close(*each[i], **CLOSE)
    assert (each[3][0] - each[3][1]).abs().max() > 0.05


@pytest.mark.parametrize("kind", TOWERS)
def test_a_token_that_no_layer_computes_keeps_what_the_reference_added(patched, kind):
    video, state = film(kind, 2), StreamState()
    model = patched(kind, budget=0.2)
    with vtoken.stream(model, state):
        before = run(model, kind, video[:1])
        after = run(model, kind, video[1:])
    (share,) = state.last.shares
    _, picked = oracle(vtoken.unpatch(model), kind, video, 4, 0.2)
    static = ~torch.stack(picked[1]).any(0)
    assert static.any() and not static.all()
    added = [x[-1] - x[0] for x in (before, after)]
    torch.testing.assert_close(added[0][static], added[1][static], rtol=0, atol=1e-12)
    assert (added[0] - added[1])[~static].abs().max() > 0.01
    assert 0 < float(share.mean()) < 1 and float(share.max()) <= 1
    assert state.last.recomputed == [int(0.2 * len(static))] and state.last.tokens == [len(static)]


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_exactly_the_chosen_rows_are_computed(patched, kind):
    video, model = film(kind, 3), patched(kind, budget=0.25)
    rows: dict[str, list[int]] = {}
    layer = layers_of(model)[1]
    parts = dict(q=layer.self_attn.q_proj, k=layer.self_attn.k_proj, v=layer.self_attn.v_proj, mlp=layer.mlp)
    parts["out"] = layer.self_attn.out_proj
    handles = [
        module.register_forward_hook(
            lambda m, a, out, name=name: rows.setdefault(name, []).append(out[..., 0].numel())
        )
        for name, module in parts.items()
    ]
    feed(model, kind, video)
    for handle in handles:
        handle.remove()
    n = 16 + int(kind == "clip")
    assert rows == {"k": [n] * 3} | {name: [n, n // 4, n // 4] for name in ("q", "v", "mlp", "out")}


@pytest.mark.parametrize("kind", TOWERS)
def test_flops_fall_as_reported(patched, kind):
    video, model = film(kind, 5), patched(kind, budget=0.25, interval=5)
    state = StreamState()

    def measure() -> int:
        with FlopCounterMode(display=False, custom_mapping=SDPA) as counter, vtoken.stream(model, state):
            run(model, kind, video)
        return counter.get_total_flops()

    sparse = measure()
    use = state.last
    vtoken.unpatch(model)
    dense = measure()
    assert dense - sparse == use.flops_dense - use.flops
    assert use.references == 1 and sparse < 0.75 * dense
    assert (state.frames, state.tokens, state.recomputed) == (5, sum(use.tokens), sum(use.recomputed))


@pytest.mark.parametrize("kind", TOWERS)
def test_interleaved_streams_do_not_mix(patched, kind):
    one, other = film(kind, 5), film(kind, 5, seed=1)
    model, states = patched(kind, budget=0.3, interval=3), (StreamState(), StreamState())
    alone = [feed(model, kind, video) for video in (one, other)]
    mixed: tuple[list, list] = ([], [])
    for frames in zip(one, other, strict=True):
        for i, frame in enumerate(frames):
            mixed[i].append(feed(model, kind, [frame], states[i]))
    assert all(torch.equal(torch.cat(m), a) for m, a in zip(mixed, alone, strict=True))
    assert not torch.equal(alone[0], alone[1])


def test_threads_feed_streams_of_their_own(patched):
    model = patched("siglip", budget=0.3, interval=3)
    videos = [film("siglip", 6, seed=i) for i in range(3)]
    barrier = threading.Barrier(3)

    def work(video: list, out: list, wait: bool = True) -> None:
        with vtoken.stream(model), torch.no_grad():
            for frame in video:
                if wait:
                    barrier.wait(60)  # all frames meet in the tower
                out.append(features(model, "siglip", [frame]).pooler_output)

    alone: list[list] = [[], [], []]
    together: list[list] = [[], [], []]
    for video, out in zip(videos, alone, strict=True):
        work(video, out, wait=False)
    threads = [threading.Thread(target=work, args=pair) for pair in zip(videos, together, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(torch.cat(a), torch.cat(b)) for a, b in zip(alone, together, strict=True))


def test_a_stream_is_fed_by_one_thread_at_a_time(patched):
    model, state, caught = patched("siglip"), StreamState(), []

    def enter() -> None:
        try:
            with vtoken.stream(model, state):
                pass
        except RuntimeError as error:
            caught.append(str(error))

    with vtoken.stream(model, state), vtoken.stream(model, state):
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
    enter()
    assert len(caught) == 1 and "Another thread is feeding this stream" in caught[0]
    with pytest.raises(TypeError, match=r"vtoken\.StreamState, found dict"), vtoken.stream(model, {}):
        pass


@pytest.mark.parametrize("kind", ["qwen2", "qwen2.5", "qwen3"])
def test_another_resolution_is_a_new_reference(patched, kind):
    # as many patches as GRID
    model, state, small = patched(kind, budget=0.2, interval=9), StreamState(), (4, 12)
    frames, others = film(kind, 3), film(kind, 2, grid=small)
    feed(model, kind, frames, state)
    got = feed(model, kind, others, state, small)
    assert state.last.recomputed < state.last.tokens
    fresh = StreamState()
    assert torch.equal(got, feed(model, kind, others, fresh, small))
    feed(model, kind, frames[:1], state)
    assert state.last.references == 1 and state.frames == 6
    assert small[0] * small[1] == GRID[0] * GRID[1]


def test_reset_and_another_patch_start_anew(patched):
    model, state = patched("clip", budget=0.2, interval=9), StreamState()
    one, other = film("clip", 3), film("clip", 3, seed=1)
    feed(model, "clip", one, state)
    assert state.frames == 3 and state.nbytes > 0
    state.reset()
    assert state.nbytes == 0 and state.frames == 0
    want = feed(model, "clip", other)
    assert torch.equal(feed(model, "clip", other, state), want)
    feed(patched("clip", budget=0.2, interval=9), "clip", one[:1], state)
    assert state.frames == 1 and state.last.references == 1


def test_state_is_constant_in_size_and_can_be_pickled(patched):
    model, state = patched("siglip", budget=0.3, interval=4), StreamState()
    video = film("siglip", 14)
    sizes = []
    for frame in video[:10]:
        feed(model, "siglip", [frame], state)
        sizes.append(state.nbytes)
    assert set(sizes) == {3 * 4 * 16 * 32 * 8}  # keys, values, increments; layers; patches; channels; float64
    again = pickle.loads(pickle.dumps(state))
    assert torch.equal(feed(model, "siglip", video[10:], again), feed(model, "siglip", video[10:], state))


def test_a_call_that_fails_leaves_the_stream_as_it_was(patched):
    model, video, state = patched("siglip", budget=0.3, interval=2), film("siglip", 4), StreamState()
    want = feed(model, "siglip", video)
    feed(model, "siglip", video[:2], state)

    def fail(module, args):
        raise KeyboardInterrupt

    handle = layers_of(model)[2].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        feed(model, "siglip", video[2:3], state)
    handle.remove()
    assert torch.equal(feed(model, "siglip", video[2:], state), want[32:])


def test_images_are_untouched_unless_they_are_a_stream(patched):
    clean, family = FAMILIES["llava"].build(dtype=torch.float64), FAMILIES["llava"]
    pixels = torch.stack(film("clip", 5))
    model = vtoken.patch(family.build(dtype=torch.float64), "stc_cacher", budget=0.3, interval=3)

    def encoded(m, x):
        with torch.no_grad():
            return torch.stack(list(m.base_model.get_image_features(x).pooler_output))

    assert torch.equal(encoded(model, pixels), encoded(clean, pixels))
    with vtoken.stream(model) as state:
        whole = encoded(model, pixels)
    with vtoken.stream(model):
        each = torch.cat([encoded(model, frame[None]) for frame in pixels])
    torch.testing.assert_close(each, whole, **CLOSE)
    assert (whole - encoded(clean, pixels))[[1, 2, 4]].abs().amax((1, 2)).min() > 0.01
    torch.testing.assert_close(whole[[0, 3]], encoded(clean, pixels)[[0, 3]], **CLOSE)
    assert state.frames == 5 and state.last.references == 2


@pytest.mark.parametrize("kind", TOWERS)
def test_unpatching_leaves_nothing(models, kind):
    model = vtoken.unpatch(models(kind))
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    video = film(kind, 3)
    want = run(model, kind, video)[-1]
    run(vtoken.patch(model, "stc"), kind, video)
    vtoken.unpatch(model)
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == {
        name: set(known) for name, known in before.items()
    }
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert torch.equal(run(model, kind, video)[-1], want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["clip", "qwen2.5"])
def test_half_precision_and_inference_mode(kind, dtype):
    model = vtoken.patch(build(kind, dtype), "stc_cacher", budget=0.5, interval=3)
    video, state = film(kind, 4, dtype=dtype), StreamState()
    with torch.inference_mode():
        feed(model, kind, video[:2], state)
    later = feed(model, kind, video[2:], state)
    assert later.dtype == dtype and bool(torch.isfinite(later).all())
    assert state.references is not None and not state.references.layers[0][0].is_inference()


def test_gradients_flow_and_checkpointing_is_refused(patched):
    model, video = patched("siglip", budget=0.5, interval=2), film("siglip", 4)
    out = features(model, "siglip", video).pooler_output
    weight = layers_of(model)[0].mlp.fc1.weight
    (grad,) = torch.autograd.grad(out.double().square().sum(), weight)
    assert bool(torch.isfinite(grad).all()) and float(grad.abs().sum()) > 0
    trained = build("siglip").train()
    checkpointing(trained)
    vtoken.patch(trained, "stc_cacher")
    with pytest.raises(NotImplementedError, match="gradient_checkpointing_disable"):
        features(trained, "siglip", video)


def test_a_copy_of_a_patched_model_is_patched_itself(patched):
    model, video = patched("clip", budget=0.3, interval=3), film("clip", 4)
    twin = copy.deepcopy(model)
    want = run(model, "clip", video)[-1]
    vtoken.unpatch(model)
    assert torch.equal(run(twin, "clip", video)[-1], want)
    assert not torch.equal(run(vtoken.unpatch(twin), "clip", video)[-1], want)


def test_a_projection_that_is_no_plain_matrix_is_used_as_it_is(patched):
    """Adapters and quantised layers cannot be taken apart by rows."""
    model, video = patched("qwen2", budget=0.3, interval=3), film("qwen2", 4)
    want = run(model, "qwen2", video)[-1]

    class Adapted(torch.nn.Linear):
        pass

    for layer in layers_of(model):
        layer.attn.qkv.__class__ = Adapted
    try:
        torch.testing.assert_close(run(model, "qwen2", video)[-1], want, **CLOSE)
    finally:
        for layer in layers_of(model):
            layer.attn.qkv.__class__ = torch.nn.Linear


@pytest.mark.parametrize("name", ["internvl", "smolvlm", "mistral3"])
def test_towers_that_cannot_serve_are_refused(name):
    with pytest.raises(ValueError, match=r"stc_cacher needs layers that can be computed in part.*use "):
        vtoken.patch(FAMILIES[name].build(), "stc_cacher")
    assert "stc_cacher" not in vtoken.list_strategies(model=FAMILIES[name].build())


def test_the_report_tells_what_the_tower_did():
    family = FAMILIES["qwen2_5_vl/video"]
    model, inputs = vtoken.patch(family.build(), "stc_cacher", budget=0.5, interval=2), family.batch("ragged")
    with torch.no_grad():
        model(**inputs)
    use = vtoken.report(model).tower["video"]
    assert [len(s.flatten()) for s in use.shares] == [6] * 3 + [12] * 2 + [4] * 4
    assert use.tokens == [24] * 3 + [48] * 2 + [16] * 4
    assert use.recomputed == [24, 12, 24, 48, 24, 16, 8, 16, 8] and use.references == 5
    text = str(vtoken.report(model))
    assert "video tower: 9 frames, 5 of them in full, 180 of 232 tokens computed" in text
    assert vtoken.report(model).to_dict()["tower"]["video"]["flops"] < use.flops_dense
    assert adapter_for(model).towers["video"].can_reuse
