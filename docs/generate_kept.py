"""Write docs/kept/: what every strategy keeps of one photograph, drawn, and the counts as kept.json.

python docs/generate_kept.py [name ...]    # no name: the strategies that are not in kept.json yet
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import vtoken
from vtoken.asking import prompt, quiet, to_model
from vtoken.cli.demo import tower_pictures
from vtoken.strategies import EncoderStrategy, create, list_names, strategy_info

FOLDER = Path(__file__).parent / "kept"
FACTS = FOLDER / "kept.json"
QUESTION = "where is the yellow one?"
BUDGET = 0.25
MODELS = ("llava", "qwen2_5_vl", "llava_onevision")  # shipped; the first that a strategy fits
ENCODER = "vit"  # shipped, of timm
SIDE, FRAMES = 384, 8  # px of the photograph; frames of the clip
ALL = "every visual token of the photograph enters the LLM"
NO_PLACE = "its tokens have no place in the picture"
NO_MODEL = "no shipped model has layers enough for it"


def photograph() -> Image.Image:
    """A cup of coffee, 600 x 400 px, by Rachel Michetti, CC0, from scikit-image."""
    from skimage import data

    return Image.fromarray(data.coffee())


def still() -> Image.Image:
    return photograph().crop((100, 0, 500, 400)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def clip(count: int = FRAMES) -> list[Image.Image]:
    """The same cup; the camera moves to the right in the second half."""
    whole, half = photograph(), SIDE // 2
    lefts = [60 + max(0, i - count // 2 + 1) * 140 // count * 2 for i in range(count)]
    return [whole.crop((x, 0, x + 400, 400)).resize((half, half), Image.Resampling.LANCZOS) for x in lefts]


def asked(model: Any, processor: Any, medium: str) -> tuple[Any, Any]:
    """Inputs of one question about the photograph or the clip, and the pictures that the tower read."""
    text = prompt(processor, QUESTION, medium)
    if medium == "image":
        inputs = to_model(model, processor(images=still(), text=text, return_tensors="pt"))
        return inputs, tower_pictures(still(), inputs, processor)
    times = dict(total_num_frames=FRAMES, fps=1.0, frames_indices=list(range(FRAMES)))
    options = dict(return_tensors="pt", do_sample_frames=False, video_metadata=[times])
    return to_model(model, processor(videos=[clip()], text=text, **options)), clip()[::2]


def ways(name: str) -> Iterator[tuple[Any, ...]]:
    """What may be drawn of a strategy: name of a model, model, processor, strategy, image or video.

    A strategy with weights takes those that ship.
    """
    learned = [m for m in MODELS if name in vtoken.tiny.trained(m)]
    for shipped in learned or MODELS:
        model, processor = vtoken.tiny.load(shipped)
        folder = vtoken.tiny.trained(shipped).get(name)
        if folder is None and name not in vtoken.list_strategies(name, model=model):
            continue
        strategy = name if folder is None else vtoken.VTokenConfig.from_pretrained(folder)
        for medium in create(name).needs(None).modalities:
            if shipped != "llava" or medium == "image":
                yield shipped, model, processor, strategy, medium


def draw(name: str) -> tuple[Image.Image | None, dict[str, Any]]:
    """The picture and its facts, or None and why there is none.

    The facts are the model, the medium, the visual tokens before and after, the budget where one was given,
    and whether `after` is an average over the LLM's layers.
    """
    if isinstance(create(name), EncoderStrategy):
        return draw_merged(name)
    why = NO_MODEL
    for shipped, model, processor, strategy, medium in ways(name):
        budget = {} if create(name).budget is None or not isinstance(strategy, str) else {"budget": BUDGET}
        inputs, pictures = asked(model, processor, medium)
        with vtoken.applied(model, strategy, **budget), torch.inference_mode():
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
            report = vtoken.report(model)
        if report.average_visual_tokens == report.tokens_in:
            why = ALL
            continue
        try:
            picture = vtoken.visualize(pictures, report.visuals[0], cell=SIDE // 12)
        except ValueError:  # queries
            why = NO_PLACE
            continue
        told = facts(shipped, medium, report.tokens_in, report.average_visual_tokens)
        return picture, told | budget | {"average": len(report.visuals[0].layers) > 1}
    return None, {"none": why}


def draw_merged(name: str) -> tuple[Image.Image, dict[str, Any]]:
    """Patches of a plain encoder, one colour per token."""
    model, preprocess, _ = vtoken.tiny.load_encoder(ENCODER)
    frames = clip(4) if hasattr(create(name), "frames") else [still()]
    options = {"frames": len(frames)} if len(frames) > 1 else {}
    with vtoken.applied(model, name, **options), torch.inference_mode():
        model(torch.stack([preprocess(frame) for frame in frames]))
        report = vtoken.report(model)
    after = report.tokens_per_layer[-1] - report.prefix
    told = facts(ENCODER, "video" if options else "image", report.patches, after)
    return vtoken.visualize(frames, report, cell=SIDE // 6), told


def facts(model: str, medium: str, before: int, after: float) -> dict[str, Any]:
    return {"model": model, "medium": medium, "before": before, "after": round(after, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="strategies; those without an entry where none is given")
    parser.add_argument("--all", action="store_true", help="every strategy that ships, about a minute")
    a = parser.parse_args()
    quiet()
    FOLDER.mkdir(exist_ok=True)
    ships = [n for n in list_names() if strategy_info(n).cls.__module__.startswith("vtoken.")]
    told = json.loads(FACTS.read_text(encoding="utf-8")) if FACTS.is_file() else {}
    told = {name: facts for name, facts in told.items() if name in ships}
    for name in a.names or [n for n in ships if a.all or n not in told]:
        picture, told[name] = draw(name)
        if picture is not None:
            picture.save(FOLDER / f"{name}.webp", quality=80, method=6)
        else:
            (FOLDER / f"{name}.webp").unlink(missing_ok=True)
    FACTS.write_text(json.dumps(dict(sorted(told.items())), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
