"""A strategy with known answers, and a spy that records any strategy's answers for the oracle."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import vtoken
from tests.models import Family
from vtoken import PrefillTokens, Selection, Strategy, StrategyInfo, VisualTokens
from vtoken.mechanism.vision_hooks import VisionHooks
from vtoken.patching import patch_of
from vtoken.sparse_attention import AttentionTokens


@dataclass
class Fixed(Strategy):
    """Keeps a random subset whose places and size depend on the picture; may merge; may drop in front of LLM
    layers.

    Args:
        seed: another seed, other places.
        merge: let dropped tokens flow into kept ones with random weights.
        layers: LLM layers to drop at.
        projector: whether to drop in front of the LLM as well.
        aligned: LLM layers whose cache keeps only what survived the last drop, once the prompt has been read.
    """

    budget: float | int = 0.5
    seed: int = 0
    merge: bool = False
    layers: tuple[int, ...] = ()
    projector: bool = True
    aligned: tuple[int, ...] = ()

    @property
    def acts_on_projector(self) -> bool:
        return self.projector

    def prefill_layers(self, num_layers: int) -> tuple[int, ...]:
        return self.layers

    def aligned_layers(self, num_layers: int) -> tuple[int, ...]:
        return self.aligned

    def select(self, tokens: VisualTokens) -> Selection:
        return self._draw(len(tokens), round(float(tokens.features.float().sum()) * 10))

    def select_in_prefill(self, tokens: PrefillTokens) -> Selection:
        places = tokens.positions[tokens.visual_rows]
        return self._draw(len(places), tokens.layer + int((places - places[0]).sum()) + tokens.total_visual)

    def _draw(self, n: int, salt: int) -> Selection:
        generator = torch.Generator().manual_seed(abs(salt) + 7919 * self.seed)
        near = int(torch.randint(-1, 2, (), generator=generator))
        count = max(1, min(n - 1, round(n * self.budget) + near)) if n > 1 else n
        keep = torch.randperm(n, generator=generator)[:count].sort().values
        if not self.merge:
            return Selection(keep)
        # the last kept one absorbs nothing
        into = torch.randint(-1, max(1, count - 1), (n,), generator=generator)
        into[keep] = torch.arange(count)
        into[keep[-1]] = -1
        return Selection(keep, into, torch.rand(n, generator=generator))


Fixed.info = StrategyInfo("fixed", "For tests.", ("projector",), cls=Fixed)


class Spy:
    """Listens to a strategy's answers; must be made before the model is patched.

    Attributes:
        items: for every image or video asked about, in order: number of tokens and the answer.
        features: what each of these was made of.
        planes: per early LLM layer what all visual tokens add there (DeepStack), if the tower reuses between
            frames.
        drops: per LLM layer, for every prompt asked about: columns of its visual tokens and the answer.
        attended: per LLM layer, for every prompt asked about: the columns that its attention reads, and the
            first column that is no part of the prompt.
    """

    def __init__(self, strategy: Strategy) -> None:
        self.strategy, self.items, self.features, self.drops, self.planes = strategy, [], [], {}, []
        self.attended: dict[int, list[tuple[Tensor, int]]] = {}
        select, in_prefill, attend = strategy.select, strategy.select_in_prefill, strategy.attend

        def spy_select(tokens: VisualTokens) -> Selection:
            answer = select(tokens)
            self.items.append((len(tokens), answer))
            self.features.append(tokens.features)
            return answer

        def spy_prefill(tokens: PrefillTokens) -> Selection:
            answer = in_prefill(tokens)
            self.drops.setdefault(tokens.layer, []).append((tokens.positions[tokens.visual_rows], answer))
            return answer

        def spy_attend(tokens: AttentionTokens) -> Selection:
            answer = attend(tokens)
            kept = tokens.positions[answer.keep].tolist()
            last = int(tokens.positions[-1])
            self.attended.setdefault(tokens.layer, []).append((torch.tensor([*kept, last]), last + 1))
            return answer

        strategy.select, strategy.select_in_prefill, strategy.attend = spy_select, spy_prefill, spy_attend

    def clear(self) -> None:
        self.items.clear()
        self.features.clear()
        self.drops.clear()
        self.attended.clear()

    def once(self, family: Family, inputs: dict, times: int) -> None:
        """Forget repeated answers: some releases encode the images of a prompt again for every beam."""
        rows = family.visual(inputs).sum(1).tolist()
        if sum(n for n, _ in self.items) != times * sum(rows):
            return
        items, kept = iter(self.items), []
        for total in rows:
            for time in range(times):
                read = 0
                while read < total:
                    n, answer = next(items)
                    read += n
                    kept += [(n, answer)] if time == 0 else []
        self.items[:] = kept

    def in_front(
        self, family: Family, inputs: dict, labels: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """What the items' answers mean for a batch: bool (batch, L), and a (kept, all) matrix for rows that
        merge.

        The last token of the prompt, which ends where `labels` begin, stays whatever was answered.
        """
        visual, items = family.visual(inputs), iter(self.items)
        keep, merge = ~visual, []
        real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        if labels is not None:
            real = real & ((labels != -100).cumsum(1) == 0)
        queries = [int(row.nonzero()[-1]) if row.any() else -1 for row in real]
        for b, row in enumerate(visual):
            places, at, blocks, merging = row.nonzero()[:, 0], 0, [], False
            while at < len(places):
                n, answer = next(items)
                if int(places[at + n - 1]) == queries[b] and n - 1 not in answer.keep.tolist():
                    answer = replace(answer, keep=torch.cat([answer.keep, torch.tensor([n - 1])]))
                keep[b, places[at : at + n][answer.keep]] = True
                blocks.append(matrix(answer, n))
                merging |= answer.into is not None
                at += n
            assert at == len(places)
            merge.append(torch.block_diag(*blocks) if merging else None)
        assert next(items, None) is None
        return keep, merge

    def hidden(self, family: Family, inputs: dict) -> Tensor:
        """Bool (batch, L, L): tokens after a picture do not see those of its tokens that are not marked."""
        visual, items = family.visual(inputs), iter(self.items)
        out = torch.zeros(*visual.shape, visual.shape[1], dtype=torch.bool)
        for b, row in enumerate(visual):
            places = row.nonzero()[:, 0].tolist()
            while places:
                n, answer = next(items)
                mine, places = places[:n], places[n:]
                for token, marked in zip(mine, answer.marked.tolist(), strict=True):
                    out[b, mine[-1] + 1 :, token] = not marked
        return out

    def by_row(self, family: Family, inputs: dict) -> list[Tensor]:
        """The features of every row's visual tokens, as the strategy saw them or wrote them."""
        counts = family.visual(inputs).sum(1).tolist()
        read = [f.clone() for f in self.features]
        for features, (_, answer) in zip(read, self.items, strict=False):
            if answer.features is not None:
                features[answer.keep] = answer.features
        return list(torch.cat(read).split(counts))

    def planes_by_row(self, family: Family, inputs: dict) -> list[list[Tensor]] | None:
        counts = family.visual(inputs).sum(1).tolist()
        return (
            [list(rows) for rows in zip(*(plane.split(counts) for plane in self.planes))]
            if self.planes
            else None
        )

    def inside(
        self, family: Family, inputs: dict, front: Tensor
    ) -> tuple[dict[int, Tensor], list[dict[int, Tensor]]]:
        """What the answers inside the LLM mean: per layer bool (batch, L), per row and layer a matrix."""
        visual, drop = family.visual(inputs), {}
        mix: list[dict[int, Tensor]] = [{} for _ in visual]
        for layer, answers in self.drops.items():
            answers, drop[layer] = iter(answers), torch.ones_like(visual)
            for b, row in enumerate(visual):
                if not row.any():
                    continue
                columns, answer = next(answers)
                gone = torch.ones(len(columns), dtype=torch.bool)
                gone[answer.keep] = False
                drop[layer][b, columns[gone]] = False
                if answer.into is not None:
                    index = (front[b] & inputs["attention_mask"][b].bool()).nonzero()[:, 0]
                    places = torch.searchsorted(index, columns)
                    mix[b][layer] = torch.eye(len(index))
                    rows = torch.zeros(len(answer.keep), len(index))
                    rows[:, places] = matrix(answer, len(columns))
                    mix[b][layer][places[answer.keep]] = rows
            assert next(answers, None) is None
        return drop, mix

    def inside_attention(self, family: Family, inputs: dict) -> dict[int, Tensor]:
        """What the answers about attention mean: per layer bool (batch, L)."""
        visual, out = family.visual(inputs), {}
        for layer, answers in self.attended.items():
            answers, out[layer] = iter(answers), torch.ones_like(visual)
            for b, row in enumerate(visual):
                if row.any():
                    columns, end = next(answers)
                    out[layer][b, :end] = False
                    out[layer][b, columns] = True
            assert next(answers, None) is None
        return out


