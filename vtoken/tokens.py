"""Inputs of a strategy: the tokens of an image, of a vision tower's layer, and of an LLM's layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .selection import Selection


@dataclass(frozen=True)
class Segment:
    """One forward of the vision tower's grid: an image, a crop of it, or a frame of a video.

    Attributes:
        kind: "image", "thumbnail", "crop" or "frame"; "queries" for learned queries that each read a whole
            picture, in one row: their cells are numbers and no places.
        grid: (rows, columns) of cells; a cell is what becomes one visual token.
        place: (row, column) of a crop on the canvas of crops; (0, 0) otherwise.
        seconds: time of a frame within its video, None where the model is not told.
        box: (x0, y0, x1, y1), the region of the original image that the grid covers, as fractions of its
            width and height; below 0 or above 1 where the grid reaches into padding. The whole image where
            the model is not told its size.
        tokens: cells that become tokens, None for all; fewer where the model unpads or shrinks a canvas of
            crops.
        shrink: cells along one side of a token, above 1 where the model shrinks the canvas after the tower;
            a token then belongs to the cell at its centre.
    """

    kind: str
    grid: tuple[int, int]
    place: tuple[int, int] = (0, 0)
    seconds: float | None = None
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    tokens: int | None = None
    shrink: float = 1.0

    @property
    def size(self) -> int:
        """Number of cells."""
        return self.grid[0] * self.grid[1]

    @property
    def fed(self) -> int:
        """Number of cells that the unpatched model would feed to the LLM as tokens."""
        return self.size if self.tokens is None else self.tokens

    def cell_boxes(self) -> Tensor:
        """(size, 4) float64: x0, y0, x1, y1 of every cell, row-major, in the unit of `box`."""
        (rows, columns), (x0, y0, x1, y1) = self.grid, self.box
        x = torch.linspace(x0, x1, columns + 1, dtype=torch.float64)
        y = torch.linspace(y0, y1, rows + 1, dtype=torch.float64)
        top, left = torch.meshgrid(y[:-1], x[:-1], indexing="ij")
        bottom, right = torch.meshgrid(y[1:], x[1:], indexing="ij")
        return torch.stack([left, top, right, bottom], -1).view(-1, 4)


@dataclass(frozen=True)
class TowerInfo:
    """Facts about a vision tower that a strategy may use.

    Attributes:
        num_layers: number of transformer layers L; layer indices are 0-based everywhere.
        feature_layer: the layer whose output feeds the projector (L - 2 for LLaVA-1.5).
        has_cls: whether token 0 of the tower is a class token.
        global_layers: layers whose attention spans the whole segment (all but the windowed ones).
        num_heads: attention heads of a layer.
    """

    num_layers: int
    feature_layer: int
    has_cls: bool
    global_layers: tuple[int, ...]
    num_heads: int = 1

    def layers_up_to_feature(self, count: int | None = None, start: int | None = None) -> tuple[int, ...]:
        """The last `count` global layers ending with the feature layer, or those from layer `start` on."""
        layers = tuple(i for i in self.global_layers if i <= self.feature_layer)
        if start is not None:
            return tuple(i for i in layers if i >= start) or layers[-1:]
        return layers if count is None else layers[-count:]

    @property
    def first_global_layer(self) -> int:
        return self.global_layers[0]


@dataclass(frozen=True)
class Needs:
    """Inputs of a strategy in addition to the features; an adapter provides them or `patch` refuses.

    Attributes:
        cls_attention: tower layers whose CLS row is read.
        cls_logits: tower layers whose CLS row is read before the softmax.
        received_attention: tower layers whose received attention is read.
        keys: tower layers whose attention keys are read.
        states: tower layers whose output is read.
        text_embeddings: whether the prompt's text embeddings are read.
        question: whether the LLM's state after the prompt's text is read.
        question_attention: the layer of the LLM, as a share of its layers in [0, 1), whose attention from the
            prompt's last token to the visual tokens is read.
        pixels: whether the frames' pixels are read, and further frames encoded.
        grid: whether the places of tokens in the picture are read.
        together: whether the images of one prompt are seen as the frames of one video.
        modalities: the kinds of input the method is defined for.
    """

    cls_attention: tuple[int, ...] = ()
    cls_logits: tuple[int, ...] = ()
    received_attention: tuple[int, ...] = ()
    keys: tuple[int, ...] = ()
    states: tuple[int, ...] = ()
    text_embeddings: bool = False
    question: bool = False
    question_attention: float | None = None
    pixels: bool = False
    grid: bool = False
    together: bool = False
    modalities: tuple[str, ...] = ("image", "video")

    @property
    def text(self) -> bool:
        """Whether the prompt's text is read."""
        return self.text_embeddings or self.question or self.question_attention is not None

    @property
    def tower_layers(self) -> set[int]:
        """Tower layers of which something is read."""
        return {layer for kind in TOWER_NEEDS for layer in getattr(self, kind)}


