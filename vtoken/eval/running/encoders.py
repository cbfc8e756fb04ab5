"""Runs a benchmark of plain encoders: the unpatched model and every setting on the same batches, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..benchmarks.encoder_models import EncoderModel
from ..benchmarks.encoder_task import EncoderTask, Sample
from ..benchmarks.task import Unreadable
from .answer_log import Record, Writer, check_settings, locked, read
from .encoder_runs import DENSE, EncoderOutcome, EncoderRun, check_complete, is_whole, outcome
from .runner import Processes


class Batches(Dataset):
    """Opened batches, for a data loader: names and pixels of what could be opened, and what could not."""

    def __init__(self, task: EncoderTask, batches: Sequence[Sequence[Sample]]) -> None:
        self.task, self.batches = task, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, place: int) -> tuple[list[str], Tensor, dict[str, str]]:
        opened, errors = {}, {}
        for sample in self.batches[place]:
            try:
                opened[sample.name] = self.task.open(sample)
            except Unreadable as error:
                errors[sample.name] = str(error)
        pixels = torch.stack(list(opened.values())) if opened else torch.empty(0)
        return list(opened), pixels, errors


class EncoderEvaluation:
    """One benchmark and one encoder, with a folder for the values.

    Of each batch the unpatched model and all runs encode the same pixels, one after the other and each time
    in another order, so that a machine that becomes slower or faster meanwhile changes no ratio.

    Args:
        task: the benchmark.
        encoder: the model.
        folder: for settings and values; a run in it is continued.
        batch_size: samples per call. Batches are the same however many processes there are.
        settings: settings on which values depend, in addition to the task's own.
        processes: see `Processes`.
        workers: processes that open and preprocess, per process; 0: this one does it.
        step: called with the number of samples that one run has just encoded.
    """

    def __init__(
        self,
        task: EncoderTask,
        encoder: EncoderModel,
        folder: str | Path,
        batch_size: int = 1,
        settings: dict[str, Any] | None = None,
        processes: Processes | None = None,
        workers: int = 0,
        step: Callable[[int], None] = lambda done: None,
    ) -> None:
        self.task, self.encoder, self.folder = task, encoder, Path(folder)
        self.processes, self.workers, self.step = processes or Processes(), workers, step
        samples = task.samples
        self.batches = [samples[i : i + batch_size] for i in range(0, len(samples), batch_size)]
        self.names = [sample.name for sample in samples]
        used = task.settings() | {"batch_size": batch_size} | (settings or {})
        with self.alone():
            check_settings(self.folder, used, self.processes.index == 0)
        self.processes.wait()

    def alone(self) -> AbstractContextManager[None]:
        """Lock the folder against other evaluations, by the first process. See `answer_log.locked`."""
        return locked(self.folder) if self.processes.index == 0 else nullcontext()

    def done(self, run: EncoderRun) -> dict[str, Record]:
        """The records of a run by sample."""
        return read(self.folder, run.stem, self.names, lambda record: is_whole(self.task, run, record))

    def progress(self, runs: Sequence[EncoderRun]) -> tuple[dict[str, int], int]:
        """Per name of a run the number of values it has, and the encodings left for this process."""
        done = {run.stem: self.done(run) for run in runs}
        there = {run.name: sum("value" in r for r in done[run.stem].values()) for run in runs}
        mine = self._mine(self._pending(runs, done))
        return there, sum(len(self.batches[place]) * len(some) for place, some in mine.items())

    def run(self, runs: Sequence[EncoderRun]) -> list[EncoderOutcome]:
        """Encode what is missing, wait for the other processes, and score.

        Args:
            runs: from `plan`; the unpatched model is always among them.

        Returns:
            One outcome per run, the unpatched model first, in the first process; an empty list in others.

        Raises:
            ValueError: if a strategy refuses this model, the model gives values that are not finite, a
                record is missing, or a video (of images: every one) cannot be opened. The sentence names it.
            BlockingIOError: if another evaluation writes into the folder.
        """
        runs = [DENSE, *(run for run in runs if run.strategy is not None)]
        with self.alone():
            done = {run.stem: self.done(run) for run in runs}
            self.processes.wait()  # no process writes before all have read
            pending = self._pending(runs, done)
            self._warm_up(pending)
            self._encode(runs, self._mine(pending), done)
            self.processes.wait()
            if self.processes.index:
                return []
            done = {run.stem: self.done(run) for run in runs}
            for run in runs:
                check_complete(self.task, run, done[run.stem])
            self.task.finish(self.encoder, self.folder)
            return [outcome(self.task, run, done) for run in runs]

    def _pending(
        self, runs: Sequence[EncoderRun], done: dict[str, dict[str, Record]]
    ) -> dict[int, list[EncoderRun]]:
        """Per batch that lacks values the runs that lack them, and the unpatched one, timed beside each."""
        found = {}
        for place, batch in enumerate(self.batches):
            lack = [r for r in runs if any("value" not in done[r.stem].get(s.name, {}) for s in batch)]
            if lack:
                found[place] = [r for r in runs if r in lack or r.strategy is None]
        return found

    def _mine(self, pending: dict[int, list[EncoderRun]]) -> dict[int, list[EncoderRun]]:
        return dict([*pending.items()][self.processes.index :: self.processes.count])

    def _warm_up(self, pending: dict[int, list[EncoderRun]]) -> None:
        """One untimed call of every run that has work; all processes do it, to be refused alike."""
        runs = {run.stem: run for some in pending.values() for run in some}.values()
        batches = Batches(self.task, [self.batches[place] for place in pending])
        opened = (pixels for names, pixels, _ in map(batches.__getitem__, range(len(batches))) if names)
        for pixels in islice(opened, 1):
            for run in runs:
                self._call(run, self._moved(pixels))

    def _encode(
        self,
        runs: Sequence[EncoderRun],
        mine: dict[int, list[EncoderRun]],
        done: dict[str, dict[str, Record]],
    ) -> None:
        writers = {run.stem: Writer(self.folder, run.stem, self.processes.index) for run in runs}
        try:
            for place, (names, pixels, errors) in zip(mine, self._opened([*mine])):
                fresh = self._visit(place, names, pixels, mine[place])
                for run in mine[place]:
                    known = done[run.stem]
                    values = [r for r in fresh[run.stem] if "value" not in known.get(r["item"], {})]
                    broken = [{"item": n, "error": e} for n, e in errors.items() if n not in known]
                    writers[run.stem].append(values + broken)
        finally:
            for writer in writers.values():
                writer.close()

    def _opened(self, places: Sequence[int]) -> Iterator[tuple[list[str], Tensor, dict[str, str]]]:
        batches = Batches(self.task, [self.batches[i] for i in places])
        if not len(batches):
            return iter(())
        return iter(DataLoader(batches, batch_size=None, num_workers=self.workers))

    def _moved(self, pixels: Tensor) -> Tensor:
        return pixels.to(self.encoder.device, self.encoder.dtype)

    def _visit(
        self, place: int, names: list[str], pixels: Tensor, pending: Sequence[EncoderRun]
    ) -> dict[str, list[Record]]:
        """Records of a batch by stem, in the batch's order."""
        records: dict[str, list[Record]] = {run.stem: [] for run in pending}
        n, turn = len(names), place % len(pending)
        measured = {}
        moved = self._moved(pixels) if n else pixels
        for run in [*pending[turn:], *pending[:turn]]:
            if n:
                output, seconds, cost = self._call(run, moved)
                measured[run.stem] = self.task.values(output, n), seconds, cost
            self.step(len(self.batches[place]))
        for run in pending if n else ():
            values, seconds, cost = measured[run.stem]
            if run.strategy is not None:
                cost = cost | {"seconds_dense": measured[DENSE.stem][1] / n}
            for name, value in zip(names, values, strict=True):
                records[run.stem].append({"item": name, "value": value, "seconds": seconds / n, **cost})
        return records

    def _call(self, run: EncoderRun, pixels: Tensor) -> tuple[Tensor, float, dict[str, Any]]:
        """Output, seconds, and what the report says of one call. Raises ValueError with the run's name."""
        try:
            return self._timed(run, pixels)
        except ValueError as error:
            raise ValueError(f"{run.name}: {error}") from error

    @torch.inference_mode()
    def _timed(self, run: EncoderRun, pixels: Tensor) -> tuple[Tensor, float, dict[str, Any]]:
        options = run.options | self.task.options(run.strategy) if run.strategy else {}
        with self.encoder.applied(run.strategy, options) if run.strategy else nullcontext():
            start = self._now()
            output = self.task.encode(self.encoder.model, pixels)
            seconds = self._now() - start
            report = self.encoder.report() if run.strategy else None
        if not torch.isfinite(output).all():
            raise ValueError(f"the model gives values that are not finite in {self.encoder.dtype}.")
        if report is None:
            return output, seconds, {}
        cost = {
            "gflops": float(report.gflops) * self.task.images,
            "gflops_dense": float(report.gflops_dense) * self.task.images,
            "tokens": [float(n) for n in report.tokens_per_layer],
        }
        return output, seconds, cost

    def _now(self) -> float:
        if self.encoder.device.type == "cuda":
            torch.cuda.synchronize(self.encoder.device)
        return time.perf_counter()
