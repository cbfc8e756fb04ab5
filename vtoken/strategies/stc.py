"""STC: the cacher in the vision tower and the pruner before the LLM, as one strategy."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from ..streams import Reuse
from ..tokens import TowerInfo
from .registry import register
from .stc_cacher import CODE, LICENCE, PAPER, STCCacher
from .stc_pruner import STCPruner


@register(
    "stc",
    summary="Streaming Token Compression: reuse of frames in the vision tower, and pruning against the "
    "stream's history.",
    stages=("encoder", "projector"),
    budget_means="entrance",
    paper=PAPER,
    code=CODE,
    code_licence=LICENCE,
    differs="As stc_cacher and stc_pruner, of which it is made.",
)
@dataclass
class STC(STCPruner):
    """Streaming Token Compression (arXiv 2512.00891): `stc_cacher` and, before the LLM, `stc_pruner`.

    Args:
        budget: of the pruner.
        recompute: share of a frame's tokens that are computed in the tower, or their number; the budget of
            the cacher.
        interval: frames from one reference of the cacher to the next.
        share_selection: see `stc_cacher`.
        always_cls: see `stc_cacher`.
        score: see `stc_pruner`.
        window: see `stc_pruner`.
        channels: see `stc_pruner`.
        alpha: see `stc_pruner`.
    """

    budget: float | int = 0.3
    _: KW_ONLY
    recompute: float | int = 0.25
    interval: int = 2
    share_selection: bool = False
    always_cls: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            self._cacher = STCCacher(self.recompute, self.interval, self.share_selection, self.always_cls)
        except ValueError as wrong:
            raise ValueError(f"recompute or interval of stc: {wrong}") from None

    def reuse(self, tower: TowerInfo) -> Reuse | None:
        return None if self._cacher.is_identity else self._cacher.reuse(tower)
