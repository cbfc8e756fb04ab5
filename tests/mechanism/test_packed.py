"""Rows of several packed prompts: position ids restart within a row, no mask and no cache.

The oracle runs every prompt alone, on the unpatched model, shortened by hand.
"""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import vtoken
from tests import oracle
from tests.models import FAMILIES
from tests.models.common import IMG, text
from tests.oracle import CACHE, clone
from vtoken.mechanism.packed_rows import ranks_of

from .common import EFFECT, assert_close, clean, subject
from .fixed import Fixed, patched
from .test_attention import flash  # noqa: F401

NAMES = ["llava", "qwen2_5_vl", "qwen3_vl"]
PER_TOKEN = ("mm_token_type_ids", "token_type_ids")
CASES = {
    "one row": [[[[0]], [[1]]]],
    "three prompts": [[[[1]], [[]], [[0, 2]]]],
    "two rows": [[[[0]], [[1]]], [[[1]], [[0]]]],
}


def positions_of(name: str, inputs: dict) -> torch.Tensor:
    """(1, n), or (4, 1, n) of a multimodal rope: a row that counts tokens, then three of the rope."""
    positions = oracle.capture(clean(name), inputs)[0].positions
    return positions[None] if positions.ndim == 1 else positions[:, None]


def packed(name: str, rows) -> tuple[list[list[dict]], dict]:
    """The prompts of every row, and one forward that holds them all; rows are as long as the longest."""
    family = FAMILIES[name]
    prompts = [[family.prompt(prompt) for prompt in row] for row in rows]
    lengths = [sum(p["input_ids"].shape[1] for p in row) for row in prompts]
    for row, length in zip(prompts, lengths):
        if length < max(lengths):  # one more prompt, of text
            ids = torch.tensor([text(max(lengths) - length, length)])
            more = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
            row.append(more | {k: torch.zeros_like(ids, dtype=torch.int) for k in PER_TOKEN if k in row[0]})
    each = [p for row in prompts for p in row]
    vision = [k for k in each[0] if k not in ("input_ids", "attention_mask", *PER_TOKEN)]
    out = {k: torch.cat([p[k] for p in each if k in p]) for k in vision}
    for key in ("input_ids", *[k for k in PER_TOKEN if k in each[0]]):
        out[key] = torch.cat([torch.cat([p[key] for p in row], 1) for row in prompts])
    positions = [torch.cat([positions_of(name, p) for p in row], -1) for row in prompts]
    return prompts, out | {"position_ids": torch.cat(positions, -2)}


def alone(name: str, prompts: list[list[dict]], inputs: dict, spy, renumber: bool = False) -> list[tuple]:
    """Per prompt: row, first column, kept columns, and the oracle's logits there."""
    keep, _ = (
        spy.in_front(FAMILIES[name], inputs) if spy else (torch.ones_like(inputs["input_ids"]).bool(), None)
    )
    out = []
    for b, row in enumerate(prompts):
        start = 0
        for prompt in row:
            mine = keep[b : b + 1, start : start + prompt["input_ids"].shape[1]]
            (short,) = oracle.shortened(clean(name), prompt, mine, renumber=renumber, door="forward")
            with torch.no_grad():
                logits = clean(name).get_output_embeddings()(oracle.hidden(clean(name), short))
            out.append((b, start, start + mine[0].nonzero()[:, 0], logits))
            start += mine.shape[1]
    return out


def check(name: str, got: torch.Tensor, want: list[tuple]) -> None:
    for b, _, columns, logits in want:
        assert_close(got[b, columns], logits)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_packed_prompts_do_not_see_each_other(name, case, attn):
    prompts, inputs = packed(name, CASES[case])
    model = subject(name, attn)
    with torch.no_grad():
        check(name, model(**clone(inputs), use_cache=False).logits, alone(name, prompts, inputs, None))
        with patched(model) as spy:
            got = model(**clone(inputs), use_cache=False).logits
        check(name, got, alone(name, prompts, inputs, spy))
        masked = torch.ones_like(inputs["input_ids"])
        with patched(model):
            across = model(**clone(inputs), attention_mask=masked, use_cache=False).logits
    assert (across - got).abs().max() > EFFECT, "whoever gives a mask says that the row is one prompt"


