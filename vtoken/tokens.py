"""The data that flows: what a strategy sees (`VisualTokens`, `EncoderTokens`, `PrefillTokens`) and what it
answers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """One forward of the vision tower's grid: an image, a crop of it, or a frame of a video.

    Attributes:
        kind: "image", "thumbnail", "crop" or "frame".
        grid: (rows, columns) of cells; a cell is what becomes one visual token.
        place: (row, column) of a crop on the canvas of crops; (0, 0) otherwise.
        seconds: time of a frame within its video, None where the model is not told.
        box: (x0, y0, x1, y1), the region of the original image that the grid covers, as fractions of its
            width and height; below 0 or above 1 where the grid reaches into padding. The whole image where
            the model is not told its size.
        tokens: cells that become tokens, None for all; fewer where the model unpads or shrinks a canvas of
            crops.
        shrink: cells along one side of a token, above 1 where the model shrinks the canvas behind the tower;
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
    """What a strategy may know about a vision tower.

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
    """What a strategy reads besides the features; an adapter provides it or `patch` refuses.

    Attributes:
        cls_attention: tower layers whose CLS row is read.
        cls_logits: tower layers whose CLS row is read in front of the softmax.
        received_attention: tower layers whose received attention is read.
        keys: tower layers whose attention keys are read.
        text_embeddings: whether the prompt's text embeddings are read.
        pixels: whether the frames' pixels are read, and further frames encoded.
        together: whether the images of one prompt are seen as the frames of one video.
        modalities: the kinds of input the method is defined for.
    """

    cls_attention: tuple[int, ...] = ()
    cls_logits: tuple[int, ...] = ()
    received_attention: tuple[int, ...] = ()
    keys: tuple[int, ...] = ()
    text_embeddings: bool = False
    pixels: bool = False
    together: bool = False
    modalities: tuple[str, ...] = ("image", "video")

    @property
    def tower_layers(self) -> set[int]:
        """Tower layers of which something is read."""
        return {*self.cls_attention, *self.cls_logits, *self.received_attention, *self.keys}


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
        merged: (num_cells,) int64, which token inside the tower a cell became; cells with one number share
            their features. None if nothing was merged there.
        memory: what the strategy noted of earlier frames of the same stream (see `vtoken.stream`), empty at
            its start and for whatever is no stream. Constant in size and made of numbers, strings, tensors,
            lists and dicts, please.
        pixels: (frames, 3, H, W) as the tower takes them, of images in crops the view of the whole; None
            unless declared.
        encode: `encode(pixels (k, 3, H, W))` gives the features (k, cells, d) of further frames; None unless
            declared.
    """

    features: Tensor
    segments: tuple[Segment, ...]
    cells: Tensor
    tower: TowerInfo | None = None
    modality: str = "image"
    text_embeddings: Tensor | None = None
    merged: Tensor | None = None
    provided: dict[tuple[str, int], Tensor | Callable[[], Tensor]] = field(default_factory=dict, repr=False)
    memory: dict[str, Any] = field(default_factory=dict, repr=False)
    pixels: Tensor | None = field(default=None, repr=False)
    encode: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)

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
        """Scaled products of the CLS query with the cells' keys, mean over heads: (segments, cells) float32."""
        return self._get("cls_logits", layer)

    def received_attention(self, layer: int) -> Tensor:
        """Attention each cell receives, mean over heads and queries: (segments, cells) float32."""
        return self._get("received_attention", layer)

    def keys(self, layer: int) -> Tensor:
        """Attention keys of a tower layer, heads side by side: (segments, cells, heads * head_dim)."""
        return self._get("keys", layer)

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
        """(segments, cells of the largest segment): what is given of each of the n tokens, -inf where a cell
        has no token.

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


@dataclass
class EncoderTokens:
    """All segments of one forward of a vision tower, behind one of its layers, prefix tokens (CLS) left out.

    Attributes:
        layer: the tower layer that has just run.
        hidden_states: (segments, n, C).
        grid: (rows, columns) of the patches before anything was merged.
        sizes: (segments, n) float32, patches that each token stands for; ones before the first merge.
    """

    layer: int
    hidden_states: Tensor
    grid: tuple[int, int]
    sizes: Tensor


@dataclass
class EncoderMerge:
    """What becomes of the tokens inside a vision tower; every segment keeps the same number m, as the tower
    needs.

    Attributes:
        keep: (segments, m) int64, ascending: the places that stay, those of merged tokens included.
        into: (segments, n) int64, the place (0 .. m - 1) that every token ends up in.
        weight: (segments, n) float32, the share with which it is added there.
    """

    keep: Tensor
    into: Tensor
    weight: Tensor


@dataclass
class PrefillTokens:
    """One prompt as LLM layer `layer` receives it, padding removed.

    Attributes:
        layer: the layer in front of which the choice is made.
        hidden_states: (n, d) of all tokens, text included; the embeddings if `layer` is 0.
        visual: (n,) bool, the visual tokens to choose from.
        positions: (n,) int64, index of each token within the prompt's forward, padding included.
        total_visual: such tokens of this prompt before anything was dropped.
        attention_rows: `attention_rows(rows)` with (r,) int64 indices into the n tokens -> (heads, r, n)
            float32, the softmaxed rows of the layer before.
        preview_rows: the same of layer `layer` itself, as it would attend if nothing were dropped in front of
            it.
        end: tokens that belong to the prompt; those after them are the answer, or drafts of it. -1 for all.
        query: the token from which the answer is read, never one of the visual tokens to choose from; -1 for
            the last of the prompt.
        num_layers: layers of the LLM.
        units: images and video frames of this prompt, for budgets in tokens per image or frame.
        item: (n,) int64, which image or video of the prompt a token belongs to, -1 for text.
        separator: (n,) bool, visual tokens that are no patch (image-newline, separator).
        marked: (n,) bool, tokens that the projector stage marked (`Selection.marked`).
        rotary: cosines and sines (n, head_dim) of the tokens' positions in the layer before; None in front of
            layer 0.
        memory: shared by all layers' choices for this prompt within one forward, empty at the first.
        entering: share of the visual tokens that a projector strategy of the same combination lets into the
            LLM.
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
        """(t,) int64, the prompt's text tokens behind its first visual token; the last token if there are
        none.
        """
        text = ~self.visual & (self.visual.cumsum(0) > 0)
        if self.end >= 0:
            text[self.end :] = False
        rows = text.nonzero()[:, 0]
        return rows if len(rows) else self.last_row

    def __len__(self) -> int:
        return self.visual.shape[0]


