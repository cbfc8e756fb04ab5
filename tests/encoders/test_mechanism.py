"""Patched encoders: bits that must not change, traces that must not stay, calls of every kind."""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import pickle
import threading

import pytest
import torch
from torch import nn

import vtoken
from vtoken.adapters.encoders.encoder import encoder_for

from . import oracle
from .models import (
    CASES,
    DEPTH,
    GRID,
    HEADS,
    OPEN_CLIP,
    PATCH,
    SIZE,
    TIMM,
    WIDTH,
    hf_model,
    images,
    scrambled,
    timm_vit,
)

PATCHES = GRID * GRID
R = [5, 3, 4, 2]
FLOAT64 = dict(rtol=0, atol=1e-9)
SOME = [
    "timm-plain",
    "timm-no_cls_map",
    "timm-registers",
    "timm-distilled",
    "timm-eva",
    "open_clip-tok",
    "open_clip-coca",
    "hf-CLIPVisionModel-sdpa",
    "hf-Dinov2WithRegistersModel-eager",
]
LAYERS = ["timm-plain", "timm-eva", "timm-registers", "timm-no_cls_avg"]


def traces(model):
    """All that a patch could leave: attributes, hooks, keys of the state, classes."""
    out = []
    for name, m in model.named_modules():
        hooks = [len(v) for k, v in sorted(vars(m).items()) if "hooks" in k and v is not None]
        plain = {k: id(v) for k, v in vars(m).items() if not isinstance(v, dict)}
        out.append((name, type(m), sorted(vars(m)), hooks, plain))
    return out, list(model.state_dict())


def same(a, b):
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a is b or torch.equal(a, b)


@pytest.fixture
def vit():
    return timm_vit()


# -- nothing changes -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", CASES)
def test_nothing_to_do_changes_no_bit(name):
    case = CASES[name]
    model = case.build()
    with torch.no_grad():
        want = case.call(model, images())
        for options in (dict(r=0), dict(r=[0, 0]), dict(budget=1.0), dict(flops=1.0), dict(r=[])):
            with vtoken.applied(model, "tome", **options):
                assert torch.equal(case.call(model, images()), want), options


@pytest.mark.parametrize("name", CASES)
def test_unpatch_leaves_no_trace_and_changes_no_bit(name):
    case = CASES[name]
    model = case.build()
    with torch.no_grad():
        want = case.call(model, images())
        before, weights = traces(model), {k: v.clone() for k, v in model.state_dict().items()}
        vtoken.patch(model, "tome", r=3)
        assert not torch.equal(case.call(model, images()), want)
        assert list(model.state_dict()) == list(weights)
        assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
        vtoken.unpatch(model)
        assert traces(model) == before
        assert torch.equal(case.call(model, images()), want)
        with vtoken.applied(model, "tome", r=3):
            assert not torch.equal(case.call(model, images()), want)
        assert traces(model) == before
        assert torch.equal(case.call(model, images()), want)


def test_layers_before_the_first_merge_are_the_models_own(vit):
    seen = []
    vit.blocks[1].register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        vit(images())
        vtoken.patch(vit, "tome", r=[0, 0, 0, 5])
        vit(images())
    assert torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("name", SOME)
def test_disabled_reads_all_tokens(name):
    case = CASES[name]
    model = case.build()
    with torch.no_grad():
        want = case.call(model, images())
        vtoken.patch(model, "tome", r=R)
        merged = case.call(model, images())
        with vtoken.disabled(model):
            assert torch.equal(case.call(model, images()), want)
            with vtoken.applied(model, "tome", r=R):
                assert torch.equal(case.call(model, images()), merged)
        assert torch.equal(case.call(model, images()), merged)


# -- several models, threads, blocks -------------------------------------------------------------------------
def test_two_models_do_not_share_anything():
    one, two = timm_vit(), scrambled(timm_vit(), 7)
    x = images()
    with torch.no_grad():
        with vtoken.applied(one, "tome", r=R):
            want_one = one(x)
        with vtoken.applied(two, "tome", r=2):
            want_two = two(x)
        vtoken.patch(one, "tome", r=R)
        vtoken.patch(two, "tome", r=2)
        assert torch.equal(one(x), want_one) and torch.equal(two(x), want_two)
        vtoken.unpatch(one)
        assert torch.equal(two(x), want_two) and not torch.equal(one(x), want_one)


@pytest.mark.parametrize("name", ["timm-plain", "open_clip-tok", "hf-CLIPVisionModel-sdpa"])
def test_threads_with_blocks_of_their_own(name):
    case = CASES[name]
    model, x, want, wrong = case.build(), images(), {}, []
    with torch.no_grad():
        for r in (1, 2, 3, 5):
            with vtoken.applied(model, "tome", r=r):
                want[r] = case.call(model, x)
    start = threading.Barrier(4)

    def work(r):
        with torch.no_grad(), vtoken.applied(model, "tome", r=r):
            start.wait()
            for _ in range(8):
                if not torch.equal(case.call(model, x), want[r]):
                    wrong.append(r)

    threads = [threading.Thread(target=work, args=(r,)) for r in want]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    assert "_vtoken_patch" not in vars(model)


