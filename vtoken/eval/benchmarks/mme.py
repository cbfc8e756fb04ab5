"""MME: yes-or-no questions, two per image (Fu et al., arXiv 2306.13394)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..protocols.yes_no import PROTOCOLS
from .datasets import parquet_folder, read_parquet, read_tsv
from .task import Breakdown, Item, Prompt, Task, checked, decoded, fingerprint

HUB = "lmms-lab/MME"
HOW = (
    "give --data a folder with the parquet files of https://huggingface.co/datasets/lmms-lab/MME (hf download"
    " lmms-lab/MME --repo-type dataset --local-dir MME) or VLMEvalKit's MME.tsv, or use --example."
)
PERCEPTION = [
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
]
COGNITION = ["commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"]
PARTS = {"perception": PERCEPTION, "cognition": COGNITION}


def load(source: str | Path = HUB) -> list[Item]:
    """The questions of MME, grouped by category; `about["image"]` is shared by the two questions of an image.

    Args:
        source: a folder of parquet files or an id on the Hub (columns `question_id, image, question, answer,
            category`), or VLMEvalKit's TSV (`index, image, question, answer, category, image_path`).

    Raises:
        ValueError: if there is no such data set, a column is missing, a category is unknown, an answer is not
            yes or no, a question is there twice, or an image has not two questions. The sentence names the
            item.
    """
    path = Path(source)
    if path.is_file():
        if path.suffix != ".tsv":
            raise ValueError(f"{str(path)!r} is a file, but no .tsv: {HOW}")
        rows, key = (
            read_tsv(path, ["index", "image", "question", "answer", "category", "image_path"]),
            "image_path",
        )
    else:
        columns = ["question_id", "image", "question", "answer", "category"]
        rows, key = (
            read_parquet(parquet_folder(path if path.is_dir() else source, HOW), columns, HOW, "image"),
            "question_id",
        )
    return _paired([_item(row, key) for row in rows])


def _item(row: dict[str, Any], key: str) -> Item:
    image, question, category = row[key], str(row["question"] or ""), row["category"]
    name = f"{category}: {image}: {question.strip()}"
    if category not in PERCEPTION + COGNITION:
        raise ValueError(
            f"{name!r} has a category that MME does not have: use {', '.join(PERCEPTION + COGNITION)}."
        )
    answer = str(row["answer"] or "").strip().rstrip(".").lower()
    if answer not in ("yes", "no"):
        raise ValueError(f"{name!r} has the answer {row['answer']!r}: MME needs Yes or No.")
    return Item(name, question, answer, category, row["open"], about={"image": f"{category}: {image}"})


def _paired(items: list[Item]) -> list[Item]:
    count: dict[str, int] = {}
    for item in checked(items):
        count[item.about["image"]] = count.get(item.about["image"], 0) + 1
    if odd := [f"{image!r} has {n}" for image, n in count.items() if n != 2]:
        more = f", and {len(odd) - 1} more images are like it" if len(odd) > 1 else ""
        raise ValueError(f"Every image of MME has two questions, but {odd[0]}{more}.")
    return items


class MME(Task):
    """MME under one protocol, a `Task` for the runner."""

    title = "MME"

    def __init__(self, items: list[Item], protocol: str = "strict") -> None:
        if protocol not in PROTOCOLS:
            raise ValueError(f"There is no protocol {protocol!r}: use {', '.join(PROTOCOLS)}.")
        self.items, self.name, self.protocol = items, protocol, PROTOCOLS[protocol]
        self.max_new_tokens = self.protocol.max_new_tokens

    def settings(self) -> dict[str, Any]:
        return {
            "task": "MME",
            "protocol": self.name,
            "questions": len(self.items),
            "data": fingerprint(self.items),
        }

    def prompt(self, item: Item, frames: int | None = None) -> Prompt:
        return Prompt(self.protocol.prompt(item.question), image=decoded(item.name, item.media))

    def read(self, item: Item, text: str) -> str:
        return self.protocol.read(text)

    def breakdown(self, right: dict[str, bool]) -> Breakdown:
        """acc (questions) and acc+ (images with both right) per category; score: their sum, at most 200."""
        images: dict[str, dict[str, list[bool]]] = {}
        for item in self.items:
            images.setdefault(item.group, {}).setdefault(item.about["image"], []).append(right[item.name])
        scores: dict[str, Any] = {"categories": {}}
        rows = [["category", "questions", "acc", "acc+", "score"]]
        columns = {}
        for part, categories in PARTS.items():
            total, there = 0.0, [c for c in categories if c in images]
            for category in there:
                pairs = images[category].values()
                acc = 100 * sum(map(sum, pairs)) / sum(map(len, pairs))
                plus = 100 * sum(map(all, pairs)) / len(pairs)
                total += acc + plus
                scores["categories"][category] = {"acc": acc, "acc+": plus, "score": acc + plus}
                rows.append([category, str(2 * len(pairs)), f"{acc:.2f}", f"{plus:.2f}", f"{acc + plus:.2f}"])
            scores[part] = total
            columns[part] = f"{total:.1f} of {200 * len(there)}" if there else "not asked"
            if there:
                few = f"{len(there)} of {len(categories)} categories"
                rows.append([f"{part}, {few}", "", "", "", columns[part]])
        scores["sum"] = scores["perception"] + scores["cognition"]
        columns["sum"] = f"{scores['sum']:.1f}"
        return Breakdown(columns, rows, scores)
