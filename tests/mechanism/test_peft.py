"""A model with adapters of peft reads the very tokens that the same weights without peft read."""

from __future__ import annotations

import functools

import pytest
import torch

import vtoken
from tests import oracle
from tests.models import FAMILIES
from tests.oracle import CACHE, clone
from vtoken.patching import patch_of

from .common import BOTH, EFFECT, assert_close, run
from .fixed import patched
from .test_isolation import traces

peft = pytest.importorskip("peft")

# a projector strategy, one that reads the tower, two that read the q/k projections of the LLM
STRATEGIES = {"llava": ("divprune", "hired", "fastv", "mustdrop"), "qwen2_5_vl": ("divprune", "fastv")}
CASES = [(name, strategy) for name, some in STRATEGIES.items() for strategy in some]


def lora(name: str, model=None):
    """LoRA with random weights on the projections of the tower and of the LLM."""
    model = FAMILIES[name].build() if model is None else model
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, target_modules=r".*(q_proj|k_proj|v_proj|qkv)", init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


def answers(model, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a forward (B, q, V), and of the steps of `generate` (steps, B, V)."""
    with torch.no_grad():
        return model(**clone(inputs)).logits, torch.stack(run(model, inputs, 3).logits)


def assert_equal(got, want, tolerance: float = 1e-4) -> None:
    for one, other in zip(got, want, strict=True):
        assert_close(one, other, tolerance)


@functools.cache
def merged_answers(name: str, strategy: str):
    """The answers of the same weights without peft."""
    model = vtoken.patch(lora(name).merge_and_unload(), strategy, budget=0.4)
    return answers(model, FAMILIES[name].batch("ragged"))


@pytest.mark.parametrize(("name", "strategy"), CASES)
def test_lora(name, strategy):
    model, inputs = lora(name), FAMILIES[name].batch("ragged")
    keys, dense = list(model.state_dict()), answers(model, inputs)
    assert vtoken.patch(model, strategy, budget=0.4) is model
    pruned = answers(model, inputs)
    assert_equal(pruned, merged_answers(name, strategy))
    assert (pruned[1] - dense[1]).abs().max() > EFFECT
    assert list(model.state_dict()) == keys
    report = vtoken.report(model)
    assert report.tokens_in == int(FAMILIES[name].visual(inputs).sum()) > report.visual_per_layer[-1]
    with vtoken.disabled(model):
        assert_equal(answers(model, inputs), dense, 0)
    with model.disable_adapter():
        plain = vtoken.patch(FAMILIES[name].build(), strategy, budget=0.4)
        assert_equal(answers(model, inputs), answers(plain, inputs), 1e-6)  # two models, two places in memory
    assert vtoken.unpatch(model) is model
    assert_equal(answers(model, inputs), dense, 0)


@pytest.mark.parametrize(("name", "strategy"), CASES)
def test_lora_put_on_or_merged_after_the_patch(name, strategy):
    inputs, model = FAMILIES[name].batch("ragged"), FAMILIES[name].build()
    model = lora(name, vtoken.patch(model, strategy, budget=0.4))
    want = merged_answers(name, strategy)
    assert_equal(answers(model, inputs), want)
    merged = model.merge_and_unload()
    assert_equal(answers(merged, inputs), want)
    vtoken.unpatch(merged)
    dense = answers(lora(name).merge_and_unload(), inputs)
    assert_equal(answers(merged, inputs), dense)
    assert not any("vtoken" in str(t) for t in traces(merged).values())


# -- prompt learning: virtual tokens before the prompt -------------------------------------------------------
VIRTUAL = 4
KINDS = {
    "prompt": lambda **common: peft.PromptTuningConfig(**common),
    "p-tuning": lambda **common: peft.PromptEncoderConfig(encoder_hidden_size=16, **common),
    "prefix": lambda **common: peft.PrefixTuningConfig(**common),
}


def prompted(name: str, kind: str):
    torch.manual_seed(3)
    common = dict(num_virtual_tokens=VIRTUAL, num_layers=4, token_dim=32, num_attention_heads=4)
    config = KINDS[kind](**common, task_type="CAUSAL_LM")
    return peft.get_peft_model(FAMILIES[name].build(), config).eval()


def read_by_the_llm(model, inputs: dict) -> dict:
    """What the unpatched LLM is given."""
    got: dict = {}
    decoder = oracle.decoder_of(model.get_base_model())
    hook = decoder.register_forward_pre_hook(lambda m, a, kw: got or got.update(kw), with_kwargs=True)
    first(model, inputs)
    hook.remove()
    return got


def first(model, inputs: dict, generates: bool = False) -> torch.Tensor:
    """(V,) the logits of the first token of the answer."""
    with torch.no_grad():
        return run(model, inputs, 1).logits[0][0] if generates else model(**clone(inputs)).logits[0, -1]


def check_generate(model, inputs: dict) -> None:
    """Skip where peft's own `generate` loses the prefix: it gives the cache a name that transformers ignores."""
    dense = first(model, inputs)
    if (dense - first(model, inputs, True)).abs().max() > 1e-3:
        pytest.skip("generate of this peft does not read what its forward reads")


# peft calls the cache by its old name; Qwen takes no prefix in a forward
@pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning")
@pytest.mark.parametrize("generates", [False, True], ids=["forward", "generate"])
@pytest.mark.parametrize("options", [dict(), dict(layers=(2,), budget=0.6, projector=False), BOTH])
@pytest.mark.parametrize(
    ("name", "kind"), [("llava", k) for k in KINDS] + [("qwen2_5_vl", k) for k in KINDS if k != "prefix"]
)
def test_prompt_learning(name, kind, options, generates):
    """The first logits are those of the LLM on the explicitly shortened embeddings, virtual tokens included."""
    family = FAMILIES[name]
    model, inputs = prompted(name, kind), family.batch("one")
    given, dense = read_by_the_llm(model, inputs), first(model, inputs)
    if generates:
        check_generate(model, inputs)
    before = 0 if kind == "prefix" else VIRTUAL
    with patched(model, **options) as spy:
        got = first(model, inputs, generates)
    keep, drop = torch.ones_like(inputs["input_ids"]).bool(), {}
    if spy.items:
        keep, _ = spy.in_front(family, inputs)
    for layer, [(columns, answer)] in spy.drops.items():
        drop[layer] = torch.ones(inputs["input_ids"].shape[1] + before, dtype=torch.bool)
        gone = torch.ones(len(columns), dtype=torch.bool)
        gone[answer.keep] = False
        drop[layer][columns[gone]] = False
    assert_close(got, first_logits(model, kind, given, keep[0], drop, before))
    assert (got - dense).abs().max() > EFFECT
    assert_close(first(model, inputs), dense)  # Qwen remembers where its last prompt ended


@torch.no_grad()
def first_logits(model, kind: str, given: dict, keep: torch.Tensor, drop: dict, before: int) -> torch.Tensor:
    inner = model.get_base_model()
    kept = torch.cat([torch.ones(before, dtype=torch.bool), keep])
    embeds, positions = given["inputs_embeds"], given.get("position_ids")
    past = VIRTUAL if kind == "prefix" else 0
    if positions is None:
        positions = torch.arange(past, past + embeds.shape[1])[None]
    index = kept.nonzero()[:, 0]
    if kind != "prefix":
        prompt = oracle.Prompt(embeds[0, index], positions[..., 0, index], index)
        inside = oracle.Inside({k: d[index] for k, d in drop.items()}) if drop else None
        return oracle.head_of(inner)(oracle.hidden(inner, prompt, inside)[-1])
    alive = torch.ones(past + len(index), dtype=torch.bool)
    cache, h = model.get_prompt(1), embeds[:, index]
    decoder = oracle.decoder_of(inner)
    rotary = decoder.rotary_emb(h, positions[..., index])
    for i, layer in enumerate(decoder.layers):
        if i in drop:
            alive[past:] &= drop[i][index]
        seen = torch.ones(len(index), past + len(index)).tril(past).bool() & alive
        seen = seen | torch.eye(len(index), past + len(index), dtype=torch.bool).roll(past, 1)
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
        h = layer(h, attention_mask=mask, position_embeddings=rotary, **{CACHE: cache})
    return oracle.head_of(inner)(decoder.norm(h)[0, -1])


@pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_the_end_of_a_learnt_prompt(kind):
    """Virtual tokens are no answer: what `generate` chooses inside the LLM is what a forward chooses."""
    model, inputs = prompted("llava", kind), FAMILIES["llava"].batch("one")
    check_generate(model, inputs)
    vtoken.patch(model, "fastv", budget=0.3)
    kept = []
    for generates in (False, True):
        first(model, inputs, generates)
        kept.append(vtoken.report(model).visuals[0].layers[-1].keep.tolist())
    assert kept[0] == kept[1]


class Packed(torch.nn.Linear):
    """As bitsandbytes' Linear4bit: its weights take another form at their first use in evaluation."""

    packed = False

    def forward(self, x):
        self.packed |= not self.training
        return super().forward(x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("strategy", ["farcover", "fastv"])
def test_a_patch_leaves_quantised_weights_as_they_are(strategy, training):
    """The attention is tried when the model is patched, which is often before `model.train()`."""
    model = FAMILIES["llava"].build().train(training)
    used = []
    for layer in model.model.language_model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            linear = getattr(layer.self_attn, name)
            linear.__class__, linear.weight.quant_state = Packed, object()
            linear.register_forward_hook(lambda module, args, out: used.append(module))
    vtoken.patch(model, strategy, budget=0.4)
    assert used and not any(module.packed for module in used)


@pytest.mark.parametrize("strategy", [None, "fastv"])
def test_dropout_of_adapters_in_training_does_not_look_like_another_attention(strategy):
    config = peft.LoraConfig(lora_dropout=0.5, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    model = peft.get_peft_model(FAMILIES["llava"].build(), config).train()
    vtoken.patch(model, strategy, budget=0.3)
    assert "relevance" not in patch_of(model).strategy.describe()
    assert all(module.training for module in model.modules())