TOWER_NEEDS = ("cls_attention", "cls_logits", "received_attention", "keys", "states")  # fields of Needs


class NotProvided(RuntimeError):
    """A strategy asked for something that it did not declare in `needs`."""


@dataclass
class VisualTokens:
    """The visual tokens of one image or one video, in the order in which the LLM would read them.

    Attributes:
        features: (n, d) projected features, the model's dtype.
        segments: one entry per tower forward; cells are numbered over all segments, row-major inside each.
        cells: (n,) int64, the cell that became token i; -1 for rows that are no patch (image-newline,
            separator, CLS).
        tower: facts about the vision tower, None where the model has no transformer tower.
        modality: "image" or "video".
        text_embeddings: (t, d) embeddings of the prompt's text tokens, None unless declared in `Needs`.
        question: (d,) the LLM's output at the last token of the prompt's text, read without the picture; None
            unless declared.
        question_attention: (heads, n) float32, products before the softmax in one layer of the LLM: the query
            of the last token of the prompt's text, read without the picture up to this layer, and the keys of
            the visual tokens as they enter the LLM, both without positions; None unless declared.
        merged: (num_cells,) int64, of a tower that merged tokens the cell in whose place a cell's token
            stands, -1 if it was dropped; cells with one number share their features. None if the tower merged
            nothing.
        memory: the strategy's notes on earlier frames of the same stream (see `vtoken.stream`), empty at its
            start and outside of streams. It must stay constant in size and hold only numbers, strings,
            tensors, lists and dicts.
        pixels: (frames, 3, H, W) as the tower takes them, of images in crops the view of the whole; None
            unless declared.
        encode: `encode(pixels (k, 3, H, W))` gives the features (k, cells, d) of further frames; None unless
            declared.
        text_ids: (t,) int64, the ids of the text tokens; None unless `text_embeddings` is declared, and for a
            prompt of embeddings.
    """

    features: Tensor
    segments: tuple[Segment, ...]
    cells: Tensor
    tower: TowerInfo | None = None
    modality: str = "image"
    text_embeddings: Tensor | None = None
    question: Tensor | None = None
    question_attention: Tensor | None = field(default=None, repr=False)
    merged: Tensor | None = None
    provided: dict[tuple[str, int], Tensor | Callable[[], Tensor]] = field(default_factory=dict, repr=False)
    memory: dict[str, Any] = field(default_factory=dict, repr=False)
    pixels: Tensor | None = field(default=None, repr=False)
    encode: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)
    text_ids: Tensor | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return self.cells.shape[0]

    @property
    def num_cells(self) -> int:
        """Cells over all segments; more than tokens where the model unpads a canvas."""
        return sum(s.size for s in self.segments)

    @property
    def fed_cells(self) -> Tensor:
        """(num_cells,) bool, the cells that became tokens."""
        fed = torch.zeros(self.num_cells, dtype=torch.bool, device=self.cells.device)
        fed[self.cells[self.cells >= 0]] = True
        return fed

    @property
    def patch_rows(self) -> Tensor:
        """(p,) int64, the tokens that are patches."""
        return (self.cells >= 0).nonzero()[:, 0]

    @property
    def separator_rows(self) -> Tensor:
        """(s,) int64, the tokens that are no patches."""
        return (self.cells < 0).nonzero()[:, 0]

    @property
    def segment_of(self) -> Tensor:
        """(n,) int64, the segment of each token; -1 for separators."""
        ends = torch.tensor([s.size for s in self.segments], device=self.cells.device).cumsum(0)
        return torch.where(self.cells < 0, -1, torch.searchsorted(ends, self.cells, right=True))

    def cls_attention(self, layer: int) -> Tensor:
        """Softmaxed attention of the CLS query over the cells: (segments, heads, cells) float32."""
        return self._get("cls_attention", layer)

    def cls_logits(self, layer: int) -> Tensor:
        """(segments, cells) float32: scaled products of CLS query and keys of cells, mean over heads."""
        return self._get("cls_logits", layer)

    def received_attention(self, layer: int) -> Tensor:
        """Attention each cell receives, mean over heads and queries: (segments, cells) float32."""
        return self._get("received_attention", layer)

    def keys(self, layer: int) -> Tensor:
        """Attention keys of a tower layer, heads side by side: (segments, cells, heads * head_dim)."""
        return self._get("keys", layer)

    def states(self, layer: int) -> Tensor:
        """Output of a tower layer at the patches: (segments, frames, rows, columns, C), the model's dtype.

        A segment has one frame, an image that is read as a static video several (`Temporal.repeats`).
        """
        return self._get("states", layer)

    def _get(self, what: str, layer: int) -> Tensor:
        if (what, layer) not in self.provided:
            have = ", ".join(f"{w}({i})" for w, i in self.provided) or "nothing"
            raise NotProvided(
                f"{what}({layer}) was not declared in the strategy's needs(); provided here: {have}"
            )
        value = self.provided[what, layer]
        if callable(value):
            value = self.provided[what, layer] = value()
        return value

    def by_cell(self, values: Tensor) -> Tensor:
        """Values of the n tokens by cell: (segments, cells of the largest segment), -inf without a token.

        Args:
            values: (n,), any float dtype; those of separators go.
        """
        sizes = torch.tensor([s.size for s in self.segments], device=self.cells.device)
        out = values.new_full((len(self.segments), int(sizes.max())), -torch.inf)
        rows, segment = self.patch_rows, self.segment_of[self.cells >= 0]
        out[segment, self.cells[rows] - (sizes.cumsum(0) - sizes)[segment]] = values[rows]
        return out

    def keep_cells(self, cells: Tensor, separators: bool = False) -> Selection:
        """The Selection of the tokens made of the given cells ((c,) int64 or (num_cells,) bool).

        Cells that the model itself threw away (padding of a canvas) are passed over.
        """
        if cells.dtype != torch.bool:
            chosen = torch.zeros(self.num_cells, dtype=torch.bool, device=self.cells.device)
            chosen[cells.to(self.cells.device)] = True
            cells = chosen
        kept = torch.where(self.cells < 0, separators, cells.to(self.cells.device)[self.cells.clamp(min=0)])
        return Selection(kept.nonzero()[:, 0])


