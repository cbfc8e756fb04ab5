"""The parts of the vLLM integration that need no vLLM: positions, announcements, overrides and refusals."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import vtoken
from vtoken import tiny
from vtoken.integrations.vllm import MODELS, PREFIX, overrides
from vtoken.integrations.vllm.__main__ import main
from vtoken.integrations.vllm.positions import (
    LARGEST,
    announce,
    attach,
    detach,
    extent,
    grid_positions,
    line_positions,
)
from vtoken.integrations.vllm.reduction import Announced, Reduction
from vtoken.tokens import VisualTokens

LLAVA, QWEN = (str(tiny.path(name)) for name in ("llava", "qwen2_5_vl"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_positions_travel_exactly(dtype):
    positions = torch.randint(0, LARGEST + 1, (3, 200), generator=torch.Generator().manual_seed(0))
    positions[:, :2] = torch.tensor([0, LARGEST])
    features = torch.randn(200, 8).to(dtype)
    back, told = detach(attach(features, positions))
    assert torch.equal(back, features) and torch.equal(told, positions)
    with pytest.raises(ValueError, match="16385 positions, at most 16384"):
        attach(features[:1], torch.full((3, 1), LARGEST + 1))


def test_positions_of_grids():
    assert grid_positions(2, 1, 3, 1.5).tolist() == [[0] * 3 + [1] * 3, [0] * 6, [0, 1, 2] * 2]
    assert extent(grid_positions(3, 2, 2, 4.0)) == 9 and extent(grid_positions(1, 2, 7)) == 7
    assert extent(line_positions(5)) == 5 and extent(line_positions(0)) == 0


def test_announced_prompt():
    positions, delta = announce(9, [(2, 3, 10), (6, 1, 4)])
    assert positions[0].tolist() == [0, 1, 2, 2, 2, 12, 13, 17, 18] and delta == 10
    assert torch.equal(positions[0], positions[1]) and torch.equal(positions[0], positions[2])
    assert announce(3, [])[0][0].tolist() == [0, 1, 2] and announce(3, [])[1] == 0
    ends_with_image = announce(4, [(1, 3, 20)])
    assert ends_with_image[1] == 17  # the first generated token stands at 4 + 17


budgets = st.none() | st.integers(1, 2**40) | st.floats(1e-6, 1.0)


@given(st.integers(1, 2**31), st.integers(1, 2**31), budgets)
def test_announced_round_trip(kept, reach, budget):
    back = Announced.of(Announced(kept, reach, budget).row())
    assert back == Announced(kept, reach, budget) and type(back.budget) is type(budget)


def reduction(model, strategy, budget=None, **options):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    for key, value in overrides(model, strategy, budget, **options)["hf_overrides"].items():
        setattr(config, key, value)
    return Reduction(config)


@settings(max_examples=15, deadline=None)
@given(budget=st.floats(0.01, 0.99) | st.integers(1, 150), own=st.none() | st.floats(0.01, 0.99))
def test_what_is_announced_is_kept(budget, own):
    for name, options in (("uniform", {}), ("divprune", {}), ("hired", {}), ("visionzip", {}), ("pool", {})):
        made = reduction(LLAVA, name, budget, **options)
        layout = made.geometry.adapter.layouts("image", [torch.empty(144)], {})[0]
        announced = made.announce("image", layout, line_positions(144), own)
        tower = made.geometry.adapter.towers["image"].info
        needs, n = made.needs("image"), 144
        provided = {("cls_attention", i): torch.rand(1, tower.num_heads, n) for i in needs.cls_attention}
        provided |= {("keys", i): torch.randn(1, n, tower.num_heads * 4) for i in needs.keys}
        tokens = VisualTokens(torch.randn(n, 16), layout.segments, layout.cells, tower, provided=provided)
        kept, keep = made.choose(tokens, announced)
        assert len(kept) == announced.kept == len(keep)
        assert announced.extent == n


def test_overrides_say_what_is_served():
    told = overrides(LLAVA, "hired", 0.2)["hf_overrides"]
    assert told["architectures"] == [PREFIX + MODELS["llava"]]
    assert told["vtoken"] == {"strategy": "hired", "budget": 0.2, "budget_unit": "share", "version": 1}
    assert told["rope_parameters"]["mrope_section"] == [1, 1, 1]
    assert "rope_parameters" not in overrides(LLAVA, "hired", 0.2, positions="renumber")["hf_overrides"]
    assert "rope_parameters" not in overrides(QWEN, "divprune", 0.2)["hf_overrides"]
    config = vtoken.VTokenConfig("visionzip", 64, options={"contextual": 5})
    assert overrides(LLAVA, config)["hf_overrides"]["vtoken"]["options"] == {"contextual": 5}
    assert overrides(LLAVA, "uniform", 1)["hf_overrides"]["vtoken"]["budget_unit"] == "tokens"


@pytest.mark.parametrize(
    "model,strategy,options,words",
    [
        (LLAVA, "fastv", {}, "fastv drops tokens inside the LLM, which vLLM cannot do"),
        (LLAVA, "visionzip+fastv", {}, "drops tokens inside the LLM"),
        (LLAVA, "cdpruner", {}, "reads the question"),
        (LLAVA, "tome", {}, "merges tokens inside the vision tower"),
        (LLAVA, "ts_llava", {}, "reads all images of a prompt together"),
        (QWEN, "stc_cacher", {}, "reuses frames"),
        (QWEN, "hired", {}, 'pass score="received"'),
        (QWEN, "divprune", {"positions": "renumber"}, "multimodal rope"),
        (LLAVA, "vidcom2", {}, "defined for video input"),
        (LLAVA, "hired", {"alpha": 3.0}, "alpha must lie in"),
        (LLAVA, "nonsense", {}, "nonsense"),
    ],
)
def test_what_cannot_be_served_is_one_sentence(model, strategy, options, words):
    with pytest.raises(ValueError, match=words) as caught:
        overrides(model, strategy, 0.3, **options)
    assert "\n" not in str(caught.value)


def test_models_that_are_not_served():
    from transformers import CLIPVisionConfig

    with pytest.raises(ValueError, match=r"vtoken serves llava, .* in vLLM, found clip_vision_model"):
        overrides(CLIPVisionConfig(), "hired")


def test_command_line():
    said = CliRunner().invoke(main, [LLAVA, "hired", "0.2", "alpha=0.4"])
    assert said.exit_code == 0
    assert json.loads(said.output) == overrides(LLAVA, "hired", 0.2, alpha=0.4)["hf_overrides"]
    said = CliRunner().invoke(main, [LLAVA, "hired", "1.5"])
    assert said.exit_code == 1 and "must lie in (0, 1]" in said.output
    said = CliRunner().invoke(main, [LLAVA, "hired", "0.5", "alpha"])
    assert said.exit_code == 1 and "written as alpha=0.4" in said.output
    said = CliRunner().invoke(main, ["/nowhere", "hired", "0.5"])
    assert said.exit_code == 1 and said.output.startswith("Error:")
