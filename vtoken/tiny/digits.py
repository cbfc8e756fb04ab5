"""Builds ``digits.npz``: the glyph masks of the ten digits in the clips.

Run ``python -m vtoken.tiny.digits`` to build it again (needs matplotlib, for its fonts, and Pillow). Like the
masks of `vtoken.tiny.assets` it ships with the package, so that a clip is the same on every machine.

The digits are rendered from fonts that matplotlib ships and then deformed. Train: DejaVu Sans, DejaVu Serif
(Bitstream Vera licence, changes in the public domain) and STIX General (SIL OFL 1.1). Test: Computer Modern
bold, roman, sans and typewriter (BaKoMa fonts licence). No family is in both.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..extras import require
from .assets import CANVAS

DIGITS = tuple("0123456789")
FONTS = {
    "train": (
        "DejaVuSans",
        "DejaVuSans-Bold",
        "DejaVuSerif",
        "DejaVuSerif-Bold",
        "STIXGeneral",
        "STIXGeneralBol",
    ),
    "test": ("cmss10", "cmtt10", "cmr10", "cmb10"),
}
GLYPHS = {"train": 72, "test": 24}  # per digit
FILE = Path(__file__).with_name("digits.npz")
_SCALE = 8


def glyph(digit: str, font: Path, rng: np.random.Generator) -> np.ndarray:
    """One deformed mask of a digit: ``(24, 24)`` uint8, 255 inside; 18 to 21 px high, strokes from 2 px."""
    side = CANVAS * _SCALE
    face = ImageFont.truetype(str(font), side)
    stroke = int(rng.integers(1, 4) if font.stem.endswith(("Bold", "Bol", "cmb10")) else rng.integers(4, 9))
    left, top, right, bottom = face.getbbox(digit, stroke_width=stroke)
    drawn = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(drawn).text((-left, -top), digit, fill=255, font=face, stroke_width=stroke)
    height = int(rng.integers(18 * _SCALE, 21 * _SCALE + 1))
    width = min(round(drawn.width * height / drawn.height * rng.uniform(0.85, 1.15)), 18 * _SCALE)
    canvas = Image.new("L", (side, side))
    canvas.paste(
        drawn.resize((width, height), Image.Resampling.BICUBIC), ((side - width) // 2, (side - height) // 2)
    )
    canvas = canvas.rotate(rng.uniform(-8, 8), Image.Resampling.BICUBIC)
    small = np.asarray(canvas, np.float64).reshape(CANVAS, _SCALE, CANVAS, _SCALE).mean((1, 3))
    return (np.round(small / 17) * 17).astype(np.uint8)  # 16 levels: compresses well


def build(file: Path = FILE, seed: int = 0) -> None:
    """Writes the file; needs matplotlib for the fonts."""
    require("matplotlib", extra="demo")
    import matplotlib

    rng = np.random.default_rng(seed)
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    arrays = {}
    for split, fonts in FONTS.items():
        faces = [folder / f"{fonts[i % len(fonts)]}.ttf" for i in range(GLYPHS[split])]
        arrays[f"digits_{split}"] = np.stack(
            [[glyph(digit, face, rng) for face in faces] for digit in DIGITS]
        )
    np.savez_compressed(file, **arrays)


if __name__ == "__main__":
    build()
    print(f"{FILE.name}: {FILE.stat().st_size / 1e3:.0f} kB")
