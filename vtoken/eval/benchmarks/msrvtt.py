"""MSR-VTT text-video retrieval (Xu et al., CVPR 2016), on the 1k-A split of JSFusion (arXiv 1808.02559)."""

from __future__ import annotations

import base64
import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from ..protocols.retrieval import RECALLS, dual_softmax, scores
from .datasets import check_columns
from .encoder_models import EncoderModel, encode_texts
from .encoder_task import EncoderTask, Sample, checked, fingerprint, spread
from .task import Breakdown, Unreadable, one_line

FILE = "MSRVTT_JSFUSION_test.csv"
HOW = (
    f"give --data a folder with {FILE} (columns key, vid_key, video_id, sentence) and the videos as"
    " videos/all/<video_id>.mp4, videos/<video_id>.mp4 or <video_id>.mp4, or use --example."
)
COLUMNS = ["key", "vid_key", "video_id", "sentence"]
PLACES = ("videos/all", "videos", ".")
DIRECTIONS = ("text to video", "video to text")
PLAIN, DUAL = "plain", "dual softmax"
FRAMES, TEMPERATURE = 12, 0.01


def load(source: str | Path, limit: int | None = None) -> list[Sample]:
    """The video-caption pairs of MSR-VTT 1k-A; `truth` is the caption.

    Args:
        source: a folder with the CSV, itself or one level below, and the videos.
        limit: pairs, in equal steps over the file; all if None.

    Raises:
        ValueError: if the folder, the CSV, a column or a video is missing, a caption is empty or cut at a
            comma without quotes, or a video has two captions. The sentence names it.
    """
    folder = Path(source)
    if not folder.is_dir():
        raise ValueError(f"There is no data set folder {str(source)!r}: {HOW}") from FileNotFoundError(source)
    path = next(iter([*folder.glob(FILE), *sorted(folder.glob(f"*/{FILE}"))]), None)
    if path is None:
        raise ValueError(f"There is no {FILE} in {str(folder)!r}: {HOW}")
    samples = []
    for row in _rows(path):
        video, caption = str(row["video_id"] or "").strip(), str(row["sentence"] or "").strip()
        if not video or not caption:
            raise ValueError(f"{str(path)!r} has a row without a {'caption' if video else 'video_id'}.")
        samples.append(Sample(video, caption, video_path(folder, video)))
    chosen = spread(checked(samples), limit)
    if missing := [sample.name for sample in chosen if sample.media is None]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"The video {missing[0]}.mp4{more} is not in {str(folder)!r}: {HOW}")
    return chosen


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)  # a quote that nobody closes would swallow rows
            rows, columns = list(reader), list(reader.fieldnames or ())
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{str(path)!r} is no CSV that can be read: {one_line(error)}") from None
    check_columns(COLUMNS, columns, path)
    if long := next((row for row in rows if None in row), None):
        raise ValueError(
            f"{str(path)!r} has a row with more cells than columns, that of {long['video_id']!r}: put a"
            " sentence with commas into quotes."
        )
    return rows


def video_path(folder: Path, video: str) -> Path | None:
    """The file of a video, None if it is not there."""
    name = f"{video}.mp4"
    if Path(name).name != name:  # a name with a separator would lead out of the folder
        return None
    return next((p for place in PLACES if (p := folder / place / name).is_file()), None)


def frame_indices(total: int, fps: float, frames: int) -> list[int]:
    """Frames that are read of a video, as TempMe's data loader takes them (arXiv 2409.01156).

    One frame per second; of more than `frames` those at equal steps, first and last included. A video with
    fewer: equal steps over all its frames, repeated where there are not enough.

    Raises:
        ValueError: if a number is not above 0.
    """
    if total < 1 or frames < 1 or not fps > 0:
        raise ValueError(f"cannot take {frames} of {total} frames at {fps:g} per second")
    each = list(range(0, total, max(1, round(fps))))
    if len(each) > frames:
        return [each[i] for i in np.linspace(0, len(each) - 1, num=frames, dtype=int)]
    return each if len(each) == frames else np.linspace(0, total - 1, num=frames, dtype=int).tolist()