def test_a_forward_ends_with_the_patch_it_began_with(vit):
    x = images()
    inside, go, outcome = threading.Event(), threading.Event(), []
    with torch.no_grad():
        before = traces(vit)
        with vtoken.applied(vit, "tome", r=R):
            want = vit(x)
        plain = vit(x)

        def pause(m, args):
            if threading.current_thread() is thread:
                inside.set()
                go.wait(20)

        handle = vit.blocks[2].register_forward_pre_hook(pause)

        def work():
            with torch.no_grad():
                outcome.append(vit(x))

        vtoken.patch(vit, "tome", r=R)
        thread = threading.Thread(target=work)
        thread.start()
        assert inside.wait(20)
        vtoken.unpatch(vit)
        assert torch.equal(vit(x), plain)
        go.set()
        thread.join()
        handle.remove()
        assert torch.equal(outcome[0], want)
        assert torch.equal(vit(x), plain)
        assert traces(vit) == before


def test_a_forward_that_began_unpatched_ends_unpatched(vit):
    x = images()
    with torch.no_grad():
        plain, calls = vit(x), []

        def late(m, args):
            if not calls:
                calls.append(vtoken.patch(vit, "tome", r=R))

        handle = vit.blocks[2].register_forward_pre_hook(late)
        assert torch.equal(vit(x), plain)
        handle.remove()
        assert not torch.equal(vit(x), plain)


# -- broken and partial calls --------------------------------------------------------------------------------
@pytest.mark.parametrize("at", range(DEPTH))
def test_an_exception_in_the_middle_is_forgotten(vit, at):
    x = images()
    vtoken.patch(vit, "tome", r=R)
    with torch.no_grad():
        want = vit(x)

        def broken(m, args):
            raise RuntimeError("broken")

        handle = vit.blocks[at].register_forward_pre_hook(broken)
        with pytest.raises(RuntimeError, match="broken"):
            vit(x)
        handle.remove()
        assert torch.equal(vit(x), want)
        vtoken.unpatch(vit)
        assert "_vtoken_patch" not in vars(vit)


@pytest.mark.parametrize("at", range(DEPTH))
def test_a_block_called_by_hand_after_a_forward(vit, at):
    """Its own forward, of all tokens: no state of the forward before it counts."""
    y = torch.randn(2, 26, WIDTH)
    with torch.no_grad():
        want = vit.blocks[at](y)
        vtoken.patch(vit, "tome", r=R)
        after = vit(images())
        if at:  # block 0 begins a forward
            assert torch.equal(vit.blocks[at](y), want)
        else:
            vit.blocks[at](y)
        assert torch.equal(vit(images()), after)
        if at > 1:
            vit.blocks[0](y)
            assert torch.equal(vit.blocks[at](y), want)
        with vtoken.disabled(vit):
            assert torch.equal(vit.blocks[at](y), want)


def test_blocks_called_by_hand_one_after_the_other_are_a_forward(vit):
    y = torch.randn(2, 26, WIDTH)
    vtoken.patch(vit, "tome", r=R)
    with torch.no_grad():
        want = vit.blocks(y)
        for block in vit.blocks:
            y = block(y)
    assert torch.equal(y, want) and y.shape[1] == 26


@pytest.mark.parametrize("at", range(1, DEPTH))
def test_a_block_by_hand_after_one_that_was_stopped(vit, at):
    """The layers of a forward that was stopped early must not go on with the tokens of another call."""
    with torch.no_grad():
        y = torch.randn(2, 26, WIDTH)
        want = vit.blocks[at](y)
        vtoken.patch(vit, "tome", r=R)
        vit.forward_intermediates(images(), indices=[at - 1], stop_early=True, intermediates_only=True)
        assert torch.equal(vit.blocks[at](y), want)


def test_a_sequence_that_something_else_changes_is_refused(vit):
    """Merging would end there in silence."""
    vtoken.patch(vit, "tome", r=[0, 0, 0, 3])
    vit.blocks[1].register_forward_hook(lambda m, args, out: out[:, :-1])
    with pytest.raises(ValueError, match="Layer 1 of this encoder left 2 sequences of 26 tokens"):
        vit(images())


