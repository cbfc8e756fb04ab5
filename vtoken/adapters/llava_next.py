"""LLaVA-NeXT and LLaVA-NeXT-Video: a thumbnail and unpadded crops per image, pooled frames per video."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .anyres import anyres_layout, best_canvas, frame_count, frames_layout
from .base import Adapter, Layout
from .llava import find_tower
from .registry import register_adapter
from .towers.base import Tower

REMEMBERED = 256  # image sizes


@register_adapter
class LlavaNextAdapter(Adapter):
    """`LlavaNextForConditionalGeneration`: thumbnail, then the unpadded canvas row by row, with newlines."""

    model_types = ("llava_next",)

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._known: dict[Any, Layout] = {}

    def make_towers(self) -> dict[str, Tower]:
        return find_tower(self.base.vision_tower, self.config)

    @property
    def side(self) -> int:
        """Patches along one side of a tile."""
        vision = self.config.vision_config
        return int(vision.image_size // vision.patch_size)

    @property
    def square_frames(self) -> tuple[str, ...]:
        return self.modalities

    def frame_arguments(self, modality: str, pixels: Tensor, like: dict[str, Any]) -> dict[str, Any]:
        given = super().frame_arguments(modality, pixels, like)
        if modality == "image":  # as an image of the size of a tile, whose crops are not used
            tiles = like[self.pixel_argument(like)].shape[1]
            given[self.pixel_argument(like)] = pixels[:, None].expand(-1, tiles, -1, -1, -1)
            given["image_sizes"] = torch.tensor([list(pixels.shape[-2:])] * len(pixels))
        return given

    def layouts(self, modality: str, features: list[Tensor], arguments: dict[str, Any]) -> list[Layout]:
        if modality == "video":
            return self.video_layouts(features, arguments)
        options = self.pack_options(arguments)
        sizes = [(int(h), int(w)) for h, w in torch.as_tensor(arguments["image_sizes"]).tolist()]
        return [
            self._image_layout(size, split, self._first(arguments), options)
            # paired as the model pairs them
            for size, split in zip(sizes, self.are_split(arguments, len(sizes)), strict=False)
        ]

    def video_layouts(self, features: list[Tensor], arguments: dict[str, Any]) -> list[Layout]:
        """Geometry of every video of one call."""
        raise NotImplementedError(f"{self.config.model_type} models read no videos.")

    def pack_options(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Arguments of `pack_image_features` from the call."""
        return {"vision_feature_select_strategy": self._given("vision_feature_select_strategy", arguments)}

    def are_split(self, arguments: dict[str, Any], images: int) -> list[bool]:
        """Per image of a call, whether it is cut into crops."""
        return [True] * images

    def _given(self, name: str, arguments: dict[str, Any]) -> Any:
        value = arguments.get(name)
        return getattr(self.config, name) if value is None else value

    def _first(self, arguments: dict[str, Any]) -> int:
        """`first` of `tile_rows`: whether the model drops a CLS row, keeps it, or drops a patch instead."""
        drops = self._given("vision_feature_select_strategy", arguments) == "default"
        return int(drops) - int("image" in self.towers and self.towers["image"].has_cls)

    def _image_layout(
        self, size: tuple[int, int], split: bool, first: int, options: dict[str, Any]
    ) -> Layout:
        key = (size, split, first, tuple(options.items()))
        if key not in self._known:
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            canvas = best_canvas(size, self.config.image_grid_pinpoints) if split else None
            # cached, and may be used with gradients later
            with torch.inference_mode(False), torch.no_grad():
                self._known[key] = anyres_layout(self.base, size, canvas, self.side, first, **options)
        return self._known[key]


@register_adapter
class LlavaNextVideoAdapter(LlavaNextAdapter):
    """`LlavaNextVideoForConditionalGeneration`: images of LLaVA-NeXT; pooled frames without newlines."""

    model_types = ("llava_next_video",)
    modalities = ("image", "video")

    def make_towers(self) -> dict[str, Tower]:
        module = self.base.vision_tower
        return find_tower(module, self.config) | find_tower(module, self.config, "video", self._pool)

    def _pool(self, value: Tensor) -> Tensor:
        """(..., patches) -> (..., cells), the mean of the patches that the model pools into a cell."""
        square = value.reshape(-1, 1, self.side, self.side)
        return torch.nn.functional.avg_pool2d(square, self.config.spatial_pool_stride).view(
            *value.shape[:-1], -1
        )

    def video_layouts(self, features: list[Tensor], arguments: dict[str, Any]) -> list[Layout]:
        stride = self.config.spatial_pool_stride
        side = self.side // stride
        covered = side * stride / self.side  # an odd last line of patches is omitted
        box = (0.0, 0.0, covered, covered)
        return [frames_layout(frame_count(arguments), (side, side), box=box) for _ in features]
