"""Answers of a strategy: the tokens that stay, and the tokens that each of them absorbs."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class EncoderMerge:
    """Merge of tokens inside an encoder; every sequence keeps the same number m, as the encoder needs.

    All numbers count the tokens of a sequence, prefix tokens (CLS) included.

    Attributes:
        keep: (rows, m) int64, in the order of the result: the token whose place each result takes.
        into: (rows, n) int64, the place (0 .. m - 1) that every token ends up in, -1 for a dropped one.
        weight: (rows, n) float32, the share with which it is added there.
        sizes: (rows, m) float32, the sizes of the results; None for the sums of the sizes that join.
    """

    keep: Tensor
    into: Tensor
    weight: Tensor
    sizes: Tensor | None = None

    def sizes_of(self, sizes: Tensor) -> Tensor:
        """(rows, m) float32, the sum of the sizes (rows, n) that join in every result."""
        m = self.keep.shape[1]
        column = torch.where(self.into < 0, m, self.into)
        return sizes.new_zeros(len(sizes), m + 1).scatter_add(1, column, sizes)[:, :m]

    @classmethod
    def weighted(cls, keep: Tensor, into: Tensor, sizes: Tensor) -> EncoderMerge:
        """The mean of the tokens that join, weighted by their sizes (rows, n)."""
        made = cls(keep, into, sizes)
        made.sizes = made.sizes_of(sizes)
        made.weight = sizes / made.sizes.gather(1, into.clamp(min=0))
        return made

    @classmethod
    def drop(cls, keep: Tensor, n: int) -> EncoderMerge:
        """Leave out all of n tokens but `keep` (rows, m)."""
        places = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
        into = keep.new_full((len(keep), n), -1).scatter(1, keep, places)
        return cls(keep, into, (into >= 0).float())


@dataclass
class Selection:
    """The kept tokens, and the shares of other tokens that are added to them.

    Attributes:
        keep: (k,) int64, ascending indices of the kept tokens.
        into: (n,) int64 or None. `into[i] = j` adds token i to the j-th kept token, -1 adds it to none. A
            kept token that no one names in `into` stays as it is; one that absorbs must name itself for its
            own share.
        weight: (n,) float32 or None, the share with which token i is added.
        marked: (k,) bool or None: kept tokens that the strategy wants to recognise inside the LLM.
        features: (k, d) or None: what the LLM reads in the kept tokens' places instead of their own features,
            for methods that encode more than the model does; not together with `into`.
        scores: (n,) floating point or None: the higher, the sooner a token stays where another number of them
            has to, see `exactly`.
    """

    keep: Tensor
    into: Tensor | None = None
    weight: Tensor | None = None
    marked: Tensor | None = None
    features: Tensor | None = None
    scores: Tensor | None = None

    @classmethod
    def everything(cls, n: int, device: torch.device | str | None = None) -> Selection:
        """All of n tokens."""
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
        """Deprecated: use `merge`, whose `owner` names tokens; `group` has indices into `keep`."""
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
                f" {tuple(self.features.shape)}{'' if self.into is None else ' together with into'}."
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

    def exactly(self, count: int | Sequence[int], n: int, part_of: Tensor | None = None) -> Selection:
        """This choice among n tokens with `count` of them, for a server that has announced so many.

        Too many: those with the lowest scores go. Too few: the others with the highest scores stay as they
        are. Among equals, and without scores, the lower index stays.

        Args:
            count: of all tokens, or a number for each part, such as the frames of a video.
            part_of: (n,) int64, the part that a token belongs to; None if there is one.

        Raises:
            ValueError: for a count that is not in 0..n, or features in place of the tokens' own.
        """
        counts = [count] if isinstance(count, int) else list(count)
        part = torch.zeros(n, dtype=torch.int64, device=self.keep.device) if part_of is None else part_of
        if torch.bincount(part[self.keep], minlength=len(counts)).tolist() == counts:
            return self
        for most, some in zip(torch.bincount(part, minlength=len(counts)).tolist(), counts, strict=True):
            if not 0 <= some <= most:
                raise ValueError(f"exactly needs a number of tokens in 0..{most}, found {some}.")
        if self.features is not None:
            raise ValueError(
                f"The strategy writes {len(self.keep)} tokens of its own, {count} were asked for."
            )
        scores = torch.zeros(n, device=self.keep.device) if self.scores is None else self.scores
        order = scores.sort(descending=True, stable=True).indices
        kept = torch.zeros(n, dtype=torch.bool, device=order.device).index_fill_(0, self.keep, True)
        order = torch.cat([order[kept[order]], order[~kept[order]]])
        keep = torch.cat([order[part[order] == i][:some] for i, some in enumerate(counts)]).sort().values
        marked = None
        if self.marked is not None:
            at = torch.zeros_like(kept).index_copy_(0, self.keep, self.marked)
            marked = at[keep]
        if self.into is None or self.weight is None:
            return Selection(keep, marked=marked, scores=self.scores)
        owner = torch.where(self.into >= 0, self.keep[self.into.clamp(min=0)], -1)
        added = keep[~kept[keep]]
        owner[added] = -1
        stays = torch.zeros_like(kept).index_fill_(0, keep, True)
        owner = torch.where((owner >= 0) & stays[owner.clamp(min=0)], owner, -1)
        made = Selection.merge(keep, owner, self.weight)
        made.marked, made.scores = marked, self.scores
        return made

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
    """One Selection of consecutive stretches of tokens, `sizes[i]` long each."""
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
