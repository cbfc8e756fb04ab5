"""Vision transformers of timm as towers: attention and keys per cell, and which models have none."""

from __future__ import annotations

import pytest
import torch

import vtoken
from tests.mechanism.common import assert_close
from tests.mechanism.fixed import Spy, patched
from tests.models import FAMILIES
from tests.oracle import clone
from vtoken import Needs, Selection, Strategy, StrategyInfo

pytestmark = pytest.mark.skipif("perception_lm" not in FAMILIES, reason="no timm")


class Reader(Strategy):
    """Asks for everything that the tower can give, and keeps all."""

    info = StrategyInfo("reader", "Reads.", ("projector",))
    items: list = []

    def needs(self, tower):
        at = tuple(range(tower.num_layers)) if tower is not None else ()
        return Needs(cls_attention=at, received_attention=at, keys=at)

    def select(self, tokens):
        self.items.append(tokens)
        return Selection(torch.arange(len(tokens) - 1))


def by_hand(model, inputs: dict) -> list[torch.Tensor]:
    """Per layer (tiles, heads, tokens, tokens), the softmax of the blocks' own attention, not fused."""
    maps: list[torch.Tensor] = []
    handles = []
    for block in model.model.vision_tower.timm_model.blocks:
        block.attn.fused_attn = False
        handles.append(block.attn.attn_drop.register_forward_hook(lambda m, a, out: maps.append(out)))
    with torch.no_grad():
        model(**clone(inputs))
    for handle in handles:
        handle.remove()
    return maps


def pooled(values: torch.Tensor) -> torch.Tensor:
    """(tiles, 16) -> (tiles, 4): the mean of 2 x 2 patches, written out."""
    grid = values.view(-1, 4, 4)
    return torch.stack([grid[:, y : y + 2, x : x + 2].mean((1, 2)) for y in (0, 2) for x in (0, 2)], 1)


def test_attention_of_the_tower():
    model, inputs = FAMILIES["perception_lm"].build(), FAMILIES["perception_lm"].batch("one")
    maps, strategy = by_hand(model, inputs), Reader()
    strategy.items = []
    vtoken.patch(model, strategy)
    with torch.no_grad():
        model(**clone(inputs))
    (item,) = strategy.items
    assert item.tower.num_layers == 2 and item.tower.has_cls
    assert [s.grid for s in item.segments] == [(2, 2)] * 3
    for layer, attention in enumerate(maps):
        received = attention.mean(1).mean(1)[:, 1:]
        assert_close(item.received_attention(layer).view(3, 4), pooled(received))
        rows = attention[:, :, 0, 1:].flatten(0, 1)
        assert_close(item.cls_attention(layer).view(12, 4), pooled(rows))
        assert len(item.keys(layer).flatten(0, -2)) == 12


@pytest.mark.parametrize("strategy", ["visionzip", "hired", "vtc_cls"])
def test_strategies_that_read_the_tower(strategy):
    name = "perception_lm"
    model, inputs = FAMILIES[name].build(), FAMILIES[name].batch("ragged")
    assert strategy in vtoken.list_strategies(model=model)
    dense = model(**clone(inputs)).logits
    with patched(model, vtoken.strategy_info(strategy).cls(budget=0.5)) as spy:
        got = model(**clone(inputs)).logits
        assert vtoken.report(model).tokens_out < vtoken.report(model).tokens_in
    assert isinstance(spy, Spy) and (got - dense).abs().max() > 1e-2
    assert torch.equal(model(**clone(inputs)).logits, dense)


def test_towers_without_plain_blocks():
    """FastViT's stages of convolutions: projector strategies alone."""
    fits = vtoken.list_strategies(model=FAMILIES["fast_vlm"].build())
    assert "divprune" in fits and "hired" not in fits
