"""ImageNet classification: top-1 and top-5 of a timm classifier (Russakovsky et al., arXiv 1409.0575)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ...extras import require
from ...images import FORMATS
from ..intervals import wilson
from .datasets import ImageCell, parquet_files, read_parquet
from .encoder_models import EncoderModel
from .encoder_task import EncoderTask, Sample, checked, fingerprint, spread
from .task import Breakdown, Unreadable, one_line

HOW = (
    "give --data a folder with one folder of images per class (ImageFolder; DIR, DIR/val or DIR/validation),"
    " or the parquet file or files of https://huggingface.co/datasets/ILSVRC/imagenet-1k with the columns"
    " image and label, or use --example."
)
TOP, SPLIT = 5, "validation"


def load(source: str | Path, classes: int, limit: int | None = None) -> list[Sample]:
    """The labelled images of a data set; `truth` is the index of the class.

    Args:
        source: a folder of class folders, sorted by name as torchvision does; a parquet file, or a folder of
            them, of which those of the validation split are read.
        classes: number of classes that the model tells apart.
        limit: images, in equal steps over the data set; all if None.

    Raises:
        ValueError: if there is no such data set, a column is missing, the folders are not the model's
            classes, or a label is not below `classes`.
        ImportError: if pyarrow is needed and not installed, or torchvision is not.
    """
    path = Path(source)
    if not path.exists():
        raise ValueError(f"There is no data set {str(source)!r}: {HOW}") from FileNotFoundError(source)
    if path.is_file() and path.suffix != ".parquet":
        raise ValueError(f"{str(path)!r} is a file, but no .parquet: {HOW}")
    found = (_parquet if parquet_files(path, SPLIT) else _folders)(path, classes)
    return checked(spread(found, limit))


def _parquet(path: Path, classes: int) -> list[Sample]:
    samples = []
    for row in read_parquet(path, ["image", "label"], HOW, image="image", split=SPLIT):
        label, cell = row["label"], row["open"]
        name = f"{cell.path.name}:{cell.group}:{cell.row}"
        if type(label) is not int or not 0 <= label < classes:
            raise ValueError(
                f"{name!r} has the label {label!r}: this model needs a whole number from 0 to {classes - 1}"
                " (labels of -1 mark a split whose labels are not published)."
            )
        samples.append(Sample(name, str(label), cell))
    return samples


def _folders(path: Path, classes: int) -> list[Sample]:
    require("torchvision", extra="timm")
    from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

    root = next((path / name for name in ("val", "validation") if (path / name).is_dir()), path)
    try:
        names, _ = find_classes(str(root))
    except FileNotFoundError:
        raise ValueError(f"The folder {str(root)!r} has no folders of classes: {HOW}") from None
    found = make_dataset(str(root), class_indices(names, classes, root), IMG_EXTENSIONS, allow_empty=True)
    if not found:
        raise ValueError(f"No class folder of {str(root)!r} has an image: {HOW}")
    return [Sample(Path(file).relative_to(root).as_posix(), str(label), Path(file)) for file, label in found]


def class_indices(names: Sequence[str], classes: int, root: Path) -> dict[str, int]:
    """Index of the class per folder name.

    As many folders as the model has classes: their order by name. Fewer that are all named by WordNet ids
    of ImageNet-1k, for a model of 1000 classes: the index of each there.

    Raises:
        ValueError: for other numbers of folders, whose indices would be those of other classes.
    """
    if len(names) == classes:
        return {name: i for i, name in enumerate(sorted(names))}
    require("timm", extra="timm")
    from timm.data import ImageNetInfo

    known = ImageNetInfo("imagenet-1k")
    wnids = {known.index_to_label_name(i): i for i in range(known.num_classes())}
    if classes == len(wnids) and all(name in wnids for name in names):
        return {name: wnids[name] for name in names}
    strange = next((f", {name!r} among them" for name in names if name not in wnids), "")
    raise ValueError(
        f"{str(root)!r} has {len(names)} folders{strange}, and the model has {classes} classes: it takes one"
        " folder per class, or folders named by WordNet ids such as n01440764 for the 1000 classes of"
        " ImageNet-1k."
    )


class ImageNet(EncoderTask):
    """Top-1 and top-5 accuracy of a classifier, an `EncoderTask` for the runner.

    An image that cannot be decoded counts as wrong. Images are not turned by their EXIF orientation, as in
    timm and torchvision.

    Args:
        samples: from `load`.
        preprocess: that of the model, see `EncoderModel`.
    """

    title, unit, axis = "ImageNet", "image", "top-1 accuracy, %"

    def __init__(self, samples: Sequence[Sample], preprocess: Callable[[Any], Tensor]) -> None:
        self.samples, self.preprocess = samples, preprocess

    def settings(self) -> dict[str, Any]:
        return {"task": "ImageNet", "images": len(self.samples), "data": fingerprint(self.samples)}

    def open(self, sample: Sample) -> Tensor:
        media = sample.media
        try:
            with Image.open(
                media.read() if isinstance(media, ImageCell) else media,
                formats=[f for f in FORMATS.split(",") if f in Image.OPEN],
            ) as image:
                return self.preprocess(image.convert("RGB"))
        except Exception as error:  # decoders fail in many ways, none of which may end a run
            raise Unreadable(f"The image {sample.name} cannot be decoded: {one_line(error)}") from None

    def encode(self, model: Any, pixels: Tensor) -> Tensor:
        return model(pixels)

    def values(self, output: Tensor, n: int) -> list[Any]:
        """The indices of the (up to) five largest of logits (n, classes), the largest first."""
        return output.float().topk(min(TOP, output.shape[-1])).indices.tolist()

    def whole(self, value: Any) -> bool:
        return isinstance(value, list) and 0 < len(value) <= TOP and all(type(i) is int for i in value)

    def breakdown(self, values: dict[str, Any]) -> Breakdown:
        """Top-1 and top-5 accuracy in %, with 95 % Wilson intervals; images without a value are wrong."""
        asked = len(self.samples)
        rows, columns = [["", "images", "right", "accuracy", "95 % interval"]], {}
        scores: dict[str, Any] = {"asked": asked}
        for k in (1, TOP):
            right = sum(int(s.truth) in values.get(s.name, [])[:k] for s in self.samples)
            low, high = (100 * end for end in wilson(right, asked))
            scores[f"top-{k}"] = {"accuracy": 100 * right / asked, "right": right, "interval": [low, high]}
            shown = f"{100 * right / asked:.2f}"
            rows.append([f"top-{k}", str(asked), str(right), shown, f"{low:.2f} to {high:.2f}"])
            columns[f"top-{k}, %"] = shown
        return Breakdown(columns, rows, scores)

    def point(self, breakdown: Breakdown) -> tuple[float, float, float]:
        first = breakdown.scores["top-1"]
        return first["accuracy"], *first["interval"]


def classes_of(encoder: EncoderModel) -> int:
    """Number of classes of a classifier. Raises ValueError for a model that is none."""
    classes = getattr(encoder.model, "num_classes", 0)
    if not classes or encoder.tokenizer is not None:
        raise ValueError(
            f"{encoder.name!r} has no classifier: give a model of timm that has one, such as"
            " timm:deit_small_patch16_224."
        )
    return int(classes)
