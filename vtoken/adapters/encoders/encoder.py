"""Interface of an encoder to the mechanism, and the choice of the class that serves a model."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...streams import unwrapped
from ...tokens import EncoderShape, TowerInfo
from .layer import EncoderLayer, differs, shape_of
from .run import EncoderRun

_encoders: list[type[Encoder]] = []
SETTINGS = (bool, int, float, str, tuple, list, type(None))
# attributes that tell where a layer stands or how it is used at present
PLACES = ("layer_idx", "layer_id", "training", "drop_prob", "p")


class Forwards(Protocol):
    """The forwards of a patched encoder, one per thread."""

    def current(self) -> EncoderRun | None:
        """The run of this thread's latest forward, None if it was not patched."""

    def stop_after(self, layers: int | None) -> None:
        """The next forwards of this thread call only so many layers, all if None."""


class Encoder(ABC):
    """A vision encoder: a sequence of layers of equal width over a class token, registers and patches.

    Args:
        model: the model as the user holds it.
        trunk: the module that has the layers.

    Attributes:
        layers: the layers in halves, first to last.
    """

    library: str

    def __init__(self, model: Any, trunk: Any) -> None:
        self.model, self.trunk = model, trunk
        self.layers = [self.layer(module) for module in self.modules]

    # -- to override -----------------------------------------------------------------------------------------
    @classmethod
    @abstractmethod
    def find(cls, model: Any) -> Any:
        """The trunk of a model of this library, None if it is of another one or has no such trunk."""

    @property
    @abstractmethod
    def modules(self) -> list[nn.Module]:
        """The layers of the trunk."""

    @abstractmethod
    def layer(self, module: nn.Module) -> EncoderLayer:
        """A layer in halves."""

    @property
    @abstractmethod
    def prefix(self) -> int:
        """Tokens at the start that are no patches: class token, distillation token, registers."""

    @property
    @abstractmethod
    def has_cls(self) -> bool:
        """Whether token 0 is a class token."""

    @property
    @abstractmethod
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the patches of an image of the model's own size."""

    def refusal(self) -> str | None:
        """The property of this encoder, in words, that keeps its sequence from becoming shorter."""
        return None

    def probe(self, tokens: int) -> dict[str, Any]:
        """Further arguments with which a layer is called on so many tokens."""
        return {}

    def follow(self, run: EncoderRun, call: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a layer for the tokens that are left, from those for all tokens."""
        return call

    def wrap(self, wrap: Callable[..., None], forwards: Forwards) -> None:  # noqa: B027 - often nothing
        """Replace the methods that return maps of layers: `wrap(owner, name, instead)`."""

    # -- provided --------------------------------------------------------------------------------------------
    def present(self) -> list[EncoderLayer]:
        """The layers in halves, looked up again: blocks of the model may have been replaced.

        Raises:
            ValueError: if new layers cannot be split.
        """
        now = self.modules
        if now != [layer.module for layer in self.layers]:
            known = {kind_of(layer.module) for layer in self.layers}
            layers = [self.layer(module) for module in now]
            for layer in layers:
                if kind_of(layer.module) not in known:
                    _check_layer(self, layer, type(self.trunk).__name__)
            self.layers = layers
        return self.layers

    @property
    def info(self) -> TowerInfo:
        every = len(self.layers)
        return TowerInfo(every, every - 1, self.has_cls, tuple(range(every)))

    def shape(self, patches: int, drops: bool = False) -> EncoderShape:
        """The numbers on which a plan depends, for images of so many patches."""
        shape = EncoderShape(len(self.layers), patches, self.prefix, embedding_macs=self.embedding_macs())
        return shape_of(self.layers[0], shape, drops)

    def embedding_macs(self) -> int:
        """Multiply-adds of the patch embedding, per patch: its weights are used once for every patch."""
        weights = (
            p for n, p in self.trunk.named_parameters() if p.ndim == 4 and ("patch" in n or "conv1" in n)
        )
        return sum(p.numel() for p in weights)

    def check(self) -> None:
        """Raise ValueError, in one sentence, if the sequence cannot become shorter inside this encoder."""
        name = type(self.trunk).__name__
        if reason := self.refusal():
            raise ValueError(f"Tokens cannot be merged in {name}: it {reason}.")
        for layer in {kind_of(layer.module): layer for layer in self.layers}.values():
            _check_layer(self, layer, name)


def kind_of(module: nn.Module) -> tuple[Any, ...]:
    """Equal for layers that differ in the values of their weights alone."""
    parts = []
    for name, part in module.named_modules():
        plain = (k for k, v in vars(part).items() if isinstance(v, SETTINGS) and k not in PLACES)
        parts.append((name, type(part), *((k, repr(getattr(part, k))) for k in plain)))
    return (*parts, *((name, p.shape) for name, p in module.named_parameters()))


def _check_layer(encoder: Encoder, layer: EncoderLayer, name: str) -> None:
    kind = type(layer.module).__name__
    why = f"its layers ({kind}) are not attention and then an MLP as vtoken knows them"
    if any("rel_pos" in n or "relative_position" in n for n, _ in layer.module.named_parameters()):
        why = f"its layers ({kind}) have a relative position bias, which is tied to the grid"
    refusal = ValueError(
        f"Tokens cannot be merged in {name}: {why}; vision transformers of timm, open_clip and transformers"
        " with plain attention work."
    )
    if any(p.is_meta for p in layer.module.parameters()):
        return
    tokens = encoder.prefix + 5
    try:
        difference = differs(layer, encoder.probe(tokens), tokens)
    except Exception as error:
        raise refusal from error
    if not difference < 0.05:
        raise refusal


def register_encoder(cls: type[Encoder]) -> type[Encoder]:
    """Class decorator: ask this class for the trunk of a model."""
    _encoders.append(cls)
    return cls


def encoder_for(model: Any) -> Encoder | None:
    """The encoder of a timm, open_clip or transformers model; None if it has none that vtoken knows.

    Whether its layers can be split is checked by `Encoder.check`.
    """
    _discover()
    model = unwrapped(model)
    for cls in _encoders:
        trunk = cls.find(model)
        if trunk is not None:
            return cls(model, trunk)
    return None


@functools.cache
def _discover() -> None:
    """Import every module of this folder, which registers its class."""
    package = importlib.import_module(__package__ or "vtoken.adapters.encoders")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{__package__}.{module.name}")


class Intermediates:
    """`forward_intermediates` whose maps have the full grid, made of layers that read fewer tokens.

    Args:
        layers: number of layers.
        prefix: tokens at the start that are no patches.
        size: (rows, columns) of the patches of a batch of images.
        forwards: the forwards of this encoder.
    """

    def __init__(
        self, layers: int, prefix: int, size: Callable[[Tensor], tuple[int, int]], forwards: Forwards
    ) -> None:
        self.layers, self.prefix, self.size, self.forwards = layers, prefix, size, forwards

    def __call__(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(original).bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        taken = self._taken(given["indices"])
        self.forwards.stop_after(taken[-1] + 1 if given.get("stop_early") and taken else None)
        try:
            out = original(**(given | {"output_fmt": "NLC"}))
        finally:
            self.forwards.stop_after(None)
        size = self.size(next(iter(given.values()))) if given["output_fmt"] == "NCHW" else None
        spread = functools.partial(self._spread, self.forwards.current(), taken, size)
        if isinstance(out, dict):
            names = "image_intermediates", "image_intermediates_prefix"
            maps, first = spread(out[names[0]], out.get(names[1]))
            return out | {names[0]: maps} | ({names[1]: first} if names[1] in out else {})
        maps = out if given["intermediates_only"] else out[1]
        if maps and isinstance(maps[0], tuple):
            maps = list(zip(*spread(*zip(*maps))))  # type: ignore[arg-type]
        else:
            maps = spread(maps)[0]
        return maps if given["intermediates_only"] else (out[0], maps)

    def _taken(self, indices: int | list[int] | None) -> list[int]:
        """The layers whose outputs are returned, ascending."""
        if indices is None or isinstance(indices, int):
            return list(range(self.layers))[-(indices or self.layers) :]
        return sorted({i % self.layers for i in indices})

    def _spread(
        self,
        run: EncoderRun | None,
        layers: list[int],
        size: tuple[int, int] | None,
        maps: Sequence[Tensor],
        first: Sequence[Tensor] | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Patches and prefix tokens of every map, with the unpatched numbers of both."""
        patches, prefixes = [], []
        for i, (x, layer) in enumerate(zip(maps, layers, strict=True)):
            before = x.new_zeros(len(x), self.prefix, x.shape[2]) if first is None else first[i]
            if run is not None and layer + 1 < run.ends:  # the last one is spread already
                whole = run.spread(torch.cat([before, x], 1), layer)
                before, x = whole[:, : self.prefix], whole[:, self.prefix :]
            patches.append(x if size is None else x.unflatten(1, size).permute(0, 3, 1, 2).contiguous())
            prefixes.append(before)
        return patches, prefixes
