"""Video-MME: sampling, prompts, subtitles and letters of each harness, scores, unreadable files."""

from __future__ import annotations

import shutil

import pytest

from vtoken.eval.benchmarks.task import Unreadable
from vtoken.eval.benchmarks.videomme import VideoMME, load
from vtoken.eval.protocols.multiple_choice import PROTOCOLS, ends, inner, middles
from vtoken.eval.running.runner import Evaluation, Run

from .canned import OPTIONS, VIDEO_SAID, Canned, grey, video_folder, video_rows

LETTERS = {  # text: (strict, lmms-eval, vlmevalkit), by hand
    "A": ("A", "A", "A"),
    " (B) ": ("B", "B", "B"),
    "C.": ("C", "C", "C"),
    "D:": ("D", "D", "D"),
    "B. Bee.": ("B", "B", "B"),
    "b": ("", "", ""),
    "": ("", "", ""),
    "...": ("", "", ""),
    "E": ("", "", ""),
    "The answer is C": ("", "C", "C"),
    "Answer: C": ("", "C", "C"),
    "The answer is (D).": ("", "D", "D"),
    "Best answer: C": ("", "C", "B"),  # VLMEvalKit's prefix lacks a comma, the B of "Best" is found
    "Definitely C": ("", "C", "D"),
    "The answer is B. Dogs do not": ("", "D", "B"),  # lmms-eval takes the later capital behind the phrase
    "(A) or (B)": ("", "B", "A"),  # the last of equal places
    "A is wrong, so (B) it is": ("", "A", "A"),  # the start weighs most
    "I think it is B": ("", "B", "B"),
    "Not A. But C: yes": ("", "A", "A"),  # "A." weighs more than "C:"
    "Only Cats": ("", "C", "C"),
    "B is what I pick A for": ("", "B", "B"),
}


@pytest.mark.parametrize("text", LETTERS)
def test_letters(text):
    read = (PROTOCOLS[p].read(text, "ABCD", OPTIONS) for p in ("strict", "lmms-eval", "vlmevalkit"))
    assert tuple(read) == LETTERS[text]


EIGHT = {
    "H": ("H", "H", "H"),
    "Final Answer: G": ("", "G", "G"),  # a prefix of version 2; with four letters F would be no letter either
    "Best answer: C": ("", "C", "C"),  # the comma is there in version 2
    "Fine, (E)": ("", "E", "F"),
}


@pytest.mark.parametrize("text", EIGHT)
def test_eight_letters(text):
    read = (PROTOCOLS[p].read(text, "ABCDEFGH", ()) for p in ("strict", "lmms-eval", "vlmevalkit"))
    assert tuple(read) == EIGHT[text]


def test_sampling_by_hand():
    assert middles(16, 4) == [2, 6, 10, 14] and middles(3, 4) == [0, 1, 1, 2]
    assert ends(16, 4) == [0, 5, 10, 15] and ends(10, 4) == [0, 3, 6, 9] and ends(2, 3) == [0, 0, 1]
    assert inner(16, 3) == [4, 8, 12] and inner(10, 3) == [2, 5, 7]


