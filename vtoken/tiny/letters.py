"""Builds ``letters.npz``: the glyph masks of the capital letters and digits on the pages.

Run ``python -m vtoken.tiny.letters`` to build it again (needs matplotlib, for its fonts, and Pillow). Like
the masks of `vtoken.tiny.assets` it ships with the package, so that a page is the same on every machine.

A face is a font in one height, stretch and stroke. Train: DejaVu Sans, Sans Mono and Serif (Bitstream Vera
licence, changes in the public domain) and STIX General (SIL OFL 1.1). Test: Computer Modern bold, roman
and sans (BaKoMa fonts licence). No family is in both.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..extras import require

LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
FONTS = {
    "train": (
        "DejaVuSans",
        "DejaVuSans-Bold",
        "DejaVuSansMono",
        "DejaVuSansMono-Bold",
        "DejaVuSerif",
        "DejaVuSerif-Bold",
        "STIXGeneral",
        "STIXGeneralBol",
    ),
    "test": ("cmss10", "cmr10", "cmb10"),
}
FACES = {"train": 192, "test": 18}
HEIGHTS = (11, 12, 13)  # px, of every glyph of a face
BOX = 13, 8  # height and width of a stored mask in px, the glyph at its top left
FILE = Path(__file__).with_name("letters.npz")
_SCALE, _WIDEST, _NARROW = 16, 7, 8  # a glyph is as wide as one of 8 px height


def face(font: Path, height: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The masks of a face, ``(36, 13, 8)`` uint8, 255 inside, and their widths in px, ``(36,)`` uint8."""
    drawer = ImageFont.truetype(str(font), 192)
    bold = font.stem.endswith(("Bold", "Bol", "cmb10"))
    stroke = int(rng.integers(0, 5) if bold else rng.integers(4, 12))
    top, bottom = drawer.getbbox("H", stroke_width=stroke)[1::2]
    stretch = _NARROW * _SCALE / (bottom - top) * rng.uniform(0.75, 1.0)
    masks, widths = [], []
    for letter in LETTERS:
        left, top, right, bottom = drawer.getbbox(letter, stroke_width=stroke)
        drawn = Image.new("L", (right - left, bottom - top))
        ImageDraw.Draw(drawn).text((-left, -top), letter, fill=255, font=drawer, stroke_width=stroke)
        width = min(max(round(drawn.width * stretch), 2 * _SCALE), _WIDEST * _SCALE)
        canvas = Image.new("L", (BOX[1] * _SCALE, BOX[0] * _SCALE))
        canvas.paste(drawn.resize((width, height * _SCALE), Image.Resampling.BICUBIC))
        small = np.asarray(canvas, np.float64).reshape(BOX[0], _SCALE, BOX[1], _SCALE).mean((1, 3))
        masks.append(np.round(small / 17) * 17)  # 16 levels: compresses well
        widths.append(-(-width // _SCALE))
    return np.stack(masks).astype(np.uint8), np.array(widths, np.uint8)


def build(file: Path = FILE, seed: int = 0) -> None:
    """Writes the file; needs matplotlib for the fonts."""
    require("matplotlib", extra="demo")
    import matplotlib

    rng = np.random.default_rng(seed)
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    arrays = {}
    for split, fonts in FONTS.items():
        faces = []
        for i in range(FACES[split]):
            height = HEIGHTS[i // len(fonts) % len(HEIGHTS)]
            faces.append((*face(folder / f"{fonts[i % len(fonts)]}.ttf", height, rng), np.uint8(height)))
        masks, widths, heights = (np.stack(part) for part in zip(*faces))
        arrays |= {f"masks_{split}": masks, f"widths_{split}": widths, f"heights_{split}": heights}
    np.savez_compressed(file, **arrays)


if __name__ == "__main__":
    build()
    print(f"{FILE.name}: {FILE.stat().st_size / 1e3:.0f} kB")
