"""KV caches that lose or pack tokens: crops, masks over what was read before, drafts, later turns, the report."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import vtoken
from tests.models import FAMILIES
from tests.oracle import CACHE, clone

from .common import assert_close, consistent, run, subject
from .test_decoding import LOOKUP, extend
from .test_turns import first_turn

EVICT = ("decode_evict", dict(decode_every=8, budget=0.4, rounds=1))
FORMS = {
    "decode_evict": EVICT,
    "newest": (EVICT[0], EVICT[1] | dict(queries="newest")),
    "sink_window": ("sink_window", dict(recent=40, sinks=2)),
    "zipvl": ("zipvl", dict(tau=0.9, interval=8)),
    "quant": ("zipvl", dict(tau=0.9, interval=8, kv="quant")),
}


class Conversation:
    """A model, a cache, and a mask that grows; positions count what the mask shows."""

    def __init__(self, model, inputs: dict) -> None:
        self.model, self.cache = model, DynamicCache(config=model.config.get_text_config())
        self.mask, self.logits = inputs["attention_mask"][:, :0], []
        self.read(inputs)

    @torch.no_grad()
    def read(self, inputs: dict) -> None:
        ids = inputs["input_ids"]
        self.mask = torch.cat([self.mask, inputs.get("attention_mask", torch.ones_like(ids))], 1)
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        given = clone(inputs) | {"attention_mask": self.mask, "position_ids": positions, CACHE: self.cache}
        self.logits.append(self.model(**given).logits[:, -1])

    def say(self, ids: Tensor) -> list[Tensor]:
        """The logits after each of the tokens ids (B, n)."""
        for token in ids.split(1, 1):
            self.read({"input_ids": token})
        return self.logits[-ids.shape[1] :]


def words(rows: int, n: int, seed: int = 0) -> Tensor:
    return torch.randint(10, 90, (rows, n), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("form", FORMS)
def test_a_crop_takes_back_what_was_noted(form):
    """Five tokens that are cropped away leave no trace in later evictions, windows and choices."""
    model, inputs = subject("llava"), FAMILIES["llava"].batch("one")
    name, options = FORMS[form]
    with vtoken.applied(model, name, **options):
        plain, cropped = Conversation(model, inputs), Conversation(model, inputs)
        cropped.say(words(1, 5, 7))
        cropped.cache.crop(-5)
        cropped.mask = cropped.mask[:, :-5]
        said = words(1, 30)
        for got, want in zip(cropped.say(said), plain.say(said), strict=True):
            assert_close(got, want)
    assert [x.keys.shape for x in plain.cache.layers] == [x.keys.shape for x in cropped.cache.layers]


@pytest.mark.parametrize("form", FORMS)
def test_padding_of_a_second_turn_counts_for_nothing(form):
    """Rows with texts of different lengths, each as alone; evictions and choices come after the second turn."""
    family, model = FAMILIES["llava"], subject("llava")
    (name, options), pictures, texts = FORMS[form], [[0], [1, 2]], [12, 2]
    first, second = words(2, 4, 1), words(2, 20, 2)
    ids = torch.stack([torch.cat([torch.zeros(12 - n).long(), words(1, n, 3)[0]]) for n in texts])
    mask = torch.stack([torch.arange(12) >= 12 - n for n in texts]).long()
    with vtoken.applied(model, name, **options):
        together = Conversation(model, family.prompt(pictures))
        together.say(first)
        together.read({"input_ids": ids, "attention_mask": mask})
        together.say(second)
        for b, n in enumerate(texts):
            alone = Conversation(model, family.prompt([pictures[b]]))
            alone.say(first[b : b + 1])
            alone.read({"input_ids": ids[b : b + 1, 12 - n :]})
            alone.say(second[b : b + 1])
            if form == "quant":  # a block has the scales of its own row: filler before it changes none
                continue
            for got, want in zip(together.logits, alone.logits, strict=True):
                assert_close(got[b], want[0], 3e-4)


def test_hidden_tokens_between_two_pictures_leave_with_an_eviction():
    """Layers evict different tokens of the first picture, so that what follows it lies elsewhere in each."""
    family, model = FAMILIES["llava"], subject("llava")
    with vtoken.applied(model, "decode_evict", decode_every=9, budget=0.5, rounds=1):
        talk = Conversation(model, family.prompt([[1]]))
        talk.say(words(1, 3))
        before = talk.mask.shape[1]
        hidden = {"input_ids": torch.zeros(1, 3).long(), "attention_mask": torch.zeros(1, 3).long()}
        talk.read(hidden)
        talk.read(family.prompt([[2]]))
        talk.say(words(1, 9, 1))
        ledger = talk.cache.layers[0].ledger
    assert ledger.evicted and not set(range(before, before + 3)) & set(ledger.slots[0][0].tolist())
    assert len({layer.keys.shape[2] for layer in talk.cache.layers}) == 1


@pytest.mark.parametrize("kv", ["evict", "quant"])
def test_zipvl_keeps_the_text_of_a_later_turn(kv):
    model, inputs = subject("llava"), FAMILIES["llava"].batch("one")
    with vtoken.applied(model, "zipvl", tau=0.9, interval=10, kv=kv):
        talk = Conversation(model, inputs)
        held = [layer.get_seq_length() - layer.dropped for layer in talk.cache.layers]
        talk.read({"input_ids": words(1, 40)})
        talk.say(words(1, 9, 1))
        assert [x.physical_length() for x in talk.cache.layers] == [n + 49 for n in held]
        talk.say(words(1, 3, 2))
        left = [x.physical_length() for x in talk.cache.layers]
    assert all(n + 42 < m <= n + 52 for n, m in zip(held, left, strict=True))


@pytest.mark.parametrize(("name", "options"), [("vidkv", {}), ("zipvl", dict(kv="quant"))])
def test_what_would_save_nothing_or_pack_a_prompt_early_is_refused(name, options):
    model, inputs = subject("llava"), FAMILIES["llava"].batch("one")
    with vtoken.applied(model, name, **options):
        if consistent("llava", inputs, prefill_chunk_size=10):
            with pytest.raises(NotImplementedError, match="leave out prefill_chunk_size"):
                run(model, inputs, 2, prefill_chunk_size=10)
        with pytest.raises(NotImplementedError, match="found use_cache=False"):
            run(model, inputs, 2, use_cache=False)


def test_drafts_are_not_packed():
    model, one = subject("llava"), extend(FAMILIES["llava"].batch("one"), words(1, 60))
    with vtoken.applied(model, "vidkv", group=4, residual=8):
        cache = run(model, one, 30, **LOOKUP)[CACHE]
        n = one["input_ids"].shape[1]
        assert {layer.packed_keys.slots for layer in cache.layers} == {n // 4 * 4}
        assert cache.get_seq_length() >= n + 28


def test_drafts_within_the_window_are_served_and_others_refused():
    model, one = subject("llava"), FAMILIES["llava"].batch("one")
    n = one["input_ids"].shape[1]
    plain = run(model, one, 20).sequences
    with vtoken.applied(model, "sink_window", recent=n + 30, sinks=2):
        assert torch.equal(run(model, one, 20, **LOOKUP).sequences, plain)
        _, again = first_turn(model, one, 4)
        with pytest.raises(NotImplementedError, match="Assisted decoding takes back tokens"):
            run(model, again, 40, **LOOKUP)
    with vtoken.applied(model, *EVICT[:1], **EVICT[1]), pytest.raises(NotImplementedError, match="Assisted"):
        run(model, one, 3, **LOOKUP)


@pytest.mark.parametrize("form", [*FORMS, "vidkv"])
def test_the_report_of_a_later_turn_counts_the_whole_cache(form):
    """The second prompt's own bytes would be compared with a cache that holds the first one too."""
    family, model = FAMILIES["llava"], subject("llava")
    name, options = FORMS.get(form, ("vidkv", dict(group=4, residual=8)))
    with vtoken.applied(model, name, **options):
        out = run(model, family.prompt([[0]]), 12)
        more = family.prompt([[1]])
        ids = torch.cat([out.sequences, more["input_ids"]], 1)
        again = {"input_ids": ids, "attention_mask": torch.ones_like(ids), CACHE: out[CACHE]}
        run(model, again | family.vision(1), 6)
        report = vtoken.report(model)
    assert 0 < report.kv_bytes < report.kv_bytes_dense
    assert report.kv_earlier == (0 if form == "zipvl" else out.sequences.shape[1] - 1)


def test_a_text_turn_under_other_options_is_refused():
    model, inputs = subject("llava"), FAMILIES["llava"].batch("one")
    with vtoken.applied(model, "vidkv", group=4, residual=8):
        _, again = first_turn(model, inputs, 4)
    with (
        vtoken.applied(model, "vidkv", group=8, residual=8),
        pytest.raises(ValueError, match=r"was filled in the form Packed\(") as refusal,
    ):
        run(model, copy.copy(again), 2)
    assert "0x" not in str(refusal.value)
