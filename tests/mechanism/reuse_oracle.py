"""Oracle of reuse between frames: every frame alone, every token computed, masks choose the source."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import vtoken
from tests.models import FAMILIES
from vtoken.adapters.registry import adapter_for

TOWERS = {
    "clip": "llava_next_video/video",
    "siglip": "llava_onevision/video",
    "qwen2": "qwen2_vl/video",
    "qwen2.5": "qwen2_5_vl/video",
    "qwen3": "qwen3_vl/video",
}
GRID = (6, 8)  # patches of a Qwen frame; windows of 4 x 4, some of them cut
CLOSE = dict(rtol=0, atol=1e-5)  # float64, but transformers rotates and normalises in float32
THRESHOLD = 0.3  # of still_patches: between the flicker of a film, 0.02, and its changes, 0.4 and more
# torch 2.14 counts nothing for this one
SDPA = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *args, **kwargs: (
        sdpa_flop_count(q, k, v)
    )
}

# modules of Qwen's towers that read every patch or place alone
OUTSIDE = re.compile(r".*\.(patch_embed|merger|deepstack_merger_list\.\d+)")


def check_flops(kind: str, model, state, read: Callable[[], object]) -> None:
    """Compare the FLOPs that torch counts in a patched and an unpatched model with those reported."""

    def measure() -> tuple[int, int]:
        with FlopCounterMode(display=False, custom_mapping=SDPA) as counter, vtoken.stream(model, state):
            read()
        counts = {name: sum(of.values()) for name, of in counter.get_flop_counts().items()}
        rows = sum(n for name, n in counts.items() if OUTSIDE.fullmatch(name))
        return counter.get_total_flops() - rows, rows

    sparse, few = measure()
    use = state.last
    vtoken.unpatch(model)
    layers, rows = measure()
    assert layers - sparse == use.flops_dense - use.flops > 0
    share = sum(use.recomputed) / sum(use.tokens)
    assert few == pytest.approx(share * rows) and (few > 0) == kind.startswith("qwen")


def check_gradients(model, video) -> None:
    """Check that the features of a patched SigLIP have a gradient in the first layer's MLP."""
    out = features(model, "siglip", video).pooler_output
    weight = layers_of(model)[0].mlp.fc1.weight
    (grad,) = torch.autograd.grad(out.double().square().sum(), weight)
    assert bool(torch.isfinite(grad).all()) and float(grad.abs().sum()) > 0


def build(kind: str, dtype: torch.dtype = torch.float64):
    return FAMILIES[TOWERS[kind]].build(dtype=dtype)


def layers_of(model):
    return adapter_for(model).towers["video"].layers


def film(
    kind: str, frames: int, seed: int = 0, dtype: torch.dtype = torch.float64, grid=GRID
) -> list[Tensor]:
    """Frames of pixels as the model takes them one by one; between frames a few patches change and all of
    them flicker.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (grid[0] * grid[1], 3 * 2 * 7 * 7) if kind.startswith("qwen") else (3, 28, 28)
    still = torch.randn(shape, generator=generator, dtype=torch.float64)
    out = []
    for _ in range(frames):
        frame = still + 0.02 * torch.randn(shape, generator=generator, dtype=torch.float64)
        if kind.startswith("qwen"):
            frame[torch.randperm(len(frame), generator=generator)[:9]] *= -1
        else:
            top, left = torch.randint(0, 3, (2,), generator=generator).tolist()
            frame[:, 7 * top : 7 * top + 14, 7 * left : 7 * left + 14] *= -1
        out.append(frame.to(dtype))
    return out


def places_of(kind: str, frame: torch.Tensor, grid=GRID):
    """By row and column of a place the pixels and the tokens of its patches in the tower's order."""
    if not kind.startswith("qwen"):
        side = frame.shape[-1] // 7
        return {
            (r, c): (frame[:, 7 * r : 7 * r + 7, 7 * c : 7 * c + 7].flatten(), [r * side + c])
            for r in range(side)
            for c in range(side)
        }
    rows, columns = grid[0] // 2, grid[1] // 2
    cells = [(r, c) for r in range(rows) for c in range(columns)]
    order = cells
    if kind == "qwen2.5":  # windows of 2 x 2 cells
        order = sorted(cells, key=lambda cell: (cell[0] // 2, cell[1] // 2, cell[0] % 2, cell[1] % 2))
    return {
        cell: (frame[4 * i : 4 * i + 4].flatten(), [4 * order.index(cell) + k for k in range(4)])
        for i, cell in enumerate(cells)
    }


def features(model, kind: str, *videos: list[Tensor], grid=GRID):
    """What `get_video_features` gives for videos of equal length; releases differ in the name of its first
    argument.
    """
    if kind.startswith("qwen"):
        grids = torch.tensor([[len(v), *grid] for v in videos])
        return model.base_model.get_video_features(
            torch.cat([torch.cat(v) for v in videos]), video_grid_thw=grids
        )
    return model.base_model.get_video_features(torch.stack([torch.stack(v) for v in videos]))


@torch.no_grad()
def run(model, kind: str, *videos: list[Tensor], grid=GRID) -> list[Tensor]:
    """Behind every tower layer (tokens, C), the frames of all videos one behind the other; input of the first
    in front.
    """
    seen: list[Tensor] = []
    layers = layers_of(model)
    handles = [layers[0].register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, -2)))]
    handles += [
        layer.register_forward_hook(lambda m, args, out: seen.append(out.flatten(0, -2))) for layer in layers
    ]
    try:
        features(model, kind, *videos, grid=grid)
    finally:
        for handle in handles:
            handle.remove()
    return seen