@dataclass(frozen=True)
class EncoderShape:
    """The numbers of an encoder and its input on which the plan of a strategy depends.

    Attributes:
        layers: layers that count; of a VLM's tower those up to the one that feeds the projector.
        patches: patches of an image.
        prefix: tokens before the patches (class token, registers).
        attention_macs, mlp_macs: multiply-adds of the linear layers of a layer's halves, per token.
        width: channels inside the attention, all heads side by side.
        embedding_macs: multiply-adds of the patch embedding, per patch.
        drops: whether tokens may be dropped and not only merged.
    """

    layers: int
    patches: int
    prefix: int
    attention_macs: int = 0
    mlp_macs: int = 0
    width: int = 0
    embedding_macs: int = 0
    drops: bool = False

    def layer_macs(self, attend: int, feed: int) -> int:
        """Multiply-adds of one layer in which so many tokens attend and so many pass the MLP."""
        return attend * self.attention_macs + 2 * attend * attend * self.width + feed * self.mlp_macs

    def macs(self, removed: Sequence[int]) -> int:
        """Multiply-adds per image if so many tokens go between attention and MLP of every layer."""
        n, total = self.patches + self.prefix, self.patches * self.embedding_macs
        for r in removed:
            total += self.layer_macs(n, n - r)
            n -= r
        return total


