"""Retrieval models: embeddings of the tokens that were read, equal to the oracle's; queries stay as they are."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
import transformers
from torch import Tensor, nn

import vtoken
from tests import oracle
from tests.models import FAMILIES
from tests.models.common import IMG
from tests.models.retrieval import RETRIEVERS
from tests.oracle import clone
from tests.record import note
from tests.test_matrix import ROWS, STAGES, make, stages

from .common import EFFECT, assert_close
from .fixed import Fixed, Spy, patched
from .test_isolation import traces
from .test_models_inside import right_padded

pytestmark = pytest.mark.skipif(not RETRIEVERS, reason="this transformers has no retrieval models")
CHEAP = (*STAGES, "stc_cacher", "quecc", "mustdrop")
CASES = [
    pytest.param(name, row, marks=() if row in CHEAP or name == "colqwen2" else pytest.mark.product)
    for name in RETRIEVERS
    for row in ROWS
]


@functools.cache
def clean(name: str):
    """An unpatched model for the oracle, which looks for the image's id in the model's own config."""
    model = RETRIEVERS[name].build()
    model.config.image_token_id = IMG
    return model


@functools.cache
def subject(name: str):
    return RETRIEVERS[name].build()


@torch.no_grad()
def embeddings(model, inputs: dict, **kwargs) -> Tensor:
    return model(**clone(inputs), **kwargs).embeddings


@torch.no_grad()
def expected(name: str, inputs: dict, spy: Spy, encodes: bool = False, model=None) -> list[Tensor]:
    """Per row (n, d), the embeddings of the tokens that stay, computed without vtoken; `encodes` if the
    strategy changes what the tower computes.
    """
    family, model = RETRIEVERS[name], clean(name) if model is None else model
    made = encodes or any(answer.features is not None for _, answer in spy.items)
    features = spy.by_row(family, inputs) if made else None
    everything = torch.ones_like(inputs["input_ids"]).bool()
    keep, merge = spy.in_front(family, inputs) if spy.items else (everything, None)
    drop, mix = spy.inside(family, inputs, keep)
    hide = spy.hidden(family, inputs) if getattr(spy.strategy, "hides_pictures", False) else None
    rows = []
    for b, prompt in enumerate(oracle.shortened(model, inputs, keep, merge, features, door="forward")):
        inside, alive = None, torch.ones(len(prompt), dtype=torch.bool)
        if drop or mix[b] or hide is not None:
            cuts = {k: d[b, prompt.index] for k, d in drop.items()}
            hidden_here = None if hide is None else hide[b, prompt.index][:, prompt.index]
            inside = oracle.Inside(cuts, mix[b], {}, 0, False, hidden_here)
            alive = functools.reduce(torch.logical_and, cuts.values(), alive)
        states = model.embedding_proj_layer(oracle.hidden(model, prompt, inside))[alive]
        rows.append(states / states.norm(dim=-1, keepdim=True))
    return rows


def assert_rows(got: Tensor, want: list[Tensor]) -> None:
    """Rows are aligned to the right, filled with zeros, and as wide as the longest."""
    assert got.shape[:2] == (len(want), max(map(len, want)))
    for row, mine in zip(got, want, strict=True):
        assert_close(row[len(row) - len(mine) :], mine)
        assert not row[: len(row) - len(mine)].any()


@functools.cache
def batch(name: str) -> dict:
    return RETRIEVERS[name].prompt([[0], [1, 2], []])


@pytest.mark.parametrize(("name", "row"), CASES)
def test_equals_the_oracle_or_refuses(name, row, sighted):
    model, inputs, strategy = subject(name), batch(name), make(row)
    parts = ROWS[row] if isinstance(ROWS[row], list) else [row]
    try:
        vtoken.unpatch(vtoken.patch(model, strategy))
    except ValueError as refusal:
        assert not set(parts) <= set(vtoken.list_strategies(model=model)), refusal
        assert str(refusal).endswith(".") and any(word in str(refusal) for word in ("use ", "choose "))
        note(sighted, RETRIEVERS[name], row, False)
        return
    dense = embeddings(model, inputs)
    with patched(model, strategy) as spy:
        got = embeddings(model, inputs)
        kept = vtoken.kept_tokens(model)
        report = vtoken.report(model)
    want = expected(name, inputs, spy, bool({"encoder", "pixels"} & stages(parts)))
    assert_rows(got, want)
    assert kept.sum(1).tolist() == [len(mine) for mine in want]
    assert report.tokens_in == int(RETRIEVERS[name].visual(inputs).sum())
    note(sighted, RETRIEVERS[name], row, True)
    assert torch.equal(embeddings(model, inputs), dense)
    still = strategy.acts_between_frames and not strategy.acts_on_projector
    assert still or got.shape[1] < dense.shape[1] or row == "voco"


@pytest.mark.parametrize("kind", ["one", "ragged", "several_images"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", [dict(), dict(merge=True), dict(layers=(2,), budget=0.6)])
@pytest.mark.parametrize("name", RETRIEVERS)
def test_batches(name, side, kind, options):
    if options.get("layers") and name == "colmodernvbert":
        pytest.skip("no drops inside its encoder")
    family, model, inputs = RETRIEVERS[name], subject(name), RETRIEVERS[name].batch(kind)
    inputs = right_padded(inputs) if side == "right" else inputs
    with patched(model, **options) as spy:
        assert_rows(embeddings(model, inputs), expected(name, inputs, spy))
    assert family.visual(inputs).any()


@pytest.mark.parametrize("name", RETRIEVERS)
def test_queries_stay_bit_for_bit(name):
    model, family = subject(name), RETRIEVERS[name]
    for inputs in (family.prompt([[], []]), right_padded(family.prompt([[], []]))):
        dense = model(**clone(inputs), output_hidden_states=True)
        with patched(model):
            embeddings(model, family.batch("one"))
            out = model(**clone(inputs), output_hidden_states=True)
        assert list(out.keys()) == list(dense.keys())
        assert torch.equal(out.embeddings, dense.embeddings)
        assert all(map(torch.equal, out.hidden_states, dense.hidden_states))


@pytest.mark.parametrize("name", RETRIEVERS)
def test_disabled_whole_budget_unpatched_and_saved(name):
    model, inputs = RETRIEVERS[name].build(), right_padded(RETRIEVERS[name].batch("ragged"))
    dense, keys, traced = embeddings(model, inputs), list(model.state_dict()), traces(model)
    vtoken.patch(model, "random", budget=1.0)
    assert torch.equal(embeddings(model, inputs), dense)
    vtoken.unpatch(model)
    vtoken.patch(model, "divprune", budget=0.25)
    short = embeddings(model, inputs)
    assert short.shape[1] < dense.shape[1]
    with vtoken.disabled(model):
        assert torch.equal(embeddings(model, inputs), dense)
    with vtoken.applied(model, "divprune", budget=0.5):
        assert short.shape[1] < embeddings(model, inputs).shape[1] < dense.shape[1]
    assert torch.equal(embeddings(copy.deepcopy(model), inputs), short)
    assert torch.equal(embeddings(pickle.loads(pickle.dumps(RETRIEVERS[name].build())), inputs), dense)
    assert list(model.state_dict()) == keys
    vtoken.unpatch(model)
    assert torch.equal(embeddings(model, inputs), dense)
    assert traces(model).keys() == traced.keys() and "forward" not in vars(model)


@pytest.mark.parametrize("name", RETRIEVERS)
def test_every_form_of_the_output(name):
    """Tuples, positional arguments, no mask, hidden states, the cache, gradients."""
    model, inputs = subject(name), RETRIEVERS[name].batch("one")
    with patched(model) as spy:
        out = model(**clone(inputs), output_hidden_states=True)
        want = expected(name, inputs, spy)
        unmasked = {k: v for k, v in inputs.items() if k != "attention_mask"}
        assert_close(model(**clone(unmasked)).embeddings, out.embeddings)
        assert_close(
            model(inputs["input_ids"], **{k: v for k, v in inputs.items() if k != "input_ids"})[0], out[0]
        )
        assert_close(model(**clone(inputs), return_dict=False)[0], out.embeddings)
        model.zero_grad()
        out.embeddings.sum().backward()
    assert_rows(out.embeddings.detach(), want)
    assert {state.shape[1] for state in out.hidden_states} == {out.embeddings.shape[1]}
    again = model.embedding_proj_layer(out.hidden_states[-1])
    assert_close(again / again.norm(dim=-1, keepdim=True), out.embeddings)
    assert model.embedding_proj_layer.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", RETRIEVERS)
def test_scores(name):
    """`score_retrieval` takes the shorter pages; zeros of a batch count as they do in the unpatched model."""
    model, family = subject(name), RETRIEVERS[name]
    processor = getattr(
        transformers,
        {"colpali": "ColPaliProcessor", "colmodernvbert": "ColModernVBertProcessor"}.get(
            name, "ColQwen2Processor"
        ),
    )
    queries, pages, want = embeddings(model, family.prompt([[], []])), [], []
    for i in range(3):
        with patched(model) as spy:
            pages.append(embeddings(model, family.prompt([[i]]))[0])
        want += expected(name, family.prompt([[i]]), spy)
    scores = processor.score_retrieval(None, queries, pages)
    padded = torch.nn.utils.rnn.pad_sequence(want, batch_first=True)
    assert_close(scores, torch.einsum("bnd,csd->bcns", queries, padded).amax(3).sum(2))
    with patched(model):
        together = embeddings(model, family.prompt([[0], [1], [2]]))
    assert processor.score_retrieval(None, queries, together).shape == scores.shape == (2, 3)


class Uneven(Fixed):
    """Drops inside the LLM by the states, so that pages lose different numbers of tokens."""

    def select_in_prefill(self, tokens):
        count = len(tokens.visual_rows)
        return self._draw(count, round(float(tokens.hidden_states.double().sum()) * 10) + self.seed)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "options", [dict(), dict(layers=(2,), budget=0.6, seed=1), dict(layers=(2,), projector=False, seed=1)]
)
def test_pages_of_one_length_that_keep_different_numbers(options, attn):
    """Without padding there is no mask, which PaliGemma's attention reads as attention in both directions."""
    family = RETRIEVERS["colpali"]
    model, one = family.build(attn), family.prompt([[0]])
    inputs = {k: one[k].expand(3, -1).contiguous() for k in ("input_ids", "attention_mask")}
    inputs["pixel_values"] = torch.cat([family.item(i, 1).tensors["pixel_values"] for i in range(3)])
    clean_model = family.build(attn)
    clean_model.config.image_token_id = IMG
    with patched(model, Uneven(**options)) as spy:
        got = embeddings(model, inputs)
    want = expected("colpali", inputs, spy, model=clean_model)
    assert len({len(row) for row in want}) > 1
    assert_rows(got, want)


