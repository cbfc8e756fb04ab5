"""Small generated data sets in the exact layout of the real ones, for trying the commands and for tests.

The pictures are scenes of `vtoken.tiny`. The tiny LLaVA can answer the MME-shaped questions under the strict
protocol; it was never trained on multiple choice, so its answers to the Video-MME-shaped ones show only
that the command runs.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...tiny.scenes import COLOURS, make_scene, questions

Row = dict[str, Any]
NEED = "Writing example data needs pyarrow, pandas and av: pip install 'vtoken[eval]'."


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def write_mme(folder: str | Path, rows: Sequence[Row], row_group: int = 4) -> Path:
    """Write MME's parquet, `data/test-00000-of-00001.parquet` with a Hub image column; returns the folder.

    Args:
        folder: made if needed.
        rows: `question_id, image, question, answer, category` each; an image is a PIL image or the bytes of a
            file.
        row_group: rows per group.
    """
    cells = [row | {"image": {"bytes": _bytes(row["image"]), "path": row["question_id"]}} for row in rows]
    _parquet(Path(folder) / "data" / "test-00000-of-00001.parquet", cells, row_group)
    return Path(folder)


def write_mme_tsv(path: str | Path, rows: Sequence[Row]) -> Path:
    """Write the same rows as VLMEvalKit's TSV, each image once; returns the path."""
    try:
        import pandas as pd
    except ImportError:
        raise ImportError(NEED) from None

    first: dict[str, int] = {}
    cells = []
    for index, row in enumerate(rows):
        seen = first.setdefault(row["question_id"], index)
        image = base64.b64encode(_bytes(row["image"])).decode() if seen == index else str(seen)
        text = {key: row[key] for key in ("question", "answer", "category")}
        cells.append({"index": index, "image": image, **text, "image_path": row["question_id"]})
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(cells).to_csv(path, sep="\t", index=False)
    return Path(path)


def write_videomme(
    folder: str | Path,
    rows: Sequence[Row],
    clips: Mapping[str, Sequence[Image.Image]],
    fps: int = 8,
    said: Row | None = None,
) -> Path:
    """Write Video-MME's layout: parquet, `data/<videoID>.mp4` and `subtitle/<videoID>.srt`.

    Args:
        folder: made if needed.
        rows: the twelve columns each.
        clips: the frames of each videoID, of even width and height.
        fps: of the files.
        said: per videoID the text of its subtitle file.

    Returns:
        The folder.
    """
    folder = Path(folder)
    _parquet(folder / "videomme" / "test-00000-of-00001.parquet", list(rows), len(rows))
    for name in ("data", "subtitle"):
        (folder / name).mkdir(exist_ok=True)
    for video, frames in clips.items():
        write_mp4(folder / "data" / f"{video}.mp4", frames, fps)
    for video, text in (said or {}).items():
        (folder / "subtitle" / f"{video}.srt").write_text(text, encoding="utf-8")
    return folder


def write_mp4(path: Path, frames: Sequence[Image.Image], fps: int) -> None:
    """Encode RGB frames of even width and height with MPEG-4."""
    try:
        import av
    except ImportError:
        raise ImportError(NEED) from None

    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=Fraction(fps))
        stream.width, stream.height = frames[0].size
        stream.pix_fmt, stream.bit_rate = "yuv420p", 2_000_000
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(frame), format="rgb24")))
        file.mux(stream.encode())


def mme(folder: str | Path, images: int = 8) -> Path:
    """An MME-shaped set about generated scenes: categories existence and color, half yes and half no."""
    rows = []
    for i in range(images):
        scene = make_scene(i, "test")
        category = ("existence", "color")[i % 2]
        asked = [q for q in questions(scene) if q.kind == "exists"]
        for answer in ("yes", "no"):
            text = next(q.text for q in asked if q.answer == answer)
            about = {"question_id": f"{category}/{i:04}.png", "image": scene.image, "category": category}
            rows.append(about | {"question": text, "answer": answer.capitalize()})
    return write_mme(folder, rows)


def videomme(folder: str | Path, videos: int = 3) -> Path:
    """A Video-MME-shaped set: clips of two scenes, and the colour of an object in each of them."""
    rows, clips, said = [], {}, {}
    colours = list(COLOURS)
    for v in range(videos):
        scenes = [make_scene(100 + 2 * v + i, "test") for i in range(2)]
        video = f"example{v:03}"
        clips[video] = [scene.image for scene in scenes for _ in range(8)]
        said[video] = "".join(
            f"{i + 1}\n00:00:0{i},000 --> 00:00:0{i + 1},000\n"
            f'<font color="white" size=".72c">scene {number} begins</font>\n\n'
            for i, number in enumerate(("one", "two"))
        )
        for i, when in enumerate(("at first", "at last")):
            item = scenes[i].objects[0]
            wrong = [c for c in colours if c != item.colour][:3]
            place = (v + i) % 4
            options = [*wrong[:place], item.colour, *wrong[place:]]
            rows.append(
                {
                    "video_id": f"{v + 1:03}",
                    "duration": ("short", "medium", "long")[v % 3],
                    "domain": "Knowledge",
                    "sub_category": "Technology",
                    "url": f"https://www.youtube.com/watch?v={video}",
                    "videoID": video,
                    "question_id": f"{v + 1:03}-{i + 1}",
                    "task_type": ("Attribute Perception", "Temporal Perception")[i],
                    "question": f"What colour is the {item.shape} {when}?",
                    "options": [f"{letter}. {colour}." for letter, colour in zip("ABCD", options)],
                    "answer": "ABCD"[place],
                }
            )
    return write_videomme(folder, rows, clips, said=said)


def _bytes(image: Image.Image | bytes) -> bytes:
    return image if isinstance(image, bytes) else png(image)


def _parquet(path: Path, rows: list[Row], row_group: int) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ImportError(NEED) from None

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group)
