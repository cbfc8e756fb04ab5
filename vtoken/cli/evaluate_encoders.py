"""The commands `vtoken eval imagenet | retrieval`: plain encoders."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..asking import quiet
from ..extras import require
from .encoder_options import common, plan_of
from .options import Command, console, progress

if TYPE_CHECKING:
    from ..eval.benchmarks.encoder_models import EncoderModel
    from ..eval.benchmarks.encoder_task import EncoderTask
    from ..eval.running.encoder_runs import EncoderRun


@click.command(cls=Command, short_help="ImageNet: top-1 and top-5 of a classifier.")
@click.option("--data", help="Folder with a folder per class, or parquet files with image and label.")
@click.option("--model", help="A classifier: timm:NAME or tiny:vit. [default with --example: tiny:vit]")
@common("tome", 64, "vtoken-imagenet")
def imagenet(data: str | None, model: str | None, limit: int | None, **options: Any) -> None:
    """ImageNet: top-1, top-5, GFLOPs and images per second of a classifier."""
    require("torch", "torchvision", extra="timm")
    from ..eval.benchmarks import example_encoder_data
    from ..eval.benchmarks.imagenet import HOW, ImageNet, classes_of, load

    def example(folder: Path) -> Path:
        return example_encoder_data.imagenet(folder)

    def task(source: str | Path, encoder: EncoderModel) -> EncoderTask:
        return ImageNet(load(source, classes_of(encoder), limit), encoder.preprocess)

    run(data, model, "tiny:vit", HOW, example, task, **options)


@click.command(cls=Command, short_help="MSR-VTT 1k-A: text-video retrieval with a CLIP.")
@click.option("--data", help="Folder with MSRVTT_JSFUSION_test.csv and the videos.")
@click.option("--model", help="open_clip:ARCH/TAG, open_clip:ARCH/FILE.safetensors or tiny:clip."
              " [default with --example: tiny:clip]")  # fmt: skip
@click.option(
    "--frames", type=click.IntRange(min=1), default=12, show_default=True, help="Frames read of a video."
)
@click.option("--dual-softmax", type=click.Choice(["off", "on", "both"]), default="off", show_default=True,
              help="Weigh similarities by a softmax over all queries.")  # fmt: skip
@click.option(
    "--temperature", type=float, default=0.01, show_default=True, help="Divides the cosines in dual softmax."
)
@common("tempme", 8, "vtoken-retrieval")
def retrieval(
    data: str | None,
    model: str | None,
    frames: int,
    dual_softmax: str,
    temperature: float,
    limit: int | None,
    **options: Any,
) -> None:
    """MSR-VTT 1k-A: recall and ranks of text-video retrieval, GFLOPs and videos per second."""
    require("av", extra="eval")
    from ..eval.benchmarks import example_encoder_data
    from ..eval.benchmarks.encoder_models import tokenizer_of
    from ..eval.benchmarks.msrvtt import HOW, MSRVTT, load

    duals = {"off": [False], "on": [True], "both": [False, True]}[dual_softmax]

    def task(source: str | Path, encoder: EncoderModel) -> EncoderTask:
        tokenizer = tokenizer_of(encoder)  # refuses a model without texts, and texts, before any work
        samples = load(source, limit)
        tokenizer([sample.truth for sample in samples])
        return MSRVTT(samples, encoder.preprocess, frames, duals, temperature)

    run(data, model, "tiny:clip", HOW, example_encoder_data.msrvtt, task, **options)


def run(
    data: str | None,
    model: str | None,
    tiny: str,
    how: str,
    write_example: Callable[[Path], Path],
    task_of: Callable[[str | Path, EncoderModel], EncoderTask],
    example: bool,
    output: str,
    checkpoint: str | None,
    pretrained: bool,
    dtype: str,
    batch_size: int,
    workers: int,
    **amounts: Any,
) -> None:
    """Run one benchmark; print, write and draw its results."""
    if example == bool(data):
        raise ValueError(f"Data come from one place: {how}")
    if not (model := model or (tiny if example else None)):
        names = "timm:NAME" if tiny == "tiny:vit" else "open_clip:ARCH/TAG"
        raise ValueError(f"Name a model: --model {names}.")
    require("matplotlib", extra="eval")
    runs = plan_of(**amounts)
    quiet()
    from ..eval.benchmarks.encoder_models import load
    from ..eval.running.answer_log import locked
    from ..eval.running.runner import Processes

    processes, folder = Processes.found(), Path(output)
    with locked(folder) if processes.index == 0 else nullcontext():
        source: str | Path = data or folder / "example"
        if example and processes.index == 0:
            write_example(folder / "example")
        processes.wait()  # one process writes the example, the others find it
        encoder = load(model, checkpoint, pretrained, dtype)
        evaluated(task_of(source, encoder), encoder, folder, runs, batch_size, workers, processes)


def evaluated(
    task: EncoderTask,
    encoder: EncoderModel,
    folder: Path,
    runs: list[EncoderRun],
    batch_size: int,
    workers: int,
    processes: Any,
) -> None:
    """All runs of one task; the first process shows them."""
    from ..eval.running.encoder_summary import save, summary
    from ..eval.running.encoders import EncoderEvaluation
    from ..eval.running.summary import show

    out, main, settings = console(), processes.index == 0, settings_of(encoder)
    with progress(out, shown=main) as bar:
        line = bar.add_task(task.title, total=0, visible=False)
        evaluation = EncoderEvaluation(
            task,
            encoder,
            folder,
            batch_size,
            settings,
            processes,
            workers,
            lambda done: bar.update(line, advance=done),
        )
        there, left = evaluation.progress(runs)
        bar.update(line, total=left, visible=left > 0)
        for name, n in there.items():
            if n and main:
                bar.console.print(f"{name}: {n} values are there already", highlight=False)
        outcomes = evaluation.run(runs)
    if not main:
        return
    title = f"{task.title}, {encoder.name}"
    for o in outcomes:
        show(out, f"\n{o.run.name}", o.breakdown.rows)
    for sentence in dict.fromkeys(s for o in outcomes for s in o.unreadable.values()):
        out.print(f"counted as wrong: {sentence}", highlight=False, markup=False)
    show(out, f"\n{title}; * marks baselines", summary(task, outcomes))
    for path in save(folder, title, task, outcomes, task.settings() | settings):
        out.print(f"wrote {path}", highlight=False)


def settings_of(encoder: EncoderModel) -> dict[str, Any]:
    """Settings on which values and times depend, in addition to those of the task."""
    from importlib.metadata import version

    import torch

    from ..eval.board.board import versions

    library = {"timm": "timm", "open_clip": "open_clip_torch"}.get(encoder.name.partition(":")[0])
    device = encoder.device
    return {
        "model": encoder.name,
        "weights": encoder.weights,
        "dtype": str(encoder.dtype),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        **versions(),
        **({library: version(library)} if library else {}),
    }
