"""The Triton kernels, each run in a process of its own: see `triton_checks.py`."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.version import Version

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run(*args: str, **env: str) -> None:
    root = HERE.parents[1]
    env = {**os.environ, "PYTHONPATH": str(root), **env}
    done = subprocess.run([sys.executable, *args], cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]


def checks(**env: str) -> None:
    run(
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        str(HERE / "triton_checks.py"),
        **env,
    )


def test_interpreted_on_the_cpu():
    from importlib.metadata import version

    if Version(version("triton")) < Version("3.7") and Version(version("numpy")) >= Version("2.4"):
        pytest.skip("the interpreter of this triton cannot read scalars of this NumPy")
    checks(TRITON_INTERPRET="1", VTOKEN_TEST_DEVICE="cpu", OMP_NUM_THREADS="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_on_the_gpu():
    checks(TRITON_INTERPRET="0", VTOKEN_TEST_DEVICE="cuda")


@pytest.mark.slow
def test_every_kernel_compiles_for_a_gpu_that_is_not_here():
    run(str(HERE / "compile_kernels.py"), "80", TRITON_INTERPRET="0")
