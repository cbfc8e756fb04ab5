"""The notebooks are stripped, run without a network, and need one changed line for another model."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import tempfile
from contextlib import contextmanager

import pytest

import vtoken

from .test_guides import ROOT

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

FOLDER = ROOT / "notebooks"
COLAB = "https://colab.research.google.com/github/vtoken/vtoken/blob/main/notebooks"
MODEL = re.compile(r'^MODEL = "(\w+)"', re.M)
INSTALL = re.compile(
    r'import sys\nimport warnings\n\nif "google\.colab" in sys\.modules:\n'
    r'    %pip install -q "vtoken\[[\w,]+\] @ git\+https://github\.com/vtoken/vtoken"\n\n.*'
)
# pictures, and what is printed only where visual tokens were dropped
SHOWS = {
    "first_steps": (2, "144 -> 36 visual tokens", r" 7 of 144 .*\n", "as before: True"),
    "compare_strategies": (2, r"\nall +144 +100% +100% ", r"\nfarcover +14 +1\d% ", r"\nfastv +79 +5\d% "),
    "prune_a_video": (2, "144 -> 36 visual tokens", "312 of 576 tokens computed", "32 frames.* 144 of 576 "),
    "live_stream": (1, r"all tokens +72 visual tokens", r"stc, half +36 visual tokens"),
    "evaluate_with_mme": (1, r"\| dense .* 144\.0 of 144\.0 \|", r"\| farcover \| 0\.05 \| 7\.0 of 144\.0 "),
    "write_a_strategy": (1, r"unusual\(budget=0\.1\)", "144 -> 14 visual tokens", "every must be 1 or more"),
}
# torch logs this about enums of torchao, which transformers imports where it is installed
LOGGED = re.compile(r"^W\d{4} .*torch/utils/_pytree\.py.*\n?", re.M)
every = pytest.mark.parametrize("name", SHOWS)


def read(name: str):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code(notebook) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


@contextmanager
def kernel():
    """A client of a new kernel of this interpreter in a folder of its own, over files instead of ports."""
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
    from jupyter_core.utils import run_sync

    class Own(KernelSpecManager):
        def get_kernel_spec(self, kernel_name):
            start = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
            return KernelSpec(argv=start, language="python", display_name="Python 3")

    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(prefix="nb") as folder,  # a socket's path has to be short
    ):
        for key, value in {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}.items():
            patch.setenv(key, value)
        patch.delenv("TRANSFORMERS_VERBOSITY", raising=False)  # a reader has not set it
        manager = AsyncKernelManager(
            kernel_spec_manager=Own(), transport="ipc", connection_file=f"{folder}/kernel.json"
        )
        client = nbclient.NotebookClient(
            nbformat.v4.new_notebook(), km=manager, timeout=300, resources={"metadata": {"path": folder}}
        )
        try:
            yield client
        finally:
            if (
                client.kc is not None
            ):  # its finaliser logs about open channels, to a stream that is closed by then
                client.kc.stop_channels()
                client.kc.context.destroy(linger=0)
            run_sync(manager.shutdown_kernel)(now=True)


def run(client, notebook) -> tuple[str, int]:
    """All that a notebook prints, tables included, and the number of its pictures."""
    client.nb = notebook
    client.execute()
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    errors = "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stderr")
    assert not LOGGED.sub("", errors)
    data = [o.data for o in outputs if o.output_type in ("display_data", "execute_result")]
    said = [o.text for o in outputs if o.output_type == "stream"]
    said += [d.get("text/markdown", "") for d in data]
    return "".join(said), sum("image/png" in d for d in data)


def check(name: str, said: str, pictures: int) -> None:
    expected, *patterns = SHOWS[name]
    assert pictures == expected
    assert not [p for p in patterns if not re.search(p, said)], said


def test_every_notebook_is_tested():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(SHOWS)


@every
def test_it_is_stripped_and_valid(name):
    spec = importlib.util.spec_from_file_location("strip", FOLDER / "strip.py")
    strip = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(strip)
    text = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    assert text == strip.stripped(text), "run notebooks/strip.py"
    nbformat.validate(nbformat.reads(text, as_version=4))
    executed = re.sub(
        r'"outputs": \[\]', '"outputs": [{"name": "stdout", "output_type": "stream", "text": ""}]', text
    )
    executed = executed.replace('"execution_count": null', '"execution_count": 3')
    assert executed != text and strip.stripped(executed) == text


@every
def test_it_opens_in_colab_and_installs_nowhere_else(name):
    notebook = read(name)
    assert f"[Open in Colab]({COLAB}/{name}.ipynb)" in notebook.cells[0].source
    page = (ROOT / "docs/notebooks.md").read_text(encoding="utf-8")
    assert f"[{name}](../notebooks/{name}.ipynb)" in page and f"[open]({COLAB}/{name}.ipynb)" in page
    install, *others = code(notebook)
    assert INSTALL.fullmatch(install) and "%pip" not in "".join(others) and "!" not in [s[:1] for s in others]
    assert len(code(notebook)) <= 13 and len(MODEL.findall("\n".join(others))) == 1
    for other in re.findall(r"\]\((?!https:)([\w.]+)\)", "".join(c.source for c in notebook.cells)):
        assert (FOLDER / other).is_file()


@pytest.fixture(scope="module")
def shared():
    """One kernel for all, as most of a notebook's time goes to the import of transformers."""
    with kernel() as client:
        yield client


def anew(notebook):
    """With a first cell that forgets the names of the notebook before."""
    notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))
    return notebook


@pytest.mark.slow
@every
def test_it_runs(name, shared):
    check(name, *run(shared, anew(read(name))))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, model, patterns",
    [
        # a folder is loaded as a model of the Hub is
        ("first_steps", str(vtoken.tiny.path("qwen2_5_vl")), ("100 -> 25 visual tokens", "as before: True")),
        ("prune_a_video", "llava_onevision", (r"289 -> \d\d visual tokens", r"32 frames.* 288 of 1153 ")),
    ],
    ids=["folder", "video"],
)
def test_another_model_takes_one_line(name, model, patterns, shared):
    notebook = anew(read(name))
    for cell in notebook.cells:
        cell.source = MODEL.sub(lambda _: f"MODEL = {model!r}", cell.source)
    said, pictures = run(shared, notebook)
    assert pictures == SHOWS[name][0] and all(re.search(p, said) for p in patterns), said


@pytest.mark.product
@every
def test_it_runs_alone(name):
    """In a process of its own, so that a warning of an import is seen in each."""
    with kernel() as client:
        check(name, *run(client, read(name)))
