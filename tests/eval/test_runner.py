"""Runs that are killed, continued, shared by processes; contents of a folder; plans."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from vtoken.eval.benchmarks.mme import MME, load
from vtoken.eval.running.answer_log import read
from vtoken.eval.running.runner import Evaluation, Processes, Run, plan

from .canned import MME_ROWS, MME_SAID, Canned, mme_folder

RUN = Run("hired", 0.2)
ROOT = Path(__file__).parents[2]
KILLED = """
import os, signal, sys
from pathlib import Path
from tests.eval.canned import MME_SAID, Canned
from vtoken.eval.benchmarks.mme import MME, load
from vtoken.eval.running.runner import Evaluation, Run

class Mortal(Canned):
    def __call__(self, prompts, max_new_tokens):
        if len(self.prompts) >= 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(prompts, max_new_tokens)

Evaluation(MME(load(sys.argv[1])), Mortal(MME_SAID), sys.argv[2]).run(Run("hired", 0.2))
"""


@pytest.fixture
def task(tmp_path):
    return MME(load(mme_folder(tmp_path)), "lmms-eval")


def lines(folder: Path, run: Run = RUN) -> list[dict]:
    files = sorted(folder.glob(f"{run.stem}.*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def evaluation(task, folder, asker=None, **options) -> Evaluation:
    return Evaluation(task, asker or Canned(MME_SAID), folder, **options)


def test_a_killed_process_loses_the_question_in_flight_and_continues(tmp_path):
    data, out = mme_folder(tmp_path), tmp_path / "out"
    made = subprocess.run(
        [sys.executable, "-c", KILLED, str(data), str(out)], cwd=ROOT, capture_output=True, text=True
    )
    assert made.returncode == -signal.SIGKILL, made.stderr
    assert len(lines(out)) == 3
    task, asker = MME(load(data)), Canned(MME_SAID)
    continued = evaluation(task, out, asker).run(RUN)
    assert len(asker.prompts) == 3 and len(lines(out)) == 6
    assert continued == evaluation(task, tmp_path / "whole").run(RUN)
    assert lines(out) == lines(tmp_path / "whole")
    again = Canned(MME_SAID)
    assert evaluation(task, out, again).run(RUN) == continued and not again.prompts


@pytest.mark.parametrize("cut", [1, 30])
def test_a_half_written_line_is_asked_again(task, tmp_path, cut):
    whole = evaluation(task, tmp_path / "out").run(RUN)
    path = tmp_path / "out" / "hired-0.2.0.jsonl"
    before = path.read_bytes()
    path.write_bytes(before[:-cut])
    asker = Canned(MME_SAID)
    assert evaluation(task, tmp_path / "out", asker).run(RUN) == whole
    assert len(asker.prompts) == 1 and path.read_bytes() == before


def test_a_batch_that_was_cut_is_asked_again_as_a_whole(task, tmp_path):
    asker = Canned(MME_SAID)
    whole = evaluation(task, tmp_path / "out", asker, batch_size=4).run(RUN)
    assert asker.batches == [4, 2]
    path = tmp_path / "out" / "hired-0.2.0.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    asker = Canned(MME_SAID)
    assert evaluation(task, tmp_path / "out", asker, batch_size=4).run(RUN) == whole
    assert asker.batches == [4, 2] and len(lines(tmp_path / "out")) == 6


def test_other_settings_are_refused(task, tmp_path):
    evaluation(task, tmp_path / "out", settings={"model": "a"}).run(RUN)
    with pytest.raises(ValueError, match=r"under model = 'a', this run has 'b'.*another --output"):
        evaluation(task, tmp_path / "out", settings={"model": "b"})
    with pytest.raises(ValueError, match=r"protocol = 'lmms-eval', this run has 'strict'"):
        evaluation(MME(list(task.items), "strict"), tmp_path / "out", settings={"model": "a"})
    with pytest.raises(ValueError, match=r"under batch_size = 1, this run has 2"):
        evaluation(task, tmp_path / "out", settings={"model": "a"}, batch_size=2)


def test_an_answer_that_is_there_twice_is_read_once(task, tmp_path):
    first = evaluation(task, tmp_path / "out").run(RUN)
    path = tmp_path / "out" / "hired-0.2.0.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    other = json.dumps(json.loads(lines[2]) | {"answer": "something else"}) + "\n"
    (tmp_path / "out" / "hired-0.2.1.jsonl").write_text(lines[2] + other)
    path.write_text("".join(lines) + "".join(lines))  # all doubled
    asker = Canned(MME_SAID)
    assert evaluation(task, tmp_path / "out", asker).run(RUN) == first and not asker.prompts


def test_foreign_and_broken_records_are_errors(task, tmp_path):
    evaluation(task, tmp_path / "out").run(RUN)
    path = tmp_path / "out" / "hired-0.2.0.jsonl"
    before = path.read_text()
    path.write_text(before + json.dumps({"item": "stranger", "answer": "yes"}) + "\n")
    with pytest.raises(ValueError, match=r"an answer to 'stranger', which the data set does not ask"):
        evaluation(task, tmp_path / "out").run(RUN)
    for broken in ("{\n", "[1]\n", "{}\n"):
        path.write_text(broken + before)
        with pytest.raises(ValueError, match=r"Line 1 of .*hired-0.2.0.jsonl' is no record"):
            evaluation(task, tmp_path / "out").run(RUN)


HOLD = """
import sys, time
from pathlib import Path
from vtoken.eval.running.answer_log import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other_evaluation(tmp_path):
    """Another process that evaluates into a folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_evaluation_in_a_folder_is_refused_until_the_first_dies(task, tmp_path, other_evaluation):
    with pytest.raises(BlockingIOError, match=r"Another evaluation writes into .*out'.*another --output"):
        evaluation(task, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.json*"))
    assert evaluation(task, tmp_path / "elsewhere").run(RUN)
    other_evaluation.kill()  # as a crash or a power cut would
    other_evaluation.wait()
    assert len(read(tmp_path / "out", RUN.stem, [])) == 0
    assert evaluation(task, tmp_path / "out").run(RUN).cell.asked == 6


def test_a_run_under_way_keeps_threads_out_too(task, tmp_path):
    heard = []

    def second() -> None:
        with pytest.raises(BlockingIOError):
            made.run(RUN)
        heard.append("refused")

    def intrude(prompts: object) -> None:
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()

    made = evaluation(task, tmp_path / "out", step=intrude)
    made.run(RUN)
    assert len(heard) == 6 and len(read(tmp_path / "out", RUN.stem, made.names)) == 6
    lines = (tmp_path / "out" / "hired-0.2.0.jsonl").read_text().splitlines()
    assert len(lines) == 6 and made.run(RUN)


def test_a_missing_answer_is_an_error_with_its_name(task, tmp_path):
    made = evaluation(task, tmp_path / "out")
    made.run(RUN)
    records = read(tmp_path / "out", RUN.stem, made.names)
    del records[made.names[4]]
    with pytest.raises(
        ValueError, match=r"hired 0.2 has no answer to 'code_reasoning: .*Is it Python.*and 0 more"
    ):
        made.outcome(RUN, records)


def test_items_that_could_be_opened_later_are_asked_again(task, tmp_path):
    item = task.items[1]
    good = item.media
    object.__setattr__(item, "media", lambda: 1 / 0)
    first = evaluation(task, tmp_path / "out").run(RUN)
    assert list(first.unreadable) == [item.name] and "division" in first.unreadable[item.name]
    asker = Canned(MME_SAID)
    assert evaluation(task, tmp_path / "out", asker).run(RUN) == first and not asker.prompts
    object.__setattr__(item, "media", good)
    asker = Canned(MME_SAID)
    assert not evaluation(task, tmp_path / "out", asker).run(RUN).unreadable and len(asker.prompts) == 1


def test_nothing_that_can_be_opened_is_an_error(task, tmp_path):
    for item in task.items:
        object.__setattr__(item, "media", lambda: 1 / 0)
    with pytest.raises(
        ValueError, match=r"None of the 6 items could be opened; the first: The image of existence"
    ):
        evaluation(task, tmp_path / "out").run(RUN)


def test_a_refusal_is_heard_before_anything_is_asked(task, tmp_path):
    asker = Canned(MME_SAID, refuses="hired")
    assert evaluation(task, tmp_path / "out", asker).run(RUN) == "no thank you" and not asker.prompts
    assert evaluation(task, tmp_path / "out", asker).run(Run("random", 0.2)).cell.baseline


@pytest.mark.parametrize(("count", "batch_size"), [(2, 1), (2, 4), (4, 4)])
def test_several_processes_are_one(task, tmp_path, count, batch_size):
    barrier, made, askers = threading.Barrier(count, timeout=60), {}, [Canned(MME_SAID) for _ in range(count)]

    def work(index: int) -> None:
        shared = Processes(index, count, barrier.wait)
        made[index] = evaluation(
            task, tmp_path / "out", askers[index], batch_size=batch_size, processes=shared
        ).run(RUN)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    one = evaluation(task, tmp_path / "one", batch_size=batch_size).run(RUN)
    assert all(made[i] == one for i in range(count))
    assert sum(len(a.prompts) for a in askers) == 6 and askers[0].batches != []
    if count == 2:
        assert all(a.prompts for a in askers) and len(list((tmp_path / "out").glob("*.jsonl"))) == 2
    # other processes may continue: here one takes over from several
    (tmp_path / "out" / "hired-0.2.0.jsonl").unlink()
    assert evaluation(task, tmp_path / "out", batch_size=batch_size).run(RUN) == one


def test_progress_counts_what_is_left(task, tmp_path):
    heard = []
    made = evaluation(task, tmp_path / "out", batch_size=4, step=heard.append)
    assert made.progress(RUN) == (0, 6)
    made.run(RUN)
    assert heard == [4, 2] and made.progress(RUN) == (6, 0)


def test_plans():
    dense = Run(None, 1.0)
    assert plan(["a"], [0.2]) == [Run("a", 0.2)]
    assert plan(["a", "b", "a"], [1.0, 0.5, 64, 0.5]) == [
        dense, Run("a", 0.5), Run("a", 64), Run("b", 0.5), Run("b", 64),
    ]  # fmt: skip
    assert plan(["a"], [1], 8) == [Run("a", 1, 8)]
    for budgets in ([1.0, 1], [1, 1.0]):
        assert [(r.strategy, repr(r.budget)) for r in plan(["a"], budgets)] == [(None, "1.0"), ("a", "1")]
    same = plan(["a"], [1.0, 0.5, 0.1, 0.3], same_tokens_as=8)
    assert [run.frames for run in same] == [8, 16, 80, 26]
    with pytest.raises(ValueError, match=r"exclude"):
        plan(["a"], [0.5], 8, 8)
    with pytest.raises(ValueError, match=r"needs budgets that are shares"):
        plan(["a"], [64], same_tokens_as=8)


def test_names_of_runs():
    assert Run("visionzip+fastv", 64, 8).stem == "visionzip+fastv-64-8-frames"
    assert Run(None, 1.0).stem == "all-visual-tokens" and len(MME_ROWS) == 6