@dataclass
class Selection:
    """Which tokens stay, and what becomes of the others.

    Attributes:
        keep: (k,) int64, ascending indices of the kept tokens.
        into: (n,) int64 or None. `into[i] = j` adds token i to the j-th kept token, -1 adds it to none. A
            kept token that no one names in `into` stays as it is; one that absorbs must name itself for its
            own share.
        weight: (n,) float32 or None, the share with which token i is added.
        marked: (k,) bool or None: kept tokens that the strategy wants to recognise inside the LLM.
        features: (k, d) or None: what the LLM reads in the kept tokens' places instead of their own features,
            for methods that encode more than the model does; not together with `into`.
    """

    keep: Tensor
    into: Tensor | None = None
    weight: Tensor | None = None
    marked: Tensor | None = None
    features: Tensor | None = None

    @classmethod
    def everything(cls, n: int, device: torch.device | str | None = None) -> Selection:
        return cls(torch.arange(n, device=device))

    @classmethod
    def merge(cls, keep: Tensor, owner: Tensor, weight: Tensor | None = None) -> Selection:
        """Token i joins the kept token `owner[i]`.

        Args:
            keep: (k,) int64, ascending.
            owner: (n,) int64, the index of a kept token, -1 for none. A kept token that absorbs must own
                itself for its own share; one whose owner is -1, and that no other names, stays as it is.
            weight: (n,) float32, the share with which token i is added; None for the mean of those that join.

        Raises:
            ValueError: if an owner is not kept.
        """
        slot = torch.full_like(owner, -1)
        slot[keep] = torch.arange(len(keep), device=keep.device)
        joins = owner >= 0
        into = torch.where(joins, slot[owner.clamp(min=0)], -1)
        if bool((joins & (into < 0)).any()):
            lost = owner[joins & (into < 0)].unique().tolist()[:5]
            raise ValueError(
                f"Selection.merge needs owners that are kept, found {lost}: use -1 for a token that goes."
            )
        if weight is None:
            size = torch.zeros(max(1, len(keep)), device=into.device).index_add_(
                0, into.clamp(min=0), joins.float()
            )
            weight = torch.where(joins, 1 / size[into.clamp(min=0)], 0.0)
        return cls(keep, into, weight)

    @classmethod
    def groups(cls, keep: Tensor, group: Tensor) -> Selection:
        """Deprecated: `Selection.merge(keep, owner)`, whose owners are tokens where `group` has indices into
        `keep`.
        """
        warnings.warn(
            "Selection.groups goes in the next release: write Selection.merge(keep, owner), with owner[i] a"
            " kept token.",
            DeprecationWarning,
            stacklevel=2,
        )
        return cls.merge(keep, torch.where(group >= 0, keep[group.clamp(min=0)], -1))

    def check(self, n: int) -> Selection:
        """Raise ValueError unless this is a legal answer for n tokens; returns itself."""
        keep = self.keep
        if keep.ndim != 1 or keep.dtype != torch.int64:
            raise ValueError(f"Selection.keep must be 1-D int64, found {tuple(keep.shape)} {keep.dtype}.")
        if len(keep) and (int(keep[0]) < 0 or int(keep[-1]) >= n or bool((keep.diff() <= 0).any())):
            raise ValueError(
                f"Selection.keep must be ascending, unique and within [0, {n}), found {keep.tolist()[:20]}."
            )
        if (self.into is None) != (self.weight is None):
            raise ValueError("Selection.into and Selection.weight go together: give both or none.")
        if self.features is not None and (self.into is not None or self.features.shape[:-1] != keep.shape):
            raise ValueError(
                f"Selection.features must be ({len(keep)}, d) and stand alone, found"
                f" {tuple(self.features.shape)}{'' if self.into is None else ' beside into'}."
            )
        if self.marked is not None and (self.marked.shape != keep.shape or self.marked.dtype != torch.bool):
            raise ValueError(
                f"Selection.marked must be bool of shape {tuple(keep.shape)}, found {self.marked.dtype}."
            )
        if self.into is not None and self.weight is not None:
            if self.into.shape != (n,) or self.weight.shape != (n,):
                raise ValueError(
                    f"Selection.into and .weight must have shape ({n},), "
                    f"found {tuple(self.into.shape)} and {tuple(self.weight.shape)}."
                )
            if n and (int(self.into.min()) < -1 or int(self.into.max()) >= len(keep)):
                raise ValueError(f"Selection.into must lie within [-1, {len(keep)}).")
        return self

    def with_last(self, features: Tensor) -> Selection:
        """This choice among tokens of `features` (n, d) with the last of them kept too, as it is."""
        last = len(features) - 1
        if len(self.keep) and int(self.keep[-1]) == last:
            return self
        own = None if self.features is None else torch.cat([self.features, features[last:].to(self.features)])
        marked = None if self.marked is None else torch.cat([self.marked, self.marked.new_zeros(1)])
        keep = torch.cat([self.keep, self.keep.new_tensor([last])])
        return Selection(keep, self.into, self.weight, marked, own)

    def dense(self, n: int) -> Tensor:
        """The (k, n) float32 matrix that maps features to kept features; for tests and for composition."""
        m = torch.zeros(len(self.keep), n, device=self.keep.device)
        if self.into is None or self.weight is None:
            m[torch.arange(len(self.keep)), self.keep] = 1.0
            return m
        rows = (self.into >= 0).nonzero()[:, 0]
        m[self.into[rows], rows] = self.weight[rows]
        alone = (
            torch.zeros(len(self.keep), dtype=torch.bool, device=m.device).index_fill_(
                0, self.into[rows], True
            )
        ) == 0
        m[alone.nonzero()[:, 0], self.keep[alone]] = 1.0
        return m


