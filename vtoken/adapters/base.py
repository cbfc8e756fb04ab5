"""Base of adapters: the parts of a model family, and the picture cell of each token of the LLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..tokens import TOWER_NEEDS, Needs, Segment, VisualTokens
from .towers.base import Tower


class Layout:
    """The geometry of one image or video: segments, and the cell of every token ((n,) int64, -1 for none)."""

    def __init__(self, segments: Sequence[Segment], cells: Tensor) -> None:
        self.segments, self.cells = tuple(segments), cells

    @classmethod
    def plain(cls, segments: Sequence[Segment], device: torch.device | None = None) -> Layout:
        """Every cell is a token, in order."""
        return cls(segments, torch.arange(sum(s.size for s in segments), device=device))

    @classmethod
    def square(cls, features: Tensor) -> Layout:
        """One square image of features (n, d). Raises ValueError if n is no square."""
        return cls.plain([Segment("image", square(len(features)))], features.device)

    @classmethod
    def queries(cls, count: int, device: torch.device | None = None) -> Layout:
        """Tokens that are learned queries of a resampler: each reads the whole picture, none has a place."""
        return cls.plain([Segment("queries", (1, count))], device)


class Adapter:
    """One model family. A subclass in this folder sets `model_types` and writes `layouts` and `make_towers`.

    Override:
        model_types: values of `config.model_type` that the class serves.
        make_towers: the vision tower per modality.
        features_field: the field of the output of `get_*_features` that holds the features.
        split_features: the features of that output, one tensor per image or video.
        advice: what would help where the visual tokens of a prompt are not those of the features.
        layouts: segments and cells of every image or video of one `get_*_features` call.
        prompt_arguments: arguments of `forward` and `generate` that `layouts` needs in addition to those of
            `get_*_features`.
        join: for families whose prompt, and not whose features, groups tiles into images.
        frames: for families whose frames in the tower are not rows of the pixels.
        square_frames: modalities whose pixels are squares of one size, so that a picture composed of frames
            can be encoded.
        has_grid: whether the segments of `layouts` have the grid of the picture.
        frame_arguments: arguments that encode such a picture, if it takes more than pixels.
        features_in_layers: True if the LLM adds the features in its layers, to visual tokens that are zero
            before; the features are then those of all these layers side by side.
        rotates_everywhere: False for an LLM with layers without positions that none of its parts tell.
        caches: whether the language model has a KV cache; an encoder has none.
        answers: whether the model generates text; one that embeds documents does not.
        short_outputs: whether the model's outputs per token are those of the tokens that the LLM read; the
            others repeat the kept one before them.
        merge: for models whose head encodes pictures and merges them into the embeddings.
        config_of: for models whose config holds that of the vision-language model.

    Attributes:
        model: the model that the user patches.
        base: its `base_model`, which owns `get_image_features`.
        decoder: the language model.
        towers: per modality ("image", "video"), the tower that encodes it.
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    pixel_arguments: ClassVar[tuple[str, ...]] = (
        "pixel_values",
        "pixel_values_videos",
        "pixel_values_images",
    )
    prompt_arguments: ClassVar[tuple[str, ...]] = ()
    features_field: ClassVar[str] = "pooler_output"
    advice: ClassVar[str] = "use the processor that belongs to this model"
    has_grid: ClassVar[bool] = True
    rotates_everywhere: ClassVar[bool] = True
    features_in_layers: ClassVar[bool] = False
    caches: ClassVar[bool] = True
    answers: ClassVar[bool] = True
    short_outputs: ClassVar[bool] = False

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.base: Any = model.base_model
        self.decoder: Any = language_model_of(model)
        self.config: Any = self.config_of(model)
        self.towers: dict[str, Tower] = self.make_towers()

    # -- to override -----------------------------------------------------------------------------------------
    @classmethod
    def config_of(cls, model: Any) -> Any:
        """The config of the vision-language model."""
        return model.config

    def merge(self, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the model's forward, with pictures merged into `inputs_embeds` by
        `get_*_features` if its head would do so itself.
        """
        return given

    def make_towers(self) -> dict[str, Tower]:
        """The tower of every modality whose tower can be read; empty if none can."""
        raise NotImplementedError(
            f"{type(self).__name__} must have make_towers, which says where the vision tower is."
        )

    def layouts(self, modality: str, features: list[Tensor], arguments: dict[str, Any]) -> list[Layout]:
        """Geometry of every item of one call.

        Args:
            modality: "image" or "video".
            features: per item (n, d), the rows for the LLM.
            arguments: the call's arguments by name, defaults included.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must have layouts, which lays out its visual tokens."
        )

    def join(self, items: list[VisualTokens], input_ids: Tensor | None, places: Tensor) -> list[VisualTokens]:
        """Group the items of one prompt row into images or videos: the same tokens in the same order.

        Default: every item is an image or a video.

        Args:
            items: results of `split_features` and `layouts`.
            input_ids: (q,) of the row in this forward, None if the prompt came as embeddings.
            places: (n,) int64, the placeholders among them.
        """
        return items

    def frames(self, modality: str, arguments: dict[str, Any]) -> list[int]:
        """Per image or video of a `get_*_features` call, its frames in the tower; none for images in crops.

        Default: pixels (videos, frames, 3, H, W) or (images, 3, H, W).
        """
        pixels = arguments[self.pixel_argument(arguments)]
        if modality == "video":
            return [int(pixels.shape[1])] * len(pixels)
        return [1] * len(pixels) if pixels.ndim == 4 else []

    @property
    def square_frames(self) -> tuple[str, ...]:
        return ()

    def frame_arguments(self, modality: str, pixels: Tensor, like: dict[str, Any]) -> dict[str, Any]:
        """Arguments of `get_*_features` for frames (k, 3, H, W), after a call with the arguments `like`."""
        name = self.pixel_argument(like)
        options = ("vision_feature_layer", "vision_feature_select_strategy")
        given = {n: like[n] for n in options if like.get(n) is not None}
        return given | {name: pixels[None] if modality == "video" else pixels}

    # -- provided --------------------------------------------------------------------------------------------
    def split_features(self, modality: str, output: Any, arguments: dict[str, Any]) -> list[Tensor]:
        """The output of `get_*_features` as one (n, d) tensor per image or video."""
        return [f.flatten(0, -2) for f in output.pooler_output]

    def pixel_argument(self, arguments: dict[str, Any]) -> str:
        """The name of a call's argument with the pixels."""
        return next(name for name in self.pixel_arguments if arguments.get(name) is not None)

    def frame_pixels(self, modality: str, arguments: dict[str, Any]) -> list[Tensor]:
        """Per item of a call, its frames (frames, 3, H, W); of an image in crops, the view of the whole."""
        pixels = arguments[self.pixel_argument(arguments)]
        return [p if modality == "video" else p[:1] if p.ndim == 4 else p[None] for p in pixels]

    def find_placeholders(self, input_ids: Tensor) -> dict[str, Tensor]:
        """(B, q) bool per modality: visual tokens by id, for families without `get_placeholder_mask`."""
        return {m: input_ids == getattr(self.config, f"{m}_token_id") for m in self.modalities}

    def provides(self, modality: str) -> frozenset[str]:
        """Names of the fields of `Needs` that can be read here."""
        tower = self.towers.get(modality)
        own = set() if self.features_in_layers else {"text_embeddings", "question"}
        own |= {"pixels"} if modality in self.square_frames else set()
        own |= {"grid"} if self.has_grid else set()
        return frozenset(own) | (tower.provides if tower is not None else frozenset())

    def lacking(self, needs: Needs, modality: str) -> list[str]:
        """The needs that this model cannot meet for a modality."""
        kinds = (*TOWER_NEEDS, "text_embeddings", "question", "pixels", "grid")
        provided = self.provides(modality)
        return [kind for kind in kinds if getattr(needs, kind) and kind not in provided]


def language_model_of(model: Any) -> Any:
    """The language model without its head. Some `get_decoder` answer with the one that has the head."""
    decoder = model.get_decoder()
    if not hasattr(decoder, "layers") and hasattr(decoder, "lm_head"):
        return next((part for part in decoder.children() if hasattr(part, "layers")), decoder)
    return decoder


def feature_layer_of(config: Any, num_layers: int, default: int = -1) -> int:
    """The 0-based tower layer whose output is `hidden_states[config.vision_feature_layer]`."""
    index = getattr(config, "vision_feature_layer", getattr(config, "vision_feature_layers", default))
    if isinstance(index, list | tuple):
        index = max(i if i >= 0 else num_layers + 1 + i for i in index)
    index = default if index is None else index
    return max(0, (index if index >= 0 else num_layers + 1 + index) - 1)


def square(n: int) -> tuple[int, int]:
    """The grid of a square segment of n cells. Raises ValueError if n is no square."""
    side = round(n**0.5)
    if side * side != n:
        raise ValueError(f"{n} visual tokens do not make a square grid.")
    return side, side
