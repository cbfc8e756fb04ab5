"""Shared by both harnesses: separates vtoken's arguments, patches the loaded model, counts its calls."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..._json import parse
from ...checks import found
from ...strategies.registry import parse_strategy

PREFIX = "vtoken_"


@dataclass
class Calls:
    """Totals over the calls of a patched model's `generate`.

    Attributes:
        calls: calls with images or videos.
        tokens_in: visual tokens that the unpatched model would have read, over all calls.
        tokens: visual tokens that were read, averaged over the LLM's layers, over all calls.
        flops, flops_dense: LLM prefill FLOPs, with and without the patch.
        failed: calls that raised; harnesses tend to log the error and to score an empty answer.
    """

    calls: int = 0
    tokens_in: int = 0
    tokens: float = 0.0
    flops: float = 0.0
    flops_dense: float = 0.0
    failed: int = 0

    def per_call(self) -> dict[str, float]:
        """Averages as plain numbers, for a results file."""
        calls = max(1, self.calls)
        return {
            "visual_tokens_unpatched": self.tokens_in / calls,
            "visual_tokens": self.tokens / calls,
            "prefill_flops_share": self.flops / self.flops_dense if self.flops_dense else 1.0,
            "failed_calls": float(self.failed),
        }

    def __str__(self) -> str:
        if not self.calls:
            return f"vtoken: no call with images or videos yet, {self.failed} failed"
        of = self.per_call()
        return (
            f"vtoken: {self.calls} calls, {of['visual_tokens_unpatched']:.1f} -> {of['visual_tokens']:.1f}"
            f" visual tokens each (average over the LLM's layers), {of['prefill_flops_share']:.1%} of the"
            f" prefill FLOPs, {self.failed} failed"
        )


def split(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A harness's keyword arguments as (ours, theirs): ours begin with `vtoken_`, which is removed."""
    ours = {k.removeprefix(PREFIX): v for k, v in arguments.items() if k.startswith(PREFIX)}
    return ours, {k: v for k, v in arguments.items() if not k.startswith(PREFIX)}


def patch_arguments(ours: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `vtoken.patch` from a harness's: `strategy`, `budget` and hyper-parameters by name.

    Values that look like JSON lists or objects are read as such (`vtoken_fastv={"layer":3}`); strategies that
    work together are joined by "+".

    Raises:
        ValueError: without a strategy, for an unknown one, or for a value that is no JSON.
    """
    given = dict(ours)
    if not isinstance(given.get("strategy"), str):
        raise ValueError(
            "Name a strategy for this model, such as vtoken_strategy=hired,vtoken_budget=0.2; found "
            + (
                ", ".join(f"{PREFIX}{k}={v}" for k, v in given.items())
                or "no argument that begins with vtoken_"
            )
            + "."
        )
    given["strategy"] = parse_strategy(given["strategy"])
    for name, value in given.items():
        if isinstance(value, str) and value[:1] in "[{":
            try:
                given[name] = parse(value)
            except ValueError as error:
                raise ValueError(
                    f"{PREFIX}{name} must be a value or JSON, found {found(value)}: {error}."
                ) from None
    return given


def patch_counted(model: Any, ours: Mapping[str, Any]) -> Calls:
    """Patch a model that a harness has loaded, and count the calls of its `generate` from now on.

    A ValueError out of `generate` (a kind of input that the strategy refuses, say) ends the run with its
    sentence: harnesses catch it, log it and score an empty answer, which would be a wrong result instead of
    a missing one.

    Raises:
        TypeError, ValueError: as `vtoken.patch` does.
    """
    import vtoken

    vtoken.patch(model, **patch_arguments(ours))
    calls = Calls()
    model.generate = functools.partial(_counting, model, model.generate, calls)
    return calls


def _counting(model: Any, generate: Callable[..., Any], calls: Calls, *args: Any, **kwargs: Any) -> Any:
    import vtoken

    try:
        out = generate(*args, **kwargs)
    except ValueError as error:
        raise SystemExit(
            f"vtoken ends this run, because the patched model refused a call: {error}"
        ) from error
    except Exception:
        calls.failed += 1
        raise
    if any(k.startswith("pixel_values") and v is not None for k, v in kwargs.items()):
        report = vtoken.report(model)
        calls.calls += 1
        calls.tokens_in += report.tokens_in
        calls.tokens += report.average_visual_tokens * report.prompts
        calls.flops += report.flops
        calls.flops_dense += report.flops_dense
    return out
