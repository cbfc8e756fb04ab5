"""The interface of a benchmark for plain encoders: `EncoderTask` and its samples."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from .encoder_models import EncoderModel
from .task import Breakdown


@dataclass(frozen=True)
class Sample:
    """One image or video of a data set.

    Attributes:
        name: unique; used in records and errors.
        truth: what it is scored against, as text: the index of its class, or its caption.
        media: information with which the task opens it.
    """

    name: str
    truth: str
    media: Any = field(repr=False, compare=False)


class EncoderTask(ABC):
    """Interface of a benchmark to the runner. It holds no model: worker processes get a copy of it.

    Attributes:
        title: for tables and plots.
        unit: "image" or "video", what one sample is.
        samples: of the data set.
        images: images that the encoder reads per sample.
        axis: name of the figure that the plot shows.
        lenient: whether a sample that cannot be opened counts as wrong; otherwise nothing is scored without
            it.
    """

    title: str
    unit: str
    samples: Sequence[Sample]
    images: int = 1
    axis: str
    lenient: bool = True

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Settings on which stored values depend; a run continues only under the same ones."""

    def options(self, strategy: str) -> dict[str, Any]:
        """Hyper-parameters that the benchmark itself gives to a strategy."""
        return {}

    @abstractmethod
    def open(self, sample: Sample) -> Tensor:
        """Preprocessed float32 pixels, of one shape for all samples. Raises Unreadable."""

    @abstractmethod
    def encode(self, model: Any, pixels: Tensor) -> Tensor:
        """The timed part: a floating-point output from pixels (n, ...) on the model's device."""

    @abstractmethod
    def values(self, output: Tensor, n: int) -> list[Any]:
        """One JSON value per sample from the output of `encode`, to be stored."""

    @abstractmethod
    def whole(self, value: Any) -> bool:
        """Whether a stored value is one that `values` made."""

    def finish(self, encoder: EncoderModel, folder: Path) -> None:  # noqa: B027
        """What is computed once for all runs, after them; may be stored in the folder."""

    @abstractmethod
    def breakdown(self, values: dict[str, Any]) -> Breakdown:
        """Scores of all stored values by name."""

    @abstractmethod
    def point(self, breakdown: Breakdown) -> tuple[float, float, float]:
        """The figure that the plot shows, and the ends of its 95 % interval (itself twice if unknown)."""


def checked(samples: Sequence[Sample]) -> list[Sample]:
    """The samples, with names checked to be unique.

    Raises:
        ValueError: for an empty data set or a name that occurs twice.
    """
    if not samples:
        raise ValueError("The data set is empty.")
    seen: set[str] = set()
    for sample in samples:
        if sample.name in seen:
            raise ValueError(f"The data set has {sample.name!r} twice: every sample has to be there once.")
        seen.add(sample.name)
    return list(samples)


def spread(samples: Sequence[Sample], limit: int | None) -> list[Sample]:
    """`limit` samples in equal steps over the data set, so that all its parts are there; all if None."""
    n = len(samples)
    if limit is None or limit >= n:
        return list(samples)
    return [samples[i * n // limit] for i in range(limit)]


def fingerprint(samples: Sequence[Sample]) -> str:
    """The first digits of a SHA-256 over names and truths."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{sample.name}\0{sample.truth}\0".encode())
    return digest.hexdigest()[:12]
