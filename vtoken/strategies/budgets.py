"""Budgets: a share of the visual tokens, or a number of tokens per image or frame."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..checks import BITS, fit, found, number
from ..tokens import Segment

Unit = Literal["share", "tokens"]
UNIT = "budget_unit"  # in files: programs that know one kind of number write 1.0 as 1


@dataclass(frozen=True, eq=False)
class Budget:
    """A budget as the user gives it, and its value in tokens.

    Args:
        value: a float in (0, 1] is a share of the visual tokens, an int a number of them per image or frame.

    Raises:
        ValueError: for anything else.
    """

    value: float | int

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", check_budget(self.value))

    @classmethod
    def of(cls, value: Any, unit: Any) -> Budget:
        """A number as programs write it that know one kind of number, in the unit that stands with it.

        Raises:
            ValueError: for an unknown unit, or a number that is none in this unit.
        """
        unit, value = fit("budget_unit", unit, Unit), fit("budget", value, float | int)
        if unit == "tokens" and not float(value).is_integer():
            raise ValueError(f"A budget in tokens must be a whole number, found {value}.")
        return cls(float(value) if unit == "share" else int(value))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Budget) and (self.unit, self.value) == (other.unit, other.value)

    def __hash__(self) -> int:
        return hash((self.unit, self.value))

    def __str__(self) -> str:
        """A share in four digits, which are enough for a reader; 1.0 and 1 stay different."""
        short = float(f"{self.value:.4g}") if self.is_share else self.value
        return str(self.value if short == 1 and self.value != 1 else short)

    @property
    def unit(self) -> Unit:
        return "share" if isinstance(self.value, float) else "tokens"

    @property
    def is_share(self) -> bool:
        return self.unit == "share"

    @property
    def is_all(self) -> bool:
        """Whether the model reads what it reads unpatched: 1.0, which is not 1."""
        return self.is_share and self.value == 1.0

    def allowed(self, n: int, units: int = 1) -> float:
        """Of `n` tokens in so many images or frames those that may stay, not rounded and not limited to n."""
        return self.value * (n if self.is_share else max(1, units))

    def share_of(self, n: int) -> float:
        """As a share of n tokens, 1.0 at most."""
        return self.value if self.is_share else min(1.0, self.value / n)

    def part(self, n: int, least: int = 1) -> int:
        """Tokens of n: the truncated share or the whole number, at least `least`, never more than n."""
        return min(n, max(least, int(self.allowed(n))))

    def tokens(self, segments: Sequence[Segment]) -> list[int]:
        """Tokens per segment of one image or video.

        A share keeps its part of what each segment feeds, at least one token of every segment that has any. A
        whole number counts per frame; of an image in crops it is divided as evenly as they allow.
        """
        fed = [s.fed for s in segments]
        if self.is_share or all(s.kind == "frame" for s in segments):
            return [self.part(n) for n in fed]
        return divide(int(self.value), fed)

    def total(self, segments: Sequence[Segment], n: int) -> int:
        """Tokens of one image or video of n tokens, at least 1, its segments taken together."""
        return min(n, max(1, int(self.allowed(n, frames_of(segments)))))

    def nearest(self, segments: Sequence[Segment], n: int) -> int:
        """As `total`, rounded, halves to even."""
        return min(n, max(1, round(self.allowed(n, frames_of(segments)))))


def check_budget(budget: Any) -> float | int:
    """Return `budget` if it is a share in (0, 1] or a positive number of tokens, raise ValueError otherwise.

    Numbers of NumPy and tensors of one value become Python's; a whole number never becomes a share.
    """
    ask = (
        "use a share of the visual tokens in (0, 1], such as 0.2, or a whole number of tokens per image, such"
        " as 128"
    )
    value: Any = number(budget)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"The budget must be a number, found {found(budget)}: {ask}.")
    if isinstance(value, int):
        if value < 1:
            raise ValueError(f"A whole-number budget must be at least 1, found {found(value)}: {ask}.")
        if value.bit_length() > BITS:
            raise ValueError(f"A whole-number budget has at most {BITS} bits, found {found(value)}: {ask}.")
        return value
    # what is above 0 but rounds to it is no share that a float can hold
    if not 0 < value <= 1 or math.isnan(value) or float(value) == 0:  # type: ignore[operator]
        raise ValueError(f"A fractional budget must lie in (0, 1], found {found(value)}: {ask}.")
    return float(value)


def with_unit(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a file without their `budget_unit`, the budget as a number of that unit.

    Raises:
        ValueError: for an unknown unit, or a budget that it does not fit.
    """
    if UNIT not in values:
        return values
    unit = fit(UNIT, values[UNIT], Unit)
    values = {k: v for k, v in values.items() if k != UNIT}
    if values.get("budget") is not None:
        values["budget"] = Budget.of(values["budget"], unit).value
    return values


def divide(total: int, sizes: Sequence[int]) -> list[int]:
    """`total` tokens over segments, as evenly as `sizes` allow; among equals earlier ones get the rest."""
    counts, left = [0] * len(sizes), total
    order = sorted(range(len(sizes)), key=lambda i: (sizes[i], -i))
    for place, i in enumerate(order):
        counts[i] = min(sizes[i], left // (len(order) - place))
        left -= counts[i]
    return counts


def divide_by(quotas: Sequence[float], total: int, sizes: Sequence[int], fill: bool = False) -> list[int]:
    """`total` tokens over segments by quotas, rounded down; the rest goes by the largest fractions.

    Args:
        quotas: tokens that each segment should have, not rounded.
        total: not below the sum of the quotas rounded down and limited to `sizes`, not above that of `sizes`.
        fill: the rest goes to one segment until it is full, and then to the next, instead of one by one to
            all in turns.
    """
    quotas = [round(q, 9) for q in quotas]  # a whole number on paper stays one
    counts = [min(int(q), n) for q, n in zip(quotas, sizes, strict=True)]
    order = sorted(range(len(quotas)), key=lambda i: int(quotas[i]) - quotas[i])
    while (left := total - sum(counts)) > 0:
        able = [i for i in order if counts[i] < sizes[i]]
        each = left if fill else max(1, left // len(able))
        for i in able[: 1 if fill else left]:
            counts[i] += min(each, sizes[i] - counts[i])
    return counts


def frames_of(segments: Sequence[Segment]) -> int:
    """Number of segments that are frames of a video."""
    return sum(s.kind == "frame" for s in segments)
