"""Reading video: files by frame and by time, and live streams.

with vtoken.video.open_video("clip.mp4") as video:
    frames = vtoken.video.sample_uniform(video, 8)
"""

from __future__ import annotations

from ..limits import Limits
from .errors import VideoError
from .fast_processor import fast_processor
from .frame import Frame, VideoReader
from .live import LiveReader, LiveStats
from .reader import BACKENDS, open_video
from .sampled import SampledVideo, sample
from .sampling import at_fps, sample_fps, sample_uniform, uniform_indices
from .synthetic import SyntheticReader

__all__ = [
    "BACKENDS",
    "Frame",
    "Limits",
    "LiveReader",
    "LiveStats",
    "SampledVideo",
    "SyntheticReader",
    "VideoError",
    "VideoReader",
    "at_fps",
    "fast_processor",
    "open_video",
    "sample",
    "sample_fps",
    "sample_uniform",
    "uniform_indices",
]
