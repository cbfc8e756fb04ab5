"""Records of a patched model's calls, collected without making the device wait."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ._threads import PerThread
from .accounting import LayersRead, Report, VisualReport
from .llm_shape import LanguageModelShape
from .mechanism.drop_schedule import DropSchedule
from .mechanism.forward_context import Run
from .mechanism.planner import Chosen
from .mechanism.stored_cache import stored_bytes
from .streams import TowerUse


class Stopwatch:
    """Times named stages; on CUDA with events, so that nothing waits until the times are read.

    A stage that is timed without end (frames of a stream that are encoded before any prompt) takes no more
    memory with time.
    """

    PENDING = 64  # spans per stage whose events are kept

    def __init__(self) -> None:
        self._spans: dict[str, list[tuple[Any, Any]]] = {}
        self._sums: dict[str, float] = {}

    @staticmethod
    def mark(device: torch.device | None) -> Any:
        """A point in time on the host, or on the current stream of a CUDA device."""
        if device is None or device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    def add(self, name: str, start: Any, end: Any) -> None:
        """Add a span from `start` to `end` to the stage `name`."""
        self._sums.setdefault(name, 0.0)
        if isinstance(start, float):
            self._sums[name] += end - start
            return
        spans = self._spans.setdefault(name, [])
        spans.append((start, end))
        if len(spans) > self.PENDING:
            self._settle(name, spans.pop(0))

    def _settle(self, name: str, span: tuple[Any, Any]) -> None:
        span[1].synchronize()
        self._sums[name] += span[0].elapsed_time(span[1]) / 1000

    def seconds(self) -> dict[str, float]:
        """Seconds per stage, summed; waits for the device if it must."""
        for name, spans in self._spans.items():
            while spans:
                self._settle(name, spans.pop(0))
        return dict(self._sums)


@dataclass
class Forward:
    """Token counts of one forward of the language model; tensors stay on the device until the report."""

    past_dense: int
    past: list[int]  # per stage
    dense: Tensor  # (rows,)
    tokens: list[Tensor]  # per stage (rows,)
    visual: list[Tensor]
    # per layer with sparse attention (rows,), queries whose attention was computed for the choice
    probes: list[list[int]] = field(default_factory=list)
    # of a prompt that loses tokens inside the LLM: (rows, q), the image of its row that a token belongs to,
    # and per stage after the entrance the tokens that are still read
    item: Tensor | None = None
    reads: list[Tensor] = field(default_factory=list)
    packed: int | None = None  # bytes of a packed cache afterwards; None for any other


@dataclass
class Record:
    """One running or finished call."""

    visuals: list[VisualReport]
    beams: int
    watch: Stopwatch
    forwards: list[Forward] = field(default_factory=list)
    tower: dict[str, TowerUse] = field(default_factory=dict)
    text: tuple[tuple[int, int], ...] = ()  # read for the choice: tokens, layers
    # of a KV cache that tokens are evicted from: bytes of a row, and tokens that it counted first and now
    held: tuple[int, int, int] | None = None


class _Local(PerThread):
    """State of the recorder in one thread."""

    record: Record | None = None
    watch: Stopwatch | None = None
    tower: dict[str, TowerUse] | None = None
    text: tuple[tuple[int, int], ...] = ()
    start: Any = None
    entered: Any = None


class Recorder:
    """Collects token counts and times of one patch's calls, per thread.

    Args:
        model: the patched model.
        text_config: shape of the language model.
        schedule: the drops inside the LLM.

    Attributes:
        describe: the strategy of the latest call in words.
        budget_counts: what its budget counts, in words.
    """

    def __init__(self, model: Any, text_config: Any, schedule: DropSchedule) -> None:
        self.model, self.text_config, self.schedule = model, text_config, schedule
        self.describe = self.budget_counts = ""
        self.local = _Local()
        self.last: Record | None = None

    @contextmanager
    def timer(self, name: str) -> Iterator[None]:
        """Time a stage that comes before the prompt's plan."""
        watch = self.local.watch = self.local.watch or Stopwatch()
        device = self.model.device
        start = watch.mark(device)
        try:
            yield
        finally:
            watch.add(name, start, watch.mark(device))

    def used(self, modality: str, use: TowerUse) -> None:
        """Note what a tower computed in the latest call for a modality."""
        self.local.tower = (self.local.tower or {}) | {modality: use}

    def read(self, tokens: int, layers: int) -> None:
        """Note that the first `layers` of the LLM have read a prompt's text for the choice."""
        self.local.text = (*self.local.text, (tokens, layers))

    def chosen(self, chosen: list[Chosen], beams: int) -> None:
        """Begin the record of a prompt. It holds counts and no features, because it outlives the call."""
        record = Record(
            [_facts(c) for c in chosen],
            beams,
            self.local.watch or Stopwatch(),
            tower=self.local.tower or {},
            text=self.local.text,
        )
        self.local.watch = self.local.tower = None
        self.local.text = ()
        self.local.record = self.last = record

    def before_prefill(self, device: torch.device) -> None:
        self.local.start = Stopwatch.mark(device)

    def entered(self, run: Run, real: Tensor) -> None:
        self.local.entered = Stopwatch.mark(real.device)
        record = self.local.record
        if record is None or run.visual is None:
            return
        real, visual = real[:: record.beams], run.visual[:: record.beams]
        record.forwards.append(
            Forward(
                past_dense=run.ledger.end,
                past=[s.shape[1] for s in run.ledger.slots],
                dense=real.sum(1),
                tokens=[real.sum(1)],
                visual=[(visual & real).sum(1)],
                packed=stored_bytes(run.cache),
            )
        )

    def holds(self, nbytes: int, tokens: int) -> None:
        record = self.local.record
        if record is not None:
            first = tokens if record.held is None else record.held[1]
            record.held = nbytes, first, tokens

    def after_prefill(self, run: Run | None, device: torch.device) -> None:
        local = self.local
        record = local.record
        if record is None or not record.forwards:
            return
        record.watch.add("select", local.start, local.entered)
        record.watch.add("prefill", local.entered, Stopwatch.mark(device))
        if run is None or run.visual is None or run.index is None:
            return
        forward = record.forwards[-1]
        forward.packed = stored_bytes(run.cache)
        forward.tokens, forward.visual = [], []
        stages = run.stages()
        for index, valid in stages:
            visual = run.visual.gather(1, run.index.gather(1, index)) & valid
            forward.tokens.append(valid[:: record.beams].sum(1))
            forward.visual.append(visual[:: record.beams].sum(1))
        forward.probes = [run.attended[i].probes[:: record.beams] for i in sorted(run.attended)]
        if len(stages) > 1 and run.layout is not None:
            forward.item = run.layout.item[:: record.beams]
            for index, valid in stages[1:]:
                times = torch.zeros_like(run.visual, dtype=torch.long)
                # filler points anywhere and adds nothing
                times.scatter_add_(1, run.index.gather(1, index), valid.long())
                forward.reads.append(times[:: record.beams] > 0)

    def report(self) -> Report | None:
        """The report on the last call of this thread, or of any thread if this one made none."""
        record = self.local.record or self.last
        if record is None:
            return None
        layers = range(self.text_config.num_hidden_layers)
        shapes = [LanguageModelShape.of(self.text_config, i) for i in layers]
        itemsize = self.model.dtype.itemsize
        per_layer, visual, prompt = [0] * len(layers), [0] * len(layers), [0] * 0
        text = sum(shape.layer_flops(n) for n, count in record.text for shape in shapes[:count])
        flops, dense = text, 0.0
        for forward in record.forwards:
            lengths = forward.dense.tolist()
            prompt = [a + b for a, b in zip(prompt, lengths, strict=True)] if prompt else lengths
            dense += sum(shape.layer_flops(n, forward.past_dense) for shape in shapes for n in lengths)
            tokens = [t.tolist() for t in forward.tokens]
            visuals = [int(v.sum()) for v in forward.visual]
            for i in layers:
                last = len(tokens) - 1
                stage, stored = min(self.schedule.reads(i), last), min(self.schedule.stores(i), last)
                attended = min(self.schedule.attends(i), last)
                past = forward.past[stored if self.schedule.evicts else stage]
                per_layer[i] += sum(tokens[stored])
                visual[i] += visuals[attended]
                flops += sum(
                    shapes[i].layer_flops(n, past, m, probes)
                    for n, m, probes in zip(
                        tokens[stage],
                        tokens[attended],
                        forward.probes[i] if forward.probes else [0] * len(tokens[stage]),
                        strict=True,
                    )
                )
        answer = 0 if record.held is None else record.held[2] - record.held[1]
        kv_bytes = self._held(record, len(prompt))
        earlier = 0 if kv_bytes is None else record.forwards[0].past_dense
        if kv_bytes is None:
            kv_bytes = sum(shapes[i].kv_bytes(per_layer[i], itemsize) for i in layers)
        return Report(
            strategy=self.describe,
            visuals=self._with_layers(record),
            prompt_tokens=prompt,
            tokens_per_layer=per_layer,
            visual_per_layer=visual,
            flops_dense=dense,
            flops=flops,
            flops_text=text,
            kv_bytes_dense=sum(
                shape.kv_bytes(sum(prompt) + len(prompt) * (answer + earlier), itemsize) for shape in shapes
            ),
            kv_bytes=kv_bytes,
            kv_earlier=earlier,
            kv_answer=None if record.held is None else answer,
            seconds=record.watch.seconds(),
            tower=record.tower,
            budget_counts=self.budget_counts,
        )

    @staticmethod
    def _held(record: Record, rows: int) -> int | None:
        """Bytes of a cache in a strategy's form, without beams' copies; None for any other."""
        if record.held is not None:
            return record.held[0] * rows
        packed = record.forwards[-1].packed
        return None if packed is None else packed // record.beams

    def _with_layers(self, record: Record) -> list[VisualReport]:
        """The images and videos, each with the tokens that every LLM layer reads of it."""
        before: dict[int, int] = {}
        out = []
        for visual in record.visuals:
            ordinal = before[visual.row] = before.get(visual.row, -1) + 1
            kept = [visual.keep]
            # a prompt that is read in chunks loses nothing inside the LLM
            for forward in record.forwards[-1:]:
                if forward.item is not None:
                    mine = forward.item[visual.row] == ordinal
                    kept += [
                        read[visual.row][mine].nonzero()[:, 0].to(visual.keep.device)
                        for read in forward.reads
                    ]
            out.append(replace(visual, layers=self._ranges(kept)))
        return out

    def _ranges(self, kept: list[Tensor]) -> tuple[LayersRead, ...]:
        """Ranges of adjacent layers that read the same tokens."""
        out: list[LayersRead] = []
        for layer in range(self.schedule.layers):
            keep = kept[min(self.schedule.attends(layer), len(kept) - 1)]
            if out and torch.equal(out[-1].keep, keep):
                out[-1] = replace(out[-1], last=layer)
            else:
                out.append(LayersRead(layer, layer, keep))
        return tuple(out)


def _facts(chosen: Chosen) -> VisualReport:
    tokens, selection = chosen.tokens, chosen.selection
    return VisualReport(
        row=chosen.row,
        modality=tokens.modality,
        tokens_in=len(tokens),
        tokens_out=len(selection.keep),
        segments=tokens.segments,
        cells=tokens.cells,
        keep=selection.keep,
        into=selection.into,
    )
