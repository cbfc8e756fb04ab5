"""Records of a prompt that is being read: its encoded visual tokens, and the choice among them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..selection import Selection
from ..tokens import Needs, VisualTokens


@dataclass
class EncodedVisuals:
    """All images, or all videos, of one batch, in placeholder order.

    `picks` are the strategy's answers, given when the frames of a stream were pushed; None outside of a
    stream. `needs` are the values read from the tower, `merging` the tower layers after which tokens were
    merged, `mixed_by` the patch whose strategy let frames attend to each other in the tower, if one did.
    """

    modality: str
    items: list[VisualTokens]
    needs: Needs
    merging: tuple[int, ...] = ()
    picks: list[Selection] | None = None
    mixed_by: str | None = None

    @property
    def total(self) -> int:
        return sum(len(item) for item in self.items)


@dataclass
class Answered:
    """A strategy's answer about the items of one prompt row, at the columns `places` (n,) int64."""

    row: int
    places: Tensor
    items: list[VisualTokens]
    picks: list[Selection]


@dataclass
class Choice:
    """The choice for a batch of prompts that is read again in every step (`generate(use_cache=False)`).

    Attributes:
        visual: modality -> (B, prompt) bool, the visual tokens.
        encoded: modality -> the images or videos that the strategy was asked about.
        answered: its answers before the language model.
        drops: its answers inside, by (stage, row).
        survivors: (B, prompt) bool, the tokens of the last drop; None while the prompt is read for the first
            time.
    """

    visual: dict[str, Tensor]
    encoded: dict[str, EncodedVisuals]
    answered: list[Answered]
    drops: dict[tuple[int, int], Selection]
    survivors: Tensor | None = None

    def serves(self, visual: dict[str, Tensor], encoded: dict[str, EncodedVisuals]) -> bool:
        """Whether a forward reads the same pictures at the same places, with any text after them."""
        if visual.keys() != self.visual.keys():
            return False
        for modality, before in self.visual.items():
            now = visual[modality]
            if now.shape[0] != before.shape[0] or now.shape[1] < before.shape[1]:
                return False
            if not torch.equal(now[:, : before.shape[1]], before) or bool(now[:, before.shape[1] :].any()):
                return False
        return all(_same(self.encoded[modality], encoded[modality]) for modality in visual)


def _same(one: EncodedVisuals, other: EncodedVisuals) -> bool:
    if one is other:
        return True
    a, b = ([item.features for item in x.items] for x in (one, other))
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def tensors_of(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors among bound arguments, including further keyword arguments."""
    return {n: v for n, v in (arguments | arguments.get("kwargs", {})).items() if isinstance(v, Tensor)}


@dataclass
class Prompt:
    """A running `generate()` with its keyword arguments.

    Attributes:
        input_ids: the ids to read, None if the prompt came as embeddings.
        given: its keyword arguments.
        encoded: modality -> the pictures that it encoded before it read the prompt.
        default: the model's generation config.
        choice: the choice, if every step reads the prompt again.
        pushed: by modality, the frames already pushed to a stream, as (stream, tensors, features), which are
            not pushed again.
        virtual: tokens that were learnt and come before the prompt.
    """

    input_ids: Tensor | None
    given: dict[str, Any] = field(default_factory=dict)
    encoded: dict[str, EncodedVisuals] = field(default_factory=dict)
    default: Any = None
    choice: Choice | None = None
    pushed: dict[str, tuple[Any, dict[str, Tensor], Any]] = field(default_factory=dict)
    virtual: int = 0

    def features_of(self, modality: str, stream: Any, given: dict[str, Any]) -> Any:
        """The features of these frames if this `generate` pushed them to the stream, else None.

        Releases that encode in every step of `use_cache=False` would push them again.
        """
        known, before, output = self.pushed.get(modality, (None, {}, None))
        now = tensors_of(given)
        if known is not stream or not now or before.keys() != now.keys():
            return None
        return output if all(torch.equal(before[name], value) for name, value in now.items()) else None

    @property
    def length(self) -> int:
        """Tokens of the prompt, including earlier turns in the cache; 0 if unknown."""
        # of the whole conversation, since input_ids may be only the last turn
        mask = self.given.get("attention_mask")
        told = int(mask.shape[1]) if isinstance(mask, Tensor) and mask.ndim == 2 else self._given_tokens
        return told + self.virtual if told else 0

    @property
    def _given_tokens(self) -> int:
        embeds = self.given.get("inputs_embeds")
        given = embeds if self.input_ids is None or not self.input_ids.shape[1] else self.input_ids
        return 0 if given is None else int(given.shape[1])

    def last_columns(self) -> list[int]:
        """Per row, the last column of `input_ids` that is not padding."""
        assert self.input_ids is not None
        real, mask = torch.ones_like(self.input_ids, dtype=torch.bool), self.given.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            real = mask[:, -real.shape[1] :].bool()
        place = torch.arange(real.shape[1], device=real.device)
        last: list[int] = torch.where(real, place, -1).amax(1).tolist()
        return last

    @property
    def drafts(self) -> bool:
        """Whether an assistant proposes tokens, which the model may take back."""
        config = self.given.get("generation_config") or self.default
        names = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
        return any(self.given.get(name) or getattr(config, name, None) for name in names)

    @property
    def new_tokens(self) -> int:
        """Tokens that may be generated, 0 if unknown."""
        config = self.given.get("generation_config") or self.default
        most, longest = (
            self.given.get(n) or getattr(config, n, None) for n in ("max_new_tokens", "max_length")
        )
        return int(most) if most else max(0, int(longest or 0) - self._given_tokens)
