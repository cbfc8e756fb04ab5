"""vtoken: vision-language models that read fewer visual tokens.

    vtoken.patch(model, "hired", budget=0.2)
    model.generate(**inputs)
    print(vtoken.report(model))
    vtoken.unpatch(model)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import strategies
from .strategies import Strategy, StrategyInfo, register, strategy_info
from .streams import FrameTokens, Reuse, StreamState, stream
from .tokens import Needs, PrefillTokens, Segment, Selection, TowerInfo, VisualTokens

if TYPE_CHECKING:
    from . import video
    from .accounting import Report
    from .adapters.generation import prompt_length
    from .config import VTokenConfig
    from .patching import applied, disabled, list_strategies, patch, report, unpatch
    from .resize import resized
    from .streaming import StreamSession

__version__ = "0.1.0"

__all__ = [
    "FrameTokens",
    "Needs",
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
    "VisualTokens",
    "applied",
    "disabled",
    "list_strategies",
    "patch",
    "prompt_length",
    "register",
    "report",
    "resized",
    "strategies",
    "strategy_info",
    "stream",
    "unpatch",
    "video",
]

# transformers and huggingface_hub are imported when something is patched, not before
_LAZY = {
    "VTokenConfig": "config",
    "Report": "accounting",
    "prompt_length": "adapters.generation",
    "resized": "resize",
    "StreamSession": "streaming",
    **dict.fromkeys(("applied", "disabled", "list_strategies", "patch", "report", "unpatch"), "patching"),
}


def __getattr__(name: str) -> Any:
    if name == "video":
        return importlib.import_module(".video", __name__)
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
