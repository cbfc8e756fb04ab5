"""Conversations: more turns on one cache, a new image later, one prompt cache continued several times."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from tests import oracle
from tests.models import FAMILIES, SPECIAL
from tests.models.common import text
from tests.oracle import CACHE, clone

from .common import (
    ALIGNED,
    BOTH,
    FRONT,
    INSIDE,
    PATCHABLE,
    SOME,
    TOLERANCE,
    assert_close,
    assert_same,
    clean,
    everywhere,
    expected,
    run,
    subject,
)
from .fixed import Spy, patched
from .test_decoding import extend

PLAIN = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


def first_turn(model, inputs: dict, steps: int = 4, seed: int = 77):
    """A few tokens, then five of the user's: the whole conversation as inputs, and what the second call is
    given.
    """
    out = run(model, inputs, steps)
    answer = out.sequences[:, inputs["input_ids"].shape[1] :]
    more = torch.tensor([text(5, seed)]).expand(len(answer), -1)
    whole = extend(inputs, torch.cat([answer, more], 1))
    if "token_type_ids" in whole and "Pali" in type(model).__name__:
        whole["token_type_ids"][:, inputs["input_ids"].shape[1] :] = (
            1  # the prompt alone sees itself in both directions
        )
    again = {k: whole[k] for k in ("input_ids", "attention_mask")} | {CACHE: out[CACHE]}
    if "mm_token_type_ids" in whole:
        again["mm_token_type_ids"] = torch.zeros_like(whole["input_ids"], dtype=torch.int)
    return whole, again


def agrees(name: str, inputs: dict) -> bool:
    """Whether the unpatched model, with its cache, does what it does on the whole conversation."""
    whole, again = first_turn(clean(name), inputs)
    out = run(clean(name), again)
    ids, logits = oracle.generate(clean(name), whole)
    error = (torch.stack(out.logits) - logits).abs().max()
    return (
        out.sequences[:, whole["input_ids"].shape[1] :].tolist() == ids.tolist()
        and error < TOLERANCE * logits.max()
    )


@everywhere(before=FRONT, aligned=ALIGNED)
def test_second_turn(name, options):
    model, inputs = subject(name), FAMILIES[name].batch("ragged")
    if not agrees(name, inputs):
        pytest.skip("the unpatched model disagrees with itself")
    with patched(model, **options) as spy:
        whole, again = first_turn(model, inputs)
        out = run(model, again)
    assert_same(out, whole, expected(name, whole, spy, read=inputs["input_ids"].shape[1]))


@everywhere(never=("aligned",), before=FRONT)
def test_new_image_in_the_second_turn(name, options):
    family = FAMILIES[name]
    whole = family.prompt([[0, 1]], turns=True)
    start = int(family.visual(whole)[0].nonzero()[len(family.visual(family.prompt([[0]])).nonzero()), 0])
    # in front of what wraps the second image
    cut = start - 3 if whole["input_ids"][0, start - 1] >= 100 else start

    def converse(model):
        one = {k: whole[k][:, :cut] for k in PLAIN if k in whole} | family.vision(0)
        with torch.no_grad():
            cache = model(**clone(one), use_cache=True)[CACHE]
        two = {k: whole[k] for k in PLAIN if k in whole} | family.vision(1)
        return run(model, two | {CACHE: cache})

    try:
        assert_same(converse(clean(name)), whole, oracle.generate(clean(name), whole))
    except Exception:
        pytest.skip("the unpatched model disagrees with itself")
    model = subject(name)
    with patched(model, **options) as spy:
        out = converse(model)
    join_turns(spy, cut)
    assert len(spy.items) == 2
    assert_same(out, whole, expected(name, whole, spy))


def join_turns(spy: Spy, cut: int) -> None:
    """The answers of two calls as those of one; columns of the second call count from its own start."""
    for layer, ((first, a), (second, b)) in spy.drops.items():
        keep = torch.cat([a.keep, b.keep + len(first)])
        spy.drops[layer] = [(torch.cat([first, second + cut]), type(a)(keep))]


@pytest.mark.parametrize("options", [FRONT, BOTH], ids=["before", "both"])
@pytest.mark.parametrize("name", [n for n in PATCHABLE if n.startswith("qwen")])
def test_new_image_by_hand(name, options):
    if options.get("layers") and name not in INSIDE:
        pytest.skip("no drops inside this LLM")
    """generate() cannot place a second image on the cache of a multimodal rope; whoever passes positions can."""
    family = FAMILIES[name]
    whole = family.prompt([[0, 1]], turns=True)
    start = len(family.visual(family.prompt([[0]])).nonzero())
    cut = int(family.visual(whole)[0].nonzero()[start, 0]) - 3
    positions = oracle.capture(clean(name), whole)[0].positions[:, None]

    @torch.no_grad()
    def converse(model):
        parts = [(slice(0, cut), family.vision(0)), (slice(cut, None), family.vision(1))]
        cache = None
        for part, vision in parts:
            text = {k: whole[k][:, part] for k in ("input_ids", "mm_token_type_ids") if k in whole}
            options = dict(position_ids=positions[..., part], **{CACHE: cache}, use_cache=True)
            out = model(**clone(text | vision), **options)
            cache, logits = out[CACHE], [out.logits[:, -1]]
        for step in range(3):
            ids, last = oracle.pick(logits[-1])[:, None], positions[..., -1:] + 1 + step
            out = model(input_ids=ids, position_ids=last, **{CACHE: cache}, use_cache=True)
            logits.append(out.logits[:, -1])
        return torch.stack(logits)

    assert_close(converse(clean(name)), oracle.generate(clean(name), whole, steps=4)[1])
    model = subject(name)
    with patched(model, **options) as spy:
        got = converse(model)
    join_turns(spy, cut)
    assert_close(got, expected(name, whole, spy, 4)[1])


@pytest.mark.parametrize("name", SOME)
def test_text_turn_before_the_first_image(name):
    family = FAMILIES[name]
    whole = family.prompt([[0]])
    cut = 2
    model = subject(name)

    def converse(model):
        one = {k: whole[k][:, :cut] for k in ("input_ids", "attention_mask")}
        with torch.no_grad():
            cache = model(**one, use_cache=True)[CACHE]
        return run(model, whole | {CACHE: cache})

    try:
        assert_same(converse(clean(name)), whole, oracle.generate(clean(name), whole))
    except Exception:
        pytest.skip("the unpatched model disagrees with itself")
    with patched(model) as spy:
        out = converse(model)
    assert_same(out, whole, expected(name, whole, spy))


@pytest.mark.parametrize("name", SOME)
def test_copies_of_one_prompt_cache(name):
    model, inputs = subject(name), FAMILIES[name].batch("one")
    with patched(model, **BOTH) as spy:
        with torch.no_grad():
            cache = model(**clone(inputs), use_cache=True)[CACHE]
        for seed in (1, 2):
            whole = extend(inputs, torch.tensor([text(4, seed)]))
            again = {k: whole[k] for k in ("input_ids", "attention_mask", "mm_token_type_ids") if k in whole}
            out = run(model, again | {CACHE: copy.deepcopy(cache)})
            assert_same(out, whole, expected(name, whole, spy))
    assert torch.equal(pickle.loads(pickle.dumps(cache.layers[0])).keys, cache.layers[0].keys)


@pytest.mark.parametrize("name", SOME)
def test_cropping_a_cache_into_the_text(name):
    """What assisted decoding does: forget the last tokens of the prompt, then read them again."""
    model, inputs = subject(name), FAMILIES[name].batch("one")
    with patched(model, **BOTH) as spy:
        with torch.no_grad():
            cache = model(**clone(inputs), use_cache=True)[CACHE]
        length = inputs["input_ids"].shape[1]
        assert int(cache.get_seq_length()) == length
        assert cache.layers[0].keys.shape[2] < length
        cache.crop(-2)
        assert int(cache.get_seq_length()) == length - 2
        again = {k: inputs[k] for k in ("input_ids", "attention_mask", "mm_token_type_ids") if k in inputs}
        if "mm_token_type_ids" in again:
            again["mm_token_type_ids"] = torch.zeros_like(again["mm_token_type_ids"])
        out = run(model, again | {CACHE: cache})
    assert_same(out, inputs, expected(name, inputs, spy))


@pytest.mark.parametrize("name", SOME)
def test_one_static_cache_for_two_prompts(name):
    """generate() resets and reuses a static cache: nothing of the first prompt stays."""
    model = subject(name)
    with patched(model, **BOTH) as spy:
        for kind in ("one", "several_images", "one"):
            inputs = FAMILIES[name].batch(kind)
            spy.clear()
            out = run(model, inputs, cache_implementation="static", disable_compile=True)
            assert_same(out, inputs, expected(name, inputs, spy))


@pytest.mark.parametrize("name", SOME)
def test_a_placeholder_in_the_text_is_no_image(name):
    """A placeholder's id among the words of a later turn brings no image with it."""
    model, inputs = subject(name), FAMILIES[name].batch("one")
    with patched(model) as spy:
        out = run(model, inputs, 2)
        more = torch.full((1, 1), SPECIAL[0])
        whole = extend(inputs, more)
        again = {k: whole[k] for k in ("input_ids", "attention_mask")} | {CACHE: out[CACHE]}
        out[CACHE].crop(-1)
        if "mm_token_type_ids" in whole:
            again["mm_token_type_ids"] = torch.zeros_like(whole["input_ids"], dtype=torch.int)
        after = run(model, again, 2)
        assert len(spy.items) == 1
    assert_close(after.logits[0], run_unpruned_tail(name, inputs, spy, more))


def run_unpruned_tail(name: str, inputs: dict, spy, more: torch.Tensor) -> torch.Tensor:
    """Logits behind the prompt and ``more``, by teacher forcing."""
    forced = torch.cat([more, more], 1)
    return expected(name, inputs, spy, 2, forced=forced)[1][1]


OPERATIONS = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", [n for n in SOME if not n.startswith("qwen")])
def test_rows_of_a_cache_move_together(name, operation):
    """Padding and gaps belong to a row of the cache, wherever it goes."""
    model, inputs = subject(name), FAMILIES[name].batch("ragged")
    operate, rows = OPERATIONS[operation]
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    now = dict(
        input_ids=torch.tensor([[5], [6]]), attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1
    )
    with patched(model, **ALIGNED), torch.no_grad():
        cache = model(**clone(inputs), use_cache=True)[CACHE]
        moved = copy.deepcopy(cache)
        want = model(**now, **{CACHE: cache}).logits
        operate(moved)
        got = model(**{k: v[rows] for k, v in now.items()}, **{CACHE: moved}).logits
    assert_close(got, want[rows])
    assert (want[0] - want[1]).abs().max() > 1e-2
