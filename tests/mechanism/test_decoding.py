"""Beams, prompt lookup, an assistant, sampling: every decoding reads the shortened prompt."""

from __future__ import annotations

import pytest
import torch

from tests import oracle
from tests.models import FAMILIES, SPECIAL
from tests.oracle import STEPS, clone

from .common import (
    BOTH,
    FRONT,
    INSIDE,
    SOME,
    TOLERANCE,
    assert_close,
    assert_same,
    clean,
    consistent,
    everywhere,
    expected,
    new_ids,
    run,
    subject,
)
from .fixed import patched

BEAMS = 3


def beam_search(model, inputs: dict):
    """Ids (batch, beams, steps) and scores (batch, beams) of all beams."""
    out = model.generate(
        **clone(inputs),
        max_new_tokens=STEPS,
        min_new_tokens=STEPS,
        num_beams=BEAMS,
        num_return_sequences=BEAMS,
        do_sample=False,
        suppress_tokens=SPECIAL,
        return_dict_in_generate=True,
        output_scores=True,
    )
    batch = len(inputs["input_ids"])
    return new_ids(out, inputs).view(batch, BEAMS, STEPS), out.sequences_scores.view(batch, BEAMS)


def teacher_forced(ids: torch.Tensor, answer) -> torch.Tensor:
    """Mean log-probability (batch, beams) of every beam; ``answer(ids)`` are the logits (steps, batch,
    vocabulary).
    """
    scores = []
    for beam in ids.unbind(1):
        log_p = answer(beam).log_softmax(-1)
        scores.append(log_p.gather(-1, beam.T[..., None])[..., 0].mean(0))
    return torch.stack(scores, 1)


@everywhere(before=FRONT)
def test_beam_scores(name, options):
    inputs = FAMILIES[name].batch("ragged")
    try:
        ids, scores = beam_search(clean(name), inputs)
        dense = teacher_forced(
            ids, lambda beam: oracle.generate(clean(name), inputs, steps=STEPS, forced=beam)[1]
        )
        assert_close(scores, dense)
    except Exception:
        pytest.skip("the unpatched model's beam search is wrong here")
    model = subject(name)
    with patched(model, **options) as spy:
        ids, scores = beam_search(model, inputs)
    spy.once(FAMILIES[name], inputs, BEAMS)
    spy.drops = {layer: answers[::BEAMS] for layer, answers in spy.drops.items()}
    want = teacher_forced(ids, lambda beam: expected(name, inputs, spy, forced=beam)[1])
    assert_close(scores, want)
    assert (want - dense).abs().max() > TOLERANCE * dense.abs().max()


def queries(model):
    """Records the query lengths of the language model; call the second value to stop."""
    lengths: list[int] = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda m, a, kw: lengths.append(kw["inputs_embeds"].shape[1]), with_kwargs=True, prepend=True
    )
    return lengths, hook.remove


LOOKUP = dict(prompt_lookup_num_tokens=3, max_matching_ngram_size=1)


@everywhere(before=FRONT)
def test_prompt_lookup(name, options):
    if clean(name)._is_stateful:
        pytest.skip("transformers refuses assisted decoding")
    model, inputs = subject(name), FAMILIES[name].batch("one")
    inputs = extend(inputs, torch.arange(3, 95)[None])  # whatever the model says can be looked up
    with patched(model, **options) as spy:
        lengths, stop = queries(model)
        out = model.generate(
            **clone(inputs), max_new_tokens=12, do_sample=False, suppress_tokens=SPECIAL, **LOOKUP
        )
        stop()
    assert out[:, inputs["input_ids"].shape[1] :].tolist() == expected(name, inputs, spy, 12)[0].tolist()
    assert max(lengths[1:]) > 1


@everywhere(before=FRONT)
def test_prompt_lookup_on_a_static_cache(name, options):
    """Drafts of the first forward are cropped out of the prompt's tables; transformers allows it from 5.24
    on.
    """
    inputs = extend(FAMILIES[name].batch("one"), torch.tensor([[5, 6, 7, 8, 9, 10, 5]]))
    padded = [k for k, v in inputs.items() if v.shape == inputs["input_ids"].shape]
    inputs = inputs | {k: torch.nn.functional.pad(inputs[k], (3, 0)) for k in padded}
    static = LOOKUP | dict(cache_implementation="static", max_cache_len=64)
    if not consistent(name, inputs, **static):
        pytest.skip("the unpatched model disagrees with itself")
    model = subject(name)
    with patched(model, **options) as spy:
        lengths, stop = queries(model)
        out = run(model, inputs, 8, **static)
        stop()
    assert lengths[0] > inputs["input_ids"].shape[1] and min(lengths) == 1
    assert_same(out, inputs, expected(name, inputs, spy, 8))


def extend(inputs: dict, ids: torch.Tensor) -> dict:
    """The inputs with more text behind; what is said per token says "text" there."""
    out = dict(inputs)
    for key in inputs:
        if key in ("input_ids", "attention_mask") or key.endswith("token_type_ids"):
            more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}.get(key, torch.zeros_like(ids))
            out[key] = torch.cat([inputs[key], more.to(inputs[key].dtype)], 1)
    return out


@pytest.mark.parametrize(
    ("name", "assistant"),
    [(n, "another, pruned") for n in INSIDE]
    + [(n, a) for n in SOME for a in ("the same, pruned", "another, dense")],
)
def test_assistant(name, assistant):
    inputs = FAMILIES[name].batch("one")
    drafter = FAMILIES[name].build(seed=int("another" in assistant))
    if not consistent(name, inputs, assistant_model=drafter):
        pytest.skip("the unpatched model disagrees with itself")
    model, options = subject(name), BOTH if name in INSIDE else FRONT
    with patched(model, **options) as spy:
        run(model, inputs, 1)
        ids, _ = expected(name, inputs, spy, 8)
        if "pruned" in assistant:
            with patched(drafter, **options):
                out = run(model, inputs, 8, assistant_model=drafter)
        else:
            out = run(model, inputs, 8, assistant_model=drafter)
    assert new_ids(out, inputs).tolist() == ids.tolist()


def sampled(model, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and logits of two drawn sequences for each prompt."""
    out = model.generate(
        **clone(inputs),
        max_new_tokens=4,
        do_sample=True,
        num_return_sequences=2,
        suppress_tokens=SPECIAL,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return new_ids(out, inputs), torch.stack(out.logits)


@pytest.mark.parametrize("name", SOME)
def test_sampling_several_sequences(name):
    """Every drawn sequence has the logits that the oracle gives to its tokens."""
    model, inputs = subject(name), FAMILIES[name].batch("ragged")
    try:
        ids, logits = sampled(clean(name), inputs)
        assert_close(logits[:, ::2], oracle.generate(clean(name), inputs, None, 4, forced=ids[::2])[1])
    except (AssertionError, ValueError, RuntimeError, IndexError):
        pytest.skip("the unpatched model repeats the images of a prompt wrongly here")
    with patched(model) as spy:
        ids, logits = sampled(model, inputs)
    spy.once(FAMILIES[name], inputs, 2)
    for k in range(2):
        assert_close(logits[:, k::2], expected(name, inputs, spy, 4, forced=ids[k::2])[1])