@pytest.mark.parametrize("merge", [False, True], ids=["dropped", "merged"])
@pytest.mark.parametrize("name", NAMES)
def test_training_on_packed_prompts_is_training_on_each(name, merge):
    """Loss and gradients, of prompts that begin with their picture too; gradient checkpointing turns the
    cache off.
    """
    prompts, inputs = packed(name, CASES["one row"])
    begins = next(n for n, i in enumerate(prompts[0][1]["input_ids"][0]) if i == IMG)
    labels = inputs["input_ids"].masked_fill(FAMILIES[name].visual(inputs), -100)
    cut = prompts[0][0]["input_ids"].shape[1]
    labels[:, [0, *range(cut, cut + begins)]] = -100
    model, parameters = subject(name), list(subject(name).get_decoder().layers[0].self_attn.parameters())

    def loss(some: dict, labels: torch.Tensor) -> torch.Tensor:
        logits = model(**clone(some), use_cache=False).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits[0], labels[0, 1:], ignore_index=-100, reduction="sum")

    with patched(model, merge=merge):
        got = torch.autograd.grad(loss(inputs, labels), parameters)
        each = zip(prompts[0], labels.split([cut, labels.shape[1] - cut], 1))
        total = sum(loss({k: v for k, v in p.items() if k != "attention_mask"}, part) for p, part in each)
        want = torch.autograd.grad(total, parameters)
    for a, b in zip(got, want):
        assert_close(a, b, 1e-3)


@pytest.mark.parametrize("where", ["first", "later"])
def test_a_prompt_that_begins_with_its_picture(where):
    """A dropped token at the head of a packed prompt is answered for by its own prompt, never by the one
    before.
    """
    family = FAMILIES["llava"]
    picture = family.vision(0)["pixel_values"]
    one, other = torch.tensor([[IMG] * 16 + text(4, 1)]), torch.tensor([text(6, 2)])
    row = [one, other] if where == "first" else [other, one]
    ids = torch.cat(row, 1)
    positions = torch.cat([torch.arange(x.shape[1]) for x in row])[None]
    strategy = Fixed()
    strategy.select = lambda tokens: vtoken.Selection(torch.tensor([5, 9]))
    model = subject("llava")
    with vtoken.applied(model, strategy), torch.no_grad():
        got = model(ids, pixel_values=picture, position_ids=positions, use_cache=False).logits
        want = torch.cat(
            [
                model(x, **({"pixel_values": picture} if x is one else {}), use_cache=False).logits
                for x in row
            ],
            1,
        )
    assert_close(got, want)


@pytest.mark.parametrize("kind", ["gap", "offset", "both"])
@pytest.mark.parametrize("name", NAMES)
def test_gaps_and_other_beginnings_are_one_prompt(name, kind):
    family, model = FAMILIES[name], subject(name)
    prompt = family.prompt([[0]])
    positions = positions_of(name, prompt).clone()
    behind = int(family.visual(prompt)[0].nonzero()[-1]) + 1
    if kind != "offset":
        positions[..., behind:] += 7
    if kind != "gap":
        positions += 11
    given = {k: v for k, v in prompt.items() if k != "attention_mask"} | {"position_ids": positions}
    with patched(model) as spy, torch.no_grad():
        got = model(**clone(given), use_cache=False).logits
        keep = spy.in_front(family, prompt)[0]
        (short,) = oracle.shortened(clean(name), prompt, keep, door="forward")
        short.positions = positions.reshape(*positions.shape[:-2], -1)[..., keep[0]]
        want = clean(name).get_output_embeddings()(oracle.hidden(clean(name), short))
    assert_close(got[0, keep[0]], want)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_packing(side):
    """A padded batch comes with a mask; its positions may start again where the padding ends."""
    family, model = FAMILIES["llava"], subject("llava")
    inputs = family.batch("ragged")
    if side == "right":
        shift = (inputs["attention_mask"] == 0).sum(1).tolist()
        for key in ("input_ids", "attention_mask"):
            inputs[key] = torch.stack([row.roll(-n) for row, n in zip(inputs[key], shift)])
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    with patched(model) as spy, torch.no_grad():
        got = model(**clone(inputs), position_ids=positions, use_cache=False).logits
    keep = spy.in_front(family, inputs)[0]
    for b, short in enumerate(oracle.shortened(clean("llava"), inputs, keep, door="forward")):
        with torch.no_grad():
            want = clean("llava").get_output_embeddings()(oracle.hidden(clean("llava"), short))
        assert_close(got[b, keep[b] & mask[b].bool()], want)


def test_renumbered_positions_count_from_the_beginning_of_each_prompt():
    from vtoken.strategies import create

    model, prompts, inputs = subject("llava"), *packed("llava", CASES["one row"])
    strategy = create("uniform", budget=0.5, positions="renumber")
    with patched(model, strategy) as spy, torch.no_grad():
        got = model(**clone(inputs), use_cache=False).logits
    check("llava", got, alone("llava", prompts, inputs, spy, renumber=True))


FLASH_CASES = {
    "three prompts": CASES["three prompts"],
    "one prompt": [[[[0]]]],
    "one of two pictures": [[[[2, 1]]]],
}


