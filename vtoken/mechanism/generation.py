"""Find the end of the prompt in a forward.

One rule, for every strategy that reads the text or the language model's attention:

1. within `generate()`, the prompt that it was given: drafts of assisted decoding and generated tokens follow
    it;
2. with `labels`, per row the tokens before the first label that counts;
3. within `prompt_length(...)`, as many tokens as the user says;
4. otherwise all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ..call_frames import labels_given
from .forward_context import ForwardContext
from .prompt import Prompt

IGNORED = -100  # the label of tokens that are not learnt

_told: ContextVar[Tensor | None] = ContextVar("vtoken_prompt_length", default=None)


def generating(context: ForwardContext, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `generate` and remember its prompt."""
    ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
    model = getattr(original, "__self__", None)
    default = getattr(model, "generation_config", None)
    virtual = _virtual_tokens(model)
    prompt = Prompt(ids if isinstance(ids, Tensor) else None, kwargs, default=default, virtual=virtual)
    outer, context.prompt = context.prompt, prompt
    try:
        return original(*args, **kwargs)
    finally:
        context.prompt = outer


def _virtual_tokens(model: Any) -> int:
    """Tokens that prompt learning of peft puts before the prompt, in a `generate` that it calls."""
    owner = getattr(getattr(model, "prepare_inputs_for_generation", None), "__self__", None)
    config = getattr(owner, "active_peft_config", None)
    learnt = getattr(config, "is_prompt_learning", False)
    return int(getattr(config, "num_virtual_tokens", 0) or 0) if learnt else 0


@contextmanager
def prompt_length(tokens: int | Sequence[int] | Tensor) -> Iterator[None]:
    """Set the prompt length of forwards within the block; the tokens after it are the answer.

    For one forward over prompt and answer without `labels`: log-likelihood scoring, or the policy's
    log-probabilities in GRPO. Strategies then choose visual tokens by the prompt alone, as in `generate()`.
    A running `generate()` and `labels` tell the prompt's end themselves and take precedence. Only the current
    thread or asynchronous task is affected.

    Args:
        tokens: columns of `input_ids` before the answer, padding on the left and tokens in the KV cache
            included, such as `prompt_ids.shape[1]`; one number for all rows, or one per row as a list or a
            1-D integer tensor.

    Raises:
        TypeError: if `tokens` is neither a whole number nor a list or 1-D tensor of whole numbers.
        ValueError: for a length below 1; in the forward, for another number of rows than it has, or a length
            past its end.

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
            "prompt_length takes a whole number of tokens, or a list or 1-D integer tensor with one per row,"
            f" found {tokens!r}."
        )
    if bool((given < 1).any()):
        raise ValueError(f"A prompt has at least 1 token, found prompt_length({given.tolist()}).")
    return given.long()


def prompt_ends(
    model: Any, context: ForwardContext, past: int, real: Tensor, input_ids: Tensor | None = None
) -> Tensor:
    """(B,) int64: the position in this forward at which each row's prompt ends; its length if all is prompt.

    Args:
        model: whose forward it is.
        context: state of the forward.
        past: tokens in the KV cache.
        real: (B, q) bool, tokens that are not padding.
        input_ids: (B, q) int64 as the forward got them, None if it got embeddings.

    Raises:
        ValueError: if `prompt_length` does not fit the forward.
    """
    batch, length = real.shape
    prompt = context.prompt
    if prompt is not None:
        end = prompt.length - past
        return torch.full((batch,), end if 0 < end < length else length, device=real.device)
    ends, told = torch.full((batch,), length, device=real.device), _told.get()
    labels = context.labels
    if labels is None and told is None:
        labels = labels_given(model, input_ids)
    if told is not None:
        if told.ndim and len(told) != batch:
            raise ValueError(
                f"prompt_length has {len(told)} rows, this forward {batch}: give one length per row."
            )
        if int(told.max()) > past + length:
            raise ValueError(
                f"prompt_length says {int(told.max())} tokens, this forward ends after {past + length}: count"
                " the columns of input_ids before the answer."
            )
        ends = (told - past).clamp(min=0).to(real.device).expand(batch)
    if isinstance(labels, Tensor) and labels.shape == real.shape:
        counts = labels.to(real.device) != IGNORED
        ends = torch.where(counts.any(1), counts.long().argmax(1), ends)
    return ends


def queries_of(ends: Tensor, real: Tensor, visual: Tensor) -> Tensor:
    """(B,) int64: the position of each row's query, from which the answer is read; -1 for an empty row.

    The query is the last token of the prompt, or the last visual token if that comes later, as in the later
    turns of a training sample, because only tokens after a picture can see it.
    """
    place = torch.arange(real.shape[1], device=real.device).expand_as(real)
    last = torch.maximum(ends - 1, torch.where(visual, place, -1).amax(1))
    return torch.where(real & (place <= last[:, None]), place, -1).amax(1)
