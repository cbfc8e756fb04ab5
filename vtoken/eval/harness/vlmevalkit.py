"""VLMEvalKit with patched models, started by `python -m vtoken.eval.harness.vlmevalkit`.

Example: `python -m vtoken.eval.harness.vlmevalkit --strategy hired --budget 0.2 --model NAME ...`.

Registers patched twins of VLMEvalKit's models in its `supported_VLM` and hands over to its own `run.py` with
all other arguments. VLMEvalKit is installed from a checkout (`pip install -e .`); `run.py` lies in
the parent folder of its package.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ..._json import parse
from .patched import Calls, patch_arguments, patch_counted


def register(
    supported: MutableMapping[str, Callable[..., Any]],
    names: Iterable[str],
    ours: dict[str, Any],
    made: dict[str, Calls] | None = None,
) -> list[str]:
    """Add a patched twin of each named model to VLMEvalKit's `supported_VLM`.

    Args:
        supported: model names to callables that build a `vlmeval.vlm` model, whose `.model` is a transformers
            model.
        names: models to take; the twin of `llava_next_vicuna_7b` is `llava_next_vicuna_7b-vtoken-hired-0.2`,
            so that its predictions have files of their own and switches in VLMEvalKit that look into names
            still see the model's.
        ours: `strategy`, `budget` and hyper-parameters.
        made: called with the twin's name and the call counts of each model that is built.

    Returns:
        The names of the twins.

    Raises:
        ValueError: for a model that VLMEvalKit does not have, or an unknown strategy.
    """
    import difflib

    patch_arguments(ours)
    twins = []
    for name in names:
        if name not in supported:
            near = difflib.get_close_matches(name, supported, n=3)
            raise ValueError(
                f"VLMEvalKit has no model {name!r}; {f'near: {near}' if near else 'see vlmutil mlist all'}."
            )
        options = [str(v) if k in ("strategy", "budget") else f"{k}={v}" for k, v in ours.items()]
        twin = "-".join([name, "vtoken", *options])
        supported[twin] = _Patched(supported[name], name, twin, ours, {} if made is None else made)
        twins.append(twin)
    return twins


class _Patched:
    """Builds a VLMEvalKit model and patches the transformers model inside it."""

    def __init__(
        self, build: Callable[..., Any], name: str, twin: str, ours: dict[str, Any], made: dict[str, Calls]
    ) -> None:
        self.build, self.name, self.twin, self.ours, self.made = build, name, twin, ours, made

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        wrapper = self.build(*args, **kwargs)
        model = getattr(wrapper, "model", None)
        try:
            self.made[self.twin] = patch_counted(model, self.ours)
        except (TypeError, ValueError) as error:
            # VLMEvalKit logs an exception and goes on to the next model
            raise SystemExit(f"VLMEvalKit's {self.name} cannot be patched: {error}") from error
        return wrapper


def load_run(kit: str | None = None) -> ModuleType:
    """VLMEvalKit's `run.py`, from `kit` (a checkout) or from the parent folder of the package `vlmeval`.

    Raises:
        ImportError: if there is none.
    """
    if kit is not None:
        sys.path.insert(0, str(Path(kit).resolve()))
    spec = importlib.util.find_spec("vlmeval")
    if spec is None or spec.origin is None:
        raise ImportError(
            "VLMEvalKit is not installed: clone github.com/open-compass/VLMEvalKit and `pip install -e` it,"
            " or pass its folder with --kit."
        )
    path = Path(spec.origin).parents[1] / "run.py"
    if not path.is_file():
        raise ImportError(
            f"No run.py beside the package vlmeval in {path.parent}: install VLMEvalKit with `pip install"
            " -e`."
        )
    run_spec = importlib.util.spec_from_file_location("vlmevalkit_run", path)
    assert run_spec is not None and run_spec.loader is not None
    module = importlib.util.module_from_spec(run_spec)
    sys.modules[run_spec.name] = module
    run_spec.loader.exec_module(module)
    return module


def _value(text: str) -> Any:
    try:
        return parse(text)
    except ValueError:
        return text


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse vtoken's options, register the twins, run VLMEvalKit with the rest, print the measured tokens."""
    parser = argparse.ArgumentParser(
        prog="python -m vtoken.eval.harness.vlmevalkit",
        description="VLMEvalKit with patched models; options that are not listed go to its run.py.",
        allow_abbrev=False,
    )
    parser.add_argument("--strategy", required=True, help="such as hired, or visionzip+fastv")
    parser.add_argument("--budget", nargs="+", default=[], help="shares such as 0.2 or counts such as 128")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="a hyper-parameter; repeatable"
    )
    parser.add_argument("--model", nargs="+", required=True, help="VLMEvalKit's names")
    parser.add_argument("--kit", help="a checkout of VLMEvalKit, if it is not installed")
    given, rest = parser.parse_known_args(arguments)
    if any(a == "--config" or a.startswith("--config=") for a in rest):
        parser.error(
            "--config builds models past supported_VLM, where the patch sits: use --model and --data."
        )
    options = {name: _value(value) for name, _, value in (o.partition("=") for o in given.option)}
    made: dict[str, Calls] = {}
    try:
        run = load_run(given.kit)
        twins = []
        for budget in given.budget or [None]:
            ours = (
                {"strategy": given.strategy}
                | ({} if budget is None else {"budget": _value(budget)})
                | options
            )
            twins += register(run.supported_VLM, given.model, ours, made)
    except (ImportError, ValueError) as error:
        parser.error(str(error))
    before = sys.argv
    sys.argv = [str(run.__file__), "--model", *twins, *rest]  # run.py reads them there, and writes them down
    try:
        run.main()
    finally:
        sys.argv = before
        for twin, calls in made.items():
            print(f"{twin}: {calls}", flush=True)


if __name__ == "__main__":
    main()
