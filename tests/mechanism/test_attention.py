"""Attention implementations and number formats."""

from __future__ import annotations

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash_utils

import vtoken
from tests.models import FAMILIES
from tests.oracle import CACHE, clone

from .common import BOTH, FRONT, INSIDE, SOME, assert_close, assert_moved, assert_same, expected, run, subject
from .fixed import Fixed, patched


@pytest.mark.parametrize("options", [FRONT, BOTH], ids=["before", "both"])
@pytest.mark.parametrize("name", SOME)
def test_eager(name, options):
    model, inputs = subject(name, "eager"), FAMILIES[name].batch("text_only_row")
    with patched(model, **options) as spy:
        out = run(model, inputs)
    assert_same(out, inputs, expected(name, inputs, spy))
    assert_moved(out, name, inputs)


def dense_kernel(q, k, v, causal=True, softmax_scale=None, **_):
    """flash_attn_func in plain torch, (batch, n, heads, d); causal masks are aligned to the bottom right."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    mask = mask.tril(k.shape[2] - q.shape[2]) if causal else mask
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=softmax_scale
    ).transpose(1, 2)


def varlen_kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, causal=True, softmax_scale=None, **_):
    """flash_attn_varlen_func: sequences packed behind each other. The real one reads foreign memory beyond
    the last of them.
    """
    assert int(cu_seqlens_q[-1]) == len(q) and int(cu_seqlens_k[-1]) == len(k) == len(v)
    bounds = zip(cu_seqlens_q[:-1], cu_seqlens_q[1:], cu_seqlens_k[:-1], cu_seqlens_k[1:])
    parts = [
        dense_kernel(q[None, a:b], k[None, c:d], v[None, c:d], causal, softmax_scale)[0]
        for a, b, c, d in bounds
    ]
    return torch.cat(parts)


def flash_arguments(query_length, key_length, is_causal, softmax_scale=None, **_):
    return dict(causal=is_causal, softmax_scale=softmax_scale)


@pytest.fixture
def flash(monkeypatch):
    """The code path of flash attention with kernels that run anywhere; makes models whose LLM goes that way."""
    kernels = (dense_kernel, varlen_kernel, None, flash_utils._pad_input, flash_utils._unpad_input)
    newer = hasattr(flash_utils, "_process_with_kvcache_kwargs_fn")
    arguments = (flash_arguments, flash_arguments) if newer else flash_arguments
    monkeypatch.setattr(flash_utils, "lazy_import_flash_attention", lambda *a, **k: (kernels, arguments))

    def make(name: str):
        model = FAMILIES[name].build()
        model.config.get_text_config()._attn_implementation_internal = "flash_attention_2"
        assert model.get_decoder().config._attn_implementation == "flash_attention_2"
        return model

    return make


@pytest.mark.parametrize(
    "cache", [{}, dict(cache_implementation="static", disable_compile=True)], ids=["dynamic", "static"]
)
@pytest.mark.parametrize("options", [FRONT, BOTH], ids=["before", "both"])
@pytest.mark.parametrize("name", [n for n in SOME if n != "gemma3"])
def test_flash(name, options, cache, flash):
    model, inputs = flash(name), FAMILIES[name].batch("ragged")
    with patched(model, **options) as spy:
        out = run(model, inputs, **cache)
    assert_same(out, inputs, expected(name, inputs, spy))
    assert_moved(out, name, inputs)


def test_flash_with_a_new_image_on_an_old_cache(flash):
    """Gaps in the positions must not be read as packed sequences."""
    family, model = FAMILIES["llava"], flash("llava")
    whole = family.prompt([[0, 1]], turns=True)
    cut = int(family.visual(whole)[0].nonzero()[16, 0])
    with patched(model) as spy, torch.no_grad():
        one = dict(input_ids=whole["input_ids"][:, :cut], **family.vision(0))
        cache = model(**one, use_cache=True)[CACHE]
        two = {k: whole[k] for k in ("input_ids", "attention_mask")} | family.vision(1)
        out = run(model, two | {CACHE: cache})
    assert_same(out, whole, expected("llava", whole, spy))


@pytest.mark.parametrize("name", SOME)
def test_double_precision(name):
    """In float64 rounding hides nothing. (generate() returns float32 logits.)"""
    model, inputs = subject(name, dtype=torch.float64), FAMILIES[name].batch("ragged", torch.float64)
    with patched(model, layers=(1,), merge=True) as spy:
        out = run(model, inputs)
    ids, logits = expected(name, inputs, spy, model=FAMILIES[name].build(dtype=torch.float64))
    assert out.sequences[:, inputs["input_ids"].shape[1] :].tolist() == ids.tolist()
    assert_close(torch.stack(out.logits), logits, 2e-6)


@pytest.mark.parametrize(
    ("name", "dtype"), [(n, torch.bfloat16) for n in INSIDE] + [(n, torch.float16) for n in SOME]
)
def test_half_precision(name, dtype):
    """Kept dtype, finite logits, near those in float32 with the same selection."""
    model, inputs = subject(name, dtype=dtype), FAMILIES[name].batch("ragged", dtype)
    layers = (2,) if name in INSIDE else ()
    strategy = Fixed(budget=0.5, layers=layers)
    # whatever the rounding of the features
    strategy.select = lambda tokens: strategy._draw(len(tokens), len(tokens))
    with patched(model, strategy) as spy, torch.no_grad():
        out = model(**clone(inputs), use_cache=False).logits
        run(model, inputs, 2)
    assert out.dtype == dtype
    assert out.isfinite().all()
    reference, twin = subject(name), Fixed(budget=0.5, layers=layers)
    twin.select = strategy.select
    with vtoken.applied(reference, twin), torch.no_grad():
        want = reference(**FAMILIES[name].batch("ragged"), use_cache=False).logits[:, -1]
    assert spy.items
    error = (out[:, -1].float() - want).norm() / want.norm()
    rough = 0.4 if "moe" in name else 0.3  # rounding sends tokens to other experts
    assert error < (rough if dtype == torch.bfloat16 else 0.1)