@dataclass
class EncoderTokens:
    """All sequences of one forward of an encoder, between attention and MLP of a layer or after a layer.

    Attributes:
        layer: the layer.
        hidden_states: (rows, n, C), prefix tokens first.
        prefix: number of tokens at the start that are no patches (CLS, registers).
        sizes: (rows, n) float32, patches that each token stands for; ones before the first merge.
        plan: the strategy's own answer to `encoder_plan`.
        grid: (rows, columns) of the patches before anything was merged; None where they form no rectangle.
        keys: () -> (rows, n, head_dim) float32, this layer's attention keys, bias included and before rotary
            embedding, the mean over heads. Not after a layer.
        cls_attention: () -> (rows, n) float32, this layer's softmaxed attention of token 0, the mean over
            heads. Not after a layer.
    """

    layer: int
    hidden_states: Tensor
    prefix: int
    sizes: Tensor
    plan: Any = None
    grid: tuple[int, int] | None = None
    keys: Callable[[], Tensor] | None = None
    cls_attention: Callable[[], Tensor] | None = None

    @property
    def patches(self) -> Tensor:
        """(rows, n - prefix, C)."""
        return self.hidden_states[:, self.prefix :]


@dataclass
class PrefillTokens:
    """One prompt as LLM layer `layer` receives it, padding removed.

    Attributes:
        layer: the layer before which the choice is made.
        hidden_states: (n, d) of all tokens, text included; the embeddings if `layer` is 0.
        visual: (n,) bool, the visual tokens to choose from.
        positions: (n,) int64, index of each token within the prompt's forward, padding included.
        total_visual: such tokens of this prompt before anything was dropped.
        attention_rows: `attention_rows(rows)` with (r,) int64 indices into the n tokens -> (heads, r, n)
            float32, the softmaxed rows of the layer before.
        preview_rows: the same of layer `layer` itself, as it would attend if nothing were dropped before
            it.
        end: tokens that belong to the prompt; those after them are the answer, or drafts of it. -1 for all.
        query: the token from which the answer is read, never one of the visual tokens to choose from; -1 for
            the last of the prompt.
        num_layers: layers of the LLM.
        units: images and video frames of this prompt, for budgets in tokens per image or frame.
        item: (n,) int64, which image or video of the prompt a token belongs to, -1 for text.
        separator: (n,) bool, visual tokens that are no patch (image-newline, separator).
        marked: (n,) bool, tokens that the projector stage marked (`Selection.marked`).
        rotary: cosines and sines (n, head_dim) of the tokens' positions in the layer before; None before
            layer 0.
        memory: shared by all layers' choices for this prompt within one forward, empty at the first.
        entering: share of the visual tokens that a projector strategy of the same combination lets into the
            LLM.
        keys: () -> (n, kv_heads * head_dim), the attention keys of the layer before, after rotary embedding,
            heads side by side; not before layer 0.
        normed: () -> (n, d), the hidden states after the last norm of the LLM.
    """

    layer: int
    hidden_states: Tensor
    visual: Tensor
    positions: Tensor
    total_visual: int
    attention_rows: Callable[[Tensor], Tensor]
    preview_rows: Callable[[Tensor], Tensor] | None = None
    end: int = -1
    query: int = -1
    num_layers: int = 0
    units: int = 1
    item: Tensor | None = None
    separator: Tensor | None = None
    marked: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    memory: dict[str, Any] = field(default_factory=dict)
    entering: float = 1.0
    keys: Callable[[], Tensor] | None = None
    normed: Callable[[], Tensor] | None = None

    @property
    def visual_rows(self) -> Tensor:
        """(v,) int64, the visual tokens among the n."""
        return self.visual.nonzero()[:, 0]

    @property
    def last_row(self) -> Tensor:
        """(1,) int64, the last token of the prompt, from which the answer is read."""
        last = (self.end if self.end > 0 else len(self)) - 1
        return torch.tensor([self.query if self.query >= 0 else last], device=self.visual.device)

    @property
    def text_rows(self) -> Tensor:
        """(t,) int64, the prompt's text tokens after its first visual token; its last token if none are."""
        text = ~self.visual & (self.visual.cumsum(0) > 0)
        if self.end >= 0:
            text[self.end :] = False
        rows = text.nonzero()[:, 0]
        return rows if len(rows) else self.last_row

    def __len__(self) -> int:
        return self.visual.shape[0]


def __getattr__(name: str) -> Any:
    if name not in ("EncoderMerge", "concat_selections"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import vtoken.selection

    warnings.warn(
        f"vtoken.tokens.{name} goes in the next release: write vtoken.selection.{name}.",
        DeprecationWarning,
        stacklevel=2,
    )
    return getattr(vtoken.selection, name)
