"""Training of strategies with weights: conversations from a folder, labels, the Trainer, the command line."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

import vtoken
from vtoken import tiny
from vtoken.cli.main import cli
from vtoken.fine_tuning.collate import IGNORED, Collator
from vtoken.fine_tuning.conversations import Conversations
from vtoken.fine_tuning.train import Plan, train_strategy
from vtoken.strategies.trained import trained_names
from vtoken.tiny import scenes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Questions about four scenes, and one conversation of two turns."""
    path = tmp_path_factory.mktemp("data")
    entries = []
    for i in range(4):
        scene = scenes.make_scene(i, "train")
        scene.image.save(path / f"{i}.png")
        asked = scenes.questions(scene)
        entries += [{"image": f"{i}.png", "question": q.text, "answer": q.answer} for q in asked[:3]]
    turns = [("human", "<image>\n" + asked[0].text), ("gpt", asked[0].answer)]
    turns += [("human", asked[1].text), ("gpt", asked[1].answer)]
    told = [{"from": who, "value": text} for who, text in turns]
    entries.append({"image": ["3.png"], "conversations": told})
    (path / "data.json").write_text(json.dumps(entries))
    return path


@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision", "qwen2_5_vl"])
def test_labels_are_the_answers(name, folder):
    _, processor = tiny.load(name)
    data = Conversations(folder)
    some = [data[0], data[-1]]
    made = Collator(processor)(some)
    for row, conversation in enumerate(some):
        labels = made["labels"][row]
        told = processor.tokenizer.decode(labels[labels != IGNORED])
        answers = [text for role, text in conversation.turns if role == "assistant"]
        assert told.replace(" ", "") == "".join(f"{a}</s>" for a in answers).replace(" ", "")
        assert torch.equal(labels[labels != IGNORED], made["input_ids"][row][labels != IGNORED])


def write(folder, entries, name="data.json"):
    (folder / name).write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return folder


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ("[1", "is not JSON"),
        ({}, "holds a list"),
        ([], "no conversations"),
        ([1], "Entry 1 .* an entry is an object"),
        ([{"image": "a.png"}], "needs conversations, or question and answer"),
        ([{"question": "a", "answer": "b"}], "neither an image nor a video"),
        ([{"image": "../a.png", "question": "a", "answer": "b"}], "lies outside of the folder"),
        ([{"image": "b.png", "question": "a", "answer": "b"}], "there is no file 'b.png'"),
        ([{"image": "a.png", "conversations": [{"from": "human", "value": "x"}]}], "take turns"),
        ([{"image": "a.png", "conversations": [{"from": "system", "value": "x"}]}], "from human or gpt"),
        ([{"image": 3, "question": "a", "answer": "b"}], "a file name is a string"),
        ([{"image": "a.png", "conversations": 5}], "Entry 1 .* a list of turns, found int"),
        ([{"image": "a.png", "conversations": [{"from": ["human"]}]}], "Entry 1 .* from human or gpt"),
    ],
)
def test_a_folder_that_cannot_be_read(entries, words, tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "inside" / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match=words) as caught:
        Conversations(write(tmp_path / "inside", entries))
    assert str(caught.value).count("\n") == 0
    with pytest.raises(ValueError, match=r"has no data\.json and no data\.jsonl"):
        Conversations(tmp_path)


def test_texts_keep_their_words_and_lines(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    entry = {"image": "a.png", "question": "Look at <image> and tell", "answer": "<image>\na\u2028b"}
    lines = json.dumps(entry, ensure_ascii=False) + "\r\n\n" + json.dumps(entry)
    (tmp_path / "data.jsonl").write_text(lines, encoding="utf-8")
    for conversation in Conversations(tmp_path):
        assert conversation.turns == (("user", "Look at and tell"), ("assistant", "a\u2028b"))
    (tmp_path / "data.jsonl").write_bytes(b"\xff{}")
    with pytest.raises(ValueError, match="is not JSON"):
        Conversations(tmp_path)


def test_training_goes_on_where_it_was_interrupted(folder, tmp_path):
    config = vtoken.VTokenConfig("pvc", 0.1, options={"side": 2, "te_dim": 16, "image_repeats": 1})

    def run(output, **plan):
        model, processor = tiny.load("llava")
        log = train_strategy(
            model, processor, config, Conversations(folder), output,
            Plan(batch_size=4, save_every=3, rate=3e-3, **plan), resume=True, step=lambda entry: None,
        )  # fmt: skip
        return model, log

    model, log = run(tmp_path / "whole", steps=6)
    assert log[-1]["loss"] < log[0]["loss"]
    names = {p.name for p in (tmp_path / "whole").iterdir() if p.is_file()}
    assert {"vtoken_config.json", "vtoken_strategy.safetensors", "training_log.json"} <= names
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    assert "model.safetensors" not in {p.name for p in checkpoint.iterdir()}
    # the same from the third step on
    (tmp_path / "half").mkdir()
    checkpoint.rename(tmp_path / "half" / "checkpoint-3")
    again, _ = run(tmp_path / "half", steps=6)
    for a, b in zip(model.vtoken_strategy.parameters(), again.vtoken_strategy.parameters()):
        assert torch.allclose(a, b, atol=1e-6)


def test_the_command_line(folder, tmp_path):
    output = tmp_path / "out"
    arguments = ["train", "pvc", "--model", "llava", "--data", str(folder), "--output", str(output)]
    more = [
        "--budget",
        "0.1",
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--option",
        "side=2",
        "--option",
        "te_dim=16",
    ]
    done = CliRunner().invoke(cli, arguments + more)
    assert done.exit_code == 0, done.output
    assert "from_pretrained" in done.output
    model, _ = tiny.load("llava")
    vtoken.patch(model, vtoken.VTokenConfig.from_pretrained(output))
    assert vtoken.patching.patch_of(model).strategy.side == 2
    for wrong, words in (
        (["--option", "side"], "written as side=2"),
        (["--option", "side=0"], "side must be at least 1"),
        (["--option", "sides=2"], "has no option 'sides'"),
    ):
        failed = CliRunner().invoke(cli, arguments + wrong)
        assert failed.exit_code == 2 and words in failed.output
    for wrong, words in (
        (more, "checkpoints of an earlier training"),
        (["--budget", "1.0"], "all visual tokens"),
    ):
        failed = CliRunner().invoke(cli, arguments + wrong)
        assert failed.exit_code == 2 and words in " ".join(failed.output.split())
    failed = CliRunner().invoke(cli, ["train", "hired", *arguments[2:]])
    assert failed.exit_code == 2 and f"choose one of {', '.join(trained_names())}" in " ".join(
        failed.output.split()
    )
