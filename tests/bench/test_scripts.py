"""The scripts in benchmarks/: the kernel benchmark runs, and gpu.sh survives a part that fails."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from vtoken.cli.main import cli

ROOT = Path(__file__).parents[2]
STUB = """#!/usr/bin/env bash
printf '%q ' "$@" >>{record}
echo >>{record}
[[ "$*" != *attention* ]] || exit 3
"""


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("kernels")
    for name in ("kernels", "kernel_cases"):
        sys.modules.pop(name, None)


def call(kernels, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["kernels.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        kernels.main()
    return bool(end.value.code)


def test_kernel_cases_agree_and_join_one_file(kernels, monkeypatch, tmp_path, capsys):
    out = tmp_path / "k.json"
    arguments = ("--device", "cpu", "--repeats", 1, "--clock", "cpu", "--out", out)
    assert not call(kernels, monkeypatch, *arguments, "--only", "gather|CLS")
    assert not call(kernels, monkeypatch, *arguments, "--only", "bipartite|kv")
    report = json.loads(out.read_text())
    assert {
        "gather",
        "gather_merge",
        "gather_rows",
        "attention_rows: CLS",
        "bipartite_match",
        "kv_compact",
    } == set(report["cases"])
    for name, case in report["cases"].items():
        assert max(case["difference"].values()) < 1e-5, f"{name}: {case['difference']}"
    assert len(report["goals"]) == 6 and "gather" in capsys.readouterr().out


def test_a_kernel_that_fails_does_not_lose_the_others(kernels, monkeypatch, tmp_path):
    def broken(*_):
        raise RuntimeError("no such device")

    monkeypatch.setattr(kernels, "clock", broken)
    out = tmp_path / "k.json"
    assert call(kernels, monkeypatch, "--device", "cpu", "--only", "^gather$", "--out", out)
    monkeypatch.undo()
    assert not call(kernels, monkeypatch, "--device", "cpu", "--only", "kv", "--repeats", 1, "--out", out)
    cases = json.loads(out.read_text())["cases"]
    assert cases["gather"] == {"failed": "RuntimeError: no such device"} and cases["kv_compact"]["ms"]


@pytest.mark.parametrize("rehearsal", [True, False])
def test_gpu_script_calls_what_exists_and_goes_on_after_a_failure(tmp_path, rehearsal):
    stub, record, out = tmp_path / "python", tmp_path / "calls", tmp_path / "results"
    stub.write_text(STUB.format(record=shlex.quote(str(record))))
    stub.chmod(0o755)
    arguments = ["--device", "cpu", "--scale", "tiny"] if rehearsal else ["--device", "cpu"]
    command = [
        "bash",
        str(ROOT / "benchmarks" / "gpu.sh"),
        *arguments,
        "--python",
        str(stub),
        "--out",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    calls = [shlex.split(line) for line in record.read_text().splitlines()]
    assert "failed: kernels-attention(3)" in done.stdout and done.returncode == 1, done.stdout + done.stderr
    assert calls[0][:2] == ["-m", "pytest"] and "gpu" in calls[0]
    benches = [c[3:] for c in calls if c[:3] == ["-m", "vtoken", "bench"]]
    shapes = [cli.commands["bench"].make_context("bench", list(c)).params for c in benches]
    from vtoken.bench.shapes import SHAPES

    assert [name for p in shapes for name in p["shapes"]] == [*SHAPES]
    assert all(
        p["output"] == str(out / "models.json") and p["scale"] == ("tiny" if rehearsal else "full")
        for p in shapes
    )
    groups = [c[c.index("--only") + 1] for c in calls if c[0] == "benchmarks/kernels.py" and "--out" in c]
    from_here = (
        "gather",
        "gather_merge",
        "attention_rows: CLS",
        "farthest_point",
        "greedy_map",
        "kv_compact",
    )
    assert all(sum(bool(re.search(g, name)) for g in groups) == 1 for name in (*from_here, "bipartite_match"))
    # what all limits add up to, and the time it takes to tell that a part is over
    limits = [int(n) for n in re.findall(r"at most (\d+) s", done.stdout)]
    assert len(limits) >= 9 and (rehearsal or sum(limits) <= 580)


def test_unknown_options_are_refused():
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "--fast", "1"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "unknown option --fast" in done.stderr
