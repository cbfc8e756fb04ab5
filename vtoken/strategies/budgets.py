"""What a budget allows: the share of the visual tokens, or the number of tokens per image or frame."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, Literal

from ..checks import BITS, fit, found, number
from ..tokens import Segment

UNIT = "budget_unit"  # in files: programs that know one kind of number write 1.0 as 1


def check_budget(budget: Any) -> float | int:
    """Return `budget` if it is a share in (0, 1] or a positive number of tokens, raise ValueError otherwise.

    Numbers of NumPy and tensors of one value become Python's; a whole number never becomes a share.
    """
    ask = "use a share of the visual tokens in (0, 1], such as 0.2, or a whole number of tokens per image, such as 128"
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


def unit(budget: float | int) -> str:
    """What a budget counts: "share" or "tokens". As numbers, the share 1.0 and 1 token are equal."""
    return "share" if isinstance(budget, float) else "tokens"


def with_unit(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a file without the unit of their budget, the budget in the kind of number that the unit asks for.

    Raises:
        ValueError: for a unit that there is not, or a budget that it does not fit.
    """
    if UNIT not in values:
        return values
    wanted = fit(UNIT, values[UNIT], Literal["share", "tokens"])
    values = {k: v for k, v in values.items() if k != UNIT}
    if "budget" in values:
        budget = fit("budget", values["budget"], float | int)
        if wanted == "tokens" and not float(budget).is_integer():
            raise ValueError(f"A budget in tokens must be a whole number, found {budget}.")
        values["budget"] = check_budget(float(budget) if wanted == "share" else int(budget))
    return values


def share(budget: float | int, n: int, least: int = 1) -> int:
    """Tokens that `budget` allows of n: the truncated share, at least `least`, never more than n."""
    wanted = int(n * budget) if isinstance(budget, float) else budget
    return min(n, max(least, wanted))


def divide(total: int, sizes: Sequence[int]) -> list[int]:
    """`total` tokens over segments of the given sizes as evenly as their sizes allow; earlier ones get the rest."""
    counts, left = [0] * len(sizes), total
    order = sorted(range(len(sizes)), key=lambda i: (sizes[i], -i))
    for place, i in enumerate(order):
        counts[i] = min(sizes[i], left // (len(order) - place))
        left -= counts[i]
    return counts


def per_segment(segments: Sequence[Segment], budget: float | int) -> list[int]:
    """Tokens per segment of one image or video: its share of what it would feed, or an even part of a whole number.

    A share keeps at least one token of every segment that has any; a whole number counts per image or frame.
    """
    fed = [s.fed for s in segments]
    if isinstance(budget, float) or all(s.kind == "frame" for s in segments):
        return [share(budget, n) for n in fed]
    return divide(budget, fed)


def in_total(segments: Sequence[Segment], budget: float | int, n: int) -> int:
    """Tokens of one image or video of n tokens that `budget` allows, at least 1, without looking at its segments."""
    frames = sum(s.kind == "frame" for s in segments)
    return share(budget if isinstance(budget, float) else budget * max(1, frames), n)
