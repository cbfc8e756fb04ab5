"""MME: prompts and parsing of each harness, scores computed by hand, and faulty data sets."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vtoken.eval.benchmarks.example_data import png, write_mme, write_mme_tsv
from vtoken.eval.benchmarks.mme import COGNITION, MME, PERCEPTION, load
from vtoken.eval.benchmarks.task import Unreadable
from vtoken.eval.protocols.yes_no import PROTOCOLS
from vtoken.eval.running.runner import Evaluation, Run

from .canned import MME_SAID, Canned, mme_folder, mme_rows

READINGS = {  # text: (strict, lmms-eval, vlmevalkit), by hand
    "Yes": ("yes", "yes", "yes"),
    " no.\n": ("no", "no", "no"),
    "NO": ("no", "no", "no"),
    "": ("", "", ""),
    "y": ("", "yes", ""),
    "N.": ("", "no", ""),
    "x": ("", "", ""),
    "Yes, it is.": ("", "yes", "yes"),
    "yes,it is": ("", "yes", "yes"),
    "Yesterday": ("", "yes", ""),
    "Nothing": ("", "no", ""),
    "I know": ("", "", ""),
    "know": ("", "no", ""),
    "yes or no": ("", "yes", ""),
    "It is: yes": ("", "", "yes"),
    "(yes)": ("", "yes", "yes"),
    "a no-go": ("", "no", "no"),  # lmms-eval finds "no" in "a no", VLMEvalKit makes a space of the hyphen
    "yes(no": ("", "yes", ""),  # VLMEvalKit: the two words
    "yes(no (": ("", "yes", ""),  # VLMEvalKit: one word, yesno
    "yes/no 1,000": ("", "yes", ""),  # a comma between digits joins everything
    "yes/ 1,000": ("", "yes", "yes"),
    "no.yes": ("", "no", ""),
    "No 3.5": ("", "no", "no"),
}


@pytest.mark.parametrize("text", READINGS)
def test_readings(text):
    assert tuple(PROTOCOLS[p].read(text) for p in ("strict", "lmms-eval", "vlmevalkit")) == READINGS[text]


def test_prompts():
    question = " Is a dog here? Please answer yes or no. "
    assert PROTOCOLS["strict"].prompt(question) == "Is a dog here? Please answer yes or no."
    assert PROTOCOLS["vlmevalkit"].prompt(question) == question
    asked = "Is a dog here?\nAnswer the question using a single word or phrase."
    assert PROTOCOLS["lmms-eval"].prompt(question) == asked


SCORES = {  # protocol: (perception, cognition), acc and acc+ of existence and of code_reasoning, by hand
    "strict": (25.0, 0.0, (25.0, 0.0), (0.0, 0.0)),
    "lmms-eval": (125.0, 200.0, (75.0, 50.0), (100.0, 100.0)),
    "vlmevalkit": (125.0, 0.0, (75.0, 50.0), (0.0, 0.0)),
}


@pytest.mark.parametrize("protocol", SCORES)
@pytest.mark.parametrize("layout", ["parquet", "tsv"])
def test_scores_by_hand(tmp_path, protocol, layout):
    source = mme_folder(tmp_path) if layout == "parquet" else write_mme_tsv(tmp_path / "MME.tsv", mme_rows())
    outcome = Evaluation(MME(load(source), protocol), Canned(MME_SAID), tmp_path / "out").run(
        Run("hired", 0.2)
    )
    perception, cognition, existence, code = SCORES[protocol]
    scores = outcome.breakdown.scores
    assert (scores["perception"], scores["cognition"], scores["sum"]) == (
        perception,
        cognition,
        perception + cognition,
    )
    for category, (acc, plus) in {"existence": existence, "code_reasoning": code}.items():
        assert scores["categories"][category] == {"acc": acc, "acc+": plus, "score": acc + plus}
    right = round(existence[0] / 25) + round(code[0] / 50)
    assert (outcome.cell.right, outcome.cell.asked) == (right, 6)
    assert (
        outcome.cell.tokens == 20
        and outcome.cell.tokens_in == 100
        and outcome.cell.flops == pytest.approx(0.2)
    )
    assert outcome.ttft == 0.25 and not outcome.unreadable and len(outcome.wrong) == 6 - right
    assert len(outcome.unparsed) == {"strict": 5, "lmms-eval": 1, "vlmevalkit": 3}[protocol]
    perception_shown, cognition_shown, total = outcome.breakdown.columns.values()
    assert perception_shown == f"{perception:.1f} of 200" and cognition_shown == f"{cognition:.1f} of 200"
    assert total == f"{perception + cognition:.1f}"


def test_a_perfect_run_over_all_categories_scores_2000_and_800(tmp_path):
    rows = [
        {"question_id": f"{c}.png", "image": b"", "question": f"{c} {a}?", "answer": a, "category": c}
        for c in PERCEPTION + COGNITION
        for a in ("Yes", "No")
    ]
    items = load(write_mme(tmp_path, rows))
    assert len(PERCEPTION) == 10 and len(COGNITION) == 4
    made = MME(items).breakdown({item.name: True for item in items})
    assert made.columns == {"perception": "2000.0 of 2000", "cognition": "800.0 of 800", "sum": "2800.0"}
    assert [row[0] for row in made.rows if "categories" in row[0]] == [
        "perception, 10 of 10 categories",
        "cognition, 4 of 4 categories",
    ]


@pytest.mark.parametrize("layout", ["parquet", "tsv"])
def test_images_are_those_of_their_rows(tmp_path, layout):
    rows = mme_rows()
    for i, row in enumerate(rows):
        row["image"] = Image.new("RGB", (4, 4), (40 * (i // 2), 0, 0))
    source = write_mme(tmp_path, rows) if layout == "parquet" else write_mme_tsv(tmp_path / "a.tsv", rows)
    task = MME(load(source), "strict")
    seen = [task.prompt(item).image.getpixel((0, 0)) for item in task.items]
    assert seen == [(40 * (i // 2), 0, 0) for i in range(6)]
    assert task.items[0].name == "existence: existence/e1.png: Is a dog here? Please answer yes or no."


@pytest.mark.parametrize("cell", ["e1.png", None, {"bytes": None, "path": "e1.png"}])
def test_an_image_that_is_only_named_says_what_to_store(tmp_path, cell):
    rows = [row | {"image": cell} for row in mme_rows()]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "test.parquet")
    item = load(tmp_path)[0]
    with pytest.raises(
        Unreadable, match=r"column 'image' has .* in this row: store the bytes of a PNG or JPEG"
    ):
        MME([item]).prompt(item)


def spoiled(**changes):
    rows = mme_rows()
    rows[3] |= changes
    return rows


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (spoiled(answer="Maybe"), "e2.png.*fox.*answer 'Maybe'"),
        (spoiled(answer=""), "e2.png.*fox.*answer ''"),
        (spoiled(category="colour"), "e2.png.*category that MME does not have"),
        (
            spoiled(question="Is a cow here? Please answer yes or no."),
            "asks 'existence: existence/e2.png: Is a cow.*twice",
        ),
        (spoiled(question_id="e9.png"), "two questions, but 'existence: existence/e2.png' has 1, and 1 more"),
        (mme_rows()[:5], "two questions, but 'code_reasoning: code_reasoning/c1.png' has 1"),
        (
            [{k: v for k, v in row.items() if k != "category"} for row in mme_rows()],
            "lacks the column category",
        ),
    ],
)
def test_a_wrong_data_set_is_refused_by_name(tmp_path, rows, words):
    with pytest.raises(ValueError, match=words):
        load(write_mme(tmp_path, rows))


@pytest.mark.parametrize("source", ["nowhere", "nobody/nothing"])
def test_a_missing_data_set_says_how_to_get_it(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"{source}.*hf download lmms-lab/MME") as raised:
        load(source)
    assert "\n" not in str(raised.value)


def test_an_id_on_the_hub_downloads_parquet_files_alone(tmp_path, monkeypatch):
    folder, calls = mme_folder(tmp_path), []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *a, **k: calls.append((a, k)) or str(folder)
    )
    assert len(load()) == len(load("some/where")) == 6
    only = {"repo_type": "dataset", "allow_patterns": ["*.parquet"]}
    assert calls == [(("lmms-lab/MME",), only), (("some/where",), only)]


def test_other_files_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no parquet files.*hf download"):
        load(tmp_path / "empty")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test-0.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"test-0.parquet.*is no parquet file"):
        load(tmp_path / "data")
    (tmp_path / "mme.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match=r"is a file, but no .tsv"):
        load(tmp_path / "mme.csv")
    (tmp_path / "mme.tsv").write_text("index\tquestion\n1\ta?\n")
    with pytest.raises(ValueError, match=r"lacks the column image, answer, category, image_path"):
        load(tmp_path / "mme.tsv")


def test_only_the_test_split_is_read(tmp_path):
    write_mme(tmp_path, mme_rows())
    (tmp_path / "data" / "train-00000-of-00001.parquet").write_bytes(b"never opened")
    assert len(load(tmp_path)) == 6


@pytest.mark.parametrize("layout", ["parquet", "tsv"])
def test_an_image_that_cannot_be_decoded_counts_as_wrong_and_is_named(tmp_path, layout):
    rows = mme_rows()
    rows[0]["image"] = rows[1]["image"] = png(rows[0]["image"])[:40] + b"x" * 60
    source = (
        write_mme(tmp_path / "mme", rows) if layout == "parquet" else write_mme_tsv(tmp_path / "a.tsv", rows)
    )
    task = MME(load(source), "lmms-eval")
    with pytest.raises(Unreadable, match=r"image of existence: existence/e1.png: Is a dog"):
        task.prompt(task.items[0])
    outcome = Evaluation(task, Canned(MME_SAID), tmp_path / "out").run(Run(None, 1.0))
    assert list(outcome.unreadable) == [task.items[0].name, task.items[1].name]
    # without e1 existence has one right of four and no pair; the tokens are those of what was read
    assert outcome.breakdown.scores["categories"]["existence"] == {"acc": 25.0, "acc+": 0.0, "score": 25.0}
    assert (outcome.cell.right, outcome.cell.asked, outcome.cell.tokens) == (3, 6, 100.0)


def test_an_unknown_protocol(tmp_path):
    with pytest.raises(ValueError, match=r"no protocol 'loose': use strict, lmms-eval, vlmevalkit"):
        MME(load(mme_folder(tmp_path)), "loose")