ASK = "Select the best answer to the following multiple-choice question based on the video"
ONLY = " Respond with only the letter (A, B, C, or D) of the correct option."
LISTED = "What crawls?\nA. Ant.\nB. Bee.\nC. Cat.\nD. Dog."
# frames 2, 6, 10, 14 of 16 are at 0.25, 0.75, 1.25, 1.75 s; 3, 6, 9, 12 at 0.375, 0.75, 1.125, 1.5 s
PROMPTS = {
    ("strict", False): f"{ASK}.{ONLY}\n{LISTED}\nThe best answer is:",
    ("strict", True): "This video's subtitles are listed below:\nfirst words\nsecond words\nplain words\n"
    f"{ASK} and the subtitles.{ONLY}\n{LISTED}\nThe best answer is:",
    ("lmms-eval", False): f"{ASK} and the subtitles.{ONLY}\n{LISTED}\n\n"
    "Answer with the option's letter from the given choices directly.",
    ("lmms-eval", True): "This video's subtitles are listed below: \nfirst words\nsecond words\n"
    f"{ASK} and the subtitles.{ONLY}\n{LISTED}\nThe best answer is:",
    ("vlmevalkit", False): f"\nThese are the frames of a video. {ASK}.{ONLY}\nQuestion: {LISTED}\nAnswer: ",
    (
        "vlmevalkit",
        True,
    ): "\nThese are the frames of a video. This video's subtitles are listed below:\nfirst words\n"
    f"first words\nsecond words\nsecond words\n{ASK}.{ONLY}\nQuestion: {LISTED}\nAnswer: ",
}
SAMPLED = {"strict": [2, 6, 10, 14], "lmms-eval": [0, 5, 10, 15], "vlmevalkit": [3, 6, 9, 12]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return video_folder(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(("protocol", "subtitles"), PROMPTS)
def test_prompts_and_frames_by_hand(folder, protocol, subtitles):
    task = VideoMME(load(folder), protocol, 4, subtitles)
    prompt = task.prompt(task.items[0])
    assert prompt.text == PROMPTS[protocol, subtitles]
    assert (
        prompt.clip.indices == SAMPLED[protocol]
        and prompt.clip.total == 16
        and prompt.clip.fps == pytest.approx(8)
    )
    seen = [frame.getpixel((20, 20))[0] for frame in prompt.clip.frames]
    assert all(abs(value - 15 * i) < 7 for value, i in zip(seen, SAMPLED[protocol]))
    assert len(task.prompt(task.items[0], 7).clip.frames) == 7


def test_a_video_without_subtitles(folder):
    items = load(folder)
    texts = {p: VideoMME(items, p, 2, True).prompt(items[2]).text for p in PROTOCOLS}
    assert (
        "subtitles" not in texts["strict"]
        and texts["strict"] == VideoMME(items, "strict", 2).prompt(items[2]).text
    )
    assert "listed below: \nNo subtitles available\nSelect" in texts["lmms-eval"]
    assert "listed below:\n\nSelect" in texts["vlmevalkit"]


SCORES = {  # protocol: right of crawls, flies, purrs, barks, hums
    "strict": "10000",
    "lmms-eval": "11110",
    "vlmevalkit": "11011",
}


@pytest.mark.parametrize("protocol", SCORES)
def test_scores_by_hand(folder, tmp_path, protocol):
    task = VideoMME(load(folder), protocol, 2)
    outcome = Evaluation(task, Canned(VIDEO_SAID), tmp_path).run(Run("hired", 0.5))
    right = [int(r) for r in SCORES[protocol]]
    scores = outcome.breakdown.scores
    assert outcome.cell.right == sum(right) and scores["overall"]["all"]["accuracy"] == pytest.approx(
        20 * sum(right)
    )
    groups = {
        ("duration", "short"): right[:2],
        ("duration", "medium"): right[2:4],
        ("duration", "long"): right[4:],
        ("task_type", "Object Recognition"): right[::2],
        ("task_type", "Action Recognition"): right[1::2],
        ("domain", "Knowledge"): right,
        ("sub_category", "Law"): right,
    }
    for (kind, name), some in groups.items():
        expected = {
            "accuracy": pytest.approx(100 * sum(some) / len(some)),
            "right": sum(some),
            "asked": len(some),
        }
        assert scores[kind][name] == expected
    assert list(outcome.breakdown.columns) == ["short", "medium", "long"]
    assert outcome.cell.kinds == {
        "Object Recognition": (sum(right[::2]), 3),
        "Action Recognition": (sum(right[1::2]), 2),
    }


def test_letters_follow_the_longest_list_of_options(tmp_path):
    from vtoken.eval.benchmarks.example_data import write_videomme

    rows = video_rows()
    rows[1] |= {"options": [f"{c}. option {c}" for c in "ABCDEFGH"], "answer": "H"}
    items = load(write_videomme(tmp_path, rows, {"one": [grey(9)] * 3, "two": [grey(9)] * 3}))
    task = VideoMME(items, "strict", 1)
    assert task.letters == "ABCDEFGH" and task.read(items[1], "(H)") == "H" and task.read(items[1], "I") == ""
    assert "(A, B, C, D, E, F, G, or H)" in task.prompt(items[0]).text
    with pytest.raises(ValueError, match=r"'001-1' has 8 options, which the letters ABCD cannot name"):
        load(tmp_path, "ABCD")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"answer": "E"}, "'001-1' has the answer 'E': it needs one of A, B, C, D"),
        ({"answer": None}, "'001-1' has the answer None"),
        ({"question_id": "001-0"}, "asks '001-0' twice"),
        ({"options": []}, "'001-1' has 0 options"),
    ],
)
def test_a_wrong_data_set_is_refused_by_name(folder, tmp_path, change, words):
    from vtoken.eval.benchmarks.example_data import write_videomme

    rows = video_rows()
    rows[1] |= change
    with pytest.raises(ValueError, match=words):
        load(write_videomme(tmp_path, rows, {}))


def test_a_missing_data_set_says_how_to_get_it(folder, tmp_path):
    with pytest.raises(
        ValueError, match=r"no data set folder.*hf download lmms-lab/Video-MME.*videos_chunked"
    ):
        load(tmp_path / "nowhere")
    shutil.copytree(folder / "videomme", tmp_path / "videomme")
    with pytest.raises(ValueError, match=r"None of the videos is in.*hf download"):
        load(tmp_path)


def test_unreadable_videos_and_subtitles_are_named_and_count_as_wrong(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "set")
    (tmp_path / "set" / "data" / "two.mp4").write_bytes(b"\0" * 2000)
    (tmp_path / "set" / "subtitle" / "one.srt").write_bytes(b"\xff\xfe\xff1\n00:00:00 --> \n\n")
    task = VideoMME(load(tmp_path / "set"), "lmms-eval", 2, True)
    with pytest.raises(Unreadable, match=r"subtitles of 001-0, subtitle/one.srt, cannot be read"):
        task.prompt(task.items[0])
    task = VideoMME(task.items, "lmms-eval", 2)
    with pytest.raises(Unreadable, match=r"video of 001-2, data/two.mp4, cannot be decoded"):
        task.prompt(task.items[2])
    outcome = Evaluation(task, Canned(VIDEO_SAID), tmp_path / "out").run(Run(None, 1.0))
    assert list(outcome.unreadable) == ["001-2", "001-3", "001-4"]
    assert (outcome.cell.right, outcome.cell.asked) == (2, 5)
    (tmp_path / "set" / "data" / "two.mp4").unlink()
    with pytest.raises(Unreadable, match=r"video of 001-2 is missing: there is no data/two.mp4"):
        task.prompt(task.items[2])


def test_a_name_cannot_lead_out_of_the_folder(folder, tmp_path):
    from vtoken.eval.benchmarks.example_data import write_videomme

    rows = video_rows()
    rows[0]["videoID"] = "../data/one"
    items = load(write_videomme(tmp_path, rows, {"one": [grey(9)] * 3, "two": [grey(9)] * 3}))
    with pytest.raises(Unreadable, match=r"is missing"):
        VideoMME(items, "strict", 1).prompt(items[0])
