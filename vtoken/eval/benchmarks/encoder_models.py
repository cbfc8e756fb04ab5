"""Loads plain image encoders by name: timm classifiers, open_clip dual encoders, and the tiny ones.

Local weights are safetensors files. Nothing is downloaded unless a tag of open_clip is named or
`pretrained` is given.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...extras import require

KINDS = (
    "timm:NAME with --checkpoint FILE.safetensors or --pretrained, open_clip:ARCH/TAG,"
    " open_clip:ARCH/FILE.safetensors or tiny:NAME"
)
DTYPES = ("float32", "float16", "bfloat16")


@dataclass
class EncoderModel:
    """An encoder in eval mode, with what belongs to it.

    Attributes:
        name: as the user gave it.
        model: called with float images (n, 3, h, w); a dual encoder has `encode_image` and `encode_text`.
        preprocess: from an RGB PIL image to a float32 tensor (3, h, w).
        tokenizer: from a list of n texts to int64 ids (n, length); None for a classifier.
        weights: what the weights are: the first digits of a file's SHA-256, or where they come from.
    """

    name: str
    model: Any
    preprocess: Callable[[Any], Tensor]
    tokenizer: Callable[[list[str]], Tensor] | None = None
    weights: str = ""

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def applied(self, strategy: str, options: dict[str, Any]) -> AbstractContextManager[Any]:
        """Patch for a `with` block."""
        import vtoken

        return vtoken.applied(self.model, strategy, **options)

    def report(self) -> Any:
        """What the last call cost, see `vtoken.report`: `gflops`, `gflops_dense`, `tokens_per_layer`."""
        import vtoken

        return vtoken.report(self.model)


def load(
    name: str, checkpoint: str | None = None, pretrained: bool = False, dtype: str = "float32"
) -> EncoderModel:
    """An encoder, on a GPU if there is one.

    Args:
        name: "timm:NAME", "open_clip:ARCH/TAG", "open_clip:ARCH/FILE.safetensors", "open_clip:ARCH" with a
            checkpoint, or "tiny:NAME", a model that ships with vtoken.
        checkpoint: a safetensors file with the weights.
        pretrained: whether timm may download its weights.
        dtype: of the weights and the pixels: "float32", "float16" or "bfloat16".

    Raises:
        ValueError: if there is no such model, it has no weights, or they do not fit.
        ImportError: if timm or open_clip is not installed.
    """
    if dtype not in DTYPES:
        raise ValueError(f"There is no dtype {dtype!r} here: use {', '.join(DTYPES)}.")
    kind, colon, rest = name.partition(":")
    if not colon or not rest or kind not in LOADERS:
        raise ValueError(f"Cannot tell what model {name!r} is: give {KINDS}.")
    made = LOADERS[kind](name, rest, checkpoint, pretrained)
    made.model.to("cuda" if torch.cuda.is_available() else "cpu", getattr(torch, dtype)).eval()
    return made


def _timm(name: str, rest: str, checkpoint: str | None, pretrained: bool) -> EncoderModel:
    require("timm", "torchvision", extra="timm")
    import timm
    from timm.data import create_transform, resolve_model_data_config

    if bool(checkpoint) == pretrained:
        found = "both" if pretrained else "neither"
        raise ValueError(
            f"{name!r} needs its weights from one place, found {found}: give --checkpoint FILE.safetensors,"
            " or --pretrained, with which timm downloads them."
        )
    weights = _weights(checkpoint) if checkpoint else "timm's pretrained weights"
    if ":" not in rest and not timm.is_model(rest):
        raise ValueError(f"timm has no model {rest!r}{_near(rest.partition('.')[0], timm.list_models())}.")
    if ":" in rest and not pretrained:
        raise ValueError(f"{name!r} is not among timm's own models: loading it needs --pretrained.")
    try:
        model = timm.create_model(rest, pretrained=pretrained)
        if checkpoint:
            timm.models.load_checkpoint(model, checkpoint)
    except Exception as error:
        raise _unloadable(name, error) from error
    preprocess = create_transform(**resolve_model_data_config(model), is_training=False)
    return EncoderModel(name, model, preprocess, weights=weights)


def _open_clip(name: str, rest: str, checkpoint: str | None, pretrained: bool) -> EncoderModel:
    require("open_clip", extra="open_clip")
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    arch, _, source = rest.partition("/")
    if arch not in open_clip.list_models():
        raise ValueError(f"open_clip has no architecture {arch!r}{_near(arch, open_clip.list_models())}.")
    tags = list_pretrained_tags_by_model(arch)
    if bool(source) == bool(checkpoint):
        raise ValueError(
            f"{name!r} needs its weights from one place: give "
            + f"open_clip:{arch}/TAG with one of {', '.join(tags)}, or " * bool(tags)
            + f"open_clip:{arch}/FILE.safetensors."
        )
    file = checkpoint or (source if source not in tags else None)
    if file and source and not source.endswith(".safetensors"):
        raise ValueError(
            f"{source!r} is neither a safetensors file nor a tag of {arch}: its tags are"
            f" {', '.join(tags) or 'none'}."
        )
    weights = _weights(file) if file else f"open_clip's {source}"
    # the activation that a tag was trained with; open_clip itself only warns
    quick = not file and bool(get_pretrained_cfg(arch, source).get("quick_gelu"))
    try:
        made = open_clip.create_model_and_transforms(
            arch, pretrained=file or source, force_quick_gelu=quick, weights_only=True
        )
        tokenizer = open_clip.get_tokenizer(arch)
    except Exception as error:
        raise _unloadable(name, error) from error
    return EncoderModel(name, made[0], made[2], tokenizer, weights)


def _tiny(name: str, rest: str, checkpoint: str | None, pretrained: bool) -> EncoderModel:
    from ... import tiny

    if checkpoint or pretrained:
        raise ValueError(f"{name!r} ships with its weights: leave --checkpoint and --pretrained away.")
    model, preprocess, tokenizer = tiny.load_encoder(rest)  # type: ignore[attr-defined]
    return EncoderModel(name, model, preprocess, tokenizer, "shipped")


LOADERS = {"timm": _timm, "open_clip": _open_clip, "tiny": _tiny}


def _near(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    return f": did you mean {' or '.join(near)}" if near else ""


def _weights(path: str) -> str:
    """The first digits of a file's SHA-256. Raises ValueError if it is no safetensors file."""
    file = Path(path)
    if file.suffix != ".safetensors":
        raise ValueError(f"{path!r} is no .safetensors file: weights in other formats can carry code.")
    if not file.is_file():
        raise ValueError(f"There is no file {path!r}.") from FileNotFoundError(path)
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while part := stream.read(2**22):
            digest.update(part)
    return digest.hexdigest()[:12]


