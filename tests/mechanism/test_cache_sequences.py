"""Random sequences of cache operations (crops, rows, copies, pickles, patches, text) against the oracle."""

from __future__ import annotations

import copy
import pickle
import random
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

import vtoken
from tests import oracle
from tests.models import FAMILIES
from tests.oracle import CACHE
from vtoken.mechanism.logical_cache import ledger_of
from vtoken.requested import make_strategy

from .common import ALIGNED, assert_close, clean, subject
from .fixed import Fixed, Spy, patched
from .test_caches import new_cache, positions_of, read

STRATEGIES = {
    "random": lambda: make_strategy("random", 0.4, {}),
    "fastv": lambda: make_strategy("fastv", 0.4, {"layer": 2}),
    "mustdrop": lambda: make_strategy("mustdrop", 0.5, {}),
    "visionzip+fastv": lambda: make_strategy("visionzip+fastv", 0.4, {"fastv": {"layer": 2}}),
    "aligned": lambda: Fixed(**ALIGNED),
}
CASES = [
    pytest.param(name, strategy, kind, marks=() if kind == "ragged" else pytest.mark.product)
    for name in ("llava", "qwen3_vl")
    for strategy in STRATEGIES
    for kind in ("one", "ragged", "text_only_row")
]


@dataclass
class Row:
    """A row of the cache: the prompt that it began with, the columns left of it, and (token, position) said
    since.
    """

    source: int
    left: int
    said: list[tuple[int, int]] = field(default_factory=list)

    def copy(self) -> Row:
        return replace(self, said=list(self.said))


class Talk:
    """A cache that is operated on at random, and what every row of it stands for."""

    def __init__(self, name: str, kind: str, spy: Spy, seed: int) -> None:
        self.name, self.family, self.model = name, FAMILIES[name], subject(name)
        self.inputs, self.spy, self.chance = self.family.batch(kind), spy, random.Random(seed)
        self.positions = positions_of(name, self.inputs)
        _, self.cache = read(self.model, self.inputs, self.positions, new_cache(self.model, False))
        self.whole = self.inputs["input_ids"].shape[1]
        self.rows = [Row(b, self.whole) for b in range(len(self.inputs["input_ids"]))]
        self.merging = any(answer.into is not None for _, answer in spy.items)

    @property
    def length(self) -> int:
        return self.rows[0].left + len(self.rows[0].said)

    def crop(self) -> None:
        """The oracle has no answer for half of a picture that was merged, or for a row without a token."""
        gone = self.chance.randint(1, self.length)
        left, visual = min(self.length - gone, self.whole), self.family.visual(self.inputs)
        empty = not all(self.inputs["attention_mask"][row.source, :left].any() for row in self.rows)
        if empty or (self.merging and visual[:, left:].any() and visual[:, :left].any()):
            return
        self.cache.crop(-gone)
        for row in self.rows:
            row.said = row.said[: max(0, len(row.said) - gone)] if left == self.whole else []
            row.left = left

    def repeat(self) -> None:
        times = self.chance.randint(1, 2) if len(self.rows) < 6 else 1
        self.cache.batch_repeat_interleave(times)
        self.rows = [row.copy() for row in self.rows for _ in range(times)]

    def choose(self) -> None:
        rows = [self.chance.randrange(len(self.rows)) for _ in range(self.chance.randint(1, len(self.rows)))]
        self.cache.batch_select_indices(torch.tensor(rows))
        self.rows = [self.rows[i].copy() for i in rows]

    def reorder(self) -> None:
        rows = [self.chance.randrange(len(self.rows)) for _ in self.rows]
        self.cache.reorder_cache(torch.tensor(rows))
        self.rows = [self.rows[i].copy() for i in rows]

    def deepcopy(self) -> None:
        old, self.cache = self.cache, copy.deepcopy(self.cache)
        old.crop(-2)

    def pickle(self) -> None:
        self.cache = pickle.loads(pickle.dumps(self.cache))

    def unpatched(self) -> None:
        vtoken.unpatch(self.model)
        ledger = ledger_of(self.cache)
        if ledger is not None and ledger.shortened:
            ids = torch.full((len(self.rows), 1), 5)
            # given, because those of the shared model follow its last prompt
            positions = ids.expand(3, *ids.shape) if self.positions.ndim == 3 else ids
            with pytest.raises(RuntimeError, match="is not patched"), torch.no_grad():
                self.model(ids, position_ids=positions, **{CACHE: self.cache})
        vtoken.patch(self.model, self.spy.strategy)

    def say(self) -> None:
        """One to three tokens in one forward: logits as the oracle's."""
        n = self.chance.randint(1, 3)
        flat, new, mask = self.positions.reshape(-1, *self.positions.shape[-2:]), [], []
        for row in self.rows:
            start = int(flat[:, row.source, : row.left].max()) + 1 + len(row.said)
            new.append([(self.chance.randint(3, 94), start + i) for i in range(n)])
            old = self.inputs["attention_mask"][row.source, : row.left]
            mask.append(torch.cat([old, old.new_ones(len(row.said) + n)]))
        ids, positions = torch.tensor(new).unbind(-1)
        given = dict(input_ids=ids, attention_mask=torch.stack(mask), position_ids=positions)
        if self.positions.ndim == 3:
            given["position_ids"] = positions.expand(3, *positions.shape)
        with torch.no_grad():
            got = self.model(**given, **{CACHE: self.cache}).logits
        assert_close(got, self.wanted(new))
        for row, tokens in zip(self.rows, new, strict=True):
            row.said = row.said + tokens

    @torch.no_grad()
    def wanted(self, new: list[list[tuple[int, int]]]) -> Tensor:
        model, inputs, spy = clean(self.name), self.inputs, self.spy
        everything = torch.ones_like(inputs["attention_mask"]).bool()
        keep, merge = spy.in_front(self.family, inputs) if spy.items else (everything, None)
        drop, _ = spy.inside(self.family, inputs, keep)
        alive = torch.stack([everything, *drop.values()]).all(0)
        evict = dict.fromkeys(spy.strategy.aligned_layers(4), alive) if drop else {}
        prompts, out = oracle.shortened(model, inputs, keep, merge), []
        for row, tokens in zip(self.rows, new, strict=True):
            prompt = prompts[row.source]
            prompt = prompt.take(prompt.index < row.left)
            cuts = [{k: d[row.source, prompt.index] for k, d in of.items()} for of in (drop, evict)]
            for i, (token, position) in enumerate([*row.said, *tokens]):
                prompt = prompt.append(model.get_input_embeddings()(torch.tensor([token])))
                prompt.positions[..., -1], prompt.index[-1] = position, self.whole + i
            inside = oracle.Inside(cuts[0], {}, cuts[1], self.whole) if drop else None
            out.append(model.get_output_embeddings()(oracle.hidden(model, prompt, inside)[-len(tokens) :]))
        return torch.stack(out)


@pytest.mark.parametrize(("name", "strategy", "kind"), CASES)
def test_any_sequence_of_operations_goes_on_as_a_fresh_prompt(name, strategy, kind):
    with patched(subject(name), STRATEGIES[strategy]()) as spy:
        for seed in range(2):
            spy.clear()
            talk = Talk(name, kind, spy, seed)
            operations = [talk.crop, talk.repeat, talk.choose, talk.reorder, talk.deepcopy, talk.pickle]
            for _ in range(6):
                talk.chance.choice([*operations, talk.unpatched])()
                talk.say()
                assert {int(talk.cache.get_seq_length(i)) for i in range(4)} == {talk.length}
