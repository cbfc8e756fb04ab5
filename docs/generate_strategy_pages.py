"""Write docs/strategies/: one page per strategy and an index, from metadata and docstrings.

python docs/generate_strategy_pages.py
"""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from dataclasses import MISSING, Field, fields
from pathlib import Path

from vtoken.strategies import EncoderStrategy, Strategy, StrategyInfo, create, list_names, strategy_info
from vtoken.tokens import Needs, TowerInfo

FOLDER = Path(__file__).parent / "strategies"
NOTE = (
    "<!-- Written by docs/generate_strategy_pages.py; edit the strategy's docstring and metadata instead. -->"
)
STAGES = {
    "pixels": "before the vision tower",
    "encoder": "inside the vision tower",
    "projector": "between the vision tower and the LLM",
    "prefill": "inside the LLM, while the prompt is read",
    "cache": "on the KV cache",
}
DEPTH = 32  # of the LLM in the examples
CLIP = TowerInfo(24, 22, True, tuple(range(24)), 16)
SIGLIP = TowerInfo(27, 25, False, tuple(range(27)), 16)
KINDS = {
    "cls_attention": "attention of the CLS token",
    "cls_logits": "attention logits of the CLS token",
    "received_attention": "attention received",
    "keys": "attention keys",
    "states": "outputs",
}


def pages() -> dict[str, str]:
    """File name in docs/strategies/ -> text, for every strategy that comes with vtoken."""
    infos = [strategy_info(name) for name in list_names()]
    infos = [i for i in infos if i.cls.__module__.startswith("vtoken.")]
    return {"README.md": index(infos)} | {f"{i.name}.md": page(i) for i in infos}


def index(infos: list[StrategyInfo]) -> str:
    rows = [
        f"| [`{i.name}`]({i.name}.md) | {', '.join(i.stages)} | {', '.join(modalities(i))} | {i.summary}"
        f" | {'baseline' if i.baseline else i.paper.rpartition(', ')[2]} |"
        for i in infos
    ]
    return "\n".join(
        [
            NOTE,
            "",
            "# Strategies",
            "",
            (
                "`vtoken.patch(model, name, budget=...)` puts one on, `vtoken.list_strategies(model=model)`"
                " lists those that fit a"
            ),
            "model. The rival that needs none is a smaller image: `vtoken.resized(processor, budget)`.",
            "",
            "| name | stage | input | what it does | source |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def page(info: StrategyInfo) -> str:
    about, arguments = parse(info.cls)
    strategy = create(info.name)
    facts = {
        "Stage": "; ".join(f"{s} ({STAGES[s]})" for s in info.stages),
        "Input": " and ".join(modalities(info)),
        "Reads": reads(strategy),
        "A budget counts": info.budget_counts
        or ("not told" if "budget" in info.defaults else "nothing: there is none"),
        "Counts": (
            "known from the grids before anything is encoded"
            if strategy.static_counts
            else "at most the budget; known before anything is encoded in a plain encoder"
            if isinstance(strategy, EncoderStrategy)
            else "decided by the content"
        ),
        "Paper": info.paper or ("none: a baseline" if info.baseline else "none"),
        "Reference code": (
            f"{info.code}{f' ({info.code_licence})' if info.code_licence else ''}" if info.code else "none"
        ),
    }
    lines = [NOTE, "", f"# {info.name}", "", info.summary, ""]
    if info.experimental:
        lines += ["**Experimental:** parts of the method are not published.", ""]
    lines += ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts.items()), ""]
    lines += ["## Idea", "", about or info.summary, ""]
    lines += kept(info.name)
    lines += ["## Use", "", "```python", example(info, strategy), "```", ""]
    lines += ["## Options", "", "| option | default | meaning |", "|---|---|---|"]
    for f in fields(info.cls):
        if f.init:
            lines.append(f"| `{f.name}` | `{default(f)!r}` | {arguments.get(f.name, 'See above.')} |")
    if info.differs:
        lines += ["", "## What differs from the reference", "", *textwrap.wrap(sentence(info.differs), 118)]
    measured = FOLDER.parent / "measured" / f"{info.name}.md"
    if measured.is_file():
        lines += ["", measured.read_text().rstrip()]
    return "\n".join([*lines, ""])


def kept(name: str) -> list[str]:
    """The picture of what the strategy keeps; no lines for a strategy that has none."""
    told = json.loads((FOLDER.parent / "kept" / "kept.json").read_text(encoding="utf-8")).get(name)
    if told is None or "none" in told:
        return []
    budget = f" with `budget={told['budget']}`" if "budget" in told else " with its defaults"
    subject = "a photograph" if told["medium"] == "image" else "a clip of it"
    counts = f"{told['after']:g} of {told['before']} visual tokens"
    average = ", averaged over the LLM's layers," if told.get("average") else ""
    words = (
        f"{counts}{average}{budget}, chosen by the shipped `{told['model']}`. The photograph is the"
        " same on every page; the model is tiny and was trained on drawings, so that it looks elsewhere than"
        " a large one does."
    )
    return [
        "## What it keeps",
        "",
        f"![{name}: {counts} of {subject}](../kept/{name}.webp)",
        "",
        *textwrap.wrap(words, 118),
        f"Made by `python docs/generate_kept.py {name}`.",
        "",
    ]


