"""Where the prompt of a forward ends, and what was chosen for the prompt of a running `generate()`.

One rule, for every strategy that reads the text or the language model's attention:

1. within `generate()`, the prompt that it was given: drafts of assisted decoding and generated tokens follow it;
2. with `labels`, per row the tokens before the first label that counts;
3. within `prompt_length(...)`, as many tokens as the user says;
4. otherwise all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..tokens import Selection, VisualTokens
    from .encoded import EncodedVisuals
    from .state import State

IGNORED = -100  # the label of tokens that are not learnt

_told: ContextVar[Tensor | None] = ContextVar("vtoken_prompt_length", default=None)


@dataclass
class Answered:
    """What the strategy answered about the images or videos of one prompt row, at the columns `places` (n,) int64."""

    row: int
    places: Tensor
    items: list[VisualTokens]
    picks: list[Selection]


@dataclass
class Choice:
    """What was chosen for one batch of prompts that is read again in every step, as `generate(use_cache=False)` does.

    Attributes:
        visual: modality -> (B, prompt) bool, the visual tokens.
        encoded: modality -> what the strategy was asked about.
        answered: its answers before the language model.
        drops: its answers inside, by (stage, row).
        survivors: (B, prompt) bool, what the last drop left; None while the prompt is read for the first time.
    """

    visual: dict[str, Tensor]
    encoded: dict[str, EncodedVisuals]
    answered: list[Answered]
    drops: dict[tuple[int, int], Selection]
    survivors: Tensor | None = None

    def serves(self, visual: dict[str, Tensor], encoded: dict[str, EncodedVisuals]) -> bool:
        """Whether a forward reads the same pictures at the same places, whatever text follows them."""
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
    """The tensors among bound arguments, those passed on as further ones included."""
    return {n: v for n, v in (arguments | arguments.get("kwargs", {})).items() if isinstance(v, Tensor)}


@dataclass
class Prompt:
    """A running `generate()` with its keyword arguments.

    Attributes:
        input_ids: what it was given to read, None if that was embeddings.
        given: its keyword arguments.
        encoded: modality -> the pictures that it encoded before it read the prompt.
        default: the model's generation config.
        choice: what was chosen, if every step reads the prompt again.
        pushed: by modality the frames that a stream went on by, as (stream, tensors, features): not by the same again.
    """

    input_ids: Tensor | None
    given: dict[str, Any] = field(default_factory=dict)
    encoded: dict[str, EncodedVisuals] = field(default_factory=dict)
    default: Any = None
    choice: Choice | None = None
    pushed: dict[str, tuple[Any, dict[str, Tensor], Any]] = field(default_factory=dict)

    def features_of(self, modality: str, stream: Any, given: dict[str, Any]) -> Any:
        """What these frames gave when this `generate` pushed them to the stream, as releases that encode in every step of
        `use_cache=False` push them again; None for others."""
        known, before, output = self.pushed.get(modality, (None, {}, None))
        now = tensors_of(given)
        if known is not stream or not now or before.keys() != now.keys():
            return None
        return output if all(torch.equal(before[name], value) for name, value in now.items()) else None

    @property
    def length(self) -> int:
        """Tokens of the prompt, those of earlier turns in the cache included; 0 if unknown."""
        mask = self.given.get("attention_mask")  # of the whole conversation, where input_ids may be the last turn's only
        return int(mask.shape[1]) if isinstance(mask, Tensor) and mask.ndim == 2 else self._given_tokens

    @property
    def _given_tokens(self) -> int:
        embeds = self.given.get("inputs_embeds")
        given = embeds if self.input_ids is None or not self.input_ids.shape[1] else self.input_ids
        return 0 if given is None else int(given.shape[1])

    def last_columns(self) -> list[int]:
        """Per row the last column of `input_ids` that is no padding."""
        assert self.input_ids is not None
        real, mask = torch.ones_like(self.input_ids, dtype=torch.bool), self.given.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            real = mask[:, -real.shape[1] :].bool()
        place = torch.arange(real.shape[1], device=real.device)
        last: list[int] = torch.where(real, place, -1).amax(1).tolist()
        return last

    @property
    def new_tokens(self) -> int:
        """Tokens that may be generated, 0 if unknown."""
        config = self.given.get("generation_config") or self.default
        most, longest = (self.given.get(n) or getattr(config, n, None) for n in ("max_new_tokens", "max_length"))
        return int(most) if most else max(0, int(longest or 0) - self._given_tokens)


def generating(state: State, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`generate` with a note of its prompt."""
    ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
    default = getattr(getattr(original, "__self__", None), "generation_config", None)
    prompt = Prompt(ids if isinstance(ids, Tensor) else None, kwargs, default=default)
    outer, state.generating = state.generating, prompt
    try:
        return original(*args, **kwargs)
    finally:
        state.generating = outer