# -- maps of layers ------------------------------------------------------------------------------------------
def layer_maps(name, model, x):
    """Per layer (images, N, C): what every patch reads, by the oracle."""
    results = CASES[name].oracle(model, x, R)
    return [torch.stack([a.spread(i) for a in results]) for i in range(DEPTH)]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    "indices",
    [None, 2, [-2, 0]]
    + [pytest.param(i, marks=pytest.mark.product) for i in (1, DEPTH, [0], [3], [-1], [1, 3], [0, 1, 2, 3])],
    ids=str,
)
def test_forward_intermediates(name, indices):
    case = CASES[name]
    model = case.build().double()
    x, p = images().double(), CASES[name].prefix
    flags = dict(
        return_prefix_tokens=(False, True),
        norm=(False, True),
        stop_early=(False, True),
        output_fmt=("NCHW", "NLC"),
        intermediates_only=(False, True),
        output_dict=(False, True),
    )
    with torch.no_grad():
        maps = layer_maps(name, model, x)
        taken = (
            range(DEPTH)[-(indices or DEPTH) :]
            if not isinstance(indices, list)
            else sorted({i % DEPTH for i in indices})
        )
        known = inspect.signature(model.forward_intermediates).parameters
        flags = {k: v for k, v in flags.items() if k in known}
        every = [dict(zip(flags, v)) for v in itertools.product(*flags.values())]
        plain = [model.forward_intermediates(x, indices=indices, **given) for given in every]
        vtoken.patch(model, "tome", r=R)
        for given, unpatched in zip(every, plain):
            out = model.forward_intermediates(x, indices=indices, **given)
            want = [model.norm(maps[i]) if given["norm"] else maps[i] for i in taken]
            last = model.norm(maps[max(taken) if given["stop_early"] else DEPTH - 1])
            spatial = [
                w[:, p:].unflatten(1, (GRID, GRID)).permute(0, 3, 1, 2)
                if given["output_fmt"] == "NCHW"
                else w[:, p:]
                for w in want
            ]
            first = [w[:, :p] for w in want]
            check_intermediates(out, unpatched, spatial, first, last)


def check_intermediates(out, unpatched, spatial, first, last):
    """The same structure as unpatched, with these values."""
    if isinstance(unpatched, dict):
        assert out.keys() == unpatched.keys()
        values = dict(image_intermediates=spatial, image_intermediates_prefix=first, image_features=last)
        for key, got in out.items():
            torch.testing.assert_close(got, values[key], **FLOAT64)
        return
    if isinstance(unpatched, tuple):
        torch.testing.assert_close(out[0], last, **FLOAT64)
        out, unpatched = out[1], unpatched[1]
    assert isinstance(out, list) and len(out) == len(spatial)
    for got, before, a, b in zip(out, unpatched, spatial, first):
        assert isinstance(got, tuple) == isinstance(before, tuple)
        if isinstance(got, tuple):
            torch.testing.assert_close(got[1], b, **FLOAT64)
            got = got[0]
        torch.testing.assert_close(got, a, **FLOAT64)


@pytest.mark.parametrize("name", LAYERS)
def test_get_intermediate_layers(name):
    model, x, p = CASES[name].build().double(), images().double(), CASES[name].prefix
    if not hasattr(model, "get_intermediate_layers"):
        pytest.skip("this model has none")
    with torch.no_grad():
        maps = layer_maps(name, model, x)
        vtoken.patch(model, "tome", r=R)
        for n, reshape, norm in itertools.product((1, 3, [0, 2], (1,)), (False, True), (False, True)):
            taken = range(DEPTH)[-n:] if isinstance(n, int) else n
            out = model.get_intermediate_layers(x, n, reshape=reshape, norm=norm)
            assert len(out) == len(taken)
            for got, i in zip(out, taken):
                want = (model.norm(maps[i]) if norm else maps[i])[:, p:]
                want = want.unflatten(1, (GRID, GRID)).permute(0, 3, 1, 2) if reshape else want
                torch.testing.assert_close(got, want, **FLOAT64)
        for got, first in model.get_intermediate_layers(x, 2, return_prefix_tokens=True) if p else []:
            assert got.shape == (2, PATCHES, WIDTH) and first.shape == (2, p, WIDTH)


def test_forward_features_and_head(vit):
    x = images().double()
    model = vit.double()
    with torch.no_grad():
        results = TIMM["plain"].oracle(model, x, R)
        vtoken.patch(model, "tome", r=R)
        features = model.forward_features(x)
        torch.testing.assert_close(
            features, model.norm(torch.stack([a.spread() for a in results])), **FLOAT64
        )
        torch.testing.assert_close(model.forward_head(features), model(x), **FLOAT64)
        assert model.forward_head(features, pre_logits=True).shape == (2, WIDTH)


@pytest.mark.parametrize("indices", [(0, 2), (1, 3), (3,), (0, 1, 2, 3)])
def test_features_only(indices):
    timm = pytest.importorskip("timm")
    shape = dict(
        img_size=SIZE,
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        num_classes=0,
        mlp_ratio=2.0,
    )
    model = timm.create_model("vit_tiny_patch16_224", features_only=True, out_indices=indices, **shape)
    scrambled(model).double()
    x = images().double()
    with torch.no_grad():
        plain = model(x)
        r = R[: len(model.model.blocks)]  # timm cuts the layers off that no map needs
        results = TIMM["plain"].oracle(_Inner(model), x, r)
        vtoken.patch(model, "tome", r=r)
        out = model(x)
        assert [a.shape for a in out] == [a.shape for a in plain]
        for got, i in zip(out, indices):
            want = torch.stack([a.spread(i) for a in results])[:, 1:]
            torch.testing.assert_close(got, want.unflatten(1, (GRID, GRID)).permute(0, 3, 1, 2), **FLOAT64)
        vtoken.unpatch(model)
        assert same(model(x), plain)


class _Inner:
    """A `features_only` model as the cases see one."""

    def __init__(self, model):
        self.model = model
        inner = getattr(model, "model", model)
        self.blocks, self.norm = inner.blocks, inner.norm

    def __call__(self, x):
        return self.model(x)


