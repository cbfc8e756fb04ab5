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
from vtoken.integrations.vllm.geometry import Geometry
from vtoken.integrations.vllm.positions import (
    LARGEST,
    attach,
    detach,
    extent,
    grid_positions,
    line_positions,
    prompt_positions,
    runs_of,
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
    with pytest.raises(ValueError, match="2097153 positions, at most 2097152"):
        attach(features[:1], torch.full((3, 1), LARGEST + 1))


def test_positions_of_grids():
    assert grid_positions(2, 1, 3, 1.5).tolist() == [[0] * 3 + [1] * 3, [0] * 6, [0, 1, 2] * 2]
    assert extent(grid_positions(3, 2, 2, 4.0)) == 9 and extent(grid_positions(1, 2, 7)) == 7
    assert extent(line_positions(5)) == 5 and extent(line_positions(0)) == 0


def test_announced_prompt():
    positions, delta = prompt_positions(9, [(2, 3, 10), (6, 1, 4)])
    assert positions[0].tolist() == [0, 1, 2, 2, 2, 12, 13, 17, 18] and delta == 10
    assert torch.equal(positions[0], positions[1]) and torch.equal(positions[0], positions[2])
    assert prompt_positions(3, [])[0][0].tolist() == [0, 1, 2] and prompt_positions(3, [])[1] == 0
    ends_with_image = prompt_positions(4, [(1, 3, 20)])
    assert ends_with_image[1] == 17  # the first generated token stands at 4 + 17


def test_runs():
    assert runs_of(torch.tensor([1, 0, 1, 1, 0, 1]).bool()) == [(0, 1), (2, 4), (5, 6)]
    assert runs_of(torch.zeros(3).bool()) == runs_of(torch.zeros(0).bool()) == []


budgets = st.none() | st.integers(1, 2**40) | st.floats(1e-6, 1.0)


numbers = st.integers(1, 2**31)


@given(numbers, numbers, numbers, budgets, st.lists(st.tuples(numbers, numbers), max_size=3))
def test_announced_round_trip(tokens, kept, reach, budget, parts):
    made = Announced(tokens, kept, reach, budget, tuple(parts))
    back = Announced.of(made.row())
    assert back == made and type(back.budget) is type(budget)
    assert back.runs() == (tuple(parts) or ((kept, reach),))


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
        assert len(kept) == announced.kept == (n if keep is None else len(keep))
        assert announced.extent == n


class Apart(Geometry):
    """As where text stands between the frames of a video."""

    apart = ("video",)

    def positions(self, modality, layouts, arguments):
        return [grid_positions(len(x.segments), *x.segments[0].grid, 0.0) for x in layouts]


def test_what_frames_announce():
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(QWEN)

    def told(strategy, budget, own=None, **options):
        config.vtoken = overrides(QWEN, strategy, budget, **options)["hf_overrides"]["vtoken"]
        made = Reduction(config, Apart(config))
        grids = {"video_grid_thw": torch.tensor([[3, 8, 12]])}
        layout = made.geometry.layouts("video", 1, grids)[0]
        place = made.geometry.positions("video", [layout], grids)[0]
        return made, layout, made.announce("video", layout, place, own)

    made, layout, announced = told("hired", 5, score="received")
    assert announced == Announced(72, 15, 18, 5, ((5, 6),) * 3)
    assert told("divprune", 0.5, 1.0)[2] == Announced(72, 72, 18, None, ((24, 6),) * 3)
    with pytest.raises(ValueError, match="divprune cannot tell how many tokens it keeps of every part"):
        told("divprune", 0.5)
    made, layout, announced = told("stc_pruner", 0.5)
    tower = made.geometry.adapter.towers["video"].info
    tokens = VisualTokens(torch.randn(72, 16), layout.segments, layout.cells, tower, "video")
    _, keep = made.choose(tokens, announced)
    assert torch.bincount(tokens.segment_of[keep]).tolist() == [12, 12, 12]
    uneven = Announced(72, 36, 18, 0.5, ((20, 6), (15, 6), (1, 6)))
    assert torch.bincount(tokens.segment_of[made.choose(tokens, uneven)[1]]).tolist() == [20, 15, 1]


class Alone(Apart):
    """As where a model reads the frames of a video as images."""

    alone = ("video",)


def test_frames_that_are_images():
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(QWEN)
    config.vtoken = overrides(QWEN, "divprune", 0.5)["hf_overrides"]["vtoken"]
    made, grids = Reduction(config, Alone(config)), {"video_grid_thw": torch.tensor([[3, 8, 12]])}
    layout = made.geometry.layouts("video", 1, grids)[0]
    place = made.geometry.positions("video", [layout], grids)[0]
    announced = made.announce("video", layout, place)
    assert announced == Announced(72, 36, 18, 0.5, ((12, 6),) * 3)
    assert made.announce("video", layout, place, 1.0) == Announced(72, 72, 18, None, ((24, 6),) * 3)
    tower, features = made.geometry.adapter.towers["video"].info, torch.randn(72, 16)
    kept, keep = made.choose(VisualTokens(features, layout.segments, layout.cells, tower, "video"), announced)
    second = VisualTokens(features[24:48], layout.segments[:1], torch.arange(24), tower, "image")
    assert (keep[12:24] - 24).tolist() == made.strategy.select(second).keep.tolist()
    assert torch.equal(kept, features[keep])


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
        (LLAVA, "decode_evict", {}, "holds the LLM's KV cache in a form of its own"),
        (LLAVA, "cdpruner", {}, "reads the question"),
        (LLAVA, "tome", {}, "merges tokens inside the vision tower"),
        (LLAVA, "ts_llava", {}, "reads all images of a prompt together"),
        (QWEN, "stc_cacher", {}, "reuses tokens"),
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


def test_budgets_of_requests_whose_bytes_could_be_alike():
    made = reduction(LLAVA, "uniform", 0.5)
    layout = made.geometry.adapter.layouts("image", [torch.empty(144)], {})[0]
    for odd in (1e-300, 2**40):
        with pytest.raises(ValueError, match="A request's budget is a share of at least"):
            made.announce("image", layout, line_positions(144), odd)


@pytest.mark.parametrize("strategy", ["ts_llava", "cdpruner", "tome"])
def test_a_strategy_that_cannot_be_served_is_refused_at_budget_one_too(strategy):
    with pytest.raises(ValueError, match="which vLLM cannot do"):
        overrides(LLAVA, strategy, 1.0)


def test_a_budget_without_a_strategy():
    from transformers import AutoConfig

    made = Reduction(AutoConfig.from_pretrained(LLAVA))
    layout = made.geometry.adapter.layouts("image", [torch.empty(144)], {})[0]
    assert made.announce("image", layout, line_positions(144)).kept == 144
    with pytest.raises(ValueError, match="served without a strategy"):
        made.announce("image", layout, line_positions(144), 0.5)


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
