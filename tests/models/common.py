"""Shared parts of the tiny models: special ids, the language model's size, seeded weights, prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import transformers
from torch import Tensor

PAD, IMG, VID, START, END, BREAK, ROW = 0, 100, 101, 102, 103, 104, 105
VOCAB = 120
SPECIAL = list(range(IMG, VOCAB))  # a random model would happily generate <image>: suppressed everywhere
LM = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    pad_token_id=PAD,
    bos_token_id=1,
    eos_token_id=2,
)
VIT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
KINDS = {
    "one": [[0]],
    "ragged": [[0], [1, 2]],
    "several_images": [[0, 1, 2]],
    "text_only_row": [[0], [], [1]],
}


@dataclass(frozen=True)
class Item:
    """One image or video in a prompt: its placeholders (with the tokens around them) and its tensors."""

    ids: list[int]
    tensors: dict[str, Tensor]


def concatenate(rows: list[list[Item]]) -> dict[str, Tensor]:
    """The tensors of all items in prompt order, concatenated along the first dimension."""
    items = [item for row in rows for item in row]
    return (
        {key: torch.cat([item.tensors[key] for item in items]) for key in items[0].tensors} if items else {}
    )


@dataclass(frozen=True)
class Family:
    """A model family in one modality, as a tiny random model with prompts that exercise it.

    ``item(i, n)`` makes the i-th test image (or video) for a prompt that holds n of them; items differ in
    size wherever the family allows it. ``collate`` turns rows of items into the model's vision inputs;
    ``extra`` derives further inputs from (input_ids, attention_mask). ``per_prompt`` is the largest number of
    items in one prompt. ``inside`` is False if no token can be dropped inside the LLM. ``broken`` names minor
    releases of transformers in which the unpatched model fails, ``requires`` a package it needs. ``needs_mask``
    is True if the unpatched model places a prompt right only with an attention mask, ``makes_cache`` False if it
    makes no KV cache of its own.
    """

    name: str
    modality: str
    architecture: str
    config: Callable[[], transformers.PreTrainedConfig]
    item: Callable[[int, int], Item]
    collate: Callable[[list[list[Item]]], dict[str, Tensor]] = concatenate
    extra: Callable[[Tensor, Tensor], dict[str, Tensor]] = lambda ids, mask: {}
    per_prompt: int = 3
    images_first: bool = False
    inside: bool = True
    broken: tuple[str, ...] = ()
    requires: str = ""
    needs_mask: bool = False
    makes_cache: bool = True

    @property
    def runs(self) -> bool:
        """Whether the installed transformers has the model, and it works there with what is installed."""
        minor = ".".join(transformers.__version__.split(".")[:2])
        installed = not self.requires or find_spec(self.requires) is not None
        return installed and hasattr(transformers, self.architecture) and minor not in self.broken

    def build(self, attn: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0):
        """A new model with the same weights every time; another ``seed`` gives other weights."""
        config, cls = self.config(), getattr(transformers, self.architecture)
        attn = "eager" if attn == "sdpa" and not cls._supports_sdpa else attn
        config._attn_implementation = attn
        model = randomize(cls._from_config(config, attn_implementation=attn), seed).to(dtype)
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = PAD
        return model

    def batch(self, kind: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Inputs of one of ``KINDS``: one, ragged, several_images, text_only_row."""
        rows = [row[: self.per_prompt] for row in KINDS[kind]]
        return self.prompt(rows, dtype)

    def prompt(
        self, rows: Sequence[Sequence[int]], dtype: torch.dtype = torch.float32, turns: bool = False
    ) -> dict[str, Tensor]:
        """Left-padded inputs; each row lists the items of one prompt, with text of varying length around
        them.

        With ``turns``, every item is prepared as if alone in its prompt, as it is when it comes with a later
        turn.
        """
        items = [[self.item(i, 1 if turns else len(row)) for i in row] for row in rows]
        ids, mask = left_pad([self._row(row, numbers) for row, numbers in zip(items, rows)])
        vision = self.collate([[item] for row in items for item in row] if turns else items)
        inputs = dict(input_ids=ids, attention_mask=mask, **vision, **self.extra(ids, mask))
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}

    def vision(self, item: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Only the vision inputs of a prompt, or a turn, with this one item."""
        return {
            k: v.to(dtype) if v.is_floating_point() else v
            for k, v in self.collate([[self.item(item, 1)]]).items()
        }

    def _row(self, items: list[Item], numbers: Sequence[int]) -> list[int]:
        first = numbers[0] if numbers else 9
        ids = [] if self.images_first else text(3 + first % 2, 10 + first)
        for number, item in zip(numbers, items):
            ids += item.ids + ([] if self.images_first else text(2 + number, 20 + number))
        return ids + text(4 + 2 * first % 5, 30 + first)

    def visual(self, inputs: dict[str, Tensor]) -> Tensor:
        """Boolean (batch, length): the placeholders."""
        return (inputs["input_ids"] == IMG) | (inputs["input_ids"] == VID)


def randomize(model, seed: int = 0):
    """Weights large enough that every token matters: logits of a few units, attention far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.ndim >= 2:
            fan = p[0].numel() if p.ndim == 4 or p.ndim == 5 else p.shape[-1]
            p.data = noise * (1.0 if "embed" in name else 1.6 / fan**0.5)
        elif "norm" in name and name.endswith("weight"):
            p.data = 1 + 0.1 * noise
        else:
            p.data = 0.1 * noise
    model.tie_weights()
    return model.eval()


def left_pad(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows])
    return ids, mask


def text(n: int, seed: int) -> list[int]:
    return torch.randint(3, 95, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 + seed))
