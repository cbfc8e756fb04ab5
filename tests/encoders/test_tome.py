"""ToMe of vtoken against the oracle, and the properties that the paper's formulation has."""

from __future__ import annotations

import copy

import pytest
import torch

import vtoken

from . import oracle
from .models import CASES, DEPTH, GRID, OPEN_CLIP, TIMM, images, scrambled
from .oracle import Block, Linear, Norm

PATCHES = GRID * GRID
R = [5, 3, 4, 2]
FLOAT32, FLOAT64 = dict(rtol=1e-5, atol=2e-5), dict(rtol=0, atol=1e-9)


def compare(name, r, oracle_r=None, dtype=torch.float64, batch=2, patch=None, **options):
    """Tokens after the last block and the output of a patched model, and those of the oracle."""
    case = CASES[name]
    model = case.build().to(dtype)
    x = images(batch).to(dtype)
    with torch.no_grad():
        reference = copy.deepcopy(model).double()
        results = case.oracle(reference, x.double(), oracle_r or r, **options)
        want, spread = case.expected(reference, results), torch.stack([a.spread() for a in results])
        vtoken.patch(model, "tome", **({"r": r} | (patch or {})))
        after, out = case.leaving(model, x), case.call(model, x)
    tolerance = FLOAT64 if dtype == torch.float64 else FLOAT32
    torch.testing.assert_close(after, spread.to(dtype), **tolerance)
    torch.testing.assert_close(out, want.to(dtype), **tolerance)
    return model, results, out


@pytest.mark.parametrize("name", CASES)
def test_every_encoder_is_the_oracle_in_float32(name):
    model, results, out = compare(name, R, dtype=torch.float32)
    n = PATCHES + CASES[name].prefix
    assert (
        vtoken.report(model).tokens_per_layer
        == [n - 5, n - 8, n - 12, n - 14]
        == [len(x) for x, _, _ in results[0].layers]
    )
    vtoken.unpatch(model)
    assert (CASES[name].call(model, images()) - out).abs().max() > 1e-3  # merging matters here


@pytest.mark.parametrize("name", CASES)
def test_every_encoder_is_the_oracle_in_float64(name):
    compare(name, R)


@pytest.mark.parametrize(
    "name", ["timm-plain", "timm-no_cls_map", "timm-eva", "open_clip-coca", "hf-SiglipVisionModel-sdpa"]
)
def test_without_proportional_attention(name):
    case = CASES[name]
    model = case.build().double()
    x = images().double()
    with torch.no_grad():
        results = case.oracle(model, x, R, prop_attn=False)
        vtoken.patch(model, "tome", r=R, prop_attn=False)
        torch.testing.assert_close(
            case.leaving(model, x), torch.stack([a.spread() for a in results]), **FLOAT64
        )


@pytest.mark.parametrize("name", ["timm-no_cls_avg", "timm-no_cls_map", "hf-SiglipVisionModel-sdpa"])
@pytest.mark.parametrize("sort", [False, True])
def test_the_order_without_prefix(name, sort):
    compare(name, R, patch=dict(sort=sort), sort=sort)


def test_the_published_order_without_prefix_differs_from_the_sorted_one():
    _, strict, _ = compare("timm-no_cls_avg", R, patch=dict(sort=False), sort=False)
    _, sorted_, _ = compare("timm-no_cls_avg", R)
    assert strict[0].order != sorted_[0].order