def concat_selections(selections: Sequence[Selection], sizes: Sequence[int]) -> Selection:
    """Selections of consecutive stretches of tokens, `sizes[i]` long each, as one Selection of all of them."""
    device = selections[0].keep.device
    keep, into, weight, marked, token, slot = [], [], [], [], 0, 0
    merging = any(s.into is not None for s in selections)
    for s, n in zip(selections, sizes, strict=True):
        keep.append(s.keep + token)
        marked.append(torch.zeros_like(s.keep, dtype=torch.bool) if s.marked is None else s.marked)
        if merging:
            if s.into is None or s.weight is None:
                into.append(torch.full((n,), -1, device=device))
                weight.append(torch.zeros(n, device=device))
            else:
                into.append(torch.where(s.into >= 0, s.into + slot, -1))
                weight.append(s.weight)
        token, slot = token + n, slot + len(s.keep)
    out = Selection(
        torch.cat(keep), torch.cat(into) if merging else None, torch.cat(weight) if merging else None
    )
    if any(s.marked is not None for s in selections):
        out.marked = torch.cat(marked)
    written = [s.features for s in selections if s.features is not None]
    if written and len(written) < len(selections):
        raise ValueError("Selection.features must be given for all of several images or videos, or for none.")
    out.features = torch.cat(written) if written else None
    return out
