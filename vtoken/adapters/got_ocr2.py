"""GOT-OCR2: a SAM tower over square tiles, convolutions that shrink its map."""

from __future__ import annotations

from .internvl import InternVLAdapter
from .registry import register_adapter
from .towers.base import Tower


@register_adapter
class GotOcr2Adapter(InternVLAdapter):
    """`GotOcr2ForConditionalGeneration`: a run of placeholders is one image with its tiles, or pages.

    The tower adds relative positions to its attention, which is therefore not read.
    """

    model_types = ("got_ocr2",)

    def make_towers(self) -> dict[str, Tower]:
        return {}
