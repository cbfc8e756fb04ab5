"""Strategies inside the LLM: their inputs, their cost, and what is refused."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import QuantizedLayer

import vtoken
from tests.models import FAMILIES
from tests.models.common import IMG, text
from tests.oracle import CACHE, clone, pick
from vtoken import PrefillTokens, Selection, Strategy, StrategyInfo, strategies
from vtoken.mechanism.attention_rows import check_projections
from vtoken.mechanism.cache_crop import physical_length

from .common import EFFECT, INSIDE, assert_same, clean, consistent, expected, run, subject
from .fixed import Fixed, patched


class Probe(Strategy):
    """Keeps everything and notes what it was shown."""

    info = StrategyInfo("probe", "For tests.", ("prefill",))

    def __init__(self, *layers: int, rows: int = 3) -> None:
        super().__init__(0.5)
        self.layers, self.rows, self.seen = layers, rows, []

    def prefill_layers(self, num_layers: int) -> tuple[int, ...]:
        return self.layers

    def select_in_prefill(self, tokens: PrefillTokens) -> Selection:
        rows = torch.arange(len(tokens) - self.rows, len(tokens))
        before = tokens.attention_rows(rows) if tokens.layer else None
        self.seen.append((tokens, before, tokens.preview_rows(rows)))
        return Selection.everything(len(tokens.visual_rows))


def probed(name: str, inputs: dict, *layers: int, **options) -> list:
    model, probe = subject(name), Probe(*layers)
    with patched(model, probe):
        run(model, inputs, 1, **options)
    return probe.seen


# -- attention rows ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", INSIDE)
def test_rows_are_those_of_eager_attention(name):
    """Grouped queries, multimodal rope, q/k norms, images that see themselves: whatever eager attention says,
    to 1e-5.
    """
    # scales its embeddings: logits of hundreds, in float32; the others differ in the sixth digit
    tolerance = {"paligemma": 5e-5, "glm4v_moe": 2e-5, "glm4v_moe/video": 2e-5}.get(name, 1e-5)
    inputs = FAMILIES[name].batch("ragged")
    with torch.no_grad():
        maps = clean(name, "eager")(**clone(inputs), output_attentions=True).attentions
    seen = probed(name, inputs, 2)
    assert len(seen) == len(inputs["input_ids"])
    for b, (tokens, before, preview) in enumerate(seen):
        real = inputs["attention_mask"][b].bool().nonzero()[:, 0]
        assert torch.equal(tokens.positions, real)
        for got, layer in ((before, 1), (preview, 2)):
            want = maps[layer][b][:, real[-3:]][..., real]
            assert got.dtype == torch.float32
            assert (got - want).abs().max() < tolerance
            assert want.std() > 1e-3


def test_preview_in_front_of_the_first_layer():
    inputs = FAMILIES["llava"].batch("ragged")
    with torch.no_grad():
        maps = clean("llava", "eager")(**clone(inputs), output_attentions=True).attentions
    for b, (tokens, _, preview) in enumerate(probed("llava", inputs, 0)):
        real = inputs["attention_mask"][b].bool().nonzero()[:, 0]
        assert (preview - maps[0][b][:, real[-3:]][..., real]).abs().max() < 1e-5
        assert torch.equal(tokens.hidden_states, clean_embeddings("llava", inputs)[b, real])
        with pytest.raises(ValueError, match="no layer before layer 0"):
            tokens.attention_rows(torch.tensor([0]))


def clean_embeddings(name: str, inputs: dict) -> Tensor:
    got: dict = {}
    hook = (
        clean(name).get_decoder().register_forward_pre_hook(lambda m, a, kw: got.update(kw), with_kwargs=True)
    )
    run(clean(name), inputs, 1)
    hook.remove()
    return got["inputs_embeds"]


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "internvl"])
def test_rows_on_a_cache_with_an_earlier_turn(name, static):
    """Keys of earlier turns take part in the softmax."""
    family = FAMILIES[name]
    whole = family.prompt([[0, 1]])
    visual = family.visual(whole)[0].nonzero()[:, 0]
    cut = int(visual[len(family.visual(family.prompt([[0]])).nonzero())]) - (name != "llava")
    with torch.no_grad():
        maps = clean(name, "eager")(**clone(whole), output_attentions=True).attentions
    model, probe = subject(name), Probe(2)
    cache = (
        StaticCache(config=model.config.get_text_config(), max_cache_len=160) if static else DynamicCache()
    )
    names = ("input_ids", "attention_mask", "mm_token_type_ids")
    position = {}
    hook = (
        clean(name)
        .get_decoder()
        .register_forward_pre_hook(lambda m, a, kw: position.update(kw), with_kwargs=True)
    )
    clean(name)(**clone(whole))
    hook.remove()
    ids = position["position_ids"]
    with patched(model, probe), torch.no_grad():
        one = {k: whole[k][:, :cut] for k in names if k in whole} | family.vision(0)
        model(**one, **{CACHE: cache}, position_ids=None if ids is None else ids[..., :cut])
        two = {k: whole[k][:, cut:] for k in names if k in whole and k != "attention_mask"} | family.vision(1)
        two["attention_mask"] = whole["attention_mask"]
        model(**two, **{CACHE: cache}, position_ids=None if ids is None else ids[..., cut:])
    tokens, before, preview = probe.seen[-1]
    assert len(tokens) == whole["input_ids"].shape[1] - cut
    for got, layer in ((before, 1), (preview, 2)):
        assert (got - maps[layer][0, :, -3:, cut:]).abs().max() < 1e-5


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_rows_leave_out_the_padding_of_an_earlier_turn(static):
    """A left-padded text turn, then an image: nothing of the softmax goes to the padding in the cache."""
    family = FAMILIES["llava"]
    image = [IMG] * 16 + text(3, 1)
    ids = torch.tensor([text(6, 2) + image, [0] * 4 + text(2, 3) + image])
    mask = (ids != 0).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole = dict(
        attention_mask=mask, pixel_values=torch.cat([family.vision(i)["pixel_values"] for i in (0, 1)])
    )
    with torch.no_grad():
        maps = clean("llava", "eager")(
            ids, position_ids=positions, **clone(whole), output_attentions=True
        ).attentions
    model, probe = subject("llava"), Probe(2)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=40) if static else DynamicCache()
    with patched(model, probe), torch.no_grad():
        model(ids[:, :6], attention_mask=mask[:, :6], position_ids=positions[:, :6], **{CACHE: cache})
        model(ids[:, 6:], position_ids=positions[:, 6:], **{CACHE: cache}, **clone(whole))
    for b, (_, before, preview) in enumerate(probe.seen):
        for got, layer in ((before, 1), (preview, 2)):
            assert (got - maps[layer][b, :, -3:, 6:]).abs().max() < 1e-5


def test_what_is_shown():
    """Items, separators and units of two images; total counts what a projector strategy dropped as well."""
    family = FAMILIES["llava_next"]
    inputs = family.prompt([[0, 1], [2]])
    tokens, *_ = probed("llava_next", inputs, 1)[0]
    assert tokens.units == 2 and tokens.num_layers == 4 and tokens.layer == 1
    assert tokens.item[tokens.visual].unique().tolist() == [0, 1]
    assert (tokens.item[~tokens.visual] == -1).all()
    assert int((tokens.item == 0).sum()) == 16 + 6 * 8 + 6
    assert int(tokens.separator.sum()) == 6 + 2
    assert int(tokens.visual.sum()) == tokens.total_visual
    assert tokens.end == len(tokens) and int(tokens.last_row) == len(tokens) - 1
    behind = int(tokens.visual_rows[0])
    assert tokens.text_rows.tolist() == [i for i in range(behind, len(tokens)) if not tokens.visual[i]]
    model, both = subject("llava_next"), strategies.combine(["uniform", "fastv"], budget=0.25)
    seen = []
    inner = both.then.select_in_prefill
    both.then.select_in_prefill = lambda t: (seen.append(t), inner(t))[1]
    with patched(model, both):
        run(model, inputs, 1)
    assert seen[0].total_visual == tokens.total_visual > int(seen[0].visual.sum())


def test_frames_are_units():
    tokens, *_ = probed("llava_onevision/video", FAMILIES["llava_onevision/video"].batch("one"), 1)[0]
    assert tokens.units == 5


# -- the end of the prompt -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options", [dict(use_cache=False), dict(prompt_lookup_num_tokens=3)], ids=["no cache", "lookup"]
)
def test_drafts_and_generated_tokens_are_not_the_prompt(options):
    """The last token of the prompt ranks, not a draft or a generated token: the same answer as with a cache."""
    model, inputs = subject("llava"), FAMILIES["llava"].batch("one")
    ids = inputs["input_ids"].clone()
    ids[0, -3:-1] = ids[0, 1:3]
    ids[0, -1] = ids[0, 1]  # ends as it began, so that prompt lookup has a draft for the first forward
    inputs["input_ids"] = ids
    lengths, ends = [], []
    strategy = strategies.create("fastv", layer=1, budget=0.3)
    inner = strategy.select_in_prefill
    strategy.select_in_prefill = lambda t: (lengths.append(len(t)), ends.append(t.end), inner(t))[2]
    with patched(model, strategy) as spy:
        plain = run(model, inputs)
        keep = spy.drops[1][0][1].keep
        lengths.clear(), ends.clear(), spy.clear()
        out = run(model, inputs, **options)
    if "use_cache" in options:
        assert lengths == [ids.shape[1]], "the prompt is read in every step, and chosen from in the first"
    else:
        assert max(lengths) > ids.shape[1], "the option put nothing behind the prompt"
    assert set(ends) == {ids.shape[1]}
    assert all(torch.equal(answer.keep, keep) for _, answer in spy.drops[1])
    assert torch.equal(out.sequences, plain.sequences)


def test_chunks_are_refused():
    model, inputs = subject("llava"), FAMILIES["llava"].batch("one")
    if not consistent("llava", inputs, prefill_chunk_size=7):
        pytest.skip("this release loses the image in a chunked prefill, unpatched too")
    with (
        patched(model, layers=(1,), projector=False),
        pytest.raises(NotImplementedError, match="prefill_chunk_size"),
    ):
        run(model, inputs, prefill_chunk_size=7)
    whole = int(FAMILIES["llava"].visual(inputs)[0].nonzero()[-1]) + 1
    with (
        patched(model, layers=(1,), projector=False),
        pytest.raises(NotImplementedError, match="prefill_chunk_size"),
    ):
        run(model, inputs, prefill_chunk_size=whole)  # all visual tokens in the first chunk


# -- caches --------------------------------------------------------------------------------------------------
def test_lengths_of_the_layers():
    model, inputs = subject("llava"), FAMILIES["llava"].batch("one")
    length = inputs["input_ids"].shape[1]
    with patched(model, strategies.create("pyramiddrop", ratio=0.5)):
        out = run(model, inputs, 3)
        report = vtoken.report(model)
    assert report.visual_per_layer == [16, 8, 4, 2]
    assert [physical_length(x) for x in out[CACHE].layers] == [length - 16 + n + 2 for n in (16, 8, 4, 2)]
    assert {int(x.get_seq_length()) for x in out[CACHE].layers} == {length + 2}
    assert "average over 4 LLM layers: 7.5" in str(report) and "16 8 4 2" in str(report)


@pytest.mark.parametrize(
    "cache", [{}, dict(cache_implementation="static", disable_compile=True)], ids=["dynamic", "static"]
)
def test_alignment_leaves_two_lengths(cache):
    model, inputs = subject("llava"), FAMILIES["llava"].batch("one")
    strategy = strategies.create("mustdrop", budget=0.5, merging=False)
    with patched(model, strategy) as spy:
        out = run(model, inputs, 1, **cache)
        report = vtoken.report(model)
    last = len(spy.drops[3][0][1].keep)
    length = inputs["input_ids"].shape[1]
    stored = [length - 16 + last] * 4  # the first filter sits behind layer 0, which is aligned
    assert [physical_length(x) for x in out[CACHE].layers] == stored
    assert report.tokens_per_layer == stored and report.visual_per_layer[0] == 16


class Fake(QuantizedLayer):
    """A quantized cache layer that loses nothing."""

    def _quantize(self, tensor, axis):
        return tensor.clone()

    def _dequantize(self, tensor):
        return tensor


def fake_quantized(model) -> DynamicCache:
    cache = DynamicCache()
    cache.layers = [Fake(residual_length=4) for _ in model.get_decoder().layers]
    cache.layer_class_to_replicate = None
    return cache


def test_quantized_caches():
    """Layers of different lengths are right there; keys cannot be cut and say so before the first token."""
    model, inputs = subject("llava"), FAMILIES["llava"].batch("ragged")
    with patched(model, strategies.create("fastv", layer=1, budget=0.3)) as spy:
        out = run(model, inputs, **{CACHE: fake_quantized(model)})
        spy.items.clear()
    assert_same(out, inputs, expected("llava", inputs, spy))
    aligned = strategies.create("mustdrop", budget=0.5, merging=False)
    with (
        patched(model, aligned),
        pytest.raises(NotImplementedError, match=r"found Fake: use a Dynamic.*align_cache=False"),
    ):
        run(model, inputs, **{CACHE: fake_quantized(model)})


def test_a_cache_filled_under_another_patch():
    model, inputs = subject("llava"), FAMILIES["llava"].batch("one")
    with patched(model, layers=(1,), projector=False):
        out = run(model, inputs, 2)
    ids = torch.cat([out.sequences, torch.tensor([text(3, 5)])], 1)
    again = dict(input_ids=ids, attention_mask=torch.ones_like(ids), **{CACHE: out[CACHE]})
    with (
        patched(model, layers=(2,), projector=False),
        pytest.raises(ValueError, match="filled under a strategy"),
    ):
        run(model, again, 2)


def test_windows():
    """A window that the conversation fits is no hindrance; a smaller one is refused before the first token."""
    family = FAMILIES["gemma3"]
    inputs = family.batch("one")
    total = inputs["input_ids"].shape[1] + 5
    for window, fits in ((total + 1, True), (total - 1, False)):
        model = family.build()
        reference = family.build()
        for m in (model, reference):
            m.config.text_config.sliding_window = window
            for layer in m.get_decoder().layers:
                if getattr(layer.self_attn, "sliding_window", None):
                    layer.self_attn.sliding_window = window
        tokens = []
        hook = model.lm_head.register_forward_hook(lambda *a, tokens=tokens: tokens.append(1))
        with patched(model, strategies.create("fastv", layer=1, budget=0.3)) as spy:
            if not fits:
                with pytest.raises(NotImplementedError, match="sliding-window"):
                    run(model, inputs, 5)
                assert not tokens
                continue
            out = run(model, inputs, 5)
        spy.items.clear()
        hook.remove()
        assert_same(out, inputs, expected("gemma3", inputs, spy))


def test_layers_that_cannot_drop_tokens(monkeypatch):
    """Linear attention carries a state, not a cache of tokens; a fused projection hides the queries."""
    model = subject("llava")
    kinds = ["linear_attention", "full_attention"] * 2
    with monkeypatch.context() as patch:
        patch.setattr(model.get_decoder().config, "layer_types", kinds, raising=False)
        with pytest.raises(
            ValueError, match="cannot be done to layers of type linear_attention: use a projector"
        ):
            vtoken.patch(model, "fastv", layer=1)
        assert "fastv" not in vtoken.list_strategies(model=model) and "random" in vtoken.list_strategies(
            model=model
        )
    layer = model.get_decoder().layers[0]
    attention = layer.self_attn
    try:
        layer.self_attn = torch.nn.Identity()
        with pytest.raises(ValueError, match="no such projections: use a projector strategy"):
            vtoken.patch(model, "fastv", layer=1)
    finally:
        layer.self_attn = attention


@pytest.mark.parametrize(("kind", "fits"), [("Llama", True), ("Cohere2", False), ("SmolLM3", False)])
def test_rotary_embeddings_of_another_kind_are_refused(kind, fits):
    """Cohere turns neighbouring channels, every fourth layer of SmolLM3 none."""
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=4, vocab_size=8, pad_token_id=0)
    config = getattr(transformers, f"{kind}Config")(**sizes, num_attention_heads=2, num_key_value_heads=1)
    decoder = getattr(transformers, f"{kind}Model")(config)
    if fits:
        check_projections(decoder, "fastv", "llava")
    else:
        with pytest.raises(ValueError, match="halves of a head in every layer; the LLM of this llava model"):
            check_projections(decoder, "fastv", "llava")


def test_capped_attention_logits_are_refused():
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, vocab_size=8, head_dim=8)
    config = transformers.Gemma2Config(**sizes, num_attention_heads=2, num_key_value_heads=1)
    with pytest.raises(ValueError, match="caps its attention logits: use a projector strategy"):
        check_projections(transformers.Gemma2Model(config), "fastv", "paligemma")


def test_a_new_image_on_quantized_keys_is_refused():
    family, model = FAMILIES["llava"], subject("llava")
    whole = family.prompt([[0, 1]])
    cut = int(family.visual(whole)[0].nonzero()[16, 0])
    cache = fake_quantized(model)
    with patched(model, strategies.create("fastv", layer=1, budget=0.5)), torch.no_grad():
        model(input_ids=whole["input_ids"][:, :cut], **family.vision(0), **{CACHE: cache})
        with pytest.raises(NotImplementedError, match="a cache of Fake that holds earlier turns"):
            model(input_ids=whole["input_ids"][:, cut:], **family.vision(1), **{CACHE: cache})


# -- cost ----------------------------------------------------------------------------------------------------
class Largest(TorchDispatchMode):
    """Notes the element count of every tensor made, while switched on."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor):
                self.shapes.append(tuple(t.shape))
        return out