def matrix(answer: Selection, n: int) -> Tensor:
    """(kept, n): what every kept token is made of, spelled out."""
    out = torch.zeros(len(answer.keep), n)
    for i in range(n if answer.into is not None else 0):
        if answer.into[i] >= 0:
            out[answer.into[i], i] += answer.weight[i]
    for j, token in enumerate(answer.keep):
        if answer.into is None or not (answer.into == j).any():
            out[j, token] = 1
    return out


def patched(model, strategy: Strategy | None = None, **options):
    """``with patched(model, ...) as spy``: a model patched with `strategy`, or with `Fixed(**options)`."""
    return _Patched(model, Fixed(**options) if strategy is None else strategy)


class _Patched:
    def __init__(self, model, strategy: Strategy) -> None:
        self.model, self.spy = model, Spy(strategy)

    def __enter__(self) -> Spy:
        vtoken.patch(self.model, self.spy.strategy)
        if self.spy.strategy.acts_between_frames:
            (watch,) = [part for part in patch_of(self.model).parts if isinstance(part, VisionHooks)]
            encode = watch._encode

            def noting(modality, output, *args):
                encoded = encode(modality, output, *args)
                planes = getattr(output, "deepstack_features", None) or []
                self.spy.planes = [p if isinstance(p, Tensor) else torch.cat(list(p)) for p in planes]
                if not self.spy.strategy.acts_on_projector:  # it is not asked
                    self.spy.features += [item.features for item in encoded.items]
                return encoded

            watch._encode = noting
        return self.spy

    def __exit__(self, *exc) -> None:
        vtoken.unpatch(self.model)
