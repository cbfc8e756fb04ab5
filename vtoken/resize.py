"""Baseline for pruning: a processor that makes images smaller."""

from __future__ import annotations

import copy
import functools
import math
import warnings
from typing import Any

import torch
from torch import Tensor
from transformers.utils import PushToHubMixin

from .strategies.budgets import Budget, check_budget

STEPS_PER_HALVING = 64
PROBES = ((32, 32), (224, 224), (336, 1008), (1400, 700), (2000, 2000))


def resized(processor: Any, budget: float | int) -> Any:
    """A copy of a processor that makes images smaller before the family's own rules turn them into tokens.

    This is the baseline of every strategy: without a patch, the vision tower and the language model both read
    fewer pixels. Each image keeps its shape and gets the largest size whose number of tokens, by the
    processor's own count, is within the budget; a small enough image stays as it is. Families choose sizes in
    steps (patches, tiles, crops), so the number of tokens may be below the budget, and some families cannot
    reach some numbers at all.

        small = vtoken.resized(processor, 0.25)
        inputs = small.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")

    Args:
        processor: a transformers processor with an image processor; it is not changed.
        budget: share of the tokens that the image would make at its own size, or a whole number of tokens per
            image.

    Returns:
        The copy. It raises ValueError for an image that cannot be made small enough, and NotImplementedError
        for a video. It can be copied, pickled and printed. `save_pretrained` writes the original processor,
        with a warning: after loading it has to be resized again.

    Raises:
        TypeError: if `processor` has no image processor.
        ValueError: for a budget out of range, a family whose images make the same number of tokens at any
            size, or one that does not tell how many they make.
    """
    budget = check_budget(budget)
    name = type(processor).__name__
    if getattr(processor, "image_processor", None) is None:
        raise TypeError(f"resized() takes a processor of a vision-language model, found {name}.")
    if not hasattr(processor, "_get_num_multimodal_tokens"):
        raise ValueError(f"{name} does not tell how many tokens an image makes: resize the images yourself.")
    made = {count_tokens(processor, *size) for size in PROBES}
    if len(made) == 1:
        raise ValueError(
            f"{name} makes {made.pop()} tokens of an image of any size, so that a smaller image saves"
            " nothing: use vtoken.patch(model, 'pool', ...) or another strategy."
        )
    small = copy.copy(processor)
    small.image_processor = _Shrinking(processor, budget)
    if getattr(processor, "video_processor", None) is not None:
        small.video_processor = _NoVideos(processor.video_processor)
    return small


def count_tokens(processor: Any, height: int, width: int) -> int:
    """Tokens of an image of this size (px), as the processor counts them."""
    return int(processor._get_num_multimodal_tokens(image_sizes=[(height, width)]).num_image_tokens[0])


class _Part(PushToHubMixin):
    """A part of a resized processor: it has the attributes of the original, and is saved as the original."""

    _inner: Any

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_inner" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._inner, name)

    def to_dict(self) -> dict[str, Any]:
        return self._inner.to_dict()


