"""How the mechanism's tests run a model and compare it with the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.models import SPECIAL
from tests.oracle import STEPS, clone

TOLERANCE = 1e-4  # of the largest logit, float32
EFFECT = 1e-2  # what pruning must at least do to the logits, or the test would pass without it


def run(model, inputs: dict, steps: int = STEPS, **kwargs):
    """generate() with exactly ``steps`` greedy tokens, their logits kept."""
    fixed = dict(max_new_tokens=steps, min_new_tokens=steps, do_sample=False, suppress_tokens=SPECIAL)
    return model.generate(**clone(inputs), **fixed, return_dict_in_generate=True, output_logits=True, **kwargs)


def new_ids(out, inputs: dict) -> Tensor:
    return out.sequences[:, inputs["input_ids"].shape[1] :]


def assert_close(got: Tensor, want: Tensor, tolerance: float = TOLERANCE) -> None:
    error, scale = (got.double() - want.double()).abs().max().item(), want.abs().max().item()
    assert error <= tolerance * scale, f"off by {error:.2e} where the largest logit is {scale:.1f}"


def assert_same(out, inputs: dict, want: tuple[Tensor, Tensor], dense: tuple[Tensor, Tensor] | None = None) -> None:
    """generate()'s tokens and logits are the oracle's; with ``dense``, they are also visibly not the unpruned ones."""
    ids, logits = want
    got = torch.stack(out.logits)
    assert new_ids(out, inputs).tolist() == ids.tolist()
    assert_close(got, logits)
    if dense is not None:
        assert (got[0] - dense[1][0]).abs().max() > EFFECT


def random_keep(family, inputs: dict, share: float = 0.4, seed: int = 7) -> Tensor:
    """Bool (batch, L): all text and a random share of every row's visual tokens."""
    visual, generator = family.visual(inputs), torch.Generator().manual_seed(seed)
    keep = ~visual
    for b, row in enumerate(visual):
        places = row.nonzero()[:, 0]
        count = max(1, round(len(places) * share)) if len(places) else 0
        keep[b, places[torch.randperm(len(places), generator=generator)[:count]]] = True
    return keep