def modalities(info: StrategyInfo) -> tuple[str, ...]:
    return create(info.name).needs(None).modalities


def example(info: StrategyInfo, strategy: Strategy) -> str:
    """A call with the default budget."""
    budget = "" if strategy.budget is None else f", budget={strategy.budget}"
    if isinstance(strategy, EncoderStrategy):
        return f'vtoken.patch(model, "{info.name}"{budget})\nmodel(images)\nprint(vtoken.report(model))'
    return (
        f'vtoken.patch(model, "{info.name}"{budget})\nmodel.generate(**inputs)\nprint(vtoken.report(model))'
    )


def reads(strategy: Strategy) -> str:
    """Inputs of a strategy, on towers with and without a CLS token, and its LLM layers."""
    with_cls, without = strategy.needs(CLIP), strategy.needs(SIGLIP)
    parts = []
    if strategy.acts_on_projector and not isinstance(strategy, EncoderStrategy):
        parts.append(
            "projected features"
            + ("" if not with_cls.text_embeddings else ", embeddings of the prompt's text")
        )
    tower = describe(with_cls)
    if tower:
        parts.append(f"{tower} (as in CLIP-L: 24 layers, features of layer 22)")
        if without.cls_attention or without.cls_logits:
            asked = (
                ' unless `score="received"` asks for attention received' if hasattr(strategy, "score") else ""
            )
            parts.append(f"a tower without CLS token is refused{asked}")
        elif without != with_cls:
            parts.append(f"on towers without CLS token {describe(without) or 'features alone'}")
    if with_cls.pixels:
        parts.append("the frames' pixels")
    if with_cls.question_attention is not None:
        parts.append("the prompt's text up to a layer of the LLM, and what its last token looks at there")
    if with_cls.together:
        parts.append("all images of a prompt at once, as the frames of one video")
    if "pixels" in strategy.info.stages:
        alone = strategy.reuse(CLIP).interval == 1
        parts.append("the pixels of every frame" + ("" if alone else ", with those of earlier frames"))
    elif strategy.reuse(CLIP) is not None:
        parts.append("attention keys of every tower layer, with those of an earlier frame")
    encoder = strategy.encoder_layers(CLIP)
    if isinstance(strategy, EncoderStrategy):
        parts.append("tokens and attention keys between attention and MLP of the encoder's layers")
    elif encoder:
        parts.append(f"features after tower {numbers(encoder)}")
    drops = strategy.prefill_layers(DEPTH)
    if drops:
        parts.append(f"what the LLM has computed before {numbers(drops)} (of {DEPTH})")
    if strategy.attention() is not None:
        parts.append("the attention of some tokens in every layer of the LLM")
    return "; ".join(parts) or "nothing but the grids"


def describe(needs: Needs) -> str:
    return ", ".join(
        f"{what} of {numbers(getattr(needs, kind))}" for kind, what in KINDS.items() if getattr(needs, kind)
    )


def numbers(layers: tuple[int, ...]) -> str:
    """`layer 2`, `layers 0 and 22`, `layers 3, 7 and 11`."""
    *some, last = map(str, layers)
    return f"layers {', '.join(some)} and {last}" if some else f"layer {last}"


def default(f: Field) -> object:
    return f.default if f.default_factory is MISSING else f.default_factory()


def parse(cls: type[Strategy]) -> tuple[str, dict[str, str]]:
    """A docstring's text without its sections, and its arguments, those of the base classes included."""
    about, arguments = "", {}
    for owner in (c for c in reversed(cls.__mro__) if issubclass(c, Strategy)):
        doc = "" if written_by_dataclass(owner) else inspect.cleandoc(owner.__doc__ or "")
        about = re.split(r"^\w+:$", doc, maxsplit=1, flags=re.MULTILINE)[0].strip()
        section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", doc, flags=re.MULTILINE)
        if section:
            arguments |= entries(textwrap.dedent(section[1]))
    return about, arguments


def written_by_dataclass(cls: type) -> bool:
    """Whether the docstring is the signature that `dataclass` writes for a class without one."""
    return (cls.__doc__ or "").startswith(f"{cls.__name__}(")


def entries(text: str) -> dict[str, str]:
    """`a, b: meaning` with indented continuation lines -> {"a": meaning, "b": meaning}."""
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=\S)", text.strip()):
        names, _, meaning = entry.partition(": ")
        meaning = sentence(" ".join(meaning.split())).replace("|", "\\|")
        found |= {name.strip(): meaning for name in names.split(",")}
    return found


def sentence(text: str) -> str:
    """The text with a full stop, and a capital unless it begins with a symbol such as `s`."""
    text = text.strip()
    if re.match(r"[a-z]+\b(?![(.])", text) and (len(text.split()[0].strip(",")) > 1 or text.startswith("a ")):
        text = text[0].upper() + text[1:]
    return text if text.endswith(".") else f"{text}."


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    wanted = pages()
    for old in FOLDER.glob("*.md"):
        if old.name not in wanted:
            old.unlink()
    for name, text in wanted.items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