@pytest.mark.parametrize("lengths", [False, True], ids=["positions", "lengths"])
@pytest.mark.parametrize("case", FLASH_CASES)
@pytest.mark.parametrize("name", NAMES)
def test_flash_attention(name, case, lengths, flash):  # noqa: F811
    """It finds the prompts in the positions, or is told their lengths; both are those of the shortened
    prompts.
    """
    model, (prompts, inputs) = flash(name), packed(name, FLASH_CASES[case])
    sizes = [p["input_ids"].shape[1] for p in prompts[0]]
    ends = torch.tensor([0, *sizes]).cumsum(0).int()
    told = dict(cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=max(sizes), max_length_k=max(sizes))
    with torch.no_grad():
        for use_cache in (False, True):
            given = clone(inputs) | (told if lengths else {}) | dict(use_cache=use_cache)
            check(name, model(**given).logits, alone(name, prompts, inputs, None))
            with patched(model) as spy:
                got = model(**given).logits
            check(name, got, alone(name, prompts, inputs, spy))


@pytest.mark.parametrize("name", NAMES)
def test_flash_attention_told_the_length_of_one_prompt_that_is_cut_inside(name, flash):  # noqa: F811
    model, inputs = flash(name), FAMILIES[name].prompt([[0]])
    size = inputs["input_ids"].shape[1]
    ends = torch.tensor([0, size]).int()
    told = dict(cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=size, max_length_k=size)
    with torch.no_grad(), patched(model, layers=(1, 2)):
        given = clone(inputs) | dict(use_cache=False)
        assert torch.equal(model(**given).logits, model(**given, **told).logits)


def test_what_cannot_be_kept_apart_is_refused(flash):  # noqa: F811
    _, inputs = packed("llava", CASES["two rows"])
    one = {k: v[:1] for k, v in packed("llava", CASES["one row"])[1].items() if k != "pixel_values"}
    one["pixel_values"] = inputs["pixel_values"][:2]
    model = subject("llava")
    with torch.no_grad():
        refusals = dict(
            fastv="one prompt per row", cdpruner="reads the text", farcover=r"with relevance=0\.0"
        )
        for strategy, words in refusals.items():
            with vtoken.applied(model, strategy, budget=0.5), pytest.raises(NotImplementedError, match=words):
                model(**clone(one), use_cache=False)
            with vtoken.applied(model, strategy, budget=0.5), vtoken.disabled(model):
                got = model(**clone(one), use_cache=False).logits
            assert torch.equal(got, clean("llava")(**clone(one), use_cache=False).logits)
        refused = pytest.raises(NotImplementedError, match="a batch of one row only")
        with vtoken.applied(flash("llava"), "uniform", budget=0.5) as other, refused:
            other(**clone(inputs), use_cache=False)


def test_pictures_of_packed_prompts_are_no_video():
    """A strategy that sees the images of a prompt as one video sees those of each prompt."""
    prompts, inputs = packed("llava", [[[[0, 1]], [[1, 2]]]])
    strategy, seen = Fixed(), []
    strategy.needs = lambda tower: vtoken.tokens.Needs(together=True)
    select = strategy.select
    strategy.select = lambda tokens: (seen.append(len(tokens.segments)), select(tokens))[1]
    model = subject("llava")
    with vtoken.applied(model, strategy), torch.no_grad():
        got = model(**clone(inputs), use_cache=False).logits
        want = [model(**clone(p), use_cache=False).logits for p in prompts[0]]
    assert seen == [2, 2, 2, 2]
    assert_close(got, torch.cat(want, 1))


def test_a_cache_makes_one_prompt_of_a_row():
    """With a cache transformers reads positions that start again as one prompt, and so does a patched model."""
    name = "llava"
    _, inputs = packed(name, CASES["one row"])
    model = subject(name)
    with patched(model) as spy, torch.no_grad():
        got = model(**clone(inputs), use_cache=True).logits
        explicit = model(**clone(inputs), attention_mask=torch.ones_like(inputs["input_ids"])).logits
        given = {CACHE: DynamicCache()}
        other = model(**clone(inputs), **given).logits
    assert spy.items
    assert_close(got, explicit)
    assert_close(other, explicit)


def test_ranks():
    first = torch.tensor([[0, 0, 0, 3, 3, 5, 5], [0, 0, 0, 0, 0, 0, 6]])
    index, valid = torch.tensor([[0, 2, 3, 4, 6], [0, 0, 1, 3, 6]]), torch.ones(2, 5, dtype=torch.bool)
    valid[1, :2] = False
    assert ranks_of(first, index, valid).tolist() == [[0, 1, 0, 1, 0], [0, 0, 0, 1, 0]]
