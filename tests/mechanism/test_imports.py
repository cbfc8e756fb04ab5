"""What importing costs, and which room may import which."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vtoken

ROOT = Path(vtoken.__file__).parent
CODE = """
import sys, time, socket
import torch
def refuse(*a, **k):
    raise RuntimeError("network")
socket.socket.connect = socket.getaddrinfo = refuse
before = {(m, k): v for m in list(sys.modules.values()) if getattr(m, "__name__", "").startswith("torch")
          for k, v in list(vars(m).items()) if callable(v)}
start = time.process_time()
import vtoken
print(time.process_time() - start)
assert "transformers" not in sys.modules, "transformers is imported before it is needed"
changed = [key for key, v in before.items() if vars(key[0]).get(key[1]) is not v]
assert not changed, changed
import transformers.cache_utils, transformers.masking_utils, transformers.generation.utils
from transformers import LlavaForConditionalGeneration, DynamicCache, StaticCache
def members():
    spaces = [transformers.cache_utils, transformers.masking_utils, transformers.generation.utils]
    spaces += [LlavaForConditionalGeneration, DynamicCache, StaticCache]
    spaces += [v for v in vars(transformers.cache_utils).values() if isinstance(v, type)]
    return {(i, k): id(v) for i, s in enumerate(spaces) for k, v in vars(s).items() if callable(v)}
tables = {k: dict(v) for k, v in vars(transformers.cache_utils).items() if isinstance(v, dict) and k.isupper()}
was = members()
import vtoken.patching, vtoken.adapters.registry
vtoken.list_strategies()
vtoken.adapters.registry.list_families()
assert members() == was, "transformers was patched"
assert all(vars(transformers.cache_utils)[k] == v for k, v in tables.items())
"""


def test_importing_patches_nothing_and_is_quick():
    out = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, cwd=ROOT.parent)
    assert out.returncode == 0, out.stderr
    assert float(out.stdout.split()[0]) < 1.0


# A room may import itself, what is listed here, and nothing else of the package; "*" is everything.
MAY_IMPORT = {
    "tokens": (),
    "streams": (),
    "kernels": (),
    "_threads": (),
    "limits": (),
    "images": ("limits",),
    "accounting": ("tokens", "streams"),
    "checks": (),
    "_json": (),
    "strategies": ("tokens", "streams", "kernels", "checks"),
    "adapters": ("tokens", "streams", "kernels", "_threads"),
    "config": ("strategies", "checks", "_json"),
}
LIBRARIES = {  # third-party packages that a room must not touch
    "tokens": ("transformers", "triton", "timm", "open_clip", "accelerate"),
    "streams": ("transformers", "triton", "timm", "open_clip", "accelerate"),
    "kernels": ("transformers", "timm", "open_clip", "accelerate"),
    "strategies": ("transformers", "timm", "open_clip", "accelerate"),
    "adapters": ("accelerate",),
}


def rooms() -> list[Path]:
    return sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


def imports(path: Path) -> list[tuple[str, str]]:
    """(package, room) of every import outside of `if TYPE_CHECKING`; room is "" for other packages."""
    tree, found = ast.parse(path.read_text()), []
    package = ["vtoken", *path.relative_to(ROOT).parent.parts]
    hidden = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = base + (node.module.split(".") if node.module else [])
            names = [[*module, alias.name] for alias in node.names] if module == ["vtoken"] else [module]
        else:
            continue
        found += [(n[0], n[1] if n[0] == "vtoken" and len(n) > 1 else "") for n in names]
    return found


@pytest.mark.parametrize("path", rooms(), ids=lambda p: str(p.relative_to(ROOT)))
def test_who_may_import_whom(path):
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for package, other in imports(path):
        if package == "vtoken" and room in MAY_IMPORT:
            assert other in (room, *MAY_IMPORT[room]), f"{room} imports vtoken.{other}"
        assert package not in LIBRARIES.get(room, ()), f"{room} imports {package}"


def test_adapters_name_no_strategy():
    names = vtoken.list_strategies()
    for path in (ROOT / "adapters").rglob("*.py"):
        words = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
        assert not words & set(names), f"{path.name} names a strategy"


def test_a_strategy_is_one_short_file():
    lengths = {p.name: len(p.read_text().splitlines()) for p in (ROOT / "strategies").glob("*.py")}
    assert not {name: n for name, n in lengths.items() if n > 250}


UNPICKLES = {
    "torch": ("load",),
    "pickle": ("load", "loads", "Unpickler"),
    "marshal": ("load", "loads"),
    "shelve": ("open",),
    "joblib": ("load",),
    "dill": ("load", "loads"),
    "cloudpickle": ("load", "loads"),
    "pd": ("read_pickle",),
    "pandas": ("read_pickle",),
}


def unpickling(code: str) -> list[str]:
    """What in a file's code reads data in a form that can carry code, by name."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.attr in UNPICKLES.get(node.value.id, ()):
                found.append(f"{node.value.id}.{node.attr}")
        elif isinstance(node, ast.ImportFrom) and node.module in UNPICKLES:
            names = [alias.name for alias in node.names if alias.name in UNPICKLES[node.module]]
            found += [f"{node.module}.{name}" for name in names]
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found += ["allow_pickle"] * (getattr(node.value, "value", True) is not False)
    return found


def test_nothing_in_the_package_reads_data_that_can_carry_code():
    known = "import torch\ntorch.load('x', weights_only=True)\nfrom pickle import loads\nnp.load('x', allow_pickle=True)"
    assert sorted(unpickling(known)) == ["allow_pickle", "pickle.loads", "torch.load"]
    found = {str(path.relative_to(ROOT)): unpickling(path.read_text()) for path in ROOT.rglob("*.py")}
    assert not {path: names for path, names in found.items() if names}