@torch.no_grad()
def facts(model, kind: str, frame: Tensor, grid=GRID) -> list[tuple[Tensor, tuple | None]]:
    """Per layer of the unpatched model (n, n) bool, who may see whom in one frame, and the rotary tables."""
    out: list = []
    layers = layers_of(model)

    def note(module, args, kwargs):
        bounds = kwargs.get("cu_seqlens")
        n = args[0].shape[-2]
        ends = torch.tensor([n]) if bounds is None else bounds[1:]
        window = torch.searchsorted(ends, torch.arange(n), right=True)
        out.append((window[:, None] == window[None], kwargs.get("position_embeddings")))

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    features(model, kind, [frame], grid=grid)
    for handle in handles:
        handle.remove()
    return out


def turn(x: Tensor, rotary) -> Tensor:
    """Rotary embedding of (n, heads, d), pair by pair."""
    cos, sin = (r.double() for r in rotary)
    half = x.shape[-1] // 2
    out = x.clone()
    for i in range(half):
        a, b = x[..., i], x[..., i + half]
        out[..., i] = a * cos[:, None, i] - b * sin[:, None, i]
        out[..., i + half] = b * cos[:, None, i + half] + a * sin[:, None, i + half]
    return out


def anatomy(layer, x: Tensor):
    """Queries, keys, values (n, C), the output projection, the second norm, the MLP and the number of heads."""
    if hasattr(layer, "self_attn"):
        a, normed = layer.self_attn, layer.layer_norm1(x)
        return (
            a.q_proj(normed),
            a.k_proj(normed),
            a.v_proj(normed),
            a.out_proj,
            layer.layer_norm2,
            layer.mlp,
            a.num_heads,
        )
    q, k, v = layer.attn.qkv(layer.norm1(x)).chunk(3, -1)
    return q, k, v, layer.attn.proj, layer.norm2, layer.mlp, layer.attn.num_heads


@torch.no_grad()
def oracle(model, kind: str, video: list[Tensor], interval: int, ratio: float | int, shared=False, grid=GRID):
    """Per layer (frames * n, C) as `run` gives them, and per frame and layer the set of computed tokens."""
    geometry = facts(model, kind, video[0], grid)
    layers, reference, picked = layers_of(model), {}, []
    outs: list[list[Tensor]] = [[] for _ in range(len(layers) + 1)]
    for number, frame in enumerate(video):
        x = run(model, kind, [frame], grid=grid)[0]
        outs[0].append(x)
        sets = []
        for i, layer in enumerate(layers):
            seen, rotary = geometry[i]
            q, k, v, project, norm2, mlp, heads = anatomy(layer, x)
            n = len(x)
            computed = torch.ones(n, dtype=torch.bool)
            if number % interval:
                key, value, attended, thought = reference[i]
                m = max(1, min(n, int(n * ratio) if isinstance(ratio, float) else ratio))
                like = [float(k[t] @ key[t] / (k[t].norm() * key[t].norm())) for t in range(n)]
                order = sorted(range(n), key=lambda t: like[t])
                computed = torch.tensor([t in order[:m] for t in range(n)])
                if shared and i:
                    computed = sets[0]
                v = torch.where(computed[:, None], v, value)
            qh, kh, vh = (y.double().view(n, heads, -1) for y in (q, k, v))
            if rotary is not None:
                qh, kh = turn(qh, rotary), turn(kh, rotary)
            logits = torch.einsum("qhd,khd->hqk", qh, kh) / qh.shape[-1] ** 0.5
            weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
            a = project(torch.einsum("hqk,khd->qhd", weights, vh).flatten(1).to(x.dtype))
            if number % interval:
                a = torch.where(computed[:, None], a, attended)
            m_out = mlp(norm2(x + a))
            if number % interval:
                m_out = torch.where(computed[:, None], m_out, thought)
            else:
                reference[i] = k, v, a, m_out
            x = x + a + m_out
            outs[i + 1].append(x)
            sets.append(computed)
        picked.append(sets)
    return [torch.cat(o) for o in outs], picked


def shared_models():
    """A fixture: `models(kind)`, built once per file."""

    @pytest.fixture(scope="module")
    def models():
        return functools.cache(build)

    return models


def patched_with(default: str):
    """A fixture: `patched(kind, **options)`, the shared model with a strategy on it, for one test."""

    @pytest.fixture
    def patched(models):
        touched = []

        def get(kind: str, strategy=default, **options):
            touched.append(vtoken.unpatch(models(kind)))
            return vtoken.patch(touched[-1], strategy, **options)

        yield get
        for model in touched:
            vtoken.unpatch(model)

    return patched


def feed(model, kind: str, video, state=None, grid=GRID):
    """The last layer's output, frame after frame in calls of their own."""
    with vtoken.stream(model, state):
        return torch.cat([run(model, kind, [frame], grid=grid)[-1] for frame in video])
