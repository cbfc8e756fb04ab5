"""Pages of the site that are not stored: those of the repository's root, the errors, and the public modules.

mkdocs-gen-files runs it while the site is built: `make site`.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # mkdocs-gen-files runs a file, not a module

import generate_errors
import site_hooks

ROOT = site_hooks.ROOT
# page -> modules; those with `__all__` show it, the others what they define
REFERENCE = {
    "vtoken": ["vtoken"],
    "asking": ["vtoken.asking"],
    "strategies": ["vtoken.strategies"],
    "inputs": ["vtoken.tokens", "vtoken.selection"],
    "streams": ["vtoken.streams", "vtoken.streaming"],
    "storage": ["vtoken.storage", "vtoken.sparse_attention"],
    "kernels": ["vtoken.kernels"],
    "video": ["vtoken.video"],
    "tiny": ["vtoken.tiny"],
    "eval": [
        "vtoken.eval.benchmarks.task",
        "vtoken.eval.running.asker",
        "vtoken.eval.running.runner",
        "vtoken.eval.board.board",
    ],
    "bench": ["vtoken.bench.run", "vtoken.bench.shapes"],
    "training": ["vtoken.fine_tuning.train", "vtoken.rates", "vtoken.retrieval_training"],
    "adapters": ["vtoken.adapters.base", "vtoken.adapters.registry"],
    "vllm": ["vtoken.integrations.vllm"],
}


def exported(module: str) -> list[str]:
    """The names in a module's `__all__`, without modules; [] where it has none."""
    place = ROOT / module.replace(".", "/")
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            inside = {p.stem for p in (ROOT / "vtoken").iterdir()} if module == "vtoken" else set()
            return [name for name in ast.literal_eval(node.value) if name not in inside | {"__version__"}]
    return []


def reference(page: str, modules: list[str]) -> str:
    lines = [f"# `{modules[0]}`" if len(modules) == 1 else f"# {page.capitalize()}", ""]
    for module in modules:
        lines += [
            f"::: {module}",
            "    options:",
            f"      show_root_heading: {str(len(modules) > 1).lower()}",
        ]
        lines += ["      show_root_full_path: true", f"      members: {exported(module) or 'null'}", ""]
    return "\n".join(lines)


def pages() -> dict[str, str]:
    """Path in docs/ -> text."""
    made = {own: (ROOT / file).read_text(encoding="utf-8") for file, own in site_hooks.PAGES.items()}
    made["troubleshooting.md"] = generate_errors.page()
    return made | {f"reference/{name}.md": reference(name, modules) for name, modules in REFERENCE.items()}


if __name__ == "<run_path>":
    import mkdocs_gen_files

    for path, text in pages().items():
        with mkdocs_gen_files.open(path, "w", encoding="utf-8") as file:
            file.write(text)