SCORERS = {
    "fastv": dict(layer=1),
    "fastv mean": dict(layer=1, query="mean"),
    "pyramiddrop": dict(),
    "sparsevlm": dict(budget=0.5),
    "sparsevlm v2": dict(budget=0.5, version="2.0"),
    "mustdrop": dict(budget=0.5, merging=False, key_rate=0.0),
}


@pytest.mark.parametrize("case", SCORERS)
def test_scoring_makes_no_square_map(case):
    """320 visual tokens: nothing that scoring allocates has two axes of the prompt's length."""
    model = subject("llava")
    family = FAMILIES["llava"]
    one = family.batch("one")
    images = 20
    ids = torch.tensor([text(3, 1) + [IMG] * 16 * images + text(5, 2)])
    inputs = dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=one["pixel_values"].repeat(images, 1, 1, 1),
    )
    strategy = strategies.create(case.split()[0], **SCORERS[case])
    inner, spy = strategy.select_in_prefill, Largest()

    def watched(tokens: PrefillTokens) -> Selection:
        with spy:
            return inner(tokens)

    strategy.select_in_prefill = watched
    with patched(model, strategy):
        run(model, inputs, 1)
    assert spy.shapes, "the strategy was not asked"
    n = 16 * images
    squares = [s for s in spy.shapes if sum(x >= n // 2 for x in s) >= 2]
    assert not squares, squares
    heads = 4
    assert max(torch.Size(s).numel() for s in spy.shapes) <= max(heads * 64 * (n + 8), (n + 8) * 48)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "cache"),
    [
        pytest.param(
            case, cache, marks=() if (case, cache) == ("mustdrop", StaticCache) else pytest.mark.product
        )
        for case in ("unpatched", "random", "fastv", "mustdrop")
        for cache in (StaticCache, DynamicCache)
    ],
)
def test_compiled_decode_does_not_recompile(case, cache):
    """`torch.compile(model.forward, fullgraph=True)` on the decode steps of a pruned prompt, rows of
    different lengths: no graph break, and from the second token on no new graph, as in the unpatched model.
    """
    import torch._dynamo as dynamo

    model, inputs = FAMILIES["llava"].build(), FAMILIES["llava"].batch("ragged")
    options = dict(layer=1, budget=0.3) if case == "fastv" else dict(budget=0.5)
    mask, length = inputs["attention_mask"], inputs["input_ids"].shape[1]
    positions, config = (mask.cumsum(1) - 1).clamp(min=0), model.config.get_text_config()
    store = (
        StaticCache(config=config, max_cache_len=length + 16)
        if cache is StaticCache
        else DynamicCache(config=config)
    )
    dynamo.reset()
    dynamo.utils.counters.clear()
    with (
        nullcontext() if case == "unpatched" else patched(model, strategies.create(case, **options)),
        torch.no_grad(),
    ):
        want = run(model, inputs, 6)
        out = model(**clone(inputs), **{CACHE: store}, position_ids=positions)
        compiled, graphs, ids = torch.compile(model.forward, backend="eager", fullgraph=True), [], []
        for _ in range(6):
            ids.append(pick(out.logits[:, -1]))
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            positions = positions[:, -1:] + 1
            step = dict(input_ids=ids[-1][:, None], attention_mask=mask, position_ids=positions)
            out = compiled(**step, **{CACHE: store})
            graphs.append(dynamo.utils.counters["stats"]["unique_graphs"])
    assert torch.equal(torch.stack(ids, 1), want.sequences[:, length:])
    assert graphs == [1, 2, 2, 2, 2, 2], (
        "the second graph is for a mask of any width, no further one is expected"
    )


