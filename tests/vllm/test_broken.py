"""What once gave wrong answers in silence, or riddles."""

from __future__ import annotations

import json
import shutil

import pytest
from click.testing import CliRunner

import vtoken
from vtoken.integrations.vllm import overrides
from vtoken.integrations.vllm.__main__ import main
from vtoken.requested import make_strategy
from vtoken.tiny import scenes

from .engines import asked, distance, engine
from .environment import vllm
from .prompts import Case, answer, cases, request
from .random_models import load, path
from .test_pure import LLAVA, reduction

pytestmark = pytest.mark.vllm


def served(folder, *prompts, length=1024, **settings):
    """The first answers of an engine that is gone afterwards."""
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = vllm.LLM(
        str(folder), dtype="float32", enforce_eager=True, max_model_len=length, block_size=32, **settings
    )
    try:
        return asked(llm, list(prompts))
    finally:
        llm.__dict__.clear()
        cleanup_dist_env_and_memory()


def check(case, out):
    assert len(out.prompt_token_ids) == case.length
    assert out.outputs[0].text.strip() == case.text and distance(case, out) < 1e-4


def with_file(tmp_path, edit):
    """Folder of the tiny LLaVA, its config.json edited."""
    folder = shutil.copytree(LLAVA, tmp_path / "model")
    told = json.loads((folder / "config.json").read_text())
    edit(told)
    (folder / "config.json").write_text(json.dumps(told))
    return folder


def test_a_budget_that_is_not_told_is_the_strategys_own():
    assert (
        reduction(LLAVA, "globalcom2").strategy.budget == make_strategy("globalcom2", None, {}).budget == 0.25
    )


def test_overrides_of_a_file_that_has_overrides(tmp_path):
    """Published with original positions, served with others."""
    before = overrides(LLAVA, "hired", 0.2, alpha=0.3)["hf_overrides"]
    folder = with_file(tmp_path, lambda told: told.update(before))
    model, processor = load("llava")
    vtoken.patch(model, "visionzip", budget=0.3, positions="renumber")
    case = answer(model, processor, cases(processor, 1, 0)[0])
    told = overrides(folder, "visionzip", 0.3, positions="renumber")
    (out,) = served(folder, request(case), **told)
    check(case, out)


@pytest.mark.parametrize("positions", ["original", "renumber"])
def test_positions_and_rope_parameters_that_disagree(positions):
    told = overrides(LLAVA, "hired", 0.2)["hf_overrides"]
    if positions == "original":  # as merged with scaled rope at the top
        told["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    else:
        told["vtoken"]["positions"] = positions
    with pytest.raises(ValueError, match=f"want {positions} positions and their rope_parameters"):
        served(LLAVA, hf_overrides=told)


def test_scaled_rope_knows_more_positions(tmp_path):
    scale = {"rope_type": "linear", "factor": 2.0}
    folder = with_file(tmp_path, lambda told: told["text_config"]["rope_parameters"].update(scale))
    tiny, processor = load("llava")
    model = type(tiny).from_pretrained(folder, dtype="float32").eval()
    content = [{"type": "image"}] * 16 + [{"type": "text", "text": "how many objects are there?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    picture = scenes.make_scene(600, "test").image
    vtoken.patch(model, "hired", budget=0.1)
    case = answer(model, processor, Case("", prompt, [picture.rotate(3 * i) for i in range(16)]))
    limit = {"limit_mm_per_prompt": {"image": 16}}
    (out,) = served(folder, request(case), length=4096, **limit, **overrides(folder, "hired", 0.1))
    check(case, out)


def test_hired_announces_no_fewer_tokens_than_it_chooses():
    from vtoken.integrations.vllm.families.llava_next import Processor

    model, processor = load("llava_next")
    picture = scenes.make_scene(600, "test").image
    pixels = processor.image_processor([picture], return_tensors="pt")
    for budget in (0.1, 7, 40):
        vtoken.patch(model, "hired", budget=budget)
        kept = answer(model, processor, Case("", "<image> hi", [picture])).kept[0]
        vtoken.unpatch(model)
        made = reduction(str(path("llava_next")), "hired", budget)
        geometry = Processor.geometry_class(model.config)
        (layout,) = geometry.layouts("image", 1, dict(pixels))
        (places,) = geometry.positions("image", [layout], dict(pixels))
        segments = len(layout.segments)
        assert 0 <= made.announce("image", layout, places).kept - len(kept) < segments


def test_a_prompt_without_a_place_for_its_picture_leaves_no_trace(monkeypatch):
    """vLLM refuses it with an AssertionError; the picture is sent again."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    model, processor = load("llava")
    vtoken.patch(model, "hired", budget=0.2)
    case = answer(model, processor, cases(processor, 1, 0)[0])
    with engine("llava", "hired", 0.2, {}, step=256) as llm:
        with pytest.raises(AssertionError, match="prompt replacement"):
            asked(llm, [request(case) | {"prompt": "how many objects are there?"}])
        check(case, asked(llm, [request(case)])[0])


@pytest.mark.parametrize("section", ["hired", ["hired"]])
def test_a_section_that_is_no_object(section):
    told = overrides(LLAVA, "hired", 0.2)["hf_overrides"] | {"vtoken": section}
    with pytest.raises(ValueError, match="A vtoken config is a JSON object"):
        served(LLAVA, hf_overrides=told)


def test_a_strategy_that_cannot_tell_its_numbers():
    with pytest.raises(ValueError, match="token_corr lets the picture decide"):
        overrides(LLAVA, "token_corr", 0.3)


@pytest.mark.parametrize(
    "options,words",
    [
        (["budget=0.3"], "budget is told by its place"),
        (["strategy=hired"], "strategy is told by its place"),
        (["alpha=0.3", "alpha=0.4"], "alpha is given twice"),
    ],
)
def test_command_line(options, words):
    said = CliRunner().invoke(main, [LLAVA, "hired", "0.2", *options])
    assert said.exit_code == 1 and said.output.startswith("Error:") and words in said.output
