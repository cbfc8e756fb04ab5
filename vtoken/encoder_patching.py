"""The patch of a plain encoder (timm, open_clip, transformers): its hooks, its running calls, its report."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._threads import PerThread
from .accounting import EncoderReport
from .active import Patches
from .adapters.encoders.encoder import Encoder
from .adapters.encoders.run import EncoderRun
from .fit import check_encoder
from .gate import Gate
from .hooks import Wrapped
from .mechanism.encoder_layers import EncoderLayers
from .recorder import Stopwatch
from .strategies import EncoderStrategy


class _Local(PerThread):
    """State of one thread."""

    run: EncoderRun | None = None
    ends: int = 0


class _Traced:
    """The same while a graph is traced, which knows no threads."""

    run: EncoderRun | None = None
    ends: int = 0


class EncoderRuns:
    """The running forwards of a patched encoder, one per thread.

    Args:
        encoder: the encoder.
        strategy: makes the plans.
        gate: tells which calls are this patch's.
    """

    def __init__(self, encoder: Encoder, strategy: EncoderStrategy, gate: Gate) -> None:
        self.encoder, self.strategy, self.gate = encoder, strategy, gate
        self.local, self.traced = _Local(), _Traced()
        self.refused: ValueError | None = None  # for a strategy that changes nothing and may be told to
        self.plans: dict[tuple[int, int], Any] = {}
        self.options: dict[str, Any] = {}
        self.idle = False
        self.last: EncoderRun | None = None

    def look(self) -> None:
        """Read the strategy's options again; a traced forward keeps those of the latest eager call."""
        if self.options != vars(self.strategy):
            self.options, self.plans = dict(vars(self.strategy)), {}
            self.idle = bool(self.strategy.is_identity)

    def plan(self, patches: int) -> Any:
        """The strategy's plan for images of so many patches, with its present options."""
        key = patches, len(self.encoder.layers)
        if key not in self.plans:
            shape = self.encoder.shape(patches, self.strategy.drops)
            self.plans[key] = shape, self.strategy.encoder_plan(shape)
        return self.plans[key]

    def __getstate__(self) -> dict[str, Any]:
        """State for a deep copy or a pickle, which has not read images yet."""
        return vars(self) | {"last": None, "traced": _Traced()}

    @property
    def _here(self) -> _Local | _Traced:
        return self.traced if torch.compiler.is_compiling() else self.local

    def stop_after(self, layers: int | None) -> None:
        self._here.ends = layers or 0

    def begin(self, x: Tensor) -> EncoderRun | None:
        self._here.run = None
        if not self.gate.forward_begins():
            return None
        if not torch.compiler.is_compiling() and self.gate.disabled():
            self.gate.forward_ended()
            return None
        if not torch.compiler.is_compiling():
            self.look()
        if self.idle:
            self.gate.forward_ended()
            return None
        if self.refused is not None:
            raise self.refused
        rows, n, _ = x.shape
        shape, plan = self.plan(n - self.encoder.prefix)
        if x.requires_grad and (reason := self.encoder.refusal()):
            raise ValueError(f"Tokens cannot be merged in {type(self.encoder.trunk).__name__}: it {reason}.")
        run = EncoderRun(shape, plan, rows, n, shape.prefix, ends=self._here.ends)
        self.strategy.begin_encoder(run)
        if not torch.compiler.is_compiling():
            run.marks.append(Stopwatch.mark(x.device))
        self._here.run = run
        return run

    def current(self) -> EncoderRun | None:
        return self._here.run

    def ended(self, run: EncoderRun) -> None:
        if not torch.compiler.is_compiling():
            device = None if run.sizes is None else run.sizes.device
            run.marks.append(Stopwatch.mark(device))
            self.gate.forward_ended()
        self.last = run


class EncoderPatch:
    """Everything that one `patch` or `applied` put on a plain encoder."""

    def __init__(self, encoder: Encoder, strategy: Any, patches: Patches) -> None:
        check_encoder(encoder, strategy)
        self.adapter, self.strategy, self.gate = encoder, strategy, Gate(patches, self)
        self.runs = EncoderRuns(encoder, strategy, self.gate)
        self.wrapped, self.parts = Wrapped(), []  # type: tuple[Wrapped, list[Any]]
        self.runs.look()
        if not self.runs.idle:
            rows, columns = encoder.grid
            self.runs.plan(rows * columns)
        else:
            self.runs.refused = _refusal(encoder)
        try:
            layers = EncoderLayers(encoder.present, self._strategy, self.runs, encoder.follow)
            self.parts = [self.wrapped, layers]
            encoder.wrap(self.wrapped.wrap, self.runs)
        except BaseException:
            self.remove()
            raise

    def __repr__(self) -> str:
        return f"<vtoken patch {self.strategy.describe()} of a {type(self.adapter.model).__name__}>"

    def _strategy(self) -> Any:
        return self.strategy

    def remove(self) -> None:
        """Take everything off the encoder."""
        for part in self.parts:
            part.remove()

    def check(self) -> None:
        """Nothing on the encoder depends on the options of the strategy."""

    def report(self) -> EncoderReport:
        """The report on the last call.

        Raises:
            ValueError: if the encoder has not been called since it was patched, or was called without images.
        """
        run = self.runs.last
        if run is None:
            raise ValueError(
                "This encoder has not read images since it was patched"
                + (
                    " (and would read all tokens of them: the strategy changes nothing)."
                    * self.strategy.is_identity
                    or ": call it first."
                )
            )
        return report_of(run, self.strategy.describe(), self.adapter)


def _refusal(encoder: Encoder) -> ValueError | None:
    try:
        encoder.check()
    except ValueError as error:
        return error
    return None


def report_of(run: EncoderRun, strategy: str, encoder: Encoder) -> EncoderReport:
    """The report on one finished forward."""
    shape, images = run.shape, run.images
    if not images:
        raise ValueError("The last call of this encoder had no images: call it with at least one.")
    embedding = shape.patches * shape.embedding_macs
    work = sum(rows * shape.layer_macs(attend, feed) for rows, attend, feed, _ in run.work)
    seconds = Stopwatch()
    if len(run.marks) == 2:
        seconds.add("encoder", *run.marks)
    rows, columns = encoder.grid
    owner = run.owner()
    return EncoderReport(
        strategy=strategy,
        images=images,
        frames=run.fused,
        prefix=shape.prefix,
        patches=shape.patches,
        tokens_per_layer=[rows * feed / images for rows, _, feed, _ in run.work],
        gflops_dense=shape.macs([0] * len(run.work)) / 1e9,
        gflops=(embedding + work / images) / 1e9,
        seconds=seconds.seconds(),
        grid=(rows, columns) if rows * columns == shape.patches else None,
        owner=None if owner is None else run.patch_owners(),
    )
