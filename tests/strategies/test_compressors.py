"""quecc, llava_mini and voco: their formulas, what the LLM reads, and how they go with caches and text."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

import vtoken
from tests.mechanism.common import assert_close, run
from tests.models import FAMILIES
from tests.oracle import clone
from vtoken import tiny
from vtoken.llm_shape import LanguageModelShape
from vtoken.strategies.common.decoder_block import DecoderBlock
from vtoken.strategies.llava_mini import places

from .common import anyres, video
from .trained import doubled, logits, patched, randomise, trained_of

SOME = ["llava", "llava_onevision/video", "internvl", "qwen2_5_vl", "qwen3_vl/video", "gemma3"]
WIDE = torch.float64


def read_by_llm(model, inputs):
    """The embeddings that the first layer of the LLM is given, and the logits."""
    seen = []
    layer = model.get_decoder().layers[0]
    handle = layer.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    try:
        out = logits(model, inputs)
    finally:
        handle.remove()
    return seen[-1], out  # a question may be read alone before


@pytest.mark.parametrize("strategy", ["quecc", "llava_mini"])
@pytest.mark.parametrize("name", SOME)
def test_untrained_it_is_pooling_bit_for_bit(name, strategy):
    model, inputs = FAMILIES[name].build(), FAMILIES[name].batch("ragged")
    with vtoken.applied(model, "pool", budget=0.3):
        pool = logits(model, inputs)
    vtoken.patch(model, strategy, budget=0.3, heads=2)
    assert torch.equal(logits(model, inputs), pool)
    before = logits(vtoken.unpatch(model), inputs)
    assert not torch.equal(pool, before)


# -- quecc -----------------------------------------------------------------------------------------------------
def quecc_by_hand(module, maps, question, grid):
    """Cell by cell and head by head; the sides of the maps are those of the grid times `side`."""
    side, heads = module.down.kernel_size[0], module.attention.num_heads
    width, out = maps[-1].shape[-1], []
    in_w, in_b = module.attention.in_proj_weight.chunk(3), module.attention.in_proj_bias.chunk(3)
    for r in range(grid[0]):
        for c in range(grid[1]):
            window = slice(r * side, (r + 1) * side), slice(c * side, (c + 1) * side)
            cells = [m[0][window].reshape(side * side, width) for m in maps]
            queries = module.query(cells[-1] + module.text(question))
            weight = module.down.weight[:, 0].reshape(width, side * side)
            query = (queries.T * weight).sum(1) + module.down.bias
            every = torch.cat(cells, -1)
            q = in_w[0] @ query + in_b[0]
            k = module.key(every) @ in_w[1].T + in_b[1]
            v = module.value(every) @ in_w[2].T + in_b[2]
            mixed = [
                (k[:, part] @ q[part] / len(part) ** 0.5).softmax(0) @ v[:, part]
                for part in torch.arange(width).chunk(heads)
            ]
            out.append(module.out(module.attention.out_proj(torch.cat(mixed))))
    return torch.stack(out)


def test_quecc_is_the_formula_and_each_token_knows_its_cell_alone():
    module = trained_of(randomise(patched("llava", "quecc", WIDE))).module
    torch.manual_seed(1)
    width = module.text[0].out_features
    layers = module.key[0].in_features // width
    maps = [torch.randn(1, 4, 6, width, dtype=WIDE) for _ in range(layers)]
    question = torch.randn(module.text[0].in_features, dtype=WIDE)
    with torch.no_grad():
        made = module(maps, question, (2, 3))[0]
        assert torch.allclose(made, quecc_by_hand(module, maps, question, (2, 3)), atol=1e-10)
        for m in maps:
            m[0, 0, 0] += 1.0
        moved = (module(maps, question, (2, 3))[0] - made).abs().amax(1) > 1e-9
        assert moved.tolist() == [True] + [False] * 5
        asked = (module(maps, question + 1.0, (2, 3))[0] - made).abs().amax(1) > 1e-9
    assert asked.all()


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "llava_onevision/video"])
def test_quecc_reads_the_state_after_the_text(name):
    """It is that of the unpatched language model, whatever pads the batch, and another question moves it."""
    model, inputs = randomise(patched(name, "quecc", WIDE)), doubled(FAMILIES[name].batch("ragged"))
    part, seen = trained_of(model), []
    select = part.select
    part.select = lambda tokens: seen.append(tokens.question) or select(tokens)
    logits(model, inputs)
    vtoken.unpatch(model)
    visual = FAMILIES[name].visual(inputs)
    for b, question in zip([b for b, row in enumerate(visual) if row.any()], unique(seen), strict=True):
        ids = inputs["input_ids"][b][inputs["attention_mask"][b].bool() & ~visual[b]]
        with torch.no_grad():
            out = model.get_decoder()(inputs_embeds=model.get_input_embeddings()(ids)[None]).last_hidden_state
        assert torch.allclose(question, out[0, -1], atol=1e-9)


def unique(tensors):
    """Those that differ from the one before."""
    return [t for i, t in enumerate(tensors) if i == 0 or not torch.equal(t, tensors[i - 1])]


@pytest.mark.parametrize("strategy", ["quecc", "llava_mini"])
def test_another_question_reads_other_tokens(strategy):
    model, inputs = randomise(patched("llava", strategy)), FAMILIES["llava"].batch("one")
    first, _ = read_by_llm(model, inputs)
    other = clone(inputs)
    other["input_ids"][:, -1] += 1
    second, _ = read_by_llm(model, other)
    assert not torch.equal(first[:, :-1], second[:, :-1]) or strategy == "llava_mini"
    assert not torch.equal(first[:, -1], second[:, -1])


# -- llava_mini ------------------------------------------------------------------------------------------------
def test_a_block_is_a_decoder_layer_of_llama():
    shape = LanguageModelShape(1, 24, 4, 2, 6, 40)
    torch.manual_seed(0)
    block = DecoderBlock(shape).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    config = LlamaConfig(
        hidden_size=24,
        intermediate_size=40,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        rms_norm_eps=1e-6,
        attn_implementation="eager",
    )
    layer, rotary = LlamaDecoderLayer(config, 0).double(), LlamaRotaryEmbedding(config)
    names = {"before_attention": "input_layernorm", "before_mlp": "post_attention_layernorm"}
    names |= {n: f"self_attn.{n[0]}_proj" for n in ("query", "key", "value", "out")}
    names |= {n: f"mlp.{n}_proj" for n in ("gate", "up", "down")}
    layer.load_state_dict({f"{names[k.partition('.')[0]]}.weight": v for k, v in block.state_dict().items()})
    x, n = torch.randn(7, 24, dtype=WIDE), 7
    mask = torch.zeros(1, 1, n, n, dtype=WIDE).masked_fill_(~torch.ones(n, n).tril().bool(), -1e30)
    with torch.no_grad():
        out = layer(x[None], attention_mask=mask, position_embeddings=rotary(x[None], torch.arange(n)[None]))
        out = out[0] if isinstance(out, tuple) else out
        assert torch.allclose(block(x), out.view(n, -1), atol=1e-6)  # rotary tables are float32


def compressor_by_hand(module, map_, grid):
    """One query after another over one map (h, w, C)."""
    width, attention = map_.shape[-1], module.attention
    seen = F.layer_norm(map_.flatten(0, 1), (width,), module.norm_map.weight, module.norm_map.bias)
    keys = seen + places(*map_.shape[:2], width, seen)
    resized = F.interpolate(module.queries[None].float(), grid, mode="bicubic", align_corners=True)[0]
    in_w, in_b = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    k, v = keys @ in_w[1].T + in_b[1], seen @ in_w[2].T + in_b[2]
    where, out = places(*grid, width, seen), []
    for i in range(grid[0] * grid[1]):
        query = resized[:, i // grid[1], i % grid[1]].to(seen)
        query = F.layer_norm(query, (width,), module.norm_query.weight, module.norm_query.bias) + where[i]
        q = in_w[0] @ query + in_b[0]
        parts = torch.arange(width).chunk(attention.num_heads)
        mixed = [(k[:, p] @ q[p] / len(p) ** 0.5).softmax(0) @ v[:, p] for p in parts]
        out.append(module.out(attention.out_proj(torch.cat(mixed))))
    return torch.stack(out)


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (4, 4)])
def test_the_compressor_is_the_formula(grid):
    module = trained_of(randomise(patched("llava", "llava_mini", WIDE))).module.compressor
    torch.manual_seed(1)
    maps = torch.randn(2, 5, 4, module.queries.shape[0], dtype=WIDE)
    with torch.no_grad():
        made = module(maps, grid)
        for t in range(2):
            assert torch.allclose(made[t], compressor_by_hand(module, maps[t], grid), atol=1e-9)


@pytest.mark.parametrize("rows,columns,width", [(1, 1, 16), (3, 2, 16), (2, 5, 30)])
def test_places_tell_cells_apart_and_a_finer_grid_has_them_too(rows, columns, width):
    like = torch.zeros(1, dtype=WIDE)
    made = places(rows, columns, width, like)
    assert made.shape == (rows * columns, width) and len(made.round(decimals=6).unique(dim=0)) == len(made)
    finer = places(3 * rows, 3 * columns, width, like).view(3 * rows, 3 * columns, width)
    assert torch.allclose(finer[1::3, 1::3].flatten(0, 1), made, atol=1e-6)


@pytest.mark.parametrize("name", SOME)
def test_the_text_of_the_prompt_reads_all_visual_tokens(name):
    """Row by row: the LLM reads fused text and pooled pictures; rows without pictures stay as they are."""
    inputs = doubled(FAMILIES[name].batch("ragged"))
    model = randomise(patched(name, "llava_mini", WIDE))
    with torch.no_grad():
        for parameter in model.vtoken_strategy.compressor.out[2].parameters():
            parameter.zero_()
    layers = model.vtoken_strategy.layers
    read, _ = read_by_llm(model, inputs)
    kept = [sum(v.tokens_out for v in vtoken.report(model).visuals if v.row == b) for b in range(len(read))]
    vtoken.unpatch(model)
    dense, _ = read_by_llm(model, inputs)
    with vtoken.applied(model, "pool", budget=0.3):
        pooled, _ = read_by_llm(model, inputs)
    for b, visual in enumerate(FAMILIES[name].visual(inputs)):
        real = inputs["attention_mask"][b].bool()
        x, text = dense[b, real], int((real & ~visual).sum())
        with torch.no_grad():
            for layer in layers if kept[b] else []:
                x = layer(x)
        mine, plain = (y[b, y.shape[1] - text - kept[b] :] for y in (read, pooled))
        changed = (mine - plain).abs().amax(-1) > 1e-9
        assert int(changed.sum()) == (text if kept[b] else 0)
        assert torch.allclose(mine[changed], x[~visual[real]][: int(changed.sum())], atol=1e-9)


@pytest.mark.parametrize("strategy", ["quecc", "llava_mini"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "llava_next"])
def test_the_answer_is_not_read_with_the_prompt(name, strategy):
    """A forward over prompt and answer, told apart by labels, is what `generate` did token by token."""
    model, inputs = randomise(patched(name, strategy)), FAMILIES[name].batch("one")
    out = model.generate(
        **clone(inputs), max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    start, ids = inputs["input_ids"].shape[1], out.sequences
    whole = clone(inputs) | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in whole:
        whole["mm_token_type_ids"] = F.pad(whole["mm_token_type_ids"], (0, ids.shape[1] - start))
    labels = ids.clone()
    labels[:, :start] = -100
    with torch.no_grad():
        made = model(**whole, labels=labels).logits[:, start - 1 : -1]
    assert torch.allclose(made[0], torch.cat(out.logits), atol=1e-4)
    with torch.no_grad():
        without = model(**whole).logits[:, start - 1 : -1]
    assert not torch.allclose(without, made, atol=1e-3)
    again = model.generate(**clone(inputs), max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(again, ids)


@pytest.mark.parametrize("strategy", ["quecc", "llava_mini"])
def test_labels_that_leave_no_prompt_are_refused(strategy):
    model, inputs = patched("llava", strategy), FAMILIES["llava"].batch("ragged")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with pytest.raises(ValueError, match="set the labels of the prompt to -100"):
        model(**clone(inputs), labels=labels)
    with vtoken.disabled(model):
        model(**clone(inputs), labels=labels)


def test_rows_of_a_batch_do_not_know_each_other():
    model, inputs = randomise(patched("llava", "llava_mini")), FAMILIES["llava"].batch("ragged")
    whole = logits(model, inputs)
    n = len(inputs["input_ids"])
    images = FAMILIES["llava"].visual(inputs).sum(1) // 16
    assert n > 1 and whole.shape[0] == n
    out = model.generate(**clone(inputs), num_beams=2, max_new_tokens=3, do_sample=False)
    assert out.shape[0] == n and images.sum() > 0


# -- voco ------------------------------------------------------------------------------------------------------
def voco_by_hand(model, module, inputs, marked, steps):
    """Greedy ids and logits of one row by full forwards with a mask and adapters, without a line of vtoken's."""
    captured, lm = [], model.get_decoder()
    handle = lm.register_forward_pre_hook(lambda m, a, kw: captured.append(kw), with_kwargs=True)
    with torch.no_grad():
        model(**clone(inputs))
    handle.remove()
    embeds, visual = captured[0]["inputs_embeds"].clone(), FAMILIES["llava"].visual(inputs)[0]
    embeds[0, marked] += module.embedding
    last, out, ids = int(visual.nonzero()[-1]), [], []
    head, embed = model.get_output_embeddings(), model.get_input_embeddings()

    def adapt(i, hidden):
        hidden = hidden.clone()
        hidden[0, marked] = module.layers[i](hidden[0, marked])
        return hidden

    hooks = [
        layer.register_forward_pre_hook(lambda m, args, i=i: (adapt(i, args[0]), *args[1:]))
        for i, layer in enumerate(lm.layers)
    ]
    try:
        for _ in range(steps):
            n = embeds.shape[1]
            seen = torch.ones(n, n).tril().bool()
            hidden = visual.clone()
            hidden[marked] = False
            seen[last + 1 :, : len(hidden)] &= ~hidden
            mask = torch.zeros(1, 1, n, n, dtype=embeds.dtype).masked_fill_(~seen, -1e30)
            with torch.no_grad():
                state = lm(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
                out.append(head(state[0, -1]))
                ids.append(int(out[-1].argmax()))
                embeds = torch.cat([embeds, embed(torch.tensor([[ids[-1]]]))], 1)
    finally:
        for hook in hooks:
            hook.remove()
    return ids, torch.stack(out)


@pytest.mark.parametrize("budget", [1, 0.2, 0.9])
def test_voco_decodes_as_the_masked_model_does(budget):
    model, inputs = (
        randomise(patched("llava", "voco", WIDE, budget=budget)),
        doubled(FAMILIES["llava"].batch("one")),
    )
    out = model.generate(
        **clone(inputs), max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    report, module = vtoken.report(model), trained_of(model).module
    count = max(1, int(budget * 16)) if budget < 1 else budget
    visual = FAMILIES["llava"].visual(inputs)[0].nonzero()[:, 0]
    stored = inputs["input_ids"].shape[1] - len(visual) + count
    cache = next(v for k, v in out.items() if hasattr(v, "get_seq_length"))
    assert [x.keys.shape[2] for x in cache.layers] == [stored + 4] * len(cache.layers)
    assert cache.get_seq_length() == out.sequences.shape[1] - 1
    assert report.tokens_per_layer == [stored] * len(cache.layers) and report.kv_bytes < report.kv_bytes_dense
    assert report.tokens_out == len(visual)
    vtoken.unpatch(model)
    ids, want = voco_by_hand(model, module, inputs, visual[-count:], 5)
    assert out.sequences[0, inputs["input_ids"].shape[1] :].tolist() == ids
    assert torch.allclose(torch.cat(out.logits), want.float(), atol=1e-5)


def test_compression_tokens_are_the_last_of_each_frame_and_of_an_image():
    strategy = vtoken.strategies.VoCo(budget=3)
    film = video(3, 2, 4, trailing=1)
    assert strategy.compression_tokens(film).nonzero()[:, 0].tolist() == [5, 6, 7, 13, 14, 15, 21, 22, 23]
    crops = anyres(2, 2, 4)
    (marked,) = strategy.compression_tokens(crops).nonzero(as_tuple=True)
    assert len(marked) == 3 and (crops.cells[marked] >= 0).all() and int(marked[-1]) == len(crops) - 2
    assert strategy.counts(film.segments) == [8, 8, 8] and strategy.total(film.segments, 1) == 25


def test_what_follows_sees_a_picture_through_its_compression_tokens_only():
    """Without adapters and embeddings: in one layer of attention, another picture moves those alone."""
    model, inputs = patched("llava", "voco", budget=2), FAMILIES["llava"].batch("one")
    visual = FAMILIES["llava"].visual(inputs)[0].nonzero()[:, 0]
    layer, seen = model.get_decoder().layers[0], []
    handle = layer.register_forward_hook(
        lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    logits(model, inputs)
    embed = model.get_decoder().register_forward_pre_hook(
        lambda m, a, kw: (
            a,
            kw
            | {
                "inputs_embeds": kw["inputs_embeds"].index_add(
                    1, visual[:3], torch.ones(1, 3, kw["inputs_embeds"].shape[-1])
                )
            },
        ),
        with_kwargs=True,
    )
    logits(model, inputs)
    handle.remove(), embed.remove()
    moved = (seen[1] - seen[0]).abs().amax(-1).view(-1) > 1e-6
    after = int(visual[-1]) + 1
    assert not moved[after:].any() and moved[visual].all() and not moved[: int(visual[0])].any()


def test_voco_is_refused_where_it_cannot_hide():
    model = FAMILIES["llava"].build()
    model.config.text_config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"hides pictures .*attn_implementation='sdpa'"):
        vtoken.patch(model, "voco")
    model.config.text_config._attn_implementation = "sdpa"
    vtoken.patch(model, "voco")
    model.config.text_config._attn_implementation = "flash_attention_2"
    with pytest.raises(NotImplementedError, match="Flash attention cannot hide a picture"):
        logits(model, FAMILIES["llava"].batch("one"))


@pytest.mark.parametrize("strategy", ["quecc", "llava_mini", "voco"])
def test_a_session_refuses_what_reads_the_question(strategy):
    model, processor = tiny.load("llava_onevision")
    vtoken.patch(model, strategy)
    with pytest.raises(ValueError, match=r"reads the question|drops inside the LLM|use transformers 5\.18"):
        vtoken.StreamSession(model, processor)


@pytest.mark.parametrize("strategy,options,words", [
    ("quecc", {"heads": 3}, "heads must divide the tower's .* channels, found 3"),
    ("llava_mini", {"heads": 5}, "heads must divide"),
    ("quecc", {"layers": (99,)}, "layers names some of the tower's layers"),
    ("quecc", {"side": 0}, "side must be at least 1"),
    ("llava_mini", {"prefusion_layers": -1}, "at least 0"),
    ("voco", {"rank": -1}, "at least 0"),
])  # fmt: skip
def test_options_out_of_range(strategy, options, words):
    model = FAMILIES["llava"].build()
    with pytest.raises(ValueError, match=words):
        vtoken.patch(model, strategy, **options)
    assert not hasattr(model, "vtoken_strategy")


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "gemma3"])
def test_voco_writes_into_a_static_cache_what_it_writes_into_another(name):
    """One row without padding has no mask, and the keys of a static cache are longer than the prompt."""
    model, inputs = randomise(patched(name, "voco")), FAMILIES[name].batch("one")
    plain = run(model, inputs, 3)
    static = run(model, inputs, 3, cache_implementation="static", disable_compile=True)
    assert_close(torch.stack(static.logits), torch.stack(plain.logits))


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision", "llava_onevision/video"])
def test_voco_hides_the_query_of_a_prompt_that_ends_in_a_picture(name):
    """The query is the picture's last token, a separator: decoding must not see it, with a cache or without."""
    model, inputs = randomise(patched(name, "voco")), FAMILIES[name].batch("one")
    visual = FAMILIES[name].visual(inputs)[0]
    end = int(visual.nonzero()[-1]) + 1
    inputs |= {k: inputs[k][:, :end] for k in ("input_ids", "attention_mask")}
    cached = run(model, inputs, 3)
    assert all(n == end - int(visual.sum()) + marked_of(model) for n in vtoken.report(model).tokens_per_layer)
    assert_close(torch.stack(run(model, inputs, 3, use_cache=False).logits), torch.stack(cached.logits))


