"""Cost of importing vtoken, and the imports that each room may have."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
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


# Every room (a folder or a file) from the ground up, and the other rooms that it may import.
GROUND = (
    "_json",
    "_threads",
    "checks",
    "extras",
    "hooks",
    "kernels",
    "limits",
    "llm_shape",
    "plugins",
    "selection",
    "storage",
    "streams",
    "version",
    "videos",
)
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(GROUND, ()),
    "sparse_attention": ("selection",),
    "temporal": ("streams",),
    "tokens": ("selection",),
    "images": ("limits",),
    "accounting": ("selection", "tokens", "streams"),
    "lettering": (),
    "drawing": ("lettering",),
    "tiny": ("extras", "videos"),
    "asking": ("tiny",),
    "video": ("checks", "images", "limits", "tiny"),
    "naming": ("_json",),
    "strategies": (
        *("checks", "kernels", "llm_shape", "naming", "plugins", "sparse_attention", "storage", "streams"),
        *("selection", "temporal", "tokens"),
    ),
    "adapters": (
        "_threads",
        "checks",
        "hooks",
        "kernels",
        "plugins",
        "streams",
        "selection",
        "temporal",
        "tokens",
    ),
    "mechanism": (
        *("_threads", "adapters", "call_frames", "hooks", "kernels", "sparse_attention", "storage"),
        *("streams", "selection", "temporal", "tokens"),
    ),
    "stage_times": ("hooks", "recorder"),
    "recorder": ("_threads", "accounting", "llm_shape", "mechanism", "streams"),
    "config": ("_json", "checks", "naming", "strategies"),
    "resize": ("strategies",),
    "call_frames": (),
    "active": ("call_frames", "streams"),
    "gate": ("active", "call_frames"),
    "fit": (
        *("adapters", "checks", "mechanism", "storage", "strategies", "streams", "selection", "temporal"),
        "tokens",
    ),
    "requested": ("adapters", "config", "fit", "strategies"),
    "trained_weights": ("adapters", "llm_shape", "strategies"),
    "saving": ("config", "patching", "strategies", "trained_weights"),
    "encoder_patching": (
        *("_threads", "accounting", "active", "adapters", "fit", "gate", "hooks", "mechanism", "recorder"),
        "strategies",
    ),
    "rates_search": ("adapters", "hooks", "strategies", "tokens"),
    "rates": ("adapters", "rates_search", "strategies"),
    "model_patching": (
        *("active", "adapters", "fit", "gate", "hooks", "kernels", "mechanism", "recorder", "strategies"),
        *("selection", "temporal", "tokens", "trained_weights"),
    ),
    "patching": (
        *(
            "accounting",
            "active",
            "adapters",
            "encoder_patching",
            "model_patching",
            "requested",
            "strategies",
        ),
    ),
    "integrations": (
        *("_json", "adapters", "config", "extras", "fit", "kernels", "requested", "strategies", "tokens"),
    ),
    "retrieval_training": ("checks", "extras", "patching", "strategies", "streams", "videos"),
    "streaming": (
        *(
            "active",
            "adapters",
            "checks",
            "fit",
            "images",
            "kernels",
            "mechanism",
            "model_patching",
            "patching",
            "requested",
            "strategies",
            "streams",
        ),
        "selection",
        "tokens",
    ),
    "video_answers": ("asking", "checks", "limits", "patching", "stage_times", "video"),
    # the public face, as users import it: `import vtoken`
    "vtoken": (
        *(
            "accounting",
            "config",
            "fit",
            "mechanism",
            "patching",
            "resize",
            "saving",
            "strategies",
            "streaming",
            "streams",
        ),
        *(
            "drawing",
            "rates",
            "retrieval_training",
            "selection",
            "tiny",
            "tokens",
            "version",
            "video",
            "video_answers",
            "videos",
        ),
    ),
    "fine_tuning": ("_json", "config", "extras", "images", "patching", "saving", "strategies", "video"),
    "bench": (
        *(
            "_json",
            "asking",
            "checks",
            "extras",
            "mechanism",
            "recorder",
            "stage_times",
            "strategies",
            "tiny",
        ),
        "vtoken",
    ),
    "eval": (
        "_json",
        "asking",
        "checks",
        "config",
        "extras",
        "images",
        "naming",
        "strategies",
        "tiny",
        "video",
        "vtoken",
    ),
    "cli": (
        *(
            "_json",
            "asking",
            "bench",
            "checks",
            "eval",
            "config",
            "extras",
            "fine_tuning",
            "images",
            "limits",
            "naming",
            "patching",
            "strategies",
            "streaming",
            "streams",
        ),
        *("tiny", "video", "drawing", "vtoken"),
    ),
    "__main__": ("cli",),
}
LIBRARIES = {  # third-party packages that a room must not touch
    "tokens": ("transformers", "triton", "timm", "open_clip", "accelerate"),
    "streams": ("transformers", "triton", "timm", "open_clip", "accelerate"),
    "kernels": ("transformers", "timm", "open_clip", "accelerate"),
    "strategies": ("transformers", "timm", "open_clip", "accelerate"),
    "adapters": ("accelerate",),
    "mechanism": ("timm", "open_clip", "accelerate"),
}
FILES = sorted(ROOT.rglob("*.py"))
NAMES = {
    path: ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in FILES
}


def room_of(module: str) -> str:
    """The room of a module's full name; the package itself is a room."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def imports(path: Path) -> set[str]:
    """The modules that a file imports, by full name; those of the package down to the file. Type checkers'
    imports count.
    """
    found, package = set(), ["vtoken", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            names = {f"{module}.{alias.name}" for alias in node.names}
            files = names & set(NAMES.values())
            found |= files or {module}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_who_may_import_whom(path):
    room = room_of(NAMES[path])
    assert room in MAY_IMPORT, f"say in MAY_IMPORT what the room {room} may import"
    for module in imports(path):
        package = module.split(".")[0]
        if package == "vtoken":
            assert room_of(module) in (room, *MAY_IMPORT[room]), f"{room} imports {module}"
        assert package not in LIBRARIES.get(room, ()), f"{room} imports {package}"


def test_no_room_imports_a_higher_one():
    assert set(MAY_IMPORT) == {room_of(name) for name in NAMES.values()}
    tuple(TopologicalSorter(MAY_IMPORT).static_order())  # raises CycleError


def test_no_circle_of_files():
    graph = {}
    for path in FILES:
        package = NAMES[path] if path.name == "__init__.py" else NAMES[path].rpartition(".")[0]
        # that importing a file runs the __init__ of its folder is no import of it; the face is imported at
        # work only
        graph[NAMES[path]] = {m for m in imports(path) if m in NAMES.values()} - {
            NAMES[path],
            "vtoken",
            package,
        }
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError


def test_adapters_name_no_strategy():
    names = vtoken.list_strategies()
    for path in [*(ROOT / "adapters").rglob("*.py"), *(ROOT / "mechanism").rglob("*.py")]:
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
