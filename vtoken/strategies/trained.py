"""Base of strategies with weights of their own, which are trained while the model stays as it is."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from ..llm_shape import LanguageModelShape
from ..tokens import TowerInfo
from .base import Strategy
from .registry import registered


@dataclass(frozen=True)
class ModelShape:
    """Facts about a model on which the shapes of a strategy's weights depend.

    Attributes:
        tower: of the vision tower; None where the model has no transformer tower.
        tower_width: channels C of the tower's layers.
        llm: numbers of the language model; its `hidden` are the channels d of the features that it reads.
    """

    tower: TowerInfo | None
    tower_width: int
    llm: LanguageModelShape

    @property
    def width(self) -> int:
        return self.llm.hidden

    def check_heads(self, heads: int) -> None:
        """Raise ValueError for a number of attention heads that does not divide the tower's channels."""
        if self.tower_width % heads:
            fit = ", ".join(str(n) for n in (1, 2, 4, 8, 12, 16) if self.tower_width % n == 0)
            raise ValueError(
                f"heads must divide the tower's {self.tower_width} channels, found {heads}: take one of"
                f" {fit}."
            )


@dataclass
class TrainedStrategy(Strategy):
    """Base of strategies with weights: write `build`, and use `self.module` in `select`.

    `vtoken.patch` puts the module on the model, freezes all other parameters, and loads weights if the
    strategy came from a folder with some. Gradients flow through `select` and `temporal`.

    Attributes:
        free: options that can be assigned while the strategy is on a model; its weights are made for the
            others.
        hides_pictures: whether, in every LLM layer, tokens after a picture see only those of its tokens that
            `select` marks. The KV cache keeps what `select_in_prefill` answers.
    """

    free: ClassVar[tuple[str, ...]] = ("budget", "positions")
    hides_pictures: ClassVar[bool] = False

    def build(self, model: ModelShape) -> nn.Module:
        """A new module with the weights of this strategy, all of them parameters, for a model.

        At the start the patched model should answer as nearly as it can like a model without such weights.
        """
        raise NotImplementedError(f"{type(self).__name__} must build its module.")

    def fuse_text(self, embeddings: Tensor, visual: Tensor) -> Tensor:
        """Text embeddings that have read the pictures, for methods that replace those of the prompt.

        Args:
            embeddings: (n, d) of the prompt in order, with all visual tokens of the unpatched model.
            visual: (n,) bool, the visual tokens.

        Returns:
            (n - v, d), of the text tokens in order.
        """
        raise NotImplementedError(f"{type(self).__name__} leaves the text as it is.")

    @property
    def fuses_text(self) -> bool:
        return type(self).fuse_text is not TrainedStrategy.fuse_text

    def adapt(self, layer: int, hidden: Tensor) -> Tensor:
        """The hidden states (m, d) of the marked tokens before an LLM layer, if pictures are hidden."""
        return hidden

    @property
    def module(self) -> Any:
        """The module on the model.

        Raises:
            RuntimeError: if the strategy is on no model.
        """
        found = self.__dict__.get("_module")
        if found is None:
            raise RuntimeError(
                f"{self.info.name} has weights, which vtoken.patch puts on a model: patch one first."
            )
        return found

    def attach(self, module: nn.Module | None) -> None:
        """Use this module from now on; None for none."""
        made_at, built = (None, None) if module is None else (_versions(module), self._fixed())
        self.__dict__.update(_module=module, _made_at=made_at, _built=built)

    def share(self, other: TrainedStrategy) -> None:
        """Use the module of another object of this strategy."""
        kept = ("_module", "_made_at", "_source", "_built")
        self.__dict__.update({k: v for k, v in other.__dict__.items() if k in kept})

    def _fixed(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init and f.name not in self.free}

    def check_built(self) -> None:
        """Raise RuntimeError if an option has been assigned for which the weights were not made."""
        now = self._fixed()
        built = self.__dict__.get("_built") or now
        if changed := [name for name in now if now[name] != built[name]]:
            name = changed[0]
            raise RuntimeError(
                f"The weights of {self.info.name} on the model were made for {name}={built[name]!r}, which"
                f" has been set to {now[name]!r} since: call vtoken.unpatch(model) and vtoken.patch again."
            )

    def check_shared(self, other: TrainedStrategy) -> None:
        """Raise ValueError unless this strategy's weights were made for the options of another object."""
        made, now = self._fixed(), other._fixed()
        if changed := [name for name in now if now[name] != made[name]]:
            name = changed[0]
            raise ValueError(
                f"The saved weights of {self.info.name} were made for {name}={made[name]!r}, found"
                f" {name}={now[name]!r}: leave it out, or name the strategy to begin with new weights."
            )

    @property
    def attached(self) -> bool:
        """Whether the strategy is on a model."""
        return self.__dict__.get("_module") is not None

    @property
    def untrained(self) -> bool:
        """Whether its weights are new, as `build` made them."""
        made = self.__dict__.get("_made_at")
        return self.attached and self.source is None and made == _versions(self.module)

    @property
    def source(self) -> Path | None:
        """The file with the weights to begin with, None to begin with new ones."""
        return self.__dict__.get("_source")

    @source.setter
    def source(self, path: Path | None) -> None:
        self.__dict__["_source"] = path

    def with_budget(self, budget: float | int) -> TrainedStrategy:
        made = replace(self, budget=budget)
        made.share(self)
        return made


def _versions(module: nn.Module) -> list[int]:
    """A number per parameter that rises whenever it is written."""
    return [parameter._version for parameter in module.parameters()]


def trained_names() -> list[str]:
    """Names of the known strategies that have weights; other packages are not asked."""
    return [cls.info.name for cls in registered() if issubclass(cls, TrainedStrategy)]


def trained_part(strategy: Strategy) -> TrainedStrategy | None:
    """The part of a strategy or a combination that has weights."""
    part = strategy.in_encoder
    return part if isinstance(part, TrainedStrategy) else None
