"""Reads evaluation data sets: parquet in the Hub's layout, local or downloaded, and VLMEvalKit's TSV.

Only rows are read: no script of a data set is run and nothing is unpickled.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from ...checks import found
from ...images import open_image

Row = dict[str, Any]
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def parquet_folder(source: str | Path, how: str) -> Path:
    """The folder of a data set, downloaded from the Hub if `source` is an id there and no local folder.

    Args:
        source: a folder, or an id on the Hub such as "lmms-lab/MME".
        how: the sentence that says how to get the data set, for errors.

    Raises:
        ValueError: if there is no such folder, or the Hub does not give it.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    if not HUB_ID.fullmatch(str(source)) or folder.exists():
        raise ValueError(f"There is no data set folder {str(source)!r}: {how}") from FileNotFoundError(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), repo_type="dataset", allow_patterns=["*.parquet"]))
    except Exception as error:  # the client has a dozen kinds, all of them mean that the data set is not here
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"The Hub did not give the data set {str(source)!r} ({reason}): {how}") from error


def parquet_files(folder: Path, split: str = "test") -> list[Path]:
    """The parquet files of a split, such as `test-00000-of-00002.parquet`; all if none names a split.

    A single file stands for itself. "validation" is also written "val".
    """
    if folder.is_file():
        return [folder]
    found = sorted(folder.rglob("*.parquet"))
    words = ("validation", "val") if split == "validation" else (split,)
    named = [f for f in found if f.name.startswith(words) or f.parent.name in words]
    return named or [f for f in found if not re.match(r"(train|validation|val|dev|test)\b", f.name)]


def read_parquet(
    folder: Path, columns: Sequence[str], how: str, image: str | None = None, split: str = "test"
) -> list[Row]:
    """Rows: the other columns of a data set, and under "open" an `ImageCell` that opens the row's image.

    Args:
        folder: searched for parquet files of the split; or one file.
        columns: must be there; all of them but `image` are read.
        how: for errors, how to get the data set.
        image: a column of Hub images (struct of `bytes` and `path`) or of bytes. Read a row group at a time,
            when asked.
        split: the name with which its files begin.

    Raises:
        ValueError: if there is no file, or a column is missing.
        ImportError: if pyarrow is not installed.
    """
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise ImportError("Parquet files need pyarrow: pip install 'vtoken[eval]'.") from None

    files = parquet_files(folder, split)
    if not files:
        raise ValueError(f"The folder {str(folder)!r} has no parquet files of a {split} split: {how}")
    rows: list[Row] = []
    for path in files:
        try:
            file = pq.ParquetFile(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"{str(path)!r} is no parquet file that can be read: {error}") from None
        check_columns(columns, file.schema_arrow.names, path)
        text = [c for c in columns if c != image]
        for group in range(file.num_row_groups):
            for i, row in enumerate(file.read_row_group(group, columns=text).to_pylist()):
                if image:
                    row["open"] = ImageCell(path, group, i, image)
                rows.append(row)
    return rows


def check_columns(wanted: Sequence[str], found: Sequence[str], path: Path) -> None:
    """Raise ValueError naming the columns that are missing."""
    if missing := [c for c in wanted if c not in found]:
        raise ValueError(f"{str(path)!r} lacks the column {', '.join(missing)}: it has {', '.join(found)}.")


@lru_cache(maxsize=2)
def _image_group(path: Path, group: int, column: str) -> list[Any]:
    import pyarrow.parquet as pq

    return pq.ParquetFile(path).read_row_group(group, columns=[column]).column(0).to_pylist()


@dataclass(frozen=True)
class ImageCell:
    """One cell of an image column; called, it opens the image. It can be sent to another process."""

    path: Path
    group: int
    row: int
    column: str

    def read(self) -> io.BytesIO:
        """The file in the cell. Raises ValueError if there is none."""
        cell = _image_group(self.path, self.group, self.column)[self.row]
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if not isinstance(data, bytes) or not data:
            raise ValueError(
                f"the column {self.column!r} has {found(cell)} in this row: store the bytes of a PNG or JPEG"
            )
        return io.BytesIO(data)

    def __call__(self) -> Image.Image:
        return open_image(self.read())


def read_tsv(path: Path, columns: Sequence[str]) -> list[Row]:
    """Rows of a VLMEvalKit TSV, with a function under "open" that opens the row's image.

    The column `image` has base64, or, to save space, the `index` of the row that has it.

    Raises:
        ValueError: if the file cannot be read or a column is missing.
        ImportError: if pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError:
        raise ImportError("TSV files need pandas: pip install 'vtoken[eval]'.") from None

    try:
        frame = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is no TSV that can be read: {error}") from None
    check_columns(columns, list(frame.columns), path)
    rows: list[Row] = frame.to_dict("records")
    images = {row["index"]: row["image"] for row in rows}
    for row in rows:
        row["open"] = _tsv_opener(images, row.pop("image"))
    return rows


def _tsv_opener(images: dict[str, str], cell: str) -> Callable[[], Image.Image]:
    def open_it() -> Image.Image:
        data = images.get(cell, "") if len(cell) <= 64 else cell
        if len(data) <= 64:
            raise ValueError(
                f"the column 'image' has neither base64 nor the index of a row that has it: {cell[:64]!r}"
            )
        return open_image(io.BytesIO(base64.b64decode(data)))

    return open_it
