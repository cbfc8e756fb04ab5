"""Blank places take the rows of one of them: compared with a slow second writing in float64."""

from __future__ import annotations

import pytest
import torch

import vtoken
from tests.models import FAMILIES
from vtoken import StreamState
from vtoken.adapters.registry import adapter_for
from vtoken.strategies import create

from .reuse_oracle import (
    CLOSE,
    GRID,
    TOWERS,
    anatomy,
    build,
    check_flops,
    check_gradients,
    facts,
    feed,
    layers_of,
    patched_with,
    places_of,
    run,
    shared_models,
    turn,
)

models = shared_models()
patched = patched_with("blank_patches")
OPTIONS = dict(threshold=0.1, margin=0, block=2)


def picture(kind: str, seed: int, dtype: torch.dtype = torch.float64, grid=GRID) -> torch.Tensor:
    """A frame as the model takes it: paper of one colour with grain, and content in some places."""
    generator = torch.Generator().manual_seed(seed)
    qwen = kind.startswith("qwen")
    shape = (grid[0] * grid[1], 3, 2 * 7 * 7) if qwen else (3, 28, 28)
    paper = torch.randn(3, 1, generator=generator, dtype=torch.float64)
    out = (paper if qwen else paper[:, None]) + 0.05 * torch.rand(shape, generator=generator)
    content = torch.randn(shape, generator=generator, dtype=torch.float64)
    rows, columns = (grid[0] // 2, grid[1] // 2) if qwen else (4, 4)
    for place in torch.randperm(rows * columns, generator=generator)[:3].tolist():
        top, left = 7 * (place // columns), 7 * (place % columns)
        at = slice(4 * place, 4 * place + 4) if qwen else (..., slice(top, top + 7), slice(left, left + 7))
        out[at] = content[at]
    return (out.flatten(1) if qwen else out).to(dtype)


@torch.no_grad()
def naive(model, kind: str, frames, options, grid=GRID, read=()):
    """After every layer (frames * n, C), and per frame the set of computed tokens.

    `read`: layers that all tokens pass, each with the position of its own.
    """
    layers, prefix = layers_of(model), int(kind == "clip")
    outs, computed_of = [[] for _ in layers], []
    for frame in frames:
        places = places_of(kind, frame, grid)
        rows, columns = (1 + max(p[i] for p in places) for i in range(2))
        each = torch.stack([pixels for pixels, _ in places.values()])
        patches = len(places[0, 0][1])
        origins = create("blank_patches", **options).origins(each.view(rows, columns, patches, -1))
        source = list(range(prefix + len(places) * patches))
        for place, (_, tokens) in places.items():
            origin = int(origins[place])
            for mine, taken in zip(tokens, places[divmod(origin, columns)][1], strict=True):
                source[prefix + mine] = prefix + taken
        computed_of.append(set(source))
        x = run(model, kind, [frame], grid=grid)[0]
        for i, (layer, (seen, rotary)) in enumerate(
            zip(layers, facts(model, kind, frame, grid), strict=True)
        ):
            q, k, v, project, norm2, mlp, heads = anatomy(layer, x)
            q, k, v = (y.double().reshape(len(x), heads, -1) for y in (q, k, v))
            q, k = (y if rotary is None else turn(y, rotary) for y in (q, k))
            if i not in read:
                k, v = k[source], v[source]
            logits = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
            weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
            y = x + project(torch.einsum("hqk,khd->qhd", weights, v).flatten(1).to(x.dtype))
            x = (y + mlp(norm2(y)))[source]
            outs[i].append(x)
    return [torch.cat(o) for o in outs], computed_of


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize("options", [OPTIONS, OPTIONS | dict(block=3), OPTIONS | dict(margin=1, block=99)])
def test_equals_the_second_writing(models, patched, kind, options):
    frames = [picture(kind, seed) for seed in range(4)]
    clean = vtoken.unpatch(models(kind))
    want, computed = naive(clean, kind, frames, options)
    dense, state = run(clean, kind, frames)[-1], StreamState()
    model = patched(kind, **options)
    for layer, (a, b) in enumerate(zip(run(model, kind, frames)[1:], want, strict=True)):
        torch.testing.assert_close(a, b, **CLOSE, msg=f"layer {layer}")
    torch.testing.assert_close(feed(model, kind, frames, state), want[-1], **CLOSE)
    assert state.recomputed == sum(map(len, computed)) < state.tokens == len(dense)
    assert state.references is None and state.nbytes == 0  # a frame takes nothing of another
    assert (dense - want[-1]).abs().max() > 0.02


@pytest.mark.parametrize("kind", TOWERS)
def test_a_frame_without_blank_places_is_the_plain_tower(patched, kind):
    frames = [torch.randn_like(picture(kind, seed)) for seed in range(2)]
    model = patched(kind, **OPTIONS)
    got, state = run(model, kind, frames)[-1], StreamState()
    fed = feed(model, kind, frames, state)
    vtoken.unpatch(model)
    assert torch.equal(got, run(model, kind, frames)[-1]) and torch.equal(fed, feed(model, kind, frames))
    assert state.recomputed == state.tokens


@pytest.mark.parametrize("kind", TOWERS)
def test_flops_fall_as_reported(patched, kind):
    frames, model, state = [picture(kind, seed) for seed in range(3)], patched(kind, **OPTIONS), StreamState()
    check_flops(kind, model, state, lambda: run(model, kind, frames))


@pytest.mark.parametrize("kind", TOWERS)
def test_all_tokens_pass_the_layers_that_are_read(models, patched, kind):
    frames, tower = [picture(kind, seed) for seed in range(3)], adapter_for(models(kind)).towers["video"]
    for other in ("visionzip", "vispruner") if kind == "clip" else ("divprune", "hiprune"):
        read = create(other).needs(tower.info).tower_layers
        assert bool(read) == (other != "divprune")
        want, _ = naive(vtoken.unpatch(models(kind)), kind, frames, OPTIONS, read=read)
        model = patched(kind, ["blank_patches", other], budget=0.25, blank_patches=OPTIONS)
        torch.testing.assert_close(run(model, kind, frames)[-1], want[-1], **CLOSE)
        torch.testing.assert_close(feed(model, kind, frames), want[-1], **CLOSE)


@torch.no_grad()
def encoded(model, pixels: torch.Tensor, **given) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The last tower layer's output for images, and their features."""
    seen: list[torch.Tensor] = []
    layer = adapter_for(model).towers["image"].layers[-1]
    handle = layer.register_forward_hook(lambda m, args, out: seen.append(out.flatten(0, -2)))
    out = model.base_model.get_image_features(pixels, **given)
    handle.remove()
    return torch.cat(seen), list(out.pooler_output)


def test_images_and_the_crops_of_one_are_served_outside_of_streams(models, patched):
    """LLaVA-NeXT's tower reads the crops of an image as a batch."""
    crops = [picture("clip", seed) for seed in range(3)]
    given = dict(image_sizes=torch.tensor([[28, 56]]))
    want, _ = naive(vtoken.unpatch(models("clip")), "clip", crops, OPTIONS)
    model = patched("clip", **OPTIONS)
    states, _ = encoded(model, torch.stack(crops)[None], **given)
    torch.testing.assert_close(states, want[-1], **CLOSE)
    with vtoken.stream(model) as state:
        assert torch.equal(encoded(model, torch.stack(crops)[None], **given)[0], states)
    assert state.frames == 3 and state.recomputed < state.tokens


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_images_alone_or_together(family):
    kind = "clip" if family == "llava" else "qwen2.5"
    model = vtoken.patch(FAMILIES[family].build(dtype=torch.float64), "blank_patches", **OPTIONS)
    images = [picture(kind, seed) for seed in range(3)]

    def features_of(some):
        if kind == "clip":
            return encoded(model, torch.stack(some))[1]
        return encoded(model, torch.cat(some), image_grid_thw=torch.tensor([[1, *GRID]] * len(some)))[1]

    together, alone = features_of(images), [features_of([image])[0] for image in images]
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    vtoken.unpatch(model)
    dense = features_of(images)
    assert all((a - b).abs().max() > 0.005 for a, b in zip(together, dense, strict=True))


def test_an_origin_that_is_not_computed_is_refused(patched, monkeypatch):
    turned = torch.arange(16).roll(1).view(4, 4)
    monkeypatch.setattr(type(create("blank_patches")), "origins", lambda self, pixels, reference: turned)
    model = patched("siglip", **OPTIONS)
    with pytest.raises(ValueError, match="must name places that are computed"):
        run(model, "siglip", [picture("siglip", 0)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["clip", "qwen2.5"])
def test_half_precision(kind, dtype):
    model = vtoken.patch(build(kind, dtype), "blank_patches", **OPTIONS)
    got = feed(model, kind, [picture(kind, seed, dtype) for seed in range(2)])
    assert got.dtype == dtype and bool(torch.isfinite(got).all())


def test_gradients_flow(patched):
    check_gradients(patched("siglip", **OPTIONS), [picture("siglip", 0)])


def test_the_report_tells_what_the_tower_computed():
    family = FAMILIES["llava"]
    model, inputs = vtoken.patch(family.build(), "blank_patches", threshold=99.0), family.batch("ragged")
    with torch.no_grad():
        model(**inputs)
    use = vtoken.report(model).tower["image"]
    assert use.recomputed == [2] * len(use.tokens) and "tokens computed" in str(vtoken.report(model))
