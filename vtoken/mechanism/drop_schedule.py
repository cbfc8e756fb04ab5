"""Schedule of the drops inside an LLM: the stage that each layer reads, and the stage that it stores."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field


@dataclass(frozen=True)
class DropSchedule:
    """The drops inside an LLM. Stage 0 enters it; the s-th drop leaves stage s.

    A drop before layer `layers` comes after the last one: it shortens the KV cache of aligned layers only.

    Attributes:
        layers: number of LLM layers.
        drops: layers before which tokens are dropped, ascending.
        aligned: layers whose KV cache is cut to the tokens of the last drop, once the prompt has been read.
        hides: whether, in every layer, tokens after a picture see only those of its tokens that are marked.
    """

    layers: int
    drops: tuple[int, ...] = ()
    aligned: tuple[int, ...] = ()
    hides: bool = False
    # made once: torch.compile reads them in every decode step
    _reads: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _stores: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        reads = tuple(bisect_right(self.drops, layer) for layer in range(self.layers))
        stores = (len(self.drops) if layer in self.aligned else stage for layer, stage in enumerate(reads))
        object.__setattr__(self, "_reads", reads)
        object.__setattr__(self, "_stores", tuple(stores))

    @property
    def count(self) -> int:
        """The number of drops."""
        return len(self.drops)

    @property
    def last(self) -> int:
        """The stage that the last layer reads."""
        return self._reads[-1] if self._reads else 0

    @property
    def drops_at_end(self) -> bool:
        """Whether there is a drop after the last layer."""
        return self.layers in self.drops

    def reads(self, layer: int) -> int:
        """The stage whose tokens a layer reads; 0 for an LLM whose layers cannot be seen."""
        return self._reads[layer] if self._reads else 0

    def stores(self, layer: int) -> int:
        """The stage whose tokens the KV cache of a layer holds once the prompt has been read."""
        return self._stores[layer] if self._stores else 0

    @property
    def stored(self) -> list[int]:
        """`stores` of every layer; one entry for an LLM whose layers cannot be seen."""
        return list(self._stores) or [0]
