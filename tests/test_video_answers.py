"""`vtoken.answer`: the model's own answer about the frames that its processor takes, with fewer tokens."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig
from transformers.video_utils import load_video

import vtoken
from tests.streaming.common import model_of, processor_of
from tests.video.media import write
from vtoken.asking import TINY_KNOWS, prompt, to_model
from vtoken.cli.main import cli
from vtoken.video import VideoError, sample
from vtoken.video_answers import STAGES

Q = "what is here ?"
NAMES = ["llava_onevision", "qwen2_5_vl", "qwen3_vl"]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return str(write(tmp_path_factory.mktemp("clips") / "clip.mp4"))


def plain(name: str, path: str, frames: int, steps: int) -> tuple[torch.Tensor, int]:
    """New tokens of `generate` on what transformers itself loads, and the length of the prompt."""
    processor = processor_of(name)
    choose = partial(processor.video_processor.sample_frames, num_frames=frames, fps=None)
    video, metadata = load_video(path, sample_indices_fn=choose)
    given = dict(text=[prompt(processor, Q, "video")], videos=[video], video_metadata=[metadata])
    inputs = processor(**given, do_sample_frames=False, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    out = model_of(name).generate(**inputs, do_sample=False, max_new_tokens=steps)
    return out[0, length:], length


@pytest.mark.parametrize("name", NAMES)
def test_an_unpatched_model_answers_as_it_does_on_the_file(name, path):
    new, length = plain(name, path, 4, 6)
    pieces: list[str] = []
    given = (model_of(name), processor_of(name), path, Q)
    out = vtoken.answer(*given, frames=4, max_new_tokens=6, on_text=pieces.append)
    assert out.text == processor_of(name).tokenizer.decode(new, skip_special_tokens=True).strip()
    assert (out.tokens, out.new_tokens, len(out.frames)) == (length, len(new), 4)
    assert "".join(pieces).strip() == out.text and out.report is None
    assert tuple(out.seconds) == STAGES and min(out.seconds.values()) >= 0 < out.seconds["tower"]
    assert all(word in str(out) for word in ("4 frames", "prefill"))


@pytest.mark.parametrize("name", NAMES)
def test_a_patched_model_reads_its_share_and_the_model_is_left_as_it_was(name, path):
    model, processor = model_of(name), processor_of(name)
    dense = vtoken.answer(model, processor, path, Q, frames=4, max_new_tokens=2)
    with vtoken.applied(model, "uniform", budget=0.5):
        out = vtoken.answer(model, processor, path, Q, frames=4, max_new_tokens=2)
        assert str(out.report) in str(out) and out.report.tokens_out <= 0.6 * out.report.tokens_in
    assert out.tokens == dense.tokens
    again = vtoken.answer(model, processor, path, Q, frames=4, max_new_tokens=2)
    assert (again.text, again.report) == (dense.text, None)


def test_a_generation_config_is_followed(path):
    model, processor = model_of("qwen2_5_vl"), processor_of("qwen2_5_vl")
    config = GenerationConfig(max_new_tokens=5, do_sample=True, temperature=3.0)
    told = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        told.append(vtoken.answer(model, processor, path, Q, frames=4, generation_config=config))
    assert [t.new_tokens for t in told] == [5, 5] and told[0].text != told[1].text
    (short,) = vtoken.answers(model, processor, [(path, Q)], max_new_tokens=2, generation_config=config)
    assert short.new_tokens == 2


def test_only_pixels_take_the_dtype_of_the_model(path):
    """The time between frames tells positions, which bfloat16 would round."""
    processor = processor_of("qwen2_5_vl")
    inputs = processor(
        text=[prompt(processor, Q, "video")],
        **sample(path, 4, processor=processor).inputs,
        return_tensors="pt",
    )
    inputs["second_per_grid_ts"] = torch.tensor([0.3922])
    cast = to_model(model_of("qwen2_5_vl").to(torch.bfloat16), inputs)
    assert cast["pixel_values_videos"].dtype == torch.bfloat16
    assert cast["second_per_grid_ts"].dtype == torch.float32


def test_answers_in_turn_are_those_one_by_one(path):
    model, processor = model_of("qwen2_5_vl"), processor_of("qwen2_5_vl")
    video = sample(path, 4, processor=processor)
    questions = [(path, Q), (video, "is here ?"), (path, Q)]
    out = list(vtoken.answers(model, processor, questions, frames=4, max_new_tokens=4))
    counts = (4, None, 4)  # the second video has its frames
    one = [
        vtoken.answer(model, processor, v, q, frames=n, max_new_tokens=4)
        for (v, q), n in zip(questions, counts, strict=True)
    ]
    assert [o.text for o in out] == [o.text for o in one] and out[0].frames == video.seconds
    turns = vtoken.answers(model, processor, [(path, Q), ("nothing.mp4", Q)], frames=4, max_new_tokens=4)
    with pytest.raises(VideoError, match="no such file"):
        list(turns)
    assert list(vtoken.answers(model, processor, [])) == []


def test_an_error_of_the_questions_comes_after_the_answers_before_it(path):
    given = (model_of("qwen2_5_vl"), processor_of("qwen2_5_vl"))

    def asked():
        yield path, Q
        raise OSError("no more")

    turns = vtoken.answers(*given, asked(), frames=4, max_new_tokens=2)
    assert next(turns).new_tokens == 2
    with pytest.raises(OSError, match="no more"):
        next(turns)
    for odd in (path, (path, Q, 1), (path, None)):
        with pytest.raises(ValueError, match=r"takes \(video, question\) pairs, found "):
            list(vtoken.answers(*given, [odd]))


def test_what_a_processor_refuses_is_told_with_what_would_work(path):
    model, processor = model_of("qwen3_vl"), processor_of("qwen3_vl")
    with pytest.raises(ValueError, match=r"about 1 frame of 128 x 48 .*temporal_factor.*frames=, at least 2"):
        vtoken.answer(model, processor, path, Q, frames=1)
    with pytest.raises(ValueError, match=r"about 4 frames .*question without marks of images"):
        vtoken.answer(model, processor, path, "is <|video_pad|> here", frames=4)
    with pytest.raises(VideoError, match=r"cannot sample this video: .* no frame, try larger frames="):
        vtoken.answer(model_of("qwen2_5_vl"), processor_of("qwen2_5_vl"), path, Q, frames=1)
    with pytest.raises(ValueError, match="one text, found num_return_sequences=2: leave it out"):
        vtoken.answer(model, processor, path, Q, num_beams=2, num_return_sequences=2)


def test_what_cannot_be_asked_gets_one_sentence(path):
    with pytest.raises(ValueError, match="LlavaProcessor reads no videos: use a model that does"):
        vtoken.answer(model_of("llava"), processor_of("llava"), path, Q)
    given = (model_of("qwen2_5_vl"), processor_of("qwen2_5_vl"))
    with pytest.raises(VideoError, match="frames or fps"):
        vtoken.answer(*given, path, Q, frames=4, fps=1.0)
    with pytest.raises(ValueError, match="A SampledVideo has its frames: leave frames="):
        vtoken.answer(*given, sample(path, 4, processor=given[1]), Q, frames=4)
    with pytest.raises(ValueError, match=r"asks a model as it is, found budget=: call it within"):
        vtoken.answer(*given, path, Q, frames=4, budget=0.25)
    with pytest.raises(ValueError, match="max_new_tokens"):
        vtoken.answer(*given, path, Q, max_new_tokens="3")


def test_the_command_with_a_file_name_that_looks_like_markup(path, tmp_path, capsys):
    (tmp_path / "x[").mkdir()
    (tmp_path / "x[" / "b].mp4").write_bytes(Path(path).read_bytes())
    asked = ["--question", "which digit is shown now?", "--frames", "4"]
    cli.main(["ask", "--video", f"{tmp_path}/x[/b].mp4", *asked], standalone_mode=False)
    assert "4 frames" in capsys.readouterr().out


def test_the_command(path, capsys):
    arguments = ["ask", "--video", path, "--question", "which digit is shown now?", "--frames", "4"]
    cli.main([*arguments, "--budget", "0.25", "--max-new-tokens", "3"], standalone_mode=False)
    said = capsys.readouterr().out
    assert "farcover(budget=0.25)" in said and "4 frames" in said and "tower" in said
    assert TINY_KNOWS in " ".join(said.split())
