"""Planner: lays a strategy's answers per image out as one plan per forward of the language model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..adapters.base import Adapter
from ..adapters.tiles import join_images
from ..selection import Selection, concat_selections
from ..tokens import VisualTokens
from .forward_context import Call, ForwardContext, Plan, PromptLayout, Run
from .packed_rows import apart
from .prompt import Answered, Choice, EncodedVisuals, Prompt
from .text_reading import TextReading, check_labels


@dataclass
class Chosen:
    """Outcome for one image or video: its prompt row, its tokens, and the selection."""

    row: int
    tokens: VisualTokens
    selection: Selection


@dataclass
class ChunkedPlan:
    """A plan over whole prompts, read in chunks: per modality (B, tokens) bool; read and all tokens, (B,)."""

    keep: dict[str, Tensor]
    seen: dict[str, Tensor]
    total: dict[str, Tensor]

    @property
    def read(self) -> bool:
        """Whether all visual tokens have been read."""
        return all(torch.equal(self.seen[m], self.total[m]) for m in self.total)


class Planner:
    """Asks the strategy about every image of a batch and lays the answers out over the prompt.

    Args:
        adapter: the model's parts, for placeholder ids.
        select: `select(VisualTokens) -> Selection`.
        context: state with the prompt of a running `generate()`.
        chosen: called once per prompt batch with the choices and the number of beams per prompt row.
        text: reads the prompt's text for the strategy; None if it reads none.
        inside: whether tokens will be dropped inside the LLM, which needs each token's item and kind.
        together: whether the strategy sees the images of a prompt as one video.
    """

    def __init__(
        self,
        adapter: Adapter,
        select: Callable[[VisualTokens], Selection],
        context: ForwardContext,
        chosen: Callable[[list[Chosen], int], None],
        text: TextReading | None,
        inside: bool = False,
        together: bool = False,
    ) -> None:
        self.adapter, self.select, self.context, self.chosen = adapter, select, context, chosen
        self.text, self.inside, self.together = text, inside, together

    def __call__(self, call: Call, run: Run, embeds: Tensor, real: Tensor) -> Plan | None:
        if self.context.disabled:
            return None
        if run.first is not None and self.text is not None:
            raise NotImplementedError(
                "A strategy that reads the text reads one prompt per row, found rows whose positions start"
                " again: give each prompt a row of its own, or use a strategy that does not read the text,"
                " such as farcover with relevance=0.0."
            )
        pending: ChunkedPlan | None = run.ledger.pending
        if pending is not None and not any(call.encoded.values()):
            plan = self._consume(call, pending)
            if pending.read:  # later tokens on this cache belong to another prompt
                run.ledger.pending = None
            return plan
        run.ledger.pending = None
        prompt = self.context.prompt
        encoded = {m: e for m, e in call.encoded.items() if e is not None}
        if not encoded and prompt is not None and self._complete(call, prompt.encoded):
            encoded = prompt.encoded  # a wrapper such as accelerate's copied the features on their way
        if encoded:
            return self._whole(call, run, encoded, embeds, real)
        if prompt is None or not prompt.encoded:
            raise RuntimeError(
                "Visual features reached the language model without their layout: pass pixel_values, or the"
                " output of get_image_features of this patched model unchanged (if you did,"
                f" {self.adapter.advice})."
            )
        return self._first_chunk(call, run, prompt, embeds)

    def _whole(
        self, call: Call, run: Run, encoded: dict[str, EncodedVisuals], embeds: Tensor, real: Tensor
    ) -> Plan | None:
        beams = self._beams(call.visual, encoded)
        prompt = self.context.prompt
        again = prompt if run.cache is None else None  # without a cache every step reads the prompt again
        if again is not None and again.choice is not None and again.choice.serves(call.visual, encoded):
            run.choice, run.drops = again.choice, again.choice.drops
            answered = again.choice.answered
        else:
            answered = self._ask(call, run, encoded, embeds, real, beams)
            if again is not None:
                again.choice = run.choice = Choice(dict(call.visual), encoded, answered, run.drops)
        plan = Plan(torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device))
        chosen: list[Chosen] = []
        for a in answered:
            chosen += [Chosen(a.row, item, s) for item, s in zip(a.items, a.picks, strict=True)]
            rows = slice(a.row * beams, (a.row + 1) * beams)
            if self.inside:
                self._lay_out(run, rows, a.places, a.items, a.picks)
            plan.follow(rows, a.places, concat_selections(a.picks, [len(item) for item in a.items]))
        if self.text is not None and self.text.fuse is not None and not self.context.disabled:
            self._fuse(plan, self.text, call, run, embeds, real, beams)
        self.chosen(chosen, beams)
        return None if plan.into is None and plan.source is None and bool(plan.keep.all()) else plan

    def _ask(
        self,
        call: Call,
        run: Run,
        encoded: dict[str, EncodedVisuals],
        embeds: Tensor,
        real: Tensor,
        beams: int,
    ) -> list[Answered]:
        assert run.ends is not None and run.queries is not None
        if self.text is not None and self.text.needs_prompt and not self.context.disabled:
            check_labels(run, real)
        # a picture after the prompt's end, as in later turns of a training sample, holds no query of it
        queries, answered = torch.where(run.queries < run.ends, run.queries, -1).tolist(), []
        for modality, places_of in self._places(call.visual, beams).items():
            for b, places, items in apart(_assign(places_of, encoded[modality].items), run.first, beams):
                ids = None if call.input_ids is None else call.input_ids[b * beams]
                items = self._join(modality, items, ids, places)
                if self.text is not None:
                    text = self._text(call, run, b * beams, real)
                    beside = {name: x[b * beams][text] for name, x in run.tokenwise.items()}
                    words = None if ids is None or len(ids) != len(text) else ids[text.to(ids.device)]
                    items = self.text.told(items, embeds[b * beams][text], beside, words)
                picks = complete([self.select(item) for item in items], items)
                answered.append(
                    Answered(b, places, items, keep_query(picks, items, places, queries[b * beams]))
                )
        return answered

    def _join(
        self, modality: str, items: list[VisualTokens], ids: Tensor | None, places: Tensor
    ) -> list[VisualTokens]:
        """The images or videos of one row, joined for the strategy."""
        items = self.adapter.join(items, ids, places)
        return [join_images(items)] if self.together and modality == "image" and len(items) > 1 else items

    @staticmethod
    def _lay_out(
        run: Run, rows: slice, places: Tensor, items: list[VisualTokens], picks: list[Selection]
    ) -> None:
        assert run.visual is not None
        if run.layout is None:
            none = torch.zeros_like(run.visual)
            run.layout = PromptLayout(none.long() - 1, none.clone(), none, [0] * len(none))
        layout, start = run.layout, 0
        first = int(layout.item[rows.start].max()) + 1
        for ordinal, (item, pick) in enumerate(zip(items, picks, strict=True), first):
            here = places[start : start + len(item)]
            layout.item[rows, here] = ordinal
            layout.separator[rows, here] = item.cells.to(here.device) < 0
            if pick.marked is not None:
                layout.marked[rows, here[pick.keep]] = pick.marked
            frames = sum(s.kind == "frame" for s in item.segments)
            for b in range(rows.start, rows.stop):
                layout.units[b] += max(1, frames)
            start += len(item)

    def _fuse(
        self, plan: Plan, text: TextReading, call: Call, run: Run, embeds: Tensor, real: Tensor, beams: int
    ) -> None:
        """Enter the text embeddings that have read the pictures, of the rows that have some."""
        assert run.visual is not None and run.ends is not None
        for first in range(0, len(embeds), beams):
            prompt = real[first] & (torch.arange(real.shape[1], device=real.device) < run.ends[first])
            if not bool(run.visual[first][prompt].any()):
                continue  # the picture comes with a later turn
            fused = text.fused(embeds[first][prompt], run.visual[first][prompt])
            places = self._text(call, run, first, real).nonzero()[:, 0]
            keep = torch.arange(len(places), device=places.device)
            plan.follow(slice(first, first + beams), places, Selection(keep, features=fused))

    @staticmethod
    def _text(call: Call, run: Run, b: int, real: Tensor) -> Tensor:
        """(q,) bool: the text of the prompt."""
        assert run.ends is not None
        text = real[b] & (torch.arange(real.shape[1], device=real.device) < run.ends[b])
        for mask in call.visual.values():
            text &= ~mask[b]
        return text

    @staticmethod
    def _complete(call: Call, encoded: dict[str, EncodedVisuals]) -> bool:
        """Whether this forward brings every visual token of the prompt, not only a chunk of them."""
        placed = {m: int(mask.sum()) for m, mask in call.visual.items()}
        return all(n >= encoded[m].total > 0 if m in encoded else False for m, n in placed.items())

    def _beams(self, visual: dict[str, Tensor], encoded: dict[str, EncodedVisuals]) -> int:
        """Rows of the forward per row of the prompt, which beam search repeats."""
        beams = 1
        for modality, mask in visual.items():
            placed, total = int(mask.sum()), encoded[modality].total if modality in encoded else 0
            if total == 0 or placed % total:
                raise ValueError(
                    f"The prompt has {placed} {modality} tokens but the features have {total}:"
                    f" {self.adapter.advice}."
                )
            beams = placed // total
        return beams

    @staticmethod
    def _places(visual: dict[str, Tensor], beams: int) -> dict[str, list[Tensor]]:
        return {m: [row.nonzero()[:, 0] for row in mask[::beams]] for m, mask in visual.items()}

    # -- chunked prefill -------------------------------------------------------------------------------------
    def _first_chunk(self, call: Call, run: Run, prompt: Prompt, embeds: Tensor) -> Plan:
        ids, encoded = prompt.input_ids, prompt.encoded
        if ids is None or self.text is not None or run.cache is None:
            raise NotImplementedError(
                "A chunked prefill needs input_ids, a cache and a strategy that does not read the text, such"
                " as farcover with relevance=0.0: leave out prefill_chunk_size."
            )
        beams = embeds.shape[0] // ids.shape[0]
        visual = self.adapter.find_placeholders(ids)
        visual = {m: mask for m, mask in visual.items() if m in encoded}
        plan, last = ChunkedPlan({}, {}, {}), prompt.last_columns()
        chosen: list[Chosen] = []
        for modality, places_of in self._places(visual, 1).items():
            longest = max(len(p) for p in places_of)
            keep = torch.ones(ids.shape[0], longest, dtype=torch.bool, device=embeds.device)
            for b, places, items in _assign(places_of, encoded[modality].items):
                items = self._join(modality, items, ids[b], places)
                picks = complete([self.select(item) for item in items], items)
                picks = keep_query(picks, items, places, last[b])
                selection = concat_selections(picks, [len(item) for item in items])
                if selection.into is not None or selection.features is not None:
                    raise NotImplementedError(
                        "A strategy that makes features needs the whole prompt in one prefill: leave out"
                        " prefill_chunk_size."
                    )
                chosen += [Chosen(b, item, s) for item, s in zip(items, picks, strict=True)]
                keep[b, : len(places)] = False
                keep[b, selection.keep] = True
            plan.keep[modality] = keep.repeat_interleave(beams, 0)
            plan.seen[modality] = torch.zeros(embeds.shape[0], dtype=torch.long, device=embeds.device)
            plan.total[modality] = visual[modality].sum(1).repeat_interleave(beams).to(embeds.device)
        self.chosen(chosen, beams)
        run.ledger.pending = plan
        return self._consume(call, plan)

    @staticmethod
    def _consume(call: Call, plan: ChunkedPlan) -> Plan:
        keep: Tensor | None = None
        for modality, mask in call.visual.items():
            if modality not in plan.keep:  # it shares the id of one that is
                continue
            table, seen = plan.keep[modality], plan.seen[modality]
            ordinal = seen[:, None] + mask.long().cumsum(1) - 1
            kept = table.gather(1, ordinal.clamp(0, table.shape[1] - 1)) | ~mask
            plan.seen[modality] = seen + mask.sum(1)
            keep = kept if keep is None else keep & kept
        assert keep is not None
        return Plan(keep)


def complete(picks: list[Selection], items: list[VisualTokens]) -> list[Selection]:
    """The answers, all with features of their own if one of them has."""
    if all(p.features is None for p in picks):
        return picks
    each = zip(picks, items, strict=True)
    return [replace(p, features=item.features[p.keep]) if p.features is None else p for p, item in each]


def keep_query(
    picks: list[Selection], items: list[VisualTokens], places: Tensor, query: int
) -> list[Selection]:
    """Answers that also keep the token at column `query`, the query, if it is the last visual token."""
    if not len(places) or int(places[-1]) != query:
        return picks
    return [*picks[:-1], picks[-1].with_last(items[-1].features)]


def _assign(
    places_of: list[Tensor], items: list[VisualTokens]
) -> list[tuple[int, Tensor, list[VisualTokens]]]:
    """Assign images to prompt rows in placeholder order: (row, places in the row, its images), if any."""
    out, i = [], 0
    for b, places in enumerate(places_of):
        mine: list[VisualTokens] = []
        while sum(len(x) for x in mine) < len(places):
            if i == len(items):
                raise ValueError(
                    "The prompt has more visual tokens than features: use the model's own processor."
                )
            mine.append(items[i])
            i += 1
        if sum(len(x) for x in mine) != len(places):
            raise ValueError(
                f"Row {b} of the prompt has {len(places)} visual tokens, its images have"
                f" {sum(len(x) for x in mine)}: use the model's own processor."
            )
        if mine:
            out.append((b, places, mine))
    return out