class _Shrinking(_Part):
    """Makes images smaller before the original image processor reads them.

    Args:
        processor: counts the tokens; it and its parts are copied, except the tokenizer.
        budget: see `resized`.
    """

    _OWN = ("_counting", "_inner", "_budget", "_fit")

    def __init__(self, processor: Any, budget: float | int) -> None:
        self._inner, self._budget = copy.deepcopy(processor.image_processor), budget
        self._counting = copy.copy(processor)
        self._counting.image_processor = self._inner
        self._fit = functools.lru_cache(1024)(self._find)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._OWN:
            super().__setattr__(name, value)
        else:
            setattr(self._inner, name, value)
            self._fit.cache_clear()

    def __reduce__(self) -> Any:
        return type(self), (self._counting, self._budget)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shrinking:
        return type(self)(self._counting, self._budget)

    def __repr__(self) -> str:
        return f"images made smaller to a budget of {self._budget}, then {self._inner!r}"

    @property
    def _auto_class(self) -> Any:
        # ProcessorMixin.save_pretrained asks every part for this attribute, and nothing else does
        if self._inner._auto_class is not None:
            raise ValueError(
                "An image processor with code of its own cannot be saved in its resized form: call"
                " save_pretrained of the processor that it was made of."
            )
        self._warn()
        return None

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        self._warn()
        return self._inner.save_pretrained(*args, **kwargs)

    def _warn(self) -> None:
        warnings.warn(
            "The resizing is not saved: load the processor and call vtoken.resized(processor,"
            f" {self._budget}) again.",
            stacklevel=3,
        )

    def __call__(self, images: Any, *args: Any, **kwargs: Any) -> Any:
        return self._inner(self._shrink(images), *args, **kwargs)

    def preprocess(self, images: Any, *args: Any, **kwargs: Any) -> Any:
        return self._inner.preprocess(self._shrink(images), *args, **kwargs)

    def _shrink(self, images: Any) -> Any:
        if isinstance(images, list | tuple):
            return [self._shrink(image) for image in images]
        if isinstance(images, str):
            images = self._inner.fetch_images(images)
        if getattr(images, "ndim", 3) == 4:
            return [self._shrink(image) for image in images]
        height, width = _size(images)
        fit = self._fit(height, width)
        return images if fit == (height, width) else _resize(images, *fit)

    def _find(self, height: int, width: int) -> tuple[int, int]:
        full = count_tokens(self._counting, height, width)
        wanted, least, size = Budget(self._budget).part(full), full, (height, width)
        for step in range(math.floor(math.log2(min(height, width)) * STEPS_PER_HALVING) + 1):
            scale = 2 ** (-step / STEPS_PER_HALVING)
            size = max(1, round(height * scale)), max(1, round(width * scale))
            try:
                tokens = count_tokens(self._counting, *size)
            except ValueError:  # shapes that the family refuses
                continue
            if tokens <= wanted:
                return size
            least = min(least, tokens)
        raise ValueError(
            f"An image of {height} x {width} px makes {full} tokens and no fewer than {least} when it is made"
            f" smaller, which is more than the budget of {wanted}: ask for at least {least} tokens, or use"
            " vtoken.patch."
        )


class _NoVideos(_Part):
    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __repr__(self) -> str:
        return f"videos are refused instead of {self._inner!r}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            "resized() makes images smaller, not videos: sample fewer frames, or use vtoken.patch."
        )

    preprocess = __call__


def _channels_last(image: Any) -> bool:
    return image.shape[-1] in (1, 3, 4) and image.shape[0] not in (1, 3, 4)


def _size(image: Any) -> tuple[int, int]:
    """(height, width) of a PIL image or an array."""
    if hasattr(image, "resize") and not hasattr(image, "ndim"):
        return image.height, image.width
    if image.ndim == 2 or _channels_last(image):
        return int(image.shape[0]), int(image.shape[1])
    return int(image.shape[1]), int(image.shape[2])


def _resize(image: Any, height: int, width: int) -> Any:
    """Bicubic with antialiasing; the result has the type of the input, and is rounded unless it is float."""
    if hasattr(image, "resize") and not hasattr(image, "ndim"):
        from PIL.Image import Resampling

        return image.resize((width, height), Resampling.BICUBIC)
    x = image if isinstance(image, Tensor) else torch.tensor(image)
    last = x.ndim == 3 and _channels_last(x)
    planes = x[None] if x.ndim == 2 else x.permute(2, 0, 1) if last else x
    out = torch.nn.functional.interpolate(
        planes[None].float(), (height, width), mode="bicubic", antialias=True
    )[0]
    if not x.is_floating_point():
        out = out.round().clamp(0, 255)
    out = out.to(x.dtype)
    out = out[0] if x.ndim == 2 else out.permute(1, 2, 0) if last else out
    return out if isinstance(image, Tensor) else out.numpy()
