"""Random access through torchcodec in upright files, if it is installed and finds an FFmpeg."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .allowed import by_itself
from .decord import one_size
from .errors import VideoError, brief, load
from .picker import check_count
from .pyav import PyAVReader


class TorchcodecPicker:
    """torchcodec on one file; its own exact index must count the frames that PyAV counts."""

    name = "torchcodec"

    def __init__(self, reader: PyAVReader):
        decoders = load("torchcodec.decoders", "torchcodec", "torchcodec")
        fit = reader.source.kind == "file" and not reader.track.turned and by_itself(reader.source.path)
        if not fit or not one_size(reader):
            raise VideoError(
                f"torchcodec serves upright mp4 and mkv files of one size here: {reader.source.name!r} needs"
                " backend 'pyav'"
            )
        try:
            self._decoder = decoders.VideoDecoder(
                reader.source.path, dimension_order="NHWC", seek_mode="exact"
            )
        except Exception as error:
            raise VideoError(f"torchcodec cannot open {reader.source.name!r}: {brief(error)}") from error
        check_count(self.name, len(self._decoder), len(reader.table), reader.source.name)

    def images(self, ordinals: Sequence[int]) -> list[np.ndarray]:
        """See `Picker`."""
        try:
            return [self._decoder[i].numpy() for i in ordinals]
        except Exception as error:
            raise VideoError(brief(error)) from error

    def close(self) -> None:
        self._decoder = None