class MSRVTT(EncoderTask):
    """Retrieval with a dual encoder, an `EncoderTask` for the runner.

    The embedding of a video is the mean of its L2-normalised frame embeddings, normalised again.

    Args:
        samples: from `load`.
        preprocess: that of the model, see `EncoderModel`.
        frames: read per video.
        duals: whether to score with dual softmax; several are scored one after the other, the first is the
            one that the table and the plot show.
        temperature: of dual softmax.

    Raises:
        ValueError: unless the temperature is above 0.
    """

    title, unit, lenient = "MSR-VTT 1k-A", "video", False
    axis = "text-to-video R-sum (R@1 + R@5 + R@10)"

    def __init__(
        self,
        samples: Sequence[Sample],
        preprocess: Callable[[Any], Tensor],
        frames: int = FRAMES,
        duals: Sequence[bool] = (False,),
        temperature: float = TEMPERATURE,
    ) -> None:
        if not temperature > 0:
            raise ValueError(f"The temperature of dual softmax is a number above 0, found {temperature!r}.")
        self.samples, self.preprocess, self.images = samples, preprocess, frames
        self.duals, self.temperature = tuple(duals), temperature
        self.texts: np.ndarray | None = None

    def settings(self) -> dict[str, Any]:
        return {
            "task": "MSR-VTT 1k-A",
            "videos": len(self.samples),
            "frames": self.images,
            "data": fingerprint(self.samples),
        }

    def options(self, strategy: str) -> dict[str, Any]:
        """`frames` for a strategy that has this hyper-parameter, such as tempme."""
        from ...strategies.registry import parse_strategy, strategy_info

        name = parse_strategy(strategy)
        takes = isinstance(name, str) and "frames" in strategy_info(name).defaults
        return {"frames": self.images} if takes else {}

    def open(self, sample: Sample) -> Tensor:
        from ...video import open_video

        try:
            with open_video(sample.media) as reader:
                indices = frame_indices(len(reader), float(reader.fps), self.images)  # type: ignore[arg-type]
                once = sorted(set(indices))
                read = {
                    i: self.preprocess(Image.fromarray(frame.image))
                    for i, frame in zip(once, reader.get_frames(indices=once), strict=True)
                }
        except ImportError:
            raise
        except Exception as error:
            raise Unreadable(f"The video {sample.media.name} cannot be decoded: {one_line(error)}") from None
        return torch.stack([read[i] for i in indices])

    def encode(self, model: Any, pixels: Tensor) -> Tensor:
        return model.encode_image(pixels.flatten(0, 1))

    def values(self, output: Tensor, n: int) -> list[Any]:
        """Base64 of the little-endian float32 embedding per video, from frame embeddings (n * frames, d)."""
        frames = normalize(output.float(), dim=-1).unflatten(0, (n, -1))
        return [packed(row) for row in normalize(frames.mean(1), dim=-1).cpu().numpy()]

    def whole(self, value: Any) -> bool:
        try:
            return unpacked(value).size > 0
        except (TypeError, ValueError):
            return False

    def finish(self, encoder: EncoderModel, folder: Path) -> None:
        """Encode the captions with the unpatched text tower, or read them from `texts.safetensors`."""
        from safetensors.torch import load_file, save_file

        path = folder / "texts.safetensors"
        if not path.is_file():
            partial = path.with_suffix(".part")
            save_file({"texts": encode_texts(encoder, [s.truth for s in self.samples])}, partial)
            partial.replace(path)
        self.texts = load_file(path)["texts"].numpy()

    def similarity(self, values: dict[str, Any]) -> np.ndarray:
        """(texts, videos) float64 cosines. Equal embeddings have equal ones, whatever their place."""
        if self.texts is None:
            raise ValueError("The captions are not encoded: call finish first.")
        videos = np.stack([unpacked(values[s.name]) for s in self.samples])
        # not through BLAS, whose rounding depends on the place in the matrix
        return np.einsum("id,jd->ij", self.texts.astype(np.float64), videos.astype(np.float64))

    def breakdown(self, values: dict[str, Any]) -> Breakdown:
        """Scores of both directions; their meaning is that of `vtoken.eval.protocols.retrieval`."""
        cosines = self.similarity(values)
        found: dict[str, Any] = {"temperature": self.temperature} if any(self.duals) else {}
        heads = [*(f"R@{k}" for k in RECALLS), "R-sum", "median rank", "mean rank"]
        rows = [["", *heads, "ties"]]
        for dual in self.duals:
            kind = DUAL if dual else PLAIN
            for direction, matrix in zip(DIRECTIONS, (cosines, cosines.T)):
                found.setdefault(kind, {})[direction] = made = scores(
                    dual_softmax(matrix, self.temperature) if dual else matrix
                )
                said = direction + f", dual softmax at {self.temperature:g}" * dual
                rows.append([said, *(f"{made[head]:.1f}" for head in heads), str(made["ties"])])
        first = found[DUAL if self.duals[0] else PLAIN]
        columns: dict[str, str] = {}
        for short, direction in zip(("t2v", "v2t"), DIRECTIONS):
            columns |= {f"{short} {key}": f"{first[direction][key]:.1f}" for key in ("R@1", "R-sum")}
        return Breakdown(columns, rows, found)

    def point(self, breakdown: Breakdown) -> tuple[float, float, float]:
        value = breakdown.scores[DUAL if self.duals[0] else PLAIN][DIRECTIONS[0]]["R-sum"]
        return value, value, value


def packed(row: np.ndarray) -> str:
    return base64.b64encode(row.astype("<f4").tobytes()).decode()


def unpacked(value: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(value, validate=True), "<f4")
