"""Runs of encoders: interleaved timing, interruption, processes, refusals, and the two commands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import vtoken
from vtoken import tiny
from vtoken.cli.main import cli
from vtoken.eval.benchmarks.imagenet import ImageNet
from vtoken.eval.benchmarks.imagenet import load as images
from vtoken.eval.benchmarks.msrvtt import MSRVTT, unpacked
from vtoken.eval.benchmarks.msrvtt import load as pairs
from vtoken.eval.running.encoder_runs import DENSE, EncoderRun, plan
from vtoken.eval.running.encoder_summary import summary
from vtoken.eval.running.encoders import EncoderEvaluation

from . import encoders
from .encoders import (
    CAPTIONS,
    classifier,
    colour,
    dual_encoder,
    image_folder,
    preprocess,
    registered,
    video_folder,
)

ROOT = Path(__file__).parents[2]
RUNS = [DENSE, EncoderRun("last_go", {"r": 2}), EncoderRun("last_go", {"r": 5})]


@pytest.fixture(autouse=True)
def strategies(monkeypatch):
    monkeypatch.setattr(vtoken, "applied", encoders.applied, raising=False)
    monkeypatch.setattr(vtoken, "report", encoders.report, raising=False)
    with registered():
        yield


@pytest.fixture
def task(tmp_path):
    return ImageNet(images(image_folder(tmp_path / "data"), 5), preprocess)


def evaluation(task, folder, encoder=None, **options):
    return EncoderEvaluation(task, encoder or classifier(), folder, **{"batch_size": 4, **options})


def lines(folder: Path, run: EncoderRun) -> list[dict]:
    files = sorted(folder.glob(f"{run.stem}.*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def logits(task, encoder, run):
    with encoder.applied(run.strategy, run.options), torch.inference_mode():
        return encoder.model(torch.stack([task.open(s) for s in task.samples]))


def test_values_are_those_of_the_patched_model(task, tmp_path):
    encoder = classifier()
    found = evaluation(task, tmp_path / "out", encoder).run(RUNS)
    assert [o.run for o in found] == RUNS
    for o in found[1:]:
        wanted = logits(task, encoder, o.run).topk(5).indices
        assert [r["value"] for r in lines(tmp_path / "out", o.run)] == wanted.tolist()
        right = sum(row[0] == int(s.truth) for row, s in zip(wanted.tolist(), task.samples))
        assert o.breakdown.scores["top-1"]["right"] == right
        assert o.tokens == [17, 17 - o.run.options["r"]] and o.gflops == pytest.approx(sum(o.tokens) / 1000)
        assert o.speedup > 0 and o.per_second > 0
    assert found[0].gflops == pytest.approx(0.034) and found[0].speedup == 1 and not found[0].tokens
    plain = encoder.model(torch.stack([task.open(s) for s in task.samples])).topk(5).indices.tolist()
    assert [r["value"] for r in lines(tmp_path / "out", DENSE)] == plain
    head, *rows = summary(task, found)
    assert [row[head.index("share")] for row in rows] == ["100.0 %", "94.1 %", "85.3 %"]


class Clocked(EncoderEvaluation):
    """Notes which run encoded which batch; its clock goes on by 1 s per call unpatched, by 0.25 s else."""

    def __init__(self, *given, **options):
        super().__init__(*given, **options)
        self.order, self.clock = [], 0.0

    def _timed(self, run, pixels):
        self.order.append((run.stem, len(pixels)))
        self.step_of_clock = 1.0 if run.strategy is None else 0.25
        return super()._timed(run, pixels)

    def _now(self):
        self.clock += self.step_of_clock
        return self.clock


def test_the_unpatched_model_is_timed_beside_every_run(task, tmp_path):
    made = Clocked(task, classifier(), tmp_path / "out", batch_size=4)
    found = made.run(RUNS)
    stems = [run.stem for run in RUNS]
    turns = [stems[turn:] + stems[:turn] for turn in (0, 1, 2, 0)]
    sizes = [4, 4, 4, 3]
    warm_up = [(stem, 4) for stem in stems]
    assert made.order == warm_up + [(stem, n) for turn, n in zip(turns, sizes) for stem in turn]
    assert [o.speedup for o in found] == pytest.approx([1, 4, 4])
    assert [o.per_second for o in found] == pytest.approx([15 / 4, 15, 15])
    later = Clocked(task, classifier(), tmp_path / "out", batch_size=4)
    added = later.run([*RUNS, EncoderRun("last_go", {"r": 1})])
    assert len(later.order) == 2 + 2 * 4  # the new run, and the unpatched model again for its time
    assert added[3].speedup == pytest.approx(4) and added[:3] == found
    assert len(lines(tmp_path / "out", DENSE)) == 15


def test_an_interrupted_run_continues(task, tmp_path):
    class Mortal(EncoderEvaluation):
        def _visit(self, place, *given):
            if place == 2:
                raise KeyboardInterrupt
            return super()._visit(place, *given)

    whole = evaluation(task, tmp_path / "whole").run(RUNS)
    with pytest.raises(KeyboardInterrupt):
        Mortal(task, classifier(), tmp_path / "out", batch_size=4).run(RUNS)
    assert [len(lines(tmp_path / "out", run)) for run in RUNS] == [8, 8, 8]
    path = tmp_path / "out" / f"{RUNS[1].stem}.0.jsonl"
    path.write_bytes(path.read_bytes()[:-30])  # a half-written line
    made = evaluation(task, tmp_path / "out")
    assert made.progress(RUNS) == ({"unpatched": 8, "last_go r=2": 7, "last_go r=5": 8}, 2 * 4 + 3 * 7)
    steps = []
    made.step = steps.append
    found = made.run(RUNS)
    assert sum(steps) == 2 * 4 + 3 * 7
    assert [o.breakdown for o in found] == [o.breakdown for o in whole]
    assert [len(lines(tmp_path / "out", run)) for run in RUNS] == [15] * 3
    again = Clocked(task, classifier(), tmp_path / "out", batch_size=4)
    assert again.run(RUNS) == found and not again.order


def test_other_settings_are_refused(task, tmp_path):
    evaluation(task, tmp_path / "out", settings={"model": "a"})
    with pytest.raises(ValueError, match=r"under model = 'a', this run has 'b'.*another --output"):
        evaluation(task, tmp_path / "out", settings={"model": "b"})
    fewer = ImageNet(task.samples[:-1], preprocess)
    with pytest.raises(ValueError, match=r"under data = "):
        evaluation(fewer, tmp_path / "out", settings={"model": "a"})


def test_broken_records_are_errors(task, tmp_path):
    evaluation(task, tmp_path / "out").run(RUNS)
    path = tmp_path / "out" / f"{RUNS[1].stem}.0.jsonl"
    first, *rest = path.read_text().splitlines(keepends=True)
    for key, value in (
        ("value", "x"),
        ("value", []),
        ("gflops", None),
        ("tokens", 3),
        ("seconds_dense", "1"),
    ):
        path.write_text(json.dumps(json.loads(first) | {key: value}) + "\n" + "".join(rest))
        with pytest.raises(ValueError, match=r"Line 1 of .* is no record: remove it"):
            evaluation(task, tmp_path / "out").run(RUNS)


def test_images_that_cannot_be_read_are_wrong_and_read_again(task, tmp_path):
    broken = task.samples[5].media
    broken.write_bytes(b"no picture")
    found = evaluation(task, tmp_path / "out").run(RUNS)
    for o in found:
        assert list(o.unreadable) == [task.samples[5].name] and "cannot be decoded" in next(
            iter(o.unreadable.values())
        )
        assert o.breakdown.scores["asked"] == 15
    assert summary(task, found)[0][-1] == "unreadable" and summary(task, found)[1][-1] == "1"
    colour(12).save(broken)
    mended = evaluation(task, tmp_path / "out").run(RUNS)
    assert not mended[0].unreadable and [len(lines(tmp_path / "out", run)) for run in RUNS] == [16] * 3
    for sample in task.samples:
        sample.media.write_bytes(b"no picture")
    with pytest.raises(
        ValueError, match=r"None of the 15 images could be opened; the first: The image class_0/0"
    ):
        evaluation(task, tmp_path / "other").run(RUNS)


def test_a_strategy_that_refuses_and_values_that_are_not_finite(task, tmp_path):
    with pytest.raises(ValueError, match=r"last_go refuse=true: no thank you"):
        evaluation(task, tmp_path / "out").run([EncoderRun("last_go", {"refuse": True})])
    encoder = classifier()
    torch.nn.init.constant_(encoder.model.head.bias, float("nan"))
    with pytest.raises(ValueError, match=r"unpatched: the model gives values that are not finite"):
        evaluation(task, tmp_path / "out", encoder).run(RUNS)
    assert not lines(tmp_path / "out", DENSE)


def test_workers_open_the_same_pixels(task, tmp_path):
    one = evaluation(task, tmp_path / "one").run(RUNS)
    two = evaluation(task, tmp_path / "two", workers=2).run(RUNS)
    assert [o.breakdown for o in one] == [o.breakdown for o in two]
    assert [r["value"] for r in lines(tmp_path / "one", RUNS[1])] == [
        r["value"] for r in lines(tmp_path / "two", RUNS[1])
    ]


@pytest.mark.product
def test_two_processes_give_what_one_gives(tmp_path):
    data = image_folder(tmp_path / "data")
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command = [sys.executable, *launch, "--main_process_port", "0", "-m", "tests.eval.encoders"]
    made = subprocess.run(
        [*command, str(data), str(tmp_path / "two")], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert made.returncode == 0, made.stderr
    task = ImageNet(images(data, 5), preprocess)
    found = evaluation(task, tmp_path / "one", batch_size=2).run(RUNS)
    wanted = [f"{o.run.name} {o.breakdown.scores['top-1']['right']} {o.gflops}" for o in found]
    assert made.stdout.splitlines() == wanted  # the second process says nothing
    for run in RUNS:
        assert len([*(tmp_path / "two").glob(f"{run.stem}.*.jsonl")]) == 2
        one, two = ({r["item"]: r["value"] for r in lines(tmp_path / name, run)} for name in ("one", "two"))
        assert one == two


def test_plans():
    def names(*given, **options):
        return [run.name for run in plan(*given, **options)]

    assert names(["last_go"], {}) == ["unpatched", "last_go"]
    amounts = {"r": [2, 5], "budget": [0.5], "flops": []}
    assert names(["last_go", "last_go_too", "last_go"], amounts, x=[1]) == [
        "unpatched",
        "last_go r=2 x=[1]",
        "last_go r=5 x=[1]",
        "last_go budget=0.5 x=[1]",
        "last_go_too budget=0.5 x=[1]",
    ]
    with pytest.raises(ValueError, match="last_go_too has no option 'r': give --budgets or --flops"):
        plan(["last_go_too"], {"r": [2]})
    with pytest.raises(ValueError, match="last_go r=2 is asked for twice"):
        plan(["last_go"], {"r": [2, 2]})


def test_retrieval_of_a_dual_encoder(tmp_path):
    encoder = dual_encoder()
    task = MSRVTT(pairs(video_folder(tmp_path / "data")), preprocess, frames=3, duals=(False, True))
    found = evaluation(task, tmp_path / "out", encoder, batch_size=2).run(plan(["last_go"], {}))
    assert task.options("last_go") == {"frames": 3} and task.options("last_go_too") == {}
    model = encoder.model
    with torch.inference_mode():
        texts = torch.nn.functional.normalize(
            model.encode_text(encoder.tokenizer([*CAPTIONS.values()])), dim=-1
        )
        videos = []
        with encoder.applied("last_go", {}):
            for sample in task.samples:  # one by one, frame by frame
                frames = [model.encode_image(frame[None])[0] for frame in task.open(sample)]
                mean = torch.stack([f / f.norm() for f in frames]).mean(0)
                videos.append(mean / mean.norm())
    stored = [torch.tensor(unpacked(r["value"])) for r in lines(tmp_path / "out", EncoderRun("last_go"))]
    assert torch.allclose(torch.stack(stored), torch.stack(videos), atol=1e-5)
    matrix = texts @ torch.stack(videos).T
    place = (matrix > matrix.diagonal()[:, None]).sum(1)
    scored = found[1].breakdown.scores["plain"]["text to video"]
    assert scored["R@1"] == pytest.approx(100 * (place == 0).float().mean().item())
    assert scored["mean rank"] == pytest.approx(place.float().mean().item() + 1)
    assert found[1].gflops == pytest.approx(3 * (17 + 14) / 1000)  # per video
    assert (tmp_path / "out" / "texts.safetensors").is_file()
    again = evaluation(task, tmp_path / "out", SimpleNamespace(), batch_size=2)
    assert again.run(plan(["last_go"], {})) == found  # neither videos nor captions are encoded again


def test_a_video_that_cannot_be_read_ends_with_a_sentence(tmp_path):
    root = video_folder(tmp_path / "data")
    whole = (root / "videos/all/video7021.mp4").read_bytes()
    (root / "videos/all/video7021.mp4").write_bytes(b"no video")
    task = MSRVTT(pairs(root), preprocess, frames=2)
    with pytest.raises(
        ValueError, match=r"The video video7021.mp4 cannot be decoded.*all 5 videos are needed"
    ):
        evaluation(task, tmp_path / "out", dual_encoder(), batch_size=2).run(plan(["last_go"], {}))
    (root / "videos/all/video7021.mp4").write_bytes(whole)
    found = evaluation(task, tmp_path / "out", dual_encoder(), batch_size=2).run(plan(["last_go"], {}))
    assert len(found) == 2 and not found[0].unreadable


@pytest.fixture
def shipped(monkeypatch):
    """Tiny encoders "vit", of 56 classes, and "clip", as `vtoken.tiny` ships them."""
    vit, clip = classifier(56), dual_encoder()
    made = {"vit": (vit.model, preprocess, None), "clip": (clip.model, preprocess, clip.tokenizer)}
    monkeypatch.setattr(tiny, "load_encoder", made.__getitem__, raising=False)


def run(*arguments):
    return CliRunner().invoke(cli, ["eval", *map(str, arguments)])


def test_the_command_imagenet(shipped, tmp_path):
    given = ["imagenet", "--example", "--strategy", "last_go,last_go_too", "--r", "2,5", "--budgets", "0.5"]
    given += ["--option", "x=1", "--batch-size", 8, "--output", tmp_path]
    result = run(*given)
    assert result.exit_code == 0, result.output
    for words in ("top-1", "last_go_too budget=0.5 x=1 *", "ImageNet, tiny:vit", "94.1 %", "results.png"):
        assert words in result.output, words
    stored = json.loads((tmp_path / "results.json").read_text())
    assert [r["options"] for r in stored["runs"]][:3] == [{}, {"r": 2, "x": 1}, {"r": 5, "x": 1}]
    assert stored["settings"]["images"] == 32 and stored["settings"]["device"]
    assert "| last_go r=2 x=1 |" in (tmp_path / "results.md").read_text()
    with Image.open(tmp_path / "results.png") as plot:
        assert len(plot.convert("RGB").getcolors(maxcolors=1 << 20)) > 20
    again = run(*given)
    assert again.exit_code == 0 and "last_go r=5 x=1: 32 values are there already" in again.output
    assert "0/0" not in again.output
    assert (tmp_path / "results.json").read_text() == json.dumps(stored, indent=1) + "\n"
    other = run(*given, "--dtype", "bfloat16")
    assert other.exit_code == 2 and "under dtype" in " ".join(other.output.split())


def test_the_command_retrieval(shipped, tmp_path):
    given = ["--strategy", "last_go", "--frames", 2, "--dual-softmax", "both", "--temperature", 0.05]
    result = run("retrieval", "--example", *given, "--limit", 6, "--output", tmp_path)
    assert result.exit_code == 0, result.output
    for words in ("video to text, dual softmax at 0.05", "R-sum", "t2v R@1", "median rank", "videos/s"):
        assert words in result.output, words
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["settings"]["videos"] == 6 and stored["settings"]["frames"] == 2
    assert stored["runs"][1]["scores"]["temperature"] == 0.05
    assert set(stored["runs"][1]["scores"]) == {"temperature", "plain", "dual softmax"}


def test_captions_are_refused_before_any_video_is_encoded(shipped, tmp_path, monkeypatch):
    def tokenizer(texts):
        raise ValueError(f"{len(texts)} captions have unknown words.")

    model, preprocess, _ = tiny.load_encoder("clip")
    monkeypatch.setattr(tiny, "load_encoder", lambda name: (model, preprocess, tokenizer))
    result = run("retrieval", "--example", "--strategy", "last_go", "--output", tmp_path)
    assert result.exit_code == 2 and "12 captions have unknown words." in result.output
    assert not list(tmp_path.glob("*.jsonl"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["imagenet"], "Data come from one place: give --data a folder with one folder of images per class"),
        (
            ["retrieval", "--example", "--data", "x"],
            "Data come from one place: give --data a folder with MSRVTT",
        ),
        (["imagenet", "--data", "x"], "Name a model: --model timm:NAME"),
        (["imagenet", "--data", "x", "--model", "tiny:clip"], "'tiny:clip' has no classifier"),
        (["imagenet", "--data", "x", "--model", "tiny:vit"], "There is no data set 'x'"),
        (["retrieval", "--data", "x", "--model", "tiny:clip"], "There is no data set folder 'x'"),
        (
            ["retrieval", "--example", "--model", "tiny:vit", "--strategy", "last_go"],
            "'tiny:vit' has no text tower",
        ),
        (["imagenet", "--example", "--strategy", "nothing"], "Unknown strategy 'nothing'"),
        (["imagenet", "--example", "--r", "x"], "--r takes whole numbers such as 8,13, found 'x'"),
        (["imagenet", "--example", "--flops", "1.5"], "--flops takes shares above 0"),
        (["imagenet", "--example", "--strategy", "tome", "--r", "8,0"], "tome r=0 changes nothing"),
        (
            ["imagenet", "--example", "--strategy", "tome", "--budget", "1.0"],
            "tome budget=1.0 changes nothing",
        ),
        (["imagenet", "--example", "--budget", "0.5", "--budgets", "0.5"], "exclude each other"),
        (["imagenet", "--example", "--option", "x"], "--option takes KEY=VALUE"),
        (["imagenet", "--example", "--option", "r=3"], "--option r=... has an option of its own: give --r"),
        (["retrieval", "--example", "--temperature", "0"], "temperature of dual softmax is a number above 0"),
    ],
)
def test_mistakes_are_one_sentence(shipped, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    if "--strategy" not in arguments:
        arguments = [*arguments, "--strategy", "last_go"]
    result = run(*arguments)
    said = " ".join(result.output.replace("│", " ").split())
    assert result.exit_code in (1, 2) and words in said, said
    assert "Traceback" not in result.output and isinstance(result.exception, SystemExit)


@pytest.mark.skipif("tome" not in vtoken.list_strategies(), reason="the strategy is not there yet")
def test_a_real_strategy_on_a_real_model(tmp_path, monkeypatch):
    monkeypatch.undo()
    task = ImageNet(images(image_folder(tmp_path / "data"), 5), preprocess)
    found = evaluation(task, tmp_path / "out").run(plan(["tome"], {"r": [2]}))
    assert found[1].gflops < found[0].gflops and found[1].tokens