@pytest.mark.parametrize("name", ["timm-plain", "timm-registers", "timm-distilled", "timm-no_cls_avg"])
@pytest.mark.parametrize("r", [1, 3, 12, 13, 100])
def test_a_constant_number_and_the_cap(name, r):
    model, results, _ = compare(name, [r] * DEPTH, patch=dict(r=r))
    n, counts = PATCHES, []
    for _ in range(DEPTH):
        n -= min(r, n // 2)
        counts.append(n + CASES[name].prefix)
    assert vtoken.report(model).tokens_per_layer == counts == [len(x) for x, _, _ in results[0].layers]


@pytest.mark.parametrize("schedule,inflect", [("decreasing", -1.0), ("increasing", 1.0), ("constant", 0.0)])
@pytest.mark.parametrize("r", [1, 2, 3])
def test_schedules(schedule, inflect, r):
    want = oracle.schedule(r, DEPTH, inflect)
    compare("timm-plain", want, patch=dict(r=r, schedule=schedule))


def test_the_published_decreasing_schedule():
    literal = [26, 23, 21, 18, 16, 14, 11, 9, 7, 4, 2, 0]
    assert oracle.schedule(13, 12, -1) == literal
    assert oracle.schedule(13, 12, 1) == [0, 2, 4, 7, 9, 11, 14, 16, 18, 21, 23, 26]
    shape = vtoken.tokens.EncoderShape(12, 196, 1)
    made = vtoken.strategies.ToMe(r=13, schedule="decreasing").encoder_plan(shape)
    assert list(made) == literal and sum(made) == 151
    for r in range(1, 14):
        for layers in (1, 2, 5, 12, 24):
            for name, inflect in (("decreasing", -1), ("increasing", 1), ("constant", 0)):
                got = vtoken.strategies.ToMe(r=r, schedule=name).encoder_plan(
                    vtoken.tokens.EncoderShape(layers, 10**5, 1)
                )
                assert list(got) == oracle.schedule(r, layers, inflect)


def test_one_layer_removes_r_with_any_schedule():
    for schedule in ("constant", "increasing", "decreasing"):
        made = vtoken.strategies.ToMe(r=7, schedule=schedule).encoder_plan(
            vtoken.tokens.EncoderShape(1, 30, 1)
        )
        assert list(made) == [7]


@pytest.mark.parametrize("r", [[4], [0, 4], [0, 0, 0, 5], [12, 0, 6], [3, 0, 3, 0]])
def test_lists(r):
    compare("timm-plain", r, oracle.schedule(r, DEPTH))
    compare("timm-eva", r, oracle.schedule(r, DEPTH))
    compare("open_clip-tok", r, oracle.schedule(r, DEPTH))


@pytest.mark.parametrize(
    "name", ["timm-plain", "timm-no_cls_avg", "timm-registers", "timm-distilled", "open_clip-avg"]
)
@pytest.mark.parametrize("k,layers", [(5, (0,)), (2, (1,)), (5, (0, 2)), (4, (1,)), (2, (0, 1))])
def test_groups_of_k(name, k, layers):
    """25 patches: groups of 5 leave none over, the others drop the last tokens of the sequence."""
    case = CASES[name]
    model = case.build().double()
    x = images().double()
    with torch.no_grad():
        results = case.oracle(model, x, [0] * DEPTH, kth=dict.fromkeys(layers, k))
        want = case.expected(model, results)
        vtoken.patch(model, "tome", kth=k, kth_layers=layers)
        torch.testing.assert_close(case.call(model, x), want, **FLOAT64)
    report = vtoken.report(model)
    assert report.tokens_per_layer == [len(a) for a, _, _ in results[0].layers]
    for i, result in enumerate(results):  # who joined whom
        owner = report.owner[i].flatten()
        for j in range(PATCHES):
            column = result.source[:, j + case.prefix]
            assert owner[j] == (column.argmax() if column.any() else -1)


# -- matching ------------------------------------------------------------------------------------------------
def kernel(keys, r, prefix, sort=True):
    from vtoken.kernels import bipartite_match

    _, _, keep, owner = bipartite_match(keys[None].float(), r, prefix, sort)
    return keep[0].tolist(), owner[0].tolist()


def places(matching, n):
    order, joins = matching
    place = {token: i for i, token in enumerate(order)}
    return [place[joins.get(i, i)] for i in range(n)]


@pytest.mark.parametrize("n", [3, 4, 5, 17, 18, 50, 197])
@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_matching_masked_split_and_kernel_agree(n, prefix):
    for seed, r in enumerate((0, 1, 2, n // 4, n // 2, n)):
        keys = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed)).double()
        if n <= prefix:
            continue
        split = oracle.match_split(keys, r, prefix)
        if prefix in (1, 2):
            masked = oracle.match_masked(keys, r, True, prefix == 2)
            assert masked == split
        assert kernel(keys, r, prefix) == (split[0], places(split, n))
    if prefix == 0:
        for r in (1, n // 4, n // 2):
            strict = oracle.match_masked(keys, r, False, False)
            assert strict == oracle.match_split(keys, r, 0, sort=False)
            assert kernel(keys, r, 0, sort=False) == (strict[0], places(strict, n))


def test_equal_tokens_are_matched_in_order():
    keys = torch.ones(10, 4).double()
    assert kernel(keys, 3, 1) == (
        oracle.match_split(keys, 3, 1)[0],
        places(oracle.match_split(keys, 3, 1), 10),
    )


def test_zero_keys_give_numbers():
    keep, owner = kernel(torch.zeros(9, 4), 3, 1)
    assert len(keep) == 6 and len(set(owner)) == 6


# -- properties ----------------------------------------------------------------------------------------------
def test_sizes_sum_and_membership():
    for name in ("timm-plain", "timm-registers", "timm-distilled", "timm-no_cls_avg", "timm-eva"):
        prefix = CASES[name].prefix
        _, results, _ = compare(name, R)
        for result in results:
            for x, sizes, source in result.layers:
                assert sizes.sum() == PATCHES + prefix and (sizes[:prefix] == 1).all()
                assert (source.sum(0) == 1).all() and (source.sum(1) == sizes).all()
                assert len(x) == len(sizes)
            assert result.order[:prefix] == list(range(prefix))


@pytest.mark.parametrize(
    "name", ["timm-plain", "timm-registers", "timm-distilled", "timm-eva", "open_clip-tok", "timm-no_cls_map"]
)
def test_sizes_and_owners_of_the_mechanism(name):
    model, results, _ = compare(name, R, batch=3)
    patches = vtoken.patching.patch_of(model)
    run, prefix = patches.runs.last, CASES[name].prefix
    for i, result in enumerate(results):
        torch.testing.assert_close(run.sizes[i].double(), result.sizes, rtol=0, atol=0)
        assert run.owner()[i].tolist() == result.source.argmax(0).tolist()
        assert run.kept[i].tolist() == result.order
        assert run.places()[i].tolist() == [
            result.order[int(result.source[:, j].argmax())] - prefix for j in range(prefix, prefix + PATCHES)
        ]


def tiny_block(seed, width=8, heads=2):
    generator = torch.Generator().manual_seed(seed)

    def linear(a, b):
        return Linear(
            torch.randn(a, b, generator=generator).double() / b**0.5,
            torch.randn(a, generator=generator).double(),
        )

    one = Norm(torch.ones(width).double(), None, 1e-6)
    parts = [linear(width, width) for _ in range(4)]
    return Block(one, *parts, one, linear(16, width), linear(width, 16), heads)


def test_tokens_with_sizes_attend_as_their_copies():
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(1)).double()
    sizes = torch.tensor([1, 3, 1, 2, 5, 1]).double()
    block = tiny_block(2)
    merged, _ = oracle.attention(block, x, sizes.log())
    copies = x.repeat_interleave(sizes.long(), 0)
    explicit, _ = oracle.attention(block, copies, None)
    first = (sizes.cumsum(0) - sizes).long()
    torch.testing.assert_close(merged, explicit[first], rtol=0, atol=1e-12)
    torch.testing.assert_close(oracle.mean_pool(x, sizes, 0), copies.mean(0), rtol=0, atol=1e-12)
    q = torch.randn(2, 8, generator=torch.Generator().manual_seed(4)).double()
    weighed = oracle.attention_pool(q, x, x, sizes, 2)
    torch.testing.assert_close(
        weighed,
        oracle.attention_pool(q, copies, copies, torch.ones(len(copies)).double(), 2),
        rtol=0,
        atol=1e-12,
    )


@pytest.mark.parametrize("kind", ["plain", "registers", "no_cls_avg", "no_cls_map", "layer_scale", "cls_map"])
def test_exact_pairs_change_nothing(kind):
    """Patches in equal pairs, all merged in the first layer: the output is that of all tokens, with log sizes."""
    model = _pairs_model(kind)
    x = _paired(model)
    with torch.no_grad():
        want = model(x)
        with vtoken.applied(model, "tome", r=[PAIRS, 0, 0]):
            torch.testing.assert_close(model(x), want, **PAIR)
            assert vtoken.report(model).tokens_per_layer[0] == PAIRS + model.num_prefix_tokens
        with vtoken.applied(model, "tome", r=[PAIRS // 2, 0, 0], prop_attn=True):
            torch.testing.assert_close(model(x), want, **PAIR)
        with vtoken.applied(model, "tome", r=[PAIRS // 2, 0, 0], prop_attn=False):
            assert (model(x) - want).abs().max() > 1e-4


PAIR, PAIRS = dict(rtol=0, atol=1e-8), 8  # of a 4 x 4 grid


def _options(kind):
    table = dict(
        plain={},
        registers=dict(reg_tokens=4),
        layer_scale=dict(init_values=0.3),
        cls_map=dict(global_pool="map"),
        no_cls_avg=dict(class_token=False, global_pool="avg"),
        no_cls_map=dict(class_token=False, global_pool="map"),
    )
    return table[kind]


def _pairs_model(kind):
    timm = pytest.importorskip("timm")
    shape = dict(img_size=28, patch_size=7, embed_dim=32, depth=3, num_heads=4, num_classes=6, mlp_ratio=2.0)
    model = scrambled(timm.models.vision_transformer.VisionTransformer(**shape, **_options(kind)))
    with torch.no_grad():  # places of a pair alike
        places = model.pos_embed[:, -16:].view(1, 8, 2, 32)
        places[:, :, 1] = places[:, :, 0]
    return model.double()


def _paired(model):
    x = images(2, 28).double()
    rows = x.view(2, 3, 28, 2, 2, 7)
    rows[..., 1, :] = rows[..., 0, :]
    return x


def test_weighted_mean_is_kept_by_a_merge():
    x = torch.randn(11, 4, generator=torch.Generator().manual_seed(2)).double()
    sizes = torch.arange(1.0, 12).double()
    joined, total, source = oracle.merge(x, sizes, torch.eye(11).double(), oracle.match_split(x, 4, 1))
    torch.testing.assert_close(
        (joined * total[:, None]).sum(0), (x * sizes[:, None]).sum(0), rtol=0, atol=1e-12
    )
    assert total.sum() == sizes.sum() and (source.sum(0) == 1).all()


@pytest.mark.parametrize(
    "name", ["timm-plain", "timm-eva", "timm-no_cls_map", "open_clip-tok", "hf-CLIPVisionModel-sdpa"]
)
def test_images_of_a_batch_do_not_meet(name):
    case = CASES[name]
    model = vtoken.patch(case.build().double(), "tome", r=R)
    x = images(3).double()
    with torch.no_grad():
        torch.testing.assert_close(
            case.call(model, x), torch.cat([case.call(model, x[i : i + 1]) for i in range(3)]), **FLOAT64
        )


def test_the_published_plan_of_deit_s():
    """Tokens and multiply-adds of README's ViT-S/16, r=13: 41 tokens at the end, 4.6 -> 2.7."""
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224")
    from vtoken.fit import plain_encoder

    shape = plain_encoder(model).shape(196)
    plan = vtoken.strategies.ToMe(r=13).encoder_plan(shape)
    assert 197 - sum(plan) == 41
    assert abs(shape.macs([0] * 12) / 1e9 - 4.6) < 0.05 and abs(shape.macs(plan) / 1e9 - 2.70) < 0.03


@pytest.mark.parametrize(
    "size,width,r,macs,merged,end",
    [
        ("base", 768, 13, 17.56, 10.37, 41),
        ("large", 1024, 7, 61.55, 34.71, 29),
        ("large", 1024, 8, 61.55, 30.96, 7),
    ],
)
def test_published_work(size, width, r, macs, merged, end):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model(f"vit_{size}_patch16_224")
    from vtoken.fit import plain_encoder

    layers = len(model.blocks)
    shape = plain_encoder(model).shape(196)
    plan = vtoken.strategies.ToMe(r=r).encoder_plan(shape)
    assert 197 - sum(plan) == end and len(plan) == layers
    assert (
        abs(shape.macs([0] * layers) / 1e9 - macs) < 0.02 * macs
        and abs(shape.macs(plan) / 1e9 - merged) < 0.02 * merged
    )
    assert shape.width == width


@pytest.mark.parametrize("budget", [0.9, 0.6, 0.5, 0.3, 0.2, 0.12, 7])
@pytest.mark.parametrize("layers,patches", [(4, 25), (12, 196), (24, 576), (3, 16)])
def test_a_budget_is_met_exactly(budget, layers, patches):
    made = vtoken.strategies.ToMe(budget=budget)
    wanted = budget if isinstance(budget, int) else max(1, int(budget * patches + 1e-9))
    shape, n = vtoken.tokens.EncoderShape(layers, patches, 1), patches
    least = patches
    for _ in range(layers):
        least -= least // 2
    if wanted < least:
        with pytest.raises(ValueError, match=f"leaves at least {least}"):
            made.encoder_plan(shape)
        return
    plan = made.encoder_plan(shape)
    for r in plan:
        assert 0 <= r <= n // 2
        n -= r
    assert n in (wanted, round(budget * patches) if isinstance(budget, float) else wanted)


@pytest.mark.parametrize("share", [0.9, 0.6, 0.5])
def test_a_share_of_the_work_is_met(share):
    shape = vtoken.tokens.EncoderShape(12, 196, 1, 4 * 384**2, 8 * 384**2, 384, 3 * 256 * 384)
    plan = vtoken.strategies.ToMe(flops=share).encoder_plan(shape)
    assert share - 0.02 < shape.macs(plan) / shape.macs([0] * 12) <= share


# -- gradients -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name",
    [
        *(f"timm-{k}" for k in TIMM if "map" in k or k in ("plain", "eva", "distilled", "qk_norm")),
        *(f"open_clip-{k}" for k in OPEN_CLIP),
        "hf-Dinov2Model-sdpa",
        "hf-SiglipVisionModel-sdpa",
    ],
)
def test_gradients_are_those_of_the_oracle(name):
    case = CASES[name]
    model = case.build().double().train()
    x = images().double().requires_grad_()
    want = case.expected(model, case.oracle(model, x, R))
    direction = torch.randn(want.shape, generator=torch.Generator().manual_seed(5)).double()
    params = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad((want * direction).sum(), [x, *params], allow_unused=True)
    with vtoken.applied(model, "tome", r=R):
        got = torch.autograd.grad((case.call(model, x) * direction).sum(), [x, *params], allow_unused=True)
    for a, b in zip(got, expected):
        assert (a is None) == (b is None) or not (a if b is None else b).any()
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    assert got[0].abs().max() > 0


@pytest.mark.parametrize(
    "options, said", [({"r": (1, 2)}, "tome(r=(1, 2))"), ({}, "tome(budget=0.5)")], ids=str
)
def test_description(options, said):
    assert vtoken.strategies.create("tome", **options).describe() == said