def _unloadable(name: str, error: Exception) -> ValueError:
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return ValueError(f"Cannot load the model {name!r}: {' '.join(lines)[:300]}")


def tokenizer_of(encoder: EncoderModel) -> Callable[[list[str]], Tensor]:
    """The tokenizer of a dual encoder. Raises ValueError for a model that is none."""
    towers = all(hasattr(encoder.model, name) for name in ("encode_text", "encode_image"))
    if encoder.tokenizer is None or not towers:
        raise ValueError(
            f"{encoder.name!r} has no text tower: give a dual encoder, such as open_clip:ViT-B-32/openai."
        )
    return encoder.tokenizer


@torch.inference_mode()
def encode_texts(encoder: EncoderModel, texts: Sequence[str], batch_size: int = 64) -> Tensor:
    """(n, d) float32 L2-normalised embeddings of texts, by the text tower of a dual encoder.

    Raises:
        ValueError: if the model has no text tower, or gives values that are not finite.
    """
    tokenizer, rows = tokenizer_of(encoder), []
    for i in range(0, len(texts), batch_size):
        ids = tokenizer(list(texts[i : i + batch_size])).to(encoder.device)
        rows.append(normalize(encoder.model.encode_text(ids).float(), dim=-1).cpu())
    found = torch.cat(rows)
    if not torch.isfinite(found).all():
        raise ValueError(f"The text tower of {encoder.name!r} gives values that are not finite.")
    return found