def test_the_head_encodes_under_a_plain_patch_only():
    """ColQwen2's head encodes pictures itself: its own answer without a patch, the same with all tokens kept."""
    name = "colqwen2"
    model, inputs = subject(name), RETRIEVERS[name].batch("ragged")
    unpadded = inputs | {
        "pixel_values": torch.cat(
            [t["pixel_values"] for t in (RETRIEVERS[name].item(i, 1).tensors for i in range(3))]
        )
    }
    dense = embeddings(model, inputs)
    with patched(model, budget=1.0) as spy:
        spy.strategy.select = lambda tokens: vtoken.Selection.everything(len(tokens))
        assert torch.equal(embeddings(model, inputs), dense)
    with patched(model):
        short = embeddings(model, inputs)
        assert torch.equal(embeddings(model, unpadded), short) and short.shape[1] < dense.shape[1]


class ColEngine(transformers.Qwen2VLModel):
    """Shaped as ColQwen2 of colpali-engine: the body is the model, and its forward gives embeddings."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.custom_text_proj = nn.Linear(32, 16)
        self.post_init()

    def forward(self, *args, **kwargs):
        states = super().forward(*args, **kwargs).last_hidden_state
        proj = self.custom_text_proj(states)
        proj = proj / proj.norm(dim=-1, keepdim=True)
        return proj * kwargs["attention_mask"].unsqueeze(-1)


def test_a_body_whose_forward_gives_embeddings():
    """They have the prompt's length, and `kept_tokens` takes those of the tokens that were read."""
    inputs = FAMILIES["qwen2_vl"].batch("ragged")
    model = ColEngine._from_config(FAMILIES["qwen2_vl"].config()).eval()
    model.load_state_dict(FAMILIES["qwen2_vl"].build().model.state_dict(), strict=False)
    with torch.no_grad(), patched(model, Fixed()) as spy:
        got = model(**clone(inputs))
        kept = vtoken.kept_tokens(model)
        keep, _ = spy.in_front(FAMILIES["qwen2_vl"], inputs)
        prompts = oracle.shortened(FAMILIES["qwen2_vl"].build(), inputs, keep, door="forward")
        for row, mine, prompt in zip(got, kept, prompts, strict=True):
            want = model.custom_text_proj(oracle.hidden(FAMILIES["qwen2_vl"].build(), prompt))
            assert_close(row[mine], want / want.norm(dim=-1, keepdim=True))
    assert (got[:, -1] - model(**clone(inputs))[:, -1]).abs().max() > EFFECT


@pytest.mark.skipif("colmodernvbert" not in RETRIEVERS, reason="this transformers lacks ModernVBERT")
def test_modernvbert_without_the_head(sighted):
    """Its states at the tokens that were read are those behind the head's embeddings."""
    model, inputs = subject("colmodernvbert"), batch("colmodernvbert")
    with vtoken.applied(model, "divprune", 0.5):
        want = embeddings(model, inputs)
    body = model.vlm
    with vtoken.applied(body, "divprune", 0.5), torch.no_grad():
        states = body(**clone(inputs)).last_hidden_state
        kept = vtoken.kept_tokens(body)
    got = nn.functional.normalize(model.embedding_proj_layer(states), dim=-1)
    assert kept.sum() < inputs["attention_mask"].sum()
    for rows, mine, there in zip(got, want, kept, strict=True):
        assert_close(rows[there], mine[len(mine) - int(there.sum()) :])
    for ability in ("image", "several", "ragged", "selection"):
        sighted("modernvbert", ability, True)
