"""StreamingLLM: the first tokens of a conversation and its last ones stay in the KV cache."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field

from ..storage import SinkWindow as Window
from .base import Strategy
from .registry import register


@register(
    "sink_window",
    summary="Keep the first tokens of a conversation and its last ones in the KV cache, so that it may go on "
    "without end in constant memory.",
    stages=("cache",),
    paper="Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453",
    code="github.com/mit-han-lab/streaming-llm",
    code_licence="MIT",
    differs="Keys are cached with their rotation. Those of the window keep it, and the first tokens are "
    "rotated forward from their first value until they stand right before the window, which gives "
    "every query the distances of positions 0, 1, ... inside the cache; gaps that pruned visual "
    "tokens leave in the window stay. Every few thousand tokens the window is rotated back once, so "
    "that positions stay small. With a multimodal rope the first tokens move by the largest common "
    "distance that passes no token of the window on any axis. Tokens go after the forward that read "
    "them; the public code for chats makes room before a turn. Rows with padding count from their "
    "first token.",
)
@dataclass
class SinkWindow(Strategy):
    """A rolling window over the KV cache with the first tokens of each row as attention sinks.

    After every forward each layer's cache keeps the first `sinks` and the last `recent` tokens of a row, of
    text as of pictures; the tokens between are lost. A forward of several tokens, such as the prompt, reads
    the whole cache and its own past before anything goes. The distance between the sinks and the window is
    closed, so that a conversation may outgrow the positions of the LLM. What was lost cannot be recalled.
    There is no budget; a strategy combined with this one has it alone. A cache that has lost tokens cannot be
    cropped, which assisted decoding needs.

    Args:
        sinks: tokens at the start that stay, at least 0.
        recent: tokens at the end that stay, at least 1.
    """

    budget: float | int | None = field(default=None, init=False)  # type: ignore[assignment]
    recent: int = 2000
    _: KW_ONLY
    sinks: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recent < 1:
            raise ValueError(f"recent must be a number of tokens, at least 1, found {self.recent!r}.")
        if self.sinks < 0:
            raise ValueError(f"sinks must be a number of tokens, at least 0, found {self.sinks!r}.")

    @property
    def is_identity(self) -> bool:
        return False

    def storage(self, num_layers: int) -> Window:
        return Window(self.sinks, self.recent)
