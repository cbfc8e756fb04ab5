"""DiffRate (arXiv 2305.17997) against explicit steps, its published numbers, and the search of its rates."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import vtoken
from vtoken.adapters.encoders.encoder import encoder_for
from vtoken.adapters.encoders.layer import Heads
from vtoken.rates import learn_rates
from vtoken.rates_search import KeptTokens, Search, start_search
from vtoken.strategies.diffrate import DiffRate, published
from vtoken.tokens import EncoderShape, EncoderTokens

from .models import CASES, images, scrambled
from .oracle import attention, mlp

timm = pytest.importorskip("timm")
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

from .models import timm_block, timm_head  # noqa: E402

LISTS = {
    "prune and merge": ([26, 20, 14, 9], [24, 17, 10, 5]),
    "prune only": ([26, 20, 14, 9], [26, 26, 26, 26]),
    "merge only": ([26, 26, 26, 26], [22, 17, 9, 4]),
    "not monotone": ([26, 14, 20, 9], [20, 26, 12, 26]),
}


def vit(**options):
    made = VisionTransformer(
        img_size=35, patch_size=7, embed_dim=32, depth=4, num_heads=4, num_classes=6, **options
    )
    return scrambled(made)


def cls_row(block, x, bias, prefix):
    """(n,) float64, the attention of token 0, the mean over heads, in explicit steps."""
    h = block.norm1(x)
    q, k = block.q(h), block.k(h)
    d, rows = q.shape[1] // block.heads, []
    for i in range(block.heads):
        part = slice(i * d, i * d + d)
        qi, ki = q[:1, part], k[:, part]
        qi = qi if block.q_norm is None else block.q_norm(qi)
        ki = ki if block.k_norm is None else block.k_norm(ki)
        logits = (ki @ qi[0]) / math.sqrt(d) + bias
        rows.append(logits.softmax(0))
    return torch.stack(rows).mean(0)


def explicit(blocks, x, prune, merge, prefix):
    """One image: sort by importance, cut, join the most similar; counts include the prefix."""
    x, sizes = x.double(), torch.ones(len(x), dtype=torch.float64)
    lengths = []
    for block, kp, km in zip(blocks, prune, merge):
        bias = sizes.log()
        importance = cls_row(block, x, bias, prefix)
        x = x + attention(block, x, bias)[0]
        order = [*range(prefix), *sorted(range(prefix, len(x)), key=lambda i: -float(importance[i]))]
        x, sizes = x[order][:kp], sizes[order][:kp]
        if km < len(x):
            joins = {}
            for i in range(km, len(x)):
                scores = [float(F.cosine_similarity(x[i], x[j], 0)) for j in range(prefix, km)]
                joins[i] = prefix + scores.index(max(scores)), max(scores)
            rows, size = [], []
            for j in range(km):
                group = [j, *[i for i, (to, _) in joins.items() if to == j]]
                rows.append(torch.stack([x[i] for i in group]).mean(0))
                size.append(sizes[j] + sum(sizes[i] * joins[i][1] for i in group[1:]))
            x, sizes = torch.stack(rows), torch.stack(size)
        lengths.append(len(x))
        x = x + mlp(block, x)
    return x, sizes, lengths


@pytest.mark.parametrize("options", [{}, dict(init_values=0.3, qk_norm=True), dict(reg_tokens=3)], ids=str)
@pytest.mark.parametrize("kept", LISTS.values(), ids=LISTS)
def test_equals_explicit_steps(options, kept):
    model, x, (prune, merge) = vit(**options), images(2), kept
    extra = model.num_prefix_tokens - 1
    with torch.no_grad():
        seen = []
        handle = model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model(x)
        handle.remove()
        with vtoken.applied(model, "diffrate", prune=prune, merge=merge):
            got, report = model(x), vtoken.report(model)
        for row, each in zip(got, seen[0], strict=True):
            blocks = [timm_block(b) for b in model.blocks]
            tokens, sizes, lengths = explicit(
                blocks, each, [k + extra for k in prune], [k + extra for k in merge], extra + 1
            )
            torch.testing.assert_close(row.double(), timm_head(model, tokens, sizes), rtol=1e-5, atol=1e-5)
            assert report.tokens_per_layer == lengths


def test_double_precision():
    model, x = vit().double(), images(1).double()
    with torch.no_grad():
        entering = []
        handle = model.blocks[0].register_forward_pre_hook(lambda _, args: entering.append(args[0]))
        model(x)
        handle.remove()
        prune, merge = LISTS["prune and merge"]
        with vtoken.applied(model, "diffrate", prune=prune, merge=merge):
            got = model(x)[0]
        tokens, sizes, _ = explicit([timm_block(b) for b in model.blocks], entering[0][0], prune, merge, 1)
    torch.testing.assert_close(got, timm_head(model, tokens, sizes), rtol=1e-9, atol=1e-9)


def test_keeping_all_changes_nothing_but_rounding():
    model, x = vit(init_values=0.3), images(2)
    with torch.no_grad():
        plain = model(x)
        with vtoken.applied(model, "diffrate", prune=[26] * 4, merge=[26] * 4):
            torch.testing.assert_close(model(x), plain, rtol=0, atol=0)


@pytest.mark.parametrize(
    "rates, width, layers, patches, classes, printed",
    [
        ("ViT-S-DeiT/2.9", 384, 12, 196, 1000, 2.905),
        ("ViT-B-DeiT/11.5", 768, 12, 196, 1000, 11.517),
        ("ViT-L-MAE/42.3", 1024, 24, 196, 1000, 42.290),
        ("ViT-H-MAE/103.4", 1280, 32, 256, 1000, 103.337),
    ],
)
def test_published_rows_cost_what_is_printed(rates, width, layers, patches, classes, printed):
    side = 14 if patches == 256 else 16
    shape = EncoderShape(layers, patches, 1, 4 * width**2, 8 * width**2, width, 3 * side**2 * width)
    n, removed = patches + 1, []
    for step in DiffRate(rates=rates).encoder_plan(shape):
        removed.append(0 if step is None else n - step[1])
        n -= removed[-1]
    # the paper charges the embedding of one token more, and the classifier
    total = shape.macs(removed) + shape.embedding_macs + width * classes
    assert total / 1e9 == pytest.approx(printed, abs=6e-4)


@pytest.mark.parametrize(
    "goal", [dict(flops=0.5), dict(flops=0.8), dict(budget=0.3), dict(budget=5), {}], ids=str
)
@pytest.mark.parametrize("depth", [5, 12, 24])
def test_goals_are_met(goal, depth):
    shape = EncoderShape(depth, 100, 1, 4 * 64**2, 8 * 64**2, 64, 1000)
    plan, n, removed = DiffRate(**goal).encoder_plan(shape), 101, []
    for step in plan:
        removed.append(0 if step is None else n - step[1])
        n -= removed[-1]
    if "budget" in goal:
        assert 0.8 * 100 * DiffRate(**goal).allowance().share_of(100) - 1 <= n - 1
        assert n - 1 <= 100 * DiffRate(**goal).allowance().share_of(100)
    else:
        share = goal.get("flops", 0.65)
        assert share - 0.03 < shape.macs(removed) / shape.macs([0] * depth) <= share


@pytest.mark.parametrize(
    "options, words",
    {
        "unknown row": (dict(rates="ViT-S-DeiT/9"), "no published rates"),
        "two goals": (dict(flops=0.5, budget=0.5), "Give one of"),
        "half a list": (dict(prune=[5] * 4), "go together"),
        "nothing left": (dict(prune=[1] * 4, merge=[1] * 4), "at least one patch"),
        "another depth": (dict(prune=[5] * 3, merge=[5] * 3), "name 3 layers, the encoder has 4"),
        "another grid": (
            dict(rates="ViT-S-DeiT/2.9"),
            "196 patches and 12 layers, this encoder has 25 and 4",
        ),
    }.values(),
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        vtoken.patch(vit(), "diffrate", **options)


def test_needs_a_class_token():
    with pytest.raises(ValueError, match="needs a class token"):
        vtoken.patch(vit(class_token=False, global_pool="avg"), "diffrate")


# -- the search ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("step, kept", [(1, 100), (4, 101)])
def test_a_uniform_start_keeps_about_half(step, kept):
    assert int(KeptTokens(196, 1, step).count()) == kept  # counts published for DeiT, class token included


def test_the_mask_and_its_gradient():
    proxy = KeptTokens(10, 1, 3)
    with torch.no_grad():
        proxy.logits.copy_(torch.tensor([0.1, 0.5, -0.3, 0.2]))
    assert proxy.candidates.tolist() == [10, 7, 4, 1]
    share = proxy.logits.softmax(0)
    alive = 9
    mask = proxy.mask(11, alive)
    kept = math.ceil(float((proxy.candidates * share).sum())) + 1
    assert mask.tolist() == pytest.approx([float(i < kept or i >= alive) for i in range(11)], abs=1e-6)
    weights = torch.arange(11.0)
    (got,) = torch.autograd.grad((mask * weights).sum(), proxy.logits)
    probability = sum(s * weights[: int(c) + 1].sum() for s, c in zip(share, proxy.candidates))
    (want,) = torch.autograd.grad(probability, proxy.logits)
    torch.testing.assert_close(got, want)


def settled(search: Search, prune, merge):
    """Every softmax peaks at the given number of patches."""
    for modules, kept in ((search.prune, prune), (search.merge, merge)):
        for module, k in zip(modules, kept):
            if len(module.candidates) > 1:
                at = (module.candidates - (k - 1)).abs().argmin()
                module.logits.data = F.one_hot(at, len(module.candidates)).float() * 1e4


@pytest.mark.parametrize("kept", ["prune only", "prune and merge"])
def test_masked_and_shortened_forwards_agree(kept):
    prune, merge = LISTS[kept]
    prune, merge = [26, *prune[1:]], [26, *merge[1:]]
    model, x = vit(), images(2)
    search = start_search(encoder_for(model), 1)
    settled(search, prune, merge)
    with torch.no_grad():
        with search.applied():
            masked = model(x)
        assert search.strategy().prune == tuple(prune) and search.strategy().merge == tuple(merge)
        with vtoken.applied(model, search.strategy()):
            short = model(x)
            cost = vtoken.report(model).gflops
    if kept == "prune only":  # the training forward clamps sizes of merged tokens to 1
        torch.testing.assert_close(masked, short, rtol=1e-4, atol=1e-4)
    assert float(search.flops) / 1e9 == pytest.approx(cost, rel=1e-5)


def test_the_search_goes_to_its_goal_and_leaves_the_weights():
    torch.manual_seed(0)
    model = vit()
    batches = [(images(4, seed=i), torch.randint(0, 6, (4,))) for i in range(40)]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    seen = []
    learned = learn_rates(
        model, batches, 0.75, steps=40, step=1, lr=0.1, weight=1e7, on_step=lambda *now: seen.append(now[2])
    )
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    with torch.no_grad(), vtoken.applied(model, learned):
        model(images(1))
        share = vtoken.report(model).gflops / vtoken.report(model).gflops_dense
    assert abs(share - 0.75) < 0.06 and abs(seen[-1] - 0.75 * vtoken_dense(model)) < abs(
        seen[0] - 0.75 * vtoken_dense(model)
    )


def vtoken_dense(model):
    shape = encoder_for(model).shape(25)
    return shape.macs([0] * shape.layers) / 1e9


def test_the_search_says_when_there_are_too_few_batches():
    with pytest.raises(ValueError, match="makes 3 updates, and the batches ended after 1"):
        learn_rates(vit(), [(images(2), torch.tensor([0, 1]))], 0.5, steps=3)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(step=0), "steps and step are whole numbers of at least 1, found 1 and 0"),
        (dict(steps=0), "found 0 and 4"),
        (dict(whole=(9,)), "whole names layer 9, the encoder has layers 0 to 3"),
    ],
)
def test_the_search_refuses_numbers_out_of_range(options, words):
    with pytest.raises(ValueError, match=words):
        learn_rates(vit(), [(images(2), torch.tensor([0, 1]))], 0.5, **{"steps": 1, **options})


def test_the_search_refuses_a_loss_that_is_not_finite_and_inference_mode():
    batches = [(images(2) * float("nan"), torch.tensor([0, 1]))]
    model = vit()
    with pytest.raises(ValueError, match="The loss of batch 0 is nan"):
        learn_rates(model, batches, 0.5, steps=1)
    assert all(p.requires_grad for p in model.parameters())
    with torch.inference_mode(), pytest.raises(ValueError, match="needs gradients"):
        learn_rates(model, batches, 0.5, steps=1)


def test_the_published_table_is_whole():
    rows = published()
    assert len(rows) == 6 and sum(len(r["rates"]) for r in rows.values()) == 28
    assert all(
        len(x) == r["depth"] for r in rows.values() for each in r["rates"].values() for x in each.values()
    )


# -- one layer on its own ------------------------------------------------------------------------------------
def layer_tokens(kept, left, prefix=2, n=14, rows=3):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(rows, n, 8, generator=generator, dtype=torch.float64)
    sizes = torch.cat([torch.ones(rows, prefix), 1 + torch.rand(rows, n - prefix, generator=generator)], 1)
    row = torch.rand(rows, n, generator=generator)
    tokens = EncoderTokens(0, x, prefix, sizes.double(), [(kept, left)], cls_attention=lambda: row)
    return tokens, row


def test_pruning_gathers_the_most_attended_and_leaves_sizes():
    tokens, row = layer_tokens(7, 7)
    made = DiffRate().merge_in_encoder(tokens)
    for b in range(3):
        best = [0, 1, *sorted(range(2, 14), key=lambda i: -float(row[b, i]))[:5]]
        assert made.keep[b].tolist() == best
        assert [int(i) for i in (made.into[b] >= 0).nonzero()] == sorted(best)
        assert torch.equal(made.sizes[b], tokens.sizes[b, best])


def test_merging_spares_the_prefix_and_scales_sizes_by_cosines():
    tokens, row = layer_tokens(14, 5)
    made, x = DiffRate().merge_in_encoder(tokens), tokens.hidden_states
    assert torch.equal(made.sizes[:, :2], torch.ones(3, 2).double())
    for b in range(3):
        order = [0, 1, *sorted(range(2, 14), key=lambda i: -float(row[b, i]))]
        assert made.keep[b].tolist() == order[:5]
        total = sum(float(tokens.sizes[b, i]) for i in order[:5])
        for i in order[5:]:
            cosines = [float(F.cosine_similarity(x[b, i], x[b, j], 0)) for j in order[2:5]]
            assert made.into[b, i] == 2 + cosines.index(max(cosines))
            total += float(tokens.sizes[b, i]) * max(cosines)
        assert float(made.sizes[b].sum()) == pytest.approx(total, rel=1e-9)
        for j in range(5):
            group = made.into[b] == j
            assert made.weight[b, group].tolist() == pytest.approx([1 / int(group.sum())] * int(group.sum()))


def test_the_class_tokens_row_is_that_of_the_whole_map():
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(2, 3, 7, 4, generator=generator) for _ in range(3))
    bias = (1 + 3 * torch.rand(2, 7, generator=generator)).log()
    whole = (q @ k.mT * 0.5 + bias[:, None, None]).softmax(-1)
    torch.testing.assert_close(Heads(q, k, v, k).first_row(0.5, bias), whole[:, :, 0].mean(1))


def test_numbers_for_more_patches_are_refused():
    with pytest.raises(ValueError, match=r"keep up to 197 tokens, .*reads only 26"):
        vtoken.patch(vit(), "diffrate", prune=[197, 190, 50, 3], merge=[197, 180, 40, 3])


@pytest.mark.parametrize(
    "options, words",
    [
        ({}, "diffrate(flops=0.65)"),
        (dict(prop_attn=False), "diffrate(flops=0.65, prop_attn=False)"),
        (dict(budget=0.5), "diffrate(budget=0.5)"),
        (dict(prune=[9, 5], merge=[8, 4]), "diffrate(prune=(9, 5), merge=(8, 4))"),
    ],
)
def test_the_description_names_the_goal(options, words):
    assert DiffRate(**options).describe() == words


# -- the search in every kind of encoder ---------------------------------------------------------------------
def classifier():
    import transformers as tf

    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4)
    vision = tf.CLIPVisionConfig(image_size=35, patch_size=7, **shape).to_dict()
    config = tf.CLIPConfig(vision_config=vision, num_labels=5)
    return scrambled(tf.CLIPForImageClassification(config))


KINDS = [
    *("timm-registers", "timm-distilled", "timm-cls_avg", "timm-eva", "timm-eva_half", "timm-eva_registers"),
    *("open_clip-tok", "open_clip-avg", "open_clip-sequence_first"),
    *("hf-CLIPVisionModel-sdpa", "hf-ViTModel-sdpa", "hf-Dinov2WithRegistersModel-eager", "classifier"),
]


@pytest.mark.parametrize("removed", ["prune only", "nothing"])
@pytest.mark.parametrize("kind", KINDS)
def test_masked_and_shortened_forwards_agree_in(kind, removed):
    """Rotary embeddings stay with their patches; means of patches are those of the patches that are left."""
    case = CASES.get(kind)
    model = classifier() if case is None else case.build()
    call = (lambda m, x: m(x).logits) if case is None else case.call
    search = start_search(encoder_for(model), 1)
    settled(search, [26, *LISTS["prune only"][0][1:]] if removed == "prune only" else [26] * 4, [26] * 4)
    with torch.no_grad():
        plain = call(model, images(2))
        with search.applied():
            masked = call(model, images(2))
        with vtoken.applied(model, search.strategy()):
            short = call(model, images(2))
    torch.testing.assert_close(masked, short, rtol=1e-4, atol=1e-4)
    assert ((plain - short).abs().max() > 1e-2) == (removed == "prune only")


def test_the_mean_of_the_patches_has_the_masks_gradient():
    search = start_search(encoder_for(vit()), 1)
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(1, 26, 8, generator=generator)
    owner = torch.arange(26).repeat(1, 1)
    owner[0, 20:], owner[0, 10] = -1, 5  # six are pruned, one has joined
    search.mask = (owner == torch.arange(26)).float().requires_grad_(True)
    search.sizes, search.owner = torch.ones(1, 26), owner
    mean = search._spread(x)[:, 1:].mean(1)
    held = torch.tensor([float((owner[0, 1:] == i).sum()) for i in range(1, 26)]) / 19
    torch.testing.assert_close(mean[0], (held[:, None] * x[0, 1:]).sum(0))
    (got,) = torch.autograd.grad(mean.sum(), search.mask)
    torch.testing.assert_close(got[0, 1:], held * x[0, 1:].sum(1))
    assert float(got[0, 0]) == 0


def test_a_mean_that_is_whole_is_not_rounded_up():
    for patches in range(4, 400):
        for step in (1, 2, 4):
            candidates = list(range(patches, 0, -step))
            want = -(-sum(candidates) // len(candidates)) + 1
            assert int(KeptTokens(patches, 1, step).count()) == want, (patches, step)


def test_layers_that_shall_stay_whole_do():
    search = start_search(encoder_for(vit()), 1, (0, -1))
    assert (
        [len(k.candidates) for k in search.prune]
        == [len(k.candidates) for k in search.merge]
        == [1, 25, 25, 1]
    )


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"learns for 25 patches, .*found 36"):
        learn_rates(vit(dynamic_img_size=True), [(images(2, 42), torch.tensor([0, 1]))], 0.5, steps=1)


@pytest.mark.parametrize("kind", ["timm-eva", "timm-cls_avg", "open_clip-tok", "hf-CLIPVisionModel-sdpa"])
def test_the_search_goes_to_its_goal_in(kind):
    model, seen = CASES[kind].build(), []
    batches = [
        (images(2, seed=i), torch.randint(0, 6, (2,), generator=torch.Generator().manual_seed(i)))
        for i in range(25)
    ]
    goal = 0.75 * encoder_for(model).shape(25).macs([0] * 4) / 1e9
    learned = learn_rates(
        model,
        batches,
        0.75,
        steps=25,
        step=1,
        lr=0.1,
        weight=1e8,
        logits=lambda out: (
            out if isinstance(out, torch.Tensor) else out[0] if isinstance(out, tuple) else out.pooler_output
        ),
        on_step=lambda *now: seen.append(now[2]),
    )
    assert abs(seen[-1] - goal) < 0.5 * abs(seen[0] - goal)
    with torch.no_grad(), vtoken.applied(model, learned):
        CASES[kind].call(model, images(1))
        # rates learned last are one update newer than the last measured
        assert vtoken.report(model).gflops == pytest.approx(goal, rel=0.08)
