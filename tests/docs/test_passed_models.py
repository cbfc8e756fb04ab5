"""The guides on what may be passed to `patch`, and on retrieval."""

from __future__ import annotations

import pytest
import torch

import vtoken
from tests.models.retrieval import RETRIEVERS

from .test_guides import run


def test_what_may_be_passed(monkeypatch, capsys):
    guide = run("docs/patching.md", monkeypatch)
    assert guide.logits.shape[:2] == guide.values.shape == guide.inputs["input_ids"].shape
    assert "divprune(budget=0.25)" in capsys.readouterr().out
    rows = [s[k].mean(0) for s, k in zip(guide.states, guide.kept)]
    assert torch.allclose(guide.embeddings, torch.stack(rows), atol=1e-5)


@pytest.mark.skipif("colqwen2" not in RETRIEVERS, reason="this transformers has no ColQwen2")
def test_retrieval(monkeypatch, capsys):
    guide = run("docs/retrieval.md", monkeypatch)
    assert guide.index.shape == (2, 9, 16) and guide.scores.shape == (1, 2)
    assert "20 -> 5" in capsys.readouterr().out
    vtoken.unpatch(guide.model)
    with torch.no_grad():
        assert torch.equal(guide.model(**guide.queries).embeddings, guide.asked)
        assert guide.model(**guide.pages).embeddings.shape == (2, 24, 16)