@contextmanager
def prompt_length(tokens: int | Sequence[int] | Tensor) -> Iterator[None]:
    """Within the block, a forward of a patched model reads a prompt of this length, and what follows it is the answer.

    For one forward over prompt and answer without `labels`: log-likelihood scoring, or the policy's log-probabilities in
    GRPO. Strategies then choose visual tokens by the prompt alone, as `generate()` lets them. A running `generate()` and
    `labels` tell where the prompt ends themselves and take precedence. Only the current thread or asynchronous task is
    concerned.

    Args:
        tokens: columns of `input_ids` before the answer, padding on the left and tokens in the KV cache included, such as
            `prompt_ids.shape[1]`; one number for all rows, or one per row as a list or a 1-D integer tensor.

    Raises:
        TypeError: if `tokens` is neither a whole number nor a list or 1-D tensor of such.
        ValueError: for a length below 1; in the forward, for another number of rows than it has, or a length beyond its end.

    Example:
        with vtoken.prompt_length(prompt_ids.shape[1]):
            logits = model(torch.cat([prompt_ids, answer_ids], 1), pixel_values=pixels).logits
    """
    token = _told.set(_lengths(tokens))
    try:
        yield
    finally:
        _told.reset(token)


def _lengths(tokens: Any) -> Tensor:
    """() or (rows,) int64 on the CPU."""
    if isinstance(tokens, Tensor):
        given = tokens.detach().cpu()
    else:
        numbers = tokens if isinstance(tokens, list | tuple) else [tokens]
        whole = all(isinstance(n, Integral) and not isinstance(n, bool) for n in numbers) and len(numbers) > 0
        given = torch.tensor(tokens) if whole else torch.zeros(0)
    if given.dtype.is_floating_point or given.dtype.is_complex or given.dtype == torch.bool or given.ndim > 1:
        raise TypeError(
            f"prompt_length takes a whole number of tokens, or a list or 1-D integer tensor with one per row, found {tokens!r}."
        )
    if bool((given < 1).any()):
        raise ValueError(f"A prompt has at least 1 token, found prompt_length({given.tolist()}).")
    return given.long()


def prompt_ends(state: State, past: int, real: Tensor) -> Tensor:
    """(B,) int64: the position in this forward at which every row's prompt ends, its length if all of it is prompt.

    Args:
        state: of the forward.
        past: tokens in the KV cache.
        real: (B, q) bool, what is no padding.

    Raises:
        ValueError: if `prompt_length` does not fit the forward.
    """
    batch, length = real.shape
    prompt: Prompt | None = state.generating
    if prompt is not None:
        end = prompt.length - past
        return torch.full((batch,), end if 0 < end < length else length, device=real.device)
    ends, told, labels = torch.full((batch,), length, device=real.device), _told.get(), state.labels
    if told is not None:
        if told.ndim and len(told) != batch:
            raise ValueError(f"prompt_length has {len(told)} rows, this forward {batch}: give one length per row.")
        if int(told.max()) > past + length:
            raise ValueError(
                f"prompt_length says {int(told.max())} tokens, this forward ends after {past + length}: count the columns of "
                "input_ids before the answer."
            )
        ends = (told - past).clamp(min=0).to(real.device).expand(batch)
    if isinstance(labels, Tensor) and labels.shape == real.shape:
        counts = labels.to(real.device) != IGNORED
        ends = torch.where(counts.any(1), counts.long().argmax(1), ends)
    return ends


def queries_of(ends: Tensor, real: Tensor, visual: Tensor) -> Tensor:
    """(B,) int64: the position of every row's query, the token from which the answer is read; -1 for an empty row.

    The last token of the prompt; the last visual token where that comes later, as in the later turns of a training sample,
    because only what follows a picture can see it.
    """
    place = torch.arange(real.shape[1], device=real.device).expand_as(real)
    last = torch.maximum(ends - 1, torch.where(visual, place, -1).amax(1))
    return torch.where(real & (place <= last[:, None]), place, -1).amax(1)
