"""Models under strategies with weights of their own."""

from __future__ import annotations

import torch

import vtoken
from tests.models import FAMILIES
from tests.oracle import clone
from vtoken.strategies.trained import trained_names

NAMES = trained_names()
OPTIONS = {
    "pvc": {"side": 2},
    "quecc": {"side": 2, "heads": 2},
    "llava_mini": {"heads": 2},
    "voco": {"rank": 4},
}


def patched(name, strategy="pvc", dtype=torch.float32, **options):
    """A new model of a family with new weights of a strategy."""
    torch.manual_seed(0)
    options = {"budget": 0.3} | OPTIONS[strategy] | options
    return vtoken.patch(FAMILIES[name].build().to(dtype), strategy, **options)


def randomise(model, seed=3):
    """The same model with other weights of its strategy."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.vtoken_strategy.parameters():
            parameter.copy_(torch.randn_like(parameter) / 3)
    return model


def logits(model, inputs):
    with torch.no_grad():
        return model(**clone(inputs)).logits


def doubled(inputs):
    return {k: v.double() if v.is_floating_point() else v for k, v in clone(inputs).items()}


def trained_of(model):
    """The strategy on a model."""
    return vtoken.patching.patch_of(model).trained
