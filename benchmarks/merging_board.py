"""Strategies that merge or drop tokens inside the tiny encoders: accuracy, GFLOPs and speed.

    python benchmarks/merging_board.py                    # docs/board/merging.json and merging.png
    python benchmarks/merging_board.py --only vit --n 200 --out merging.json

The tiny ViT names the topmost object of held-out scenes (top-1). The tiny CLIP finds held-out clips of 12
frames by their captions and captions by clips (R-sum, as in TempMe, arXiv:2409.01156). GFLOPs are
multiply-adds / 1e9. Speed is relative to the unpatched model, measured in turns in the same run.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

import vtoken
from vtoken.bench.report import machine
from vtoken.tiny import load_encoder
from vtoken.tiny.captions import retrieval_set
from vtoken.tiny.retrieval import recalls, text_embeddings, video_embeddings
from vtoken.tiny.topmost import labelled

IMAGE = ("tome", "diffrate", "random_merge", "prune_by_norm")
TEMPME = ({"r": 0}, {"r": 2}, {"r": 4}, {"r": 4, "cross": 0.4, "intra": 0.2})
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)  # of the unpatched model's multiply-adds
FRAMES, BATCH, CLIPS = 12, 64, 8
Row = dict[str, Any]
Apply = Callable[[Any, str, dict[str, Any]], AbstractContextManager[Any]]


def applied(model: Any, strategy: str, options: dict[str, Any]) -> AbstractContextManager[Any]:
    """A block in which the model is patched."""
    return vtoken.applied(model, strategy, **options)


def settings(strategies: Sequence[str], shares: Sequence[float]) -> list[tuple[str, dict[str, Any]]]:
    """``(strategy, options)`` of every cell."""
    return [(strategy, {"flops": share}) for strategy in strategies for share in shares]


def video_settings(shares: Sequence[float]) -> list[tuple[str, dict[str, Any]]]:
    """The settings of videos: tempme across their frames, and tome within each frame."""
    return [*(("tempme", {"frames": FRAMES, **each}) for each in TEMPME), *settings(("tome",), shares)]


def seconds(call: Callable[[], Any]) -> float:
    """Time of one call: processor time where torch has one thread, so that other work does not count."""
    cuda = torch.cuda.is_available()
    now = time.process_time if torch.get_num_threads() == 1 and not cuda else time.perf_counter
    if cuda:
        torch.cuda.synchronize()
    began = now()
    call()
    if cuda:
        torch.cuda.synchronize()
    return now() - began


def speed(block: Callable[[], AbstractContextManager[Any]], call: Callable[[], Any], repeats: int) -> float:
    """Speed of a call inside a block relative to the same call outside it: medians of calls in turns.

    The patched model is warm: one call of both comes before.
    """
    taken: tuple[list[float], list[float]] = ([], [])
    for i in range(repeats + 1):
        for times, where in zip(taken, (nullcontext, block)):
            with where():
                spent = seconds(call)
            if i:
                times.append(spent)
    plain, patched = (statistics.median(times) for times in taken)
    return plain / patched


def cells(
    model: Any,
    measure: Callable[[], Row],
    once: Callable[[], Any],
    chosen: Sequence[tuple[str, dict[str, Any]]],
    per_item: int,
    repeats: int,
    apply: Apply = applied,
    report: Callable[[Any], Any] = vtoken.report,
) -> list[Row]:
    """One row per setting, after the row of the unpatched model.

    Args:
        model: the encoder.
        measure: runs the whole task; its figures.
        once: one batch, for the clock.
        chosen: from `settings`.
        per_item: images of a scene (1) or of a clip (its frames); GFLOPs are counted per scene or clip.
        repeats: turns of the clock.
        apply, report: how a model is patched and asked; replaced in tests.
    """
    rows: list[Row] = [{"strategy": "unpatched", **measure(), "speed": 1.0}]
    for strategy, options in chosen:
        row: Row = {"strategy": strategy, **options}
        try:
            with apply(model, strategy, options):
                row |= measure()
                said = report(model)
        except ValueError as error:  # a share that a strategy cannot reach
            rows.append({**row, "refused": str(error)})
            continue
        row |= {"gflops": said.gflops * per_item, "tokens_per_layer": list(said.tokens_per_layer)}
        rows[0]["gflops"] = said.gflops_dense * per_item
        row["speed"] = speed(lambda s=strategy, o=options: apply(model, s, o), once, repeats)
        rows.append(row)
        print({k: v for k, v in row.items() if k != "tokens_per_layer"}, flush=True)
    return rows


@torch.no_grad()
def image_rows(
    model: Any, preprocess: Any, n: int, repeats: int, shares: Sequence[float], **how: Any
) -> list[Row]:
    """Top-1 of the tiny ViT over ``n`` held-out scenes."""
    device = next(model.parameters()).device
    some = [labelled(i, "test") for i in range(n)]
    pixels = torch.stack([preprocess(scene.image) for scene, _ in some]).to(device)
    right = torch.tensor([label for _, label in some], device=device)

    def measure() -> Row:
        said = torch.cat([model(part).argmax(-1) for part in pixels.split(BATCH)])
        return {"top1": 100 * (said == right).float().mean().item()}

    return cells(model, measure, lambda: model(pixels[:BATCH]), settings(IMAGE, shares), 1, repeats, **how)


@torch.no_grad()
def video_rows(
    model: Any, preprocess: Any, tokenizer: Any, n: int, repeats: int, shares: Sequence[float], **how: Any
) -> list[Row]:
    """Recall of the tiny CLIP between ``n`` held-out clips and their captions."""
    clips, texts = retrieval_set(n, frames=FRAMES)
    asked = text_embeddings(model, tokenizer, texts)
    some = torch.stack([preprocess(frame) for clip in clips[:CLIPS] for frame in clip.media]).to(asked.device)

    def measure() -> Row:
        return recalls(asked @ video_embeddings(model, preprocess, clips, CLIPS).T)

    chosen = video_settings(shares)
    return cells(model, measure, lambda: model.encode_image(some), chosen, FRAMES, repeats, **how)


def trained_rows(
    model: Any, preprocess: Any, tokenizer: Any, n: int, steps: int, batch: int = 8
) -> list[Row]:
    """The tiny CLIP after training LoRA and frame positions through tempme, and the same without tempme.

    The clips are of the train split. The second row tells what the training does by itself.
    """
    from vtoken.retrieval_training import add_lora, train

    clips, texts = retrieval_set(batch * steps, split="train", frames=FRAMES)

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for i in range(0, batch * steps, batch):
            frames = [preprocess(f) for clip in clips[i : i + batch] for f in clip.media]
            yield torch.stack(frames).unflatten(0, (-1, FRAMES)), tokenizer(texts[i : i + batch])

    held_out, asked = retrieval_set(n, frames=FRAMES)
    rows: list[Row] = []
    for merging in (True, False):
        options: dict[str, Any] = {"r": 2} if merging else {"r": 0, "cross": 0.0, "intra": 0.0, "fuse": ()}
        strategy = vtoken.strategies.TempMe(frames=FRAMES, **options)
        tuned = add_lora(copy.deepcopy(model))
        losses = train(tuned, strategy, batches(), steps)
        clip = tuned.merge_and_unload().eval()
        with torch.no_grad(), vtoken.applied(clip, strategy):
            queries = text_embeddings(clip, tokenizer, asked)
            row: Row = {"strategy": "tempme, trained" if merging else "unpatched, trained", "steps": steps}
            row |= recalls(queries @ video_embeddings(clip, preprocess, held_out, CLIPS).T)
            row["gflops"] = vtoken.report(clip).gflops * FRAMES
        rows.append(row | {"loss": [losses[0], losses[-1]]})
        print(rows[-1], flush=True)
    return rows


def draw(report: dict[str, Any], path: Path) -> None:
    """One panel per encoder: its figure over GFLOPs per scene or clip, by strategy."""
    from matplotlib.figure import Figure

    panels = {"vit": ("top1", "top-1 (%)", "scene"), "clip": ("rsum", "R-sum", "clip")}
    panels = {name: panel for name, panel in panels.items() if name in report}
    figure = Figure(figsize=(1 + 4.2 * len(panels), 4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (name, (key, label, item)) in zip(axes, panels.items()):
        rows = [row for row in report[name] if "gflops" in row]
        for strategy in dict.fromkeys(row["strategy"] for row in rows):
            own = sorted((row["gflops"], row[key]) for row in rows if row["strategy"] == strategy)
            if strategy == "unpatched":
                axis.axhline(own[0][1], color="0.5", lw=0.8, ls=":", zorder=0)
            axis.plot(*zip(*own), "o-", ms=3.5, lw=1, label=strategy)
        axis.set(title=f"tiny {name}", xlabel=f"GFLOPs per {item} (multiply-adds)", ylabel=label)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=90)


def tables(report: dict[str, Any]) -> str:
    """The rows of both encoders as markdown."""
    kinds = {
        "vit": {"top1": "top-1, %", "gflops": "GFLOPs", "share": "share", "speed": "speed"},
        "clip": {
            "t2v_r1": "t2v R@1",
            "v2t_r1": "v2t R@1",
            "rsum": "R-sum",
            "gflops": "GFLOPs",
            "share": "share",
        }
        | {"speed": "speed"},
    }
    lines = []
    for name, columns in kinds.items():
        rows = [row for row in report.get(name, ()) if "gflops" in row]
        dense = rows[0]["gflops"] if rows else 1.0
        lines += ["", f"Tiny {name}:", "", f"| method | {' | '.join(columns.values())} |", "|---" * 7 + "|"]
        lines[-1] = "|---" * (1 + len(columns)) + "|"
        for row in rows:
            options = {k: v for k, v in row.items() if k in ("flops", "r", "cross", "intra")}
            row = row | {"share": f"{row['gflops'] / dense:.0%}"}
            label = " ".join([row["strategy"], *(f"{k}={v}" for k, v in options.items())])
            shown = (row.get(key, "-") for key in columns)
            cells = [v if isinstance(v, str) else f"{v:.3g}" if v < 10 else f"{v:.1f}" for v in shown]
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def write_page(report: dict[str, Any], page: Path) -> None:
    """Put the tables between the marks of a page."""
    before, rest = page.read_text().split("<!-- tables -->")
    after = rest.split("<!-- end -->")[1]
    page.write_text(f"{before}<!-- tables -->\n{tables(report)}\n<!-- end -->{after}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("vit", "clip"), help="one encoder; both if left out")
    parser.add_argument("--n", type=int, help="scenes and clips (default: 2000 scenes, 500 clips)")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of the multiply-adds")
    parser.add_argument("--repeats", type=int, default=7, help="turns of the clock")
    parser.add_argument("--train", type=int, default=60, help="steps of training through tempme; 0: none")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("docs/board/merging.json"))
    parser.add_argument(
        "--page", type=Path, help="write the tables of what is in --out into this page, run nothing"
    )
    arguments = parser.parse_args()
    if arguments.page:
        write_page(json.loads(arguments.out.read_text()), arguments.page)
        return
    facts = {k: v for k, v in vars(arguments).items() if k not in ("out", "page")}
    report: dict[str, Any] = {"about": facts, "machine": machine(torch.device(arguments.device))}
    for name, rows, count in (("vit", image_rows, 2000), ("clip", video_rows, 500)):
        if arguments.only in (None, name):
            model, *inputs = load_encoder(name)
            inputs = [part for part in inputs if part is not None]
            model = model.to(arguments.device)
            n = arguments.n or count
            report[name] = rows(model, *inputs, n, arguments.repeats, arguments.shares)
            if name == "clip" and arguments.train:
                report[name] += trained_rows(model, *inputs, n, arguments.train)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    draw(report, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