def marked_of(model):
    """The compression tokens of the last call."""
    report, strategy = vtoken.report(model), trained_of(model)
    counts = [strategy.allowance().tokens(v.segments) for v in report.visuals]
    return sum(sum(c) for c in counts)


@pytest.mark.parametrize(
    ("strategy", "option"),
    [("quecc", {"heads": 4}), ("llava_mini", {"heads": 4}), ("quecc", {"layers": (0, 2)})],
)
def test_saved_weights_do_not_serve_other_options(strategy, option, tmp_path):
    """Also where their shapes are the same."""
    vtoken.save_strategy(randomise(patched("llava", strategy)), tmp_path)
    config = vtoken.VTokenConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"saved weights of {strategy} were made for {next(iter(option))}="):
        vtoken.patch(FAMILIES["llava"].build(), config, **option)
    vtoken.patch(FAMILIES["llava"].build(), config, 0.5, positions="renumber")


def test_saved_weights_of_a_combination_do_not_serve_other_options(tmp_path):
    names = ["quecc", "fastv"]
    model = vtoken.patch(FAMILIES["llava"].build(), names, 0.4, quecc={"heads": 2}, fastv={"layer": 2})
    vtoken.save_strategy(model, tmp_path)
    config = vtoken.VTokenConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="saved weights of quecc were made for heads=2, found heads=4"):
        vtoken.patch(FAMILIES["llava"].build(), config, quecc={"heads": 4})
    other = vtoken.patch(FAMILIES["llava"].build(), config, fastv={"layer": 3})
    assert vtoken.patching.patch_of(other).strategy.budget == 0.4


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("strategy", ["quecc", "llava_mini", "voco"])
def test_the_llm_can_have_another_dtype_than_the_model(name, strategy):
    model, inputs = randomise(patched(name, strategy)), FAMILIES[name].batch("one")
    for part in (model.get_decoder(), model.lm_head):
        part.to(torch.bfloat16)
    assert logits(model, inputs).isfinite().all()


