"""Schedule of the drops inside an LLM: the stage that each layer reads, and the stage that it stores."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field

from ..sparse_attention import SparseAttention


@dataclass(frozen=True)
class DropSchedule:
    """The drops inside an LLM. Stage 0 enters it; the s-th drop leaves stage s.

    A drop before layer `layers` comes after the last one: it shortens the KV cache of aligned layers only.
    With sparse attention each layer has, after these stages, one of its own: the tokens that it attends to.

    Attributes:
        layers: number of LLM layers.
        drops: layers before which tokens are dropped, ascending.
        aligned: layers whose KV cache is cut to the tokens of the last drop, once the prompt has been read.
        hides: whether, in every layer, tokens after a picture see only those of its tokens that are marked.
        sparse: the attention of layers to tokens of their own choice, None for all that they read.
    """

    layers: int
    drops: tuple[int, ...] = ()
    aligned: tuple[int, ...] = ()
    hides: bool = False
    sparse: SparseAttention | None = None
    # made once: torch.compile reads them in every decode step
    _reads: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _stores: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        reads = tuple(bisect_right(self.drops, layer) for layer in range(self.layers))
        stores = [len(self.drops) if layer in self.aligned else stage for layer, stage in enumerate(reads)]
        if self.evicts:
            stores = [self.own(layer) for layer in range(self.layers)]
        object.__setattr__(self, "_reads", reads)
        object.__setattr__(self, "_stores", tuple(stores))

    @property
    def count(self) -> int:
        """The number of drops."""
        return len(self.drops)

    @property
    def inside(self) -> bool:
        """Whether layers of the LLM leave tokens out."""
        return self.count > 0 or self.sparse is not None

    @property
    def evicts(self) -> bool:
        """Whether the KV cache of each layer holds the tokens of its own stage."""
        return self.sparse is not None and self.sparse.evicts

    @property
    def tables(self) -> int:
        """The number of stages whose tokens a KV cache can hold."""
        return self.count + 1 + (self.layers if self.evicts else 0)

    def own(self, layer: int) -> int:
        """The stage of the tokens that a layer with sparse attention chooses."""
        return self.count + 1 + layer

    def attends(self, layer: int) -> int:
        """The stage whose tokens the attention of a layer reads."""
        return self.reads(layer) if self.sparse is None else self.own(layer)

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
