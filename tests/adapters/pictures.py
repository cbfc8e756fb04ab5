"""Pictures with one cell painted, and tokenizers for the processors of families, built without files."""

from __future__ import annotations

import transformers
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

import vtoken
from tests.mechanism.common import run
from tests.models.common import VOCAB

from .families import Probe, seen


def tokenizer(**names: int) -> transformers.PreTrainedTokenizerFast:
    """Words w0, w1, ... are their numbers; `names` are special tokens by id, without the angle brackets."""
    return tokenizer_of({f"<{name}>": i for name, i in names.items()})


def tokenizer_of(special: dict[str, int]) -> transformers.PreTrainedTokenizerFast:
    """The same for special tokens spelled out."""
    words = {f"w{i}": i for i in range(VOCAB) if i not in special.values()} | special
    inner = Tokenizer(models.WordLevel(words, unk_token="w3"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0", unk_token="w3")
    made.add_special_tokens({"additional_special_tokens": list(special)})
    made.padding_side = "left"
    return made


def painted(size: tuple[int, int], box: tuple[int, int, int, int] | None) -> Image.Image:
    """A grey picture of size (width, height), white within (left, top, right, bottom)."""
    image = Image.new("RGB", size, (90, 90, 90))
    if box is not None:
        left, top, right, bottom = box
        ImageDraw.Draw(image).rectangle((left, top, right - 1, bottom - 1), fill=(255, 255, 255))
    return image


def find(
    model, plain: dict[str, Tensor], marked: dict[str, Tensor], segment: int = 0
) -> tuple[int, vtoken.VisualTokens]:
    """The cell of a segment whose token changes most between two prompts of one image, and its tokens.

    It is also the token that stays if a strategy keeps this cell alone.
    """
    (before,), (after,) = (seen(model, p, received=False, keys=False) for p in (plain, marked))
    change = (after.features - before.features).norm(dim=-1)
    change[after.segment_of != segment] = -1
    cell = int(after.cells[change.argmax()])
    with vtoken.applied(model, Probe(budget=0.5, received=False, keys=False, mark=(cell,))):
        run(model, marked, 1)
        visual = vtoken.report(model).visuals[0]
    assert visual.cells[visual.keep].tolist() == [cell] and visual.tokens_out == 1
    return cell, after