@pytest.mark.parametrize("name", ["tok", "avg", "sequence_first"])
def test_intermediates_of_open_clip(name):
    case = OPEN_CLIP[name]
    model, x = case.build().double(), images().double()
    flags = dict(
        stop_early=(False, True),
        normalize_intermediates=(False, True),
        intermediates_only=(False, True),
        output_fmt=("NCHW", "NLC"),
        output_extra_tokens=(False, True),
    )
    with torch.no_grad():
        results = case.oracle(model, x, R)
        maps = [torch.stack([a.spread(i) for a in results]) for i in range(DEPTH)]
        embedding = case.call(model, x)
        vtoken.patch(model, "tome", r=R)
        embedding = case.call(model, x)
        for indices in (None, 1, 2, [0], [-1], [1, 3]):
            taken = (
                range(DEPTH)[-(indices or DEPTH) :]
                if not isinstance(indices, list)
                else sorted({i % DEPTH for i in indices})
            )
            for values in itertools.product(*flags.values()):
                given = dict(zip(flags, values))
                out = model.visual.forward_intermediates(x, indices=indices, **given)
                want = [
                    model.visual.ln_post(maps[i]) if given["normalize_intermediates"] else maps[i]
                    for i in taken
                ]
                spatial = [
                    w[:, 1:].unflatten(1, (GRID, GRID)).permute(0, 3, 1, 2)
                    if given["output_fmt"] == "NCHW"
                    else w[:, 1:]
                    for w in want
                ]
                torch.testing.assert_close(out["image_intermediates"], spatial, **FLOAT64)
                if given["output_extra_tokens"]:
                    torch.testing.assert_close(
                        out["image_intermediates_prefix"], [w[:, :1] for w in want], **FLOAT64
                    )
                if not given["intermediates_only"] and not given["stop_early"]:
                    torch.testing.assert_close(out["image_features"], embedding, **FLOAT64)
                if not given["intermediates_only"] and given["stop_early"]:
                    pooled = model.visual._pool(maps[max(taken)])[0] @ model.visual.proj
                    torch.testing.assert_close(out["image_features"], pooled, **FLOAT64)


def test_encode_image_normalised_and_text_untouched():
    model, x = OPEN_CLIP["tok"].build().double(), images().double()
    text = torch.randint(1, 49, (2, 8))
    with torch.no_grad():
        words = model.encode_text(text)
        vtoken.patch(model, "tome", r=R)
        plain = model.encode_image(x)
        torch.testing.assert_close(
            model.encode_image(x, normalize=True), plain / plain.norm(dim=1, keepdim=True), **FLOAT64
        )
        assert torch.equal(model.encode_text(text), words)
        features = model(x, text)
        torch.testing.assert_close(features[0], plain / plain.norm(dim=1, keepdim=True), **FLOAT64)


def test_output_tokens_of_open_clip_have_the_unpatched_length():
    model = OPEN_CLIP["coca"].build()
    model.visual.output_tokens = True
    with torch.no_grad():
        want = [a.shape for a in model.visual(images())]
        vtoken.patch(model, "tome", r=R)
        assert [a.shape for a in model.visual(images())] == want


@pytest.mark.parametrize("name", [k for k in CASES if k.startswith("hf-")])
@pytest.mark.parametrize("r", [R, [0, 0, 5, 0], [12, 6, 3, 1]], ids=str)
def test_hidden_states_of_transformers(name, r):
    case = CASES[name]
    model, x = case.build().double(), images().double()
    off = dict(rtol=0, atol=2e-6) if name.endswith("eager") else FLOAT64
    with torch.no_grad():
        entering = case.entering(model, x)
        results = case.oracle(model, x, r)
        plain = model(pixel_values=x, output_hidden_states=True)
        vtoken.patch(model, "tome", r=r)
        out = model(pixel_values=x, output_hidden_states=True)
    assert [h.shape for h in out.hidden_states] == [h.shape for h in plain.hidden_states]
    torch.testing.assert_close(out.hidden_states[0], entering, **FLOAT64)
    for i in range(DEPTH):
        torch.testing.assert_close(
            out.hidden_states[i + 1], torch.stack([a.spread(i) for a in results]), **off
        )
    assert out.last_hidden_state.shape == plain.last_hidden_state.shape


def test_transformers_tuple_output_with_hidden_states():
    case = CASES["hf-CLIPVisionModel-sdpa"]
    model = case.build()
    with torch.no_grad():
        plain = model(pixel_values=images(), output_hidden_states=True, return_dict=False)
        vtoken.patch(model, "tome", r=R)
        named = model(pixel_values=images(), output_hidden_states=True)
        out = model(pixel_values=images(), output_hidden_states=True, return_dict=False)
    assert len(out) == len(plain)
    states = next(a for a in out if isinstance(a, tuple))
    assert same(list(states), list(named.hidden_states))


