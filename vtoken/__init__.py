"""vtoken: vision-language models that read fewer visual tokens.

vtoken.patch(model, "hired", budget=0.2)
model.generate(**inputs)
print(vtoken.report(model))
vtoken.unpatch(model)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from . import rates, retrieval_training, strategies, tiny, video
    from .accounting import EncoderReport, Report
    from .config import VTokenConfig
    from .drawing import visualize
    from .fit import list_strategies
    from .mechanism.generation import prompt_length
    from .patching import applied, disabled, kept_tokens, patch, report, unpatch
    from .resize import resized
    from .saving import save_strategy
    from .selection import Selection
    from .strategies import EncoderStrategy, Strategy, StrategyInfo, register, strategy_info
    from .streaming import StreamSession
    from .streams import FrameTokens, PixelReuse, Reuse, StreamState, stream
    from .tokens import Needs, PrefillTokens, Segment, TowerInfo, VisualTokens
    from .video_answers import VideoAnswer, answer, answers
    from .videos import video_embeddings

__all__ = [
    "EncoderReport",
    "EncoderStrategy",
    "FrameTokens",
    "Needs",
    "PixelReuse",
    "PrefillTokens",
    "Report",
    "Reuse",
    "Segment",
    "Selection",
    "Strategy",
    "StrategyInfo",
    "StreamSession",
    "StreamState",
    "TowerInfo",
    "VTokenConfig",
    "VideoAnswer",
    "VisualTokens",
    "__version__",
    "answer",
    "answers",
    "applied",
    "disabled",
    "kept_tokens",
    "list_strategies",
    "patch",
    "prompt_length",
    "rates",
    "register",
    "report",
    "resized",
    "retrieval_training",
    "save_strategy",
    "strategies",
    "strategy_info",
    "stream",
    "tiny",
    "unpatch",
    "video",
    "video_embeddings",
    "visualize",
]

# Everything is imported when it is used: `vtoken --help` needs no torch, a strategy no transformers.
_MODULES = ("rates", "retrieval_training", "strategies", "tiny", "video")
_LAZY = {
    "VTokenConfig": "config",
    "EncoderReport": "accounting",
    "Report": "accounting",
    "list_strategies": "fit",
    "prompt_length": "mechanism.generation",
    "resized": "resize",
    "video_embeddings": "videos",
    "save_strategy": "saving",
    "visualize": "drawing",
    "StreamSession": "streaming",
    **dict.fromkeys(("VideoAnswer", "answer", "answers"), "video_answers"),
    **dict.fromkeys(("applied", "disabled", "kept_tokens", "patch", "report", "unpatch"), "patching"),
    **dict.fromkeys(("EncoderStrategy", "Strategy", "StrategyInfo"), "strategies"),
    **dict.fromkeys(("register", "strategy_info"), "strategies"),
    **dict.fromkeys(("FrameTokens", "PixelReuse", "Reuse", "StreamState", "stream"), "streams"),
    **dict.fromkeys(("Needs", "PrefillTokens", "Segment", "TowerInfo", "VisualTokens"), "tokens"),
    "Selection": "selection",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
