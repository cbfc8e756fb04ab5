"""Memory of a stream: its first and latest steps, and those in between with large changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from ..checks import checked
from ..strategies.base import top_k
from ..strategies.budgets import Budget, check_budget

CHANGED_PART = 10  # the change of a picture is measured on a tenth of its tokens


@dataclass(frozen=True)
class Step:
    """One frame, or the frames that the vision tower joins into one, as the LLM would read them.

    Attributes:
        seconds: times of its frames, ascending.
        features: (k, d) kept visual tokens, in the model's dtype.
        kept: (k,) int64 on the CPU, ascending: their indices among the step's `rows` tokens.
        rows: visual tokens that the unpruned model would read.
        cells: (k,) int64 on the CPU, grid cell of every kept token, -1 for tokens that are no patch.
        grid: (rows, columns) of the cells, None if a step is several crops.
        tail: (s, d) rows that the model puts after the last step of a video, if it does.
        deepstack: (levels, k, d), for models that feed features of earlier tower layers into early LLM
            layers.
        change: change since the previous step in memory, >= 0.
    """

    seconds: tuple[float, ...]
    features: Tensor
    kept: Tensor
    rows: int
    cells: Tensor
    grid: tuple[int, int] | None = None
    tail: Tensor | None = None
    deepstack: Tensor | None = None
    change: float = 0.0

    @property
    def nbytes(self) -> int:
        tensors = (self.features, self.kept, self.cells, self.tail, self.deepstack)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def only(self, places: Tensor) -> Step:
        """The step with the kept tokens at `places` (ascending int64 on the features' device)."""
        here = places.cpu()
        deep = None if self.deepstack is None else self.deepstack[:, places]
        return replace(
            self, features=self.features[places], kept=self.kept[here], cells=self.cells[here], deepstack=deep
        )


def change_between(before: Tensor | None, now: Tensor) -> float:
    """Change between two pictures of (n, d) features: 1 - cosine, mean of the most changed tenth."""
    if before is None or before.shape != now.shape:
        return 1.0
    moved = 1 - cosine_similarity(before.float(), now.float(), dim=-1)
    return float(moved.topk(max(1, len(moved) // CHANGED_PART)).values.mean().clamp(min=0))


def thinnest(changes: Sequence[float], first: int, last: int) -> int:
    """The step of [first, last) with the least change, the earliest of equals: the one to delete."""
    return min(range(first, last), key=changes.__getitem__)


class RecentMemory:
    """Memory of the first steps, a window of the latest, and a history in between, of bounded size.

    If a new step does not fit, the history step with the least change since its predecessor in memory is
    deleted, and its change is added to its successor's: the remaining steps are about evenly spaced in
    change, not in time, and long still stretches shrink first. The window shrinks only when no history is
    left. Steps that leave the window may be pruned to `history_tokens`, the tokens least similar to the mean
    of their step (the spatial anchor of STC, arXiv 2512.00891).

    Args:
        max_bytes: upper bound of the bytes of features and indices.
        max_tokens: upper bound of the visual tokens, which bounds the prompt.
        sinks: number of first steps that are never deleted.
        recent: number of latest steps that are deleted last and not pruned further.
        history_tokens: share or number of a history step's kept tokens that remain; None keeps them all.
        max_rows: upper bound of the tokens that the kept steps would have unpruned, for prompts whose
            positions count those; None for no bound.
        max_steps: upper bound of the kept steps, None for no bound. With `sinks=0` and `recent` of the same
            number, the memory is a window of the latest steps.

    Raises:
        ValueError: for a bound that is not positive.
    """

    @checked
    def __init__(
        self,
        max_bytes: int,
        max_tokens: int,
        sinks: int = 1,
        recent: int = 8,
        history_tokens: float | int | None = None,
        max_rows: int | None = None,
        max_steps: int | None = None,
    ) -> None:
        bounds = {"max_bytes": max_bytes, "max_tokens": max_tokens, "recent": recent, "max_steps": max_steps}
        for name, value in bounds.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}.")
        if sinks < 0:
            raise ValueError(f"sinks must be at least 0, found {sinks}.")
        if history_tokens is not None:
            history_tokens = check_budget(history_tokens)
        self.max_bytes, self.max_tokens, self.sinks, self.recent = max_bytes, max_tokens, sinks, recent
        self.history_tokens, self.max_rows, self.max_steps = history_tokens, max_rows, max_steps
        self.reset()

    def reset(self) -> None:
        self.steps: list[Step] = []
        self.nbytes = self.visual_tokens = self.rows = self.forgotten = 0

    def _count(self, step: Step, sign: int) -> None:
        self.nbytes += sign * step.nbytes
        self.visual_tokens += sign * len(step.kept)
        self.rows += sign * step.rows

    @property
    def _full(self) -> bool:
        rows = self.max_rows is not None and self.rows > self.max_rows
        steps = self.max_steps is not None and len(self.steps) > self.max_steps
        return rows or steps or self.nbytes > self.max_bytes or self.visual_tokens > self.max_tokens

    def _replace(self, place: int, step: Step) -> None:
        self._count(self.steps[place], -1)
        self.steps[place] = step
        self._count(step, 1)

    def prepare(self, step: Step) -> Step:
        """The step as `add` takes it. Raises ValueError if the step alone is larger than the memory."""
        if (
            step.nbytes > self.max_bytes
            or len(step.kept) > self.max_tokens
            or step.rows > (self.max_rows or step.rows)
        ):
            raise ValueError(
                f"One step of {len(step.kept)} visual tokens, {step.nbytes} bytes, does not fit a memory of"
                f" {self.max_tokens} tokens, {self.max_bytes} bytes: raise max_tokens or max_bytes, or lower"
                " the budget."
            )
        return step

    def add(self, step: Step) -> None:
        """Add one step."""
        self.steps.append(step)
        self._count(step, 1)
        left = len(self.steps) - 1 - self.recent
        if self.history_tokens is not None and left >= self.sinks:
            self._replace(left, self._pruned(self.steps[left]))
        while self._full:
            self._forget()

    def _forget(self) -> None:
        first = max(0, min(self.sinks, len(self.steps) - 2))
        last = len(self.steps) - self.recent
        changes = [s.change for s in self.steps]
        place = thinnest(changes, first, last) if last > first else first
        step = self.steps.pop(place)
        self._count(step, -1)
        self.forgotten += 1
        after = self.steps[place]
        self.steps[place] = replace(after, change=after.change + step.change)

    def _pruned(self, step: Step) -> Step:
        assert self.history_tokens is not None
        k = Budget(self.history_tokens).part(len(step.kept))
        if k == len(step.kept):
            return step
        unit = normalize(step.features.float(), dim=-1)
        return step.only(top_k(-unit @ unit.mean(0), k))

    def view(self, t: float | None = None) -> list[Step]:
        """The steps in memory with all frames up to time `t` (seconds; None for all), in time order."""
        return [s for s in self.steps if t is None or s.seconds[-1] <= t]