@pytest.mark.parametrize("chosen", [[1], [2, 3], [1, -2], 3], ids=str)
def test_chosen_hidden_states_of_transformers(chosen):
    """`output_hidden_states` can name layers; the states that it leaves out are None."""
    model = CASES["hf-CLIPVisionModel-sdpa"].build()
    with torch.no_grad():
        plain = model(pixel_values=images(), output_hidden_states=chosen).hidden_states
        vtoken.patch(model, "tome", r=R)
        every = model(pixel_values=images(), output_hidden_states=True).hidden_states
        some = model(pixel_values=images(), output_hidden_states=chosen).hidden_states
    assert [a is None for a in some] == [a is None for a in plain] and any(a is not None for a in some)
    for a, b in zip(reversed(some), reversed(every)):  # some releases leave out what the first layer reads
        assert a is None or torch.equal(a, b)


def test_hidden_states_that_a_module_around_the_tower_records():
    model = hf_model("GitVisionModel", "eager")
    with torch.no_grad():
        plain = model(pixel_values=images(), output_hidden_states=True)
        vtoken.patch(model, "tome", r=R)
        out = model(pixel_values=images(), output_hidden_states=True)
        direct = model.vision_model(pixel_values=images()).last_hidden_state
        vtoken.unpatch(model)
        again = model(pixel_values=images(), output_hidden_states=True)
    assert [h.shape for h in out.hidden_states] == [h.shape for h in plain.hidden_states]
    assert torch.equal(out.last_hidden_state, direct)
    assert len(out.hidden_states[1][0].unique(dim=0)) == plain.hidden_states[1].shape[1] - R[0]
    assert same(list(plain.hidden_states), list(again.hidden_states))


@pytest.mark.parametrize("kind", ["CLIPVisionModel", "ViTModel", "Dinov2Model"])
def test_attention_maps_are_refused(kind):
    model = CASES[f"hf-{kind}-eager"].build()
    with torch.no_grad():
        assert len(model(pixel_values=images(), output_attentions=True).attentions) == DEPTH
        vtoken.patch(model, "tome", r=[0, 3, 0, 2])
        with pytest.raises(ValueError) as error:
            model(pixel_values=images(), output_attentions=True)
        assert "output_attentions" in one_sentence(error)
        with vtoken.disabled(model):
            assert len(model(pixel_values=images(), output_attentions=True).attentions) == DEPTH