@pytest.mark.slow
@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.12"), reason="dynamo of torch 2.11 cannot guard hooks' state"
)
@pytest.mark.parametrize("case", [pytest.param("random", marks=pytest.mark.product), "fastv"])
def test_compiled_prefill_is_right(case):
    """What depends on data is left to eager mode, whatever surrounds it is compiled: the very same logits,
    twice.
    """
    import torch._dynamo as dynamo

    model, inputs = FAMILIES["llava"].build(), FAMILIES["llava"].batch("ragged")
    options = dict(layer=1, budget=0.3) if case == "fastv" else dict(budget=0.5)
    dynamo.reset()
    dynamo.utils.counters.clear()
    with patched(model, strategies.create(case, **options)), torch.no_grad():
        want = model(**clone(inputs)).logits
        compiled = torch.compile(model.forward, backend="eager")
        for _ in range(2):
            assert (compiled(**clone(inputs)).logits - want).abs().max() < 1e-5
    assert dynamo.utils.counters["stats"]["unique_graphs"] > 1


@pytest.mark.product  # three quarters of a minute of compilation
@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.12"), reason="dynamo of torch 2.11 cannot guard hooks' state"
)
def test_what_was_compiled_and_called_before_the_patch_says_so():
    model, inputs = FAMILIES["llava"].build(), FAMILIES["llava"].batch("ragged")
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(model.forward, backend="eager")
        dense = compiled(**clone(inputs)).logits
        with patched(model):
            with pytest.raises(RuntimeError, match=r"call torch.compiler.reset\(\)"):
                compiled(**clone(inputs))
            torch.compiler.reset()
            got, want = compiled(**clone(inputs)).logits, model(**clone(inputs)).logits
        assert (got - want).abs().max() < 1e-5 < EFFECT < (got - dense).abs().max()
        assert (compiled(**clone(inputs)).logits - dense).abs().max() < 1e-5


def test_fixed_is_asked_at_layer_zero():
    """A drop in front of layer 0 is a drop in front of the LLM."""
    model, inputs = subject("llava"), FAMILIES["llava"].batch("ragged")
    with patched(model, Fixed(layers=(0,), projector=False)) as spy:
        out = run(model, inputs)
    assert_same(out, inputs, expected("llava", inputs, spy))
