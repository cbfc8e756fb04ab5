"""Running mean over the frames of a stream, in the stream's memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def remember(memory: dict[str, Any], mean: Tensor, window: int | None) -> None:
    """Store the mean (channels,) of one frame: the last `window` are kept, the sum of all if it is None."""
    if window is not None:
        memory["means"] = [*memory.get("means", []), mean.double()][-window:]
        return
    before = memory.get("total")
    memory["total"] = mean.double() if before is None else before.to(mean.device) + mean
    memory["count"] = memory.get("count", 0) + 1


def history(memory: dict[str, Any], device: torch.device) -> Tensor:
    """(channels,) float32, the mean over the frames that are remembered, of which there must be one."""
    if "means" in memory:
        return torch.stack([m.to(device) for m in memory["means"]]).mean(0).float()
    return (memory["total"].to(device) / memory["count"]).float()