# -- sizes and types -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options,prefix",
    [(dict(), 1), (dict(reg_tokens=4), 5), (dict(kind="Eva", use_rot_pos_emb=True), 1)],
    ids=["plain", "registers", "eva"],
)
def test_images_of_other_sizes(options, prefix):
    model = timm_vit(dynamic_img_size=True, **options).double()
    case = copy.copy(TIMM["eva" if "kind" in options else "registers" if prefix == 5 else "plain"])
    with torch.no_grad():
        for size in ((35, 35), (28, 49), (14, 21), (70, 35)):
            x = images(2, size).double()
            grid = (size[0] // PATCH, size[1] // PATCH)
            if "kind" in options:
                case.rope = lambda m, grid=grid: m.rope.get_embed(shape=grid)
            n = grid[0] * grid[1]
            results = case.oracle(model, x, [2] * DEPTH) if n > 8 else None
            with vtoken.applied(model, "tome", r=2):
                out = model(x)
                if results:
                    torch.testing.assert_close(out, case.expected(model, results), **FLOAT64)
                maps = model.forward_intermediates(x, intermediates_only=True)
                assert all(m.shape == (2, WIDTH, *grid) for m in maps)
                assert vtoken.report(model).patches == n
            with vtoken.applied(model, "tome", budget=0.5):
                model(x)
                assert vtoken.report(model).tokens_per_layer[-1] == prefix + max(1, n // 2)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name, dtype):
    case = CASES[name]
    model = case.build()
    with torch.no_grad():
        half = copy.deepcopy(model).to(dtype)
        plain = case.call(half, images().to(dtype))
        vtoken.patch(half, "tome", r=R)
        out = case.call(half, images().to(dtype))
        assert out.dtype == plain.dtype and out.shape == plain.shape and out.isfinite().all()
        far = (out - plain).abs().max()
        assert far > 0
        report = vtoken.report(half)
        assert report.tokens_per_layer[-1] == PATCHES + case.prefix - sum(R)


@pytest.mark.parametrize("name", SOME)
def test_autocast(name):
    case = CASES[name]
    model = case.build()
    with torch.no_grad():
        vtoken.patch(model, "tome", r=[5, 0, 0, 0])
        want = case.call(model, images())
        with torch.autocast("cpu", torch.bfloat16):
            out = case.call(model, images())
    assert out.isfinite().all() and (out.float() - want).abs().mean() < 0.2 * want.abs().mean() + 0.05


def test_an_empty_batch_and_a_batch_of_one(vit):
    vtoken.patch(vit, "tome", r=R)
    with torch.no_grad():
        assert vit(images()[:1]).shape == (1, 6)
        assert vit(images()[:0]).shape == (0, 6)
    with pytest.raises(ValueError, match="had no images"):
        vtoken.report(vit)


def test_inference_mode_then_training(vit):
    vtoken.patch(vit, "tome", r=R)
    with torch.inference_mode():
        want = vit(images())
    out = vit(images())
    out.sum().backward()
    torch.testing.assert_close(out.detach(), want.clone(), rtol=1e-5, atol=1e-5)
    assert vit.blocks[0].attn.qkv.weight.grad.abs().max() > 0


def test_dropout_and_stochastic_depth_act_in_training():
    model = timm_vit(attn_drop_rate=0.2, proj_drop_rate=0.2, drop_path_rate=0.2)
    vtoken.patch(model, "tome", r=R)
    x = images()
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
        model.train()
        assert not torch.equal(model(x), model(x))


def test_patches_dropped_in_training_keep_their_rotary_embedding():
    case = CASES["timm-eva"]
    model = timm_vit(kind="Eva", use_rot_pos_emb=True, patch_drop_rate=0.25).double().train()
    seen = []
    model.blocks[0].register_forward_pre_hook(
        lambda m, a, k: seen.append((a[0], k["rope"])), with_kwargs=True
    )
    vtoken.patch(model, "tome", r=R)
    out = model(images().double())
    assert vtoken.report(model).tokens_per_layer == [19 - sum(R[: i + 1]) for i in range(DEPTH)]
    ((x, ropes),) = seen
    results = [
        oracle.tome(case.blocks(model), each, R, case.prefix, rope=rope[0]) for each, rope in zip(x, ropes)
    ]
    torch.testing.assert_close(out, case.expected(model, results), **FLOAT64)


@pytest.mark.parametrize("options", [dict(attn_drop_rate=0.5), dict(proj_drop_rate=0.5)], ids=str)
def test_each_dropout_acts_in_merging_layers(options):
    model = timm_vit(**options).train()
    vtoken.patch(model, "tome", r=[5, 0, 0, 0])
    y = torch.randn(2, 26, WIDTH)
    with torch.no_grad():
        assert not torch.equal(model.blocks[0](y), model.blocks[0](y))


# -- copies, compilation, adapters ---------------------------------------------------------------------------
@pytest.mark.parametrize("name", SOME)
def test_deep_copies_and_pickles(name):
    case = CASES[name]
    model = vtoken.patch(case.build(), "tome", r=R)
    with torch.no_grad():
        want = case.call(model, images())
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(case.call(other, images()), want)
            vtoken.unpatch(other)
            plain = case.call(other, images())
            assert not torch.equal(plain, want)
            assert torch.equal(case.call(model, images()), want)
            with vtoken.disabled(model):
                assert torch.equal(case.call(model, images()), plain)
            others = {id(m) for m in other.modules()}
            assert not others & {id(m) for m in model.modules()}
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    with torch.no_grad():
        assert torch.equal(case.call(again, images()), want)


def test_a_copy_has_its_own_strategy_and_report(vit):
    vtoken.patch(vit, "tome", r=R)
    other = copy.deepcopy(vit)
    with torch.no_grad():
        other(images(3))
        with pytest.raises(ValueError, match="has not read images"):
            vtoken.report(vit)
        assert vtoken.report(other).images == 3


@pytest.mark.parametrize(
    "name",
    ["timm-plain"]
    + [pytest.param(n, marks=pytest.mark.product) for n in ("timm-eva", "timm-no_cls_map", "open_clip-tok")],
)
def test_compiled_in_one_graph(name):
    case = CASES[name]
    model = vtoken.patch(case.build(), "tome", r=R)
    torch._dynamo.reset()
    with torch.no_grad():
        want = case.call(model, images())
        trunk = model.visual if name.startswith("open_clip") else model
        compiled = torch.compile(trunk, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(images()), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            compiled(images(seed=8)), case.call(model, images(seed=8)), rtol=1e-5, atol=1e-5
        )
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.product
def test_compiled_by_inductor(vit):
    vtoken.patch(vit, "tome", r=R)
    torch._dynamo.reset()
    with torch.no_grad():
        want = vit(images())
        torch.testing.assert_close(torch.compile(vit, fullgraph=True)(images()), want, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize("before", [False, True])
def test_lora_of_peft(before):
    peft = pytest.importorskip("peft")
    model, x = timm_vit(), images()
    config = peft.LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False)
    if before:
        vtoken.patch(model, "tome", r=R)
        wrapped = peft.get_peft_model(model, config)
    else:
        wrapped = vtoken.patch(peft.get_peft_model(model, config), "tome", r=R)
    wrapped.eval()
    merged = copy.deepcopy(wrapped)
    vtoken.unpatch(merged)
    merged = merged.merge_and_unload()
    vtoken.patch(merged, "tome", r=R)
    with torch.no_grad():
        torch.testing.assert_close(wrapped(x), merged(x), rtol=1e-4, atol=1e-4)
        vtoken.unpatch(wrapped)
        assert (wrapped(x) - merged(x)).abs().max() > 1e-3


def test_replaced_blocks_are_found(vit):
    """A block that someone replaces after the patch is read as it is now, or refused, never silently wrong."""
    x = images()
    other = scrambled(timm_vit(), 9)
    vtoken.patch(vit, "tome", r=R)
    with torch.no_grad():
        vit(x)
        vit.blocks[1] = other.blocks[1]
        fresh = scrambled(timm_vit())
        fresh.blocks[1] = copy.deepcopy(other.blocks[1])
        vtoken.patch(fresh, "tome", r=R)
        torch.testing.assert_close(vit(x), fresh(x))


# -- options and refusals ------------------------------------------------------------------------------------
def test_assigned_options_count(vit):
    strategy = vtoken.strategies.ToMe(r=2)
    x = images()
    with torch.no_grad():
        with vtoken.applied(vit, "tome", r=5):
            want = vit(x)
        with vtoken.applied(vit, "tome", r=5, prop_attn=False):
            flat = vit(x)
        plain = vit(x)
        vtoken.patch(vit, strategy)
        vit(x)
        strategy.r = 5
        assert torch.equal(vit(x), want)
        strategy.prop_attn = False
        assert torch.equal(vit(x), flat)
        strategy.prop_attn, strategy.r, strategy.budget = True, None, 0.2
        vit(x)
        assert vtoken.report(vit).tokens_per_layer[-1] == 6
        strategy.budget = 1.0
        assert torch.equal(vit(x), plain)


def test_options_assigned_to_a_patch_that_did_nothing(vit):
    strategy = vtoken.strategies.ToMe(r=0)
    with torch.no_grad():
        with vtoken.applied(vit, "tome", r=5):
            want = vit(images())
        vtoken.patch(vit, strategy)
        vit(images())
        strategy.r = 5
        assert torch.equal(vit(images()), want)


def one_sentence(error):
    text = str(error.value)
    assert text.endswith(".") and "\n" not in text and 30 < len(text) < 420, text
    return text


def small_model(kind, **options):
    import transformers as tf

    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    return getattr(tf, f"{kind}Model")(getattr(tf, f"{kind}Config")(**shape, **options))


def test_layers_of_one_class_that_are_not_alike_are_refused():
    """Sapiens2 shares keys among heads in its middle layers alone."""
    timm = pytest.importorskip("timm")
    heads = dict(num_heads=4, num_kv_heads=(4, 2, 1, 4), embed_dim=32, depth=4)
    try:
        model = timm.create_model("vit_base_patch16_sapiens2", img_size=28, patch_size=7, **heads)
    except (RuntimeError, TypeError):
        pytest.skip("an older timm")
    with pytest.raises(ValueError) as error:
        vtoken.patch(model, "tome", r=2)
    assert one_sentence(error).startswith("Tokens cannot be merged in Eva: its layers (EvaBlock)")


def test_models_without_blocks_are_refused():
    timm = pytest.importorskip("timm")
    kwargs = dict(img_size=64, patch_size=4, window_size=4, embed_dim=16, depths=(1, 1), num_heads=(2, 2))
    makers = {
        "resnet": lambda: timm.create_model("resnet10t"),
        "swin": lambda: timm.models.swin_transformer.SwinTransformer(**kwargs),
        "beit": lambda: timm.models.beit.Beit(
            img_size=28, patch_size=7, embed_dim=32, depth=2, num_heads=2, use_rel_pos_bias=True
        ),
        "beit_shared": lambda: timm.models.beit.Beit(
            img_size=28, patch_size=7, embed_dim=32, depth=2, num_heads=2, use_shared_rel_pos_bias=True
        ),
        "parallel": lambda: timm_vit(block_fn=timm.models.vision_transformer.ParallelThingsBlock),
        "parallel_scaling": lambda: timm_vit(block_fn=timm.models.vision_transformer.ParallelScalingBlock),
        "mixer": lambda: timm.models.mlp_mixer.MlpMixer(
            img_size=28, patch_size=7, embed_dim=32, num_blocks=2
        ),
        "cait": lambda: timm.models.cait.Cait(img_size=28, patch_size=7, embed_dim=32, depth=2, num_heads=2),
        "differential": lambda: timm_vit(attn_layer="diff"),
        "naflex": lambda: timm.create_model(
            "naflexvit_base_patch16_gap", embed_dim=32, depth=2, num_heads=2, patch_size=7
        ),
        "audio": lambda: small_model("AST", num_mel_bins=32, max_length=64),
        "packed": lambda: small_model("Siglip2Vision", num_patches=16, patch_size=7),
        "stages": lambda: small_model("GroupViTVision", image_size=32, patch_size=4),
    }
    for name, make in makers.items():
        model = make().eval()
        before = traces(model)
        with pytest.raises((ValueError, TypeError)) as error:
            vtoken.patch(model, "tome", r=2)
        assert one_sentence(error).startswith("Tokens cannot be merged in"), name
        with pytest.raises((ValueError, TypeError), match="Tokens cannot be merged in"):
            vtoken.list_strategies(model=model)
        assert traces(model) == before, name


def test_things_that_are_no_models_are_refused():
    for thing in (nn.Linear(3, 3), nn.Sequential(nn.Conv2d(3, 3, 1)), "vit", None):
        with pytest.raises((ValueError, TypeError)) as error:
            vtoken.patch(thing, "tome", r=2)
        one_sentence(error)


@pytest.mark.parametrize(
    "options,words",
    [
        (dict(r=-1), "r must be 0 or more"),
        (dict(r=[1, -2]), "r must be 0 or more"),
        (dict(r=[1] * (DEPTH + 1)), "names 5 layers"),
        (dict(budget=0.04), "at least 2"),
        (dict(budget=0.0), "budget"),
        (dict(budget=1.5), "budget"),
        (dict(flops=0.01), "cannot bring"),
        (dict(flops=0), "flops"),
        (dict(r=2, budget=0.5), "one of"),
        (dict(r=[2], schedule="decreasing"), "schedule"),
        (dict(r=2, schedule="random"), "schedule"),
        (dict(r=2.5), "r"),
        (dict(kth=1), "kth"),
        (dict(kth=3, r=2), "kth"),
        (dict(kth=26), "kth"),
        (dict(kth=2, kth_layers=(0, 1, 2, 3, 4)), "kth"),
        (dict(kth=2, kth_layers=(7,)), "kth"),
        (dict(rr=2), "rr"),
    ],
    ids=str,
)
def test_bad_options_are_refused(vit, options, words):
    before = traces(vit)
    with pytest.raises((ValueError, TypeError)) as error:
        vtoken.patch(vit, "tome", **options)
    assert words in one_sentence(error)
    assert traces(vit) == before


@pytest.mark.parametrize("name", ["timm-plain", "open_clip-tok", "hf-CLIPVisionModel-sdpa"])
def test_methods_of_language_models_are_refused(name):
    model = CASES[name].build()
    before = traces(model)
    for strategy in ("hired", "fastv", "visionzip+fastv"):
        with pytest.raises(ValueError) as error:
            vtoken.patch(model, strategy, budget=0.2)
        assert "tome" in one_sentence(error)
    assert traces(model) == before
    with pytest.raises(ValueError) as error:
        vtoken.patch(vtoken.patch(model, "tome", r=2), "tome", r=3)
    assert "patched with tome already" in one_sentence(error)


def test_masks_are_refused(vit):
    n, x = PATCHES + 1, images()
    vtoken.patch(vit, "tome", r=R)
    for given in (dict(attn_mask=torch.zeros(n, n)), dict(is_causal=True)):
        with pytest.raises(ValueError) as error:
            vit(x, **given)
        assert "mask" in one_sentence(error)
        with vtoken.disabled(vit):
            vit(x, **given)
    with torch.no_grad():
        assert vit(x).isfinite().all()


def test_masks_are_refused_before_the_first_merge(vit):
    """A mask counts in the layers before the first merge too: nobody may be told half a truth."""
    vtoken.patch(vit, "tome", r=[0, 0, 0, 5])
    with pytest.raises(ValueError, match="mask"):
        vit(images(), is_causal=True)


@pytest.mark.parametrize("name", ["timm-plain", "open_clip-tok", "hf-CLIPVisionModel-sdpa"])
def test_gradient_checkpointing_is_refused(name):
    case = CASES[name]

    def checkpoint(model):
        if name.startswith("hf"):
            model.gradient_checkpointing_enable()
        else:
            model.set_grad_checkpointing()
        return model.train()

    with pytest.raises(ValueError) as error:
        vtoken.patch(checkpoint(case.build()), "tome", r=R)
    assert "checkpointing" in one_sentence(error)
    model = checkpoint(vtoken.patch(case.build(), "tome", r=R))
    with pytest.raises(ValueError, match="checkpointing"):
        case.call(model, images()).sum().backward()


def test_reports(vit):
    vtoken.patch(vit, "tome", r=R)
    with pytest.raises(ValueError) as error:
        vtoken.report(vit)
    one_sentence(error)
    with torch.no_grad():
        vit(images(3))
    report = vtoken.report(vit)
    n, c, counts = PATCHES + 1, WIDTH, []
    dense = merged = PATCHES * 3 * PATCH * PATCH * c
    for r in R:
        dense += 4 * (PATCHES + 1) * c * c + 2 * (PATCHES + 1) ** 2 * c + 4 * (PATCHES + 1) * c * c
        merged += 4 * n * c * c + 2 * n * n * c + 4 * (n - r) * c * c
        n -= r
        counts.append(n)
    assert report.tokens_per_layer == counts and report.images == 3
    assert "  tokens per layer, 1 prefix token included: " in str(report) and "  3 images: " in str(report)
    assert report.gflops_dense == pytest.approx(dense / 1e9) and report.gflops == pytest.approx(merged / 1e9)


def test_multiply_adds_of_a_stem_of_several_convolutions():
    timm = pytest.importorskip("timm")
    model, found = timm.create_model("vit_tiny_r_s16_p8_224", img_size=64).eval(), []

    def count(module, args, out):
        if isinstance(module, torch.nn.Conv2d):
            found.append(out[0, 0].numel() * module.weight.numel())

    handles = [module.register_forward_hook(count) for module in model.modules()]
    with torch.no_grad():
        model(torch.rand(1, 3, 64, 64))
    for handle in handles:
        handle.remove()
    shape = encoder_for(model).shape(4)
    assert len(found) > 1 and shape.patches * shape.embedding_macs == pytest.approx(sum(found), rel=1e-3)