@pytest.mark.parametrize("strategy,option", [
    ("quecc", "side"), ("llava_mini", "size"), ("llava_mini", "prefusion_layers"), ("voco", "rank"),
])  # fmt: skip
def test_a_config_cannot_ask_for_weights_without_end(strategy, option, tmp_path):
    vtoken.save_strategy(patched("llava", strategy), tmp_path)
    path = tmp_path / "vtoken_config.json"
    told = json.loads(path.read_text())
    told["options"][option] = 10**10
    path.write_text(json.dumps(told))
    with pytest.raises(ValueError, match=f"{option} must be .*at most"):
        vtoken.patch(FAMILIES["llava"].build(), vtoken.VTokenConfig.from_pretrained(tmp_path))


def test_text_before_the_turn_with_the_picture_stays_as_it_is():
    """As in `generate()`: the first answer of a training sample is read from a prompt without a picture."""
    model, inputs = randomise(patched("llava", "llava_mini")), FAMILIES["llava"].batch("one")
    first = int(FAMILIES["llava"].visual(inputs)[0].nonzero()[0])
    assert first > 2
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, first - 1] = inputs["input_ids"][:, first - 1]
    seen = []
    layer = model.get_decoder().layers[0]
    handle = layer.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        model(**clone(inputs), labels=labels)
        handle.remove()
        text = model.get_input_embeddings()(inputs["input_ids"][:, :first])
    assert torch.equal(seen[-1][:, :first], text)


def test_a_window_that_cannot_hold_the_prompt_is_told():
    model, inputs = FAMILIES["gemma3"].build(), FAMILIES["gemma3"].batch("one")
    model.config.text_config.sliding_window = 12
    vtoken.patch(model, "voco", rank=4)
    with torch.no_grad(), pytest.raises(NotImplementedError, match="sliding-window layer whose window is"):
        model(**inputs, use_cache=True)
