"""Shared by the tests of the model families: strategy probes, eager attention, prompts of both modalities."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

import vtoken
from tests import oracle
from tests.mechanism.common import assert_same, clean, expected, run, subject
from tests.mechanism.fixed import matrix, patched
from tests.models import FAMILIES
from tests.models.common import IMG, ROW, START, left_pad, pixels, text
from tests.oracle import clone
from vtoken import Needs, Selection, Strategy, StrategyInfo, TowerInfo, VisualTokens
from vtoken.strategies import create

STRATEGIES = {  # those that fit every tower, with the options that let them
    "random": {},
    "uniform": {},
    "pool": {},
    "hired": dict(score="received"),
    "vtc_cls": dict(score="received", layers=2),
}
GLOBAL, LINE = ROW + 9, 50  # the tag of a whole image, and what stands for a line break


@dataclass
class Probe(Strategy):
    """Keeps everything it is shown in `seen`, and of every image the tokens of the cells in `mark` (all if it
    is empty).
    """

    layer: int = 3
    cls: bool = False
    keys: bool = True
    received: bool = True
    mark: tuple[int, ...] = ()
    seen: list[VisualTokens] = field(default_factory=list)

    def needs(self, tower: TowerInfo | None) -> Needs:
        at = (self.layer,)
        return Needs(
            cls_attention=at if self.cls else (),
            received_attention=at if self.received else (),
            keys=at if self.keys else (),
        )

    def select(self, tokens: VisualTokens) -> Selection:
        self.seen.append(tokens)
        if not self.mark:
            return Selection(torch.arange(len(tokens) - 1))
        return tokens.keep_cells(torch.tensor(self.mark))


Probe.info = StrategyInfo("probe", "For tests.", ("projector",), cls=Probe)


def seen(model, inputs: dict, **options) -> list[VisualTokens]:
    """The visual tokens of every image and video of a prompt, as a strategy sees them."""
    probe = Probe(budget=0.5, **options)
    with vtoken.applied(model, probe):
        run(model, inputs, 1)
    return probe.seen


def check(name: str, strategy: str, inputs: dict, budget: float = 0.3, **options) -> None:
    """generate() of a patched model is the oracle's answer for what the strategy chose, and not the dense
    answer.
    """
    with patched(subject(name), create(strategy, budget=budget, **options)) as spy:
        out = run(subject(name), inputs)
    assert_same(out, inputs, expected(name, inputs, spy))
    dense = run(clean(name), inputs, 1).logits[0]
    for b, row in enumerate(FAMILIES[name].visual(inputs)):
        assert ((out.logits[0][b] - dense[b]).abs().max() > 1e-2) == bool(row.any())


def check_attention_rows(name: str) -> None:
    """FastV chooses by the last row of the eager attention maps, and the answer is the oracle's."""
    inputs = FAMILIES[name].prompt([[0], [1]])
    with patched(subject(name), create("fastv", budget=0.5, layer=2)) as spy:
        out = run(subject(name), inputs)
    with torch.no_grad():
        maps = eager(name)(**clone(inputs), output_attentions=True).attentions[1]
    assert len(spy.drops[2]) == 2
    for b, (places, answer) in enumerate(spy.drops[2]):
        best = maps[b, :, -1].mean(0)[places].topk(len(answer.keep)).indices
        assert answer.keep.tolist() == best.sort().values.tolist()
    spy.items.clear()
    assert_same(out, inputs, expected(name, inputs, spy))


def check_full_budget(name: str) -> None:
    """generate() with a budget of one is the unpatched model's, bit for bit."""
    inputs = FAMILIES[name].batch("ragged")
    with vtoken.applied(subject(name), "random", budget=1.0):
        out = run(subject(name), inputs)
    plain = run(clean(name), inputs)
    assert torch.equal(torch.stack(out.logits), torch.stack(plain.logits))
    assert torch.equal(out.sequences, plain.sequences)


def mixed(name: str, rows: list[list[str]]) -> dict[str, Tensor]:
    """Prompts that hold images ("i0") and videos ("v1") of a family side by side, left-padded."""
    tensors: dict[str, list[Tensor]] = {}
    ids = []
    for r, row in enumerate(rows):
        line = text(2 + r, 40 + r)
        for item in row:
            family = FAMILIES[name if item[0] == "i" else f"{name}/video"]
            made = family.item(int(item[1]), len(row))
            line += made.ids + text(2, 50 + r)
            for key, value in made.tensors.items():
                tensors.setdefault(key, []).append(value)
        ids.append(line + text(3 + r, 60 + r))
    input_ids, mask = left_pad(ids)
    joined = {key: torch.cat(values) for key, values in tensors.items()}
    return dict(input_ids=input_ids, attention_mask=mask, **joined, **FAMILIES[name].extra(input_ids, mask))


def expected_mixed(name: str, inputs: dict, items: list, visuals: list) -> tuple[Tensor, Tensor]:
    """The oracle's answer for prompts of both modalities, whose images are planned before their videos."""
    family = FAMILIES[name]
    config, visual = clean(name).config, family.visual(inputs)
    keep, merge, at = ~visual, [torch.zeros(int(v.sum()), int(v.sum())) for v in visual], {}
    for (n, answer), seen_as in zip(items, visuals, strict=True):
        b, modality = seen_as.row, seen_as.modality
        token = getattr(config, f"{modality}_token_id")
        places = (inputs["input_ids"][b] == token).nonzero()[:, 0]
        start = at.get((b, modality), 0)
        at[b, modality] = start + n
        mine = places[start : start + n]
        ordinal = (visual[b].cumsum(0) - 1)[mine]
        keep[b, mine[answer.keep]] = True
        block = torch.zeros(len(answer.keep), len(merge[b]))
        block[:, ordinal] = matrix(answer, n)
        merge[b][ordinal[answer.keep]] = block
    merge = [m[keep[b][visual[b]]] if len(m) else None for b, m in enumerate(merge)]
    return oracle.generate(clean(name), inputs, keep, merge=merge)


@functools.cache
def eager(name: str):
    """The clean model with attention maps, for the reference scores."""
    return FAMILIES[name].build("eager")


@functools.cache
def quiet(name: str):
    """A model to be patched whose vision tower's attention says little: what changes most is the patch that
    was marked.
    """
    model = FAMILIES[name].build()
    outputs = ("o_proj.weight", "out_proj.weight", "projection_layer.weight", "attn.proj.weight")
    for key, weight in model.named_parameters():
        if ("vision" in key or "visual" in key) and key.endswith(outputs):
            weight.data *= 0.02
    return model


@torch.no_grad()
def maps_of(name: str, inputs: dict, layer_module) -> list[Tensor]:
    """Every attention map, (batch, heads, queries, keys), that an attention module of `eager(name)` makes for
    a prompt.
    """
    module = importlib.import_module(type(layer_module).__module__)
    original, caught = module.eager_attention_forward, []

    def spy(asker, *args, **kwargs):
        out = original(asker, *args, **kwargs)
        if asker is layer_module:
            caught.append(out[1].double())
        return out

    module.eager_attention_forward = spy
    try:
        eager(name)(**clone(inputs))
    finally:
        module.eager_attention_forward = original
    return caught


def assert_near(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    assert got.shape == want.shape
    assert (got.double() - want.double()).abs().max() < tolerance


def block_means(values: Tensor, height: int, width: int, side: int) -> Tensor:
    """(height * width, ...) row-major patches -> (cells, ...), the mean of every side x side block, spelled
    out.
    """
    grid = values.reshape(height, width, *values.shape[1:])
    rows = [
        grid[y : y + side, x : x + side].flatten(0, 1).mean(0)
        for y in range(0, height - side + 1, side)
        for x in range(0, width - side + 1, side)
    ]
    return torch.stack(rows)


def loudest(before: VisualTokens, after: VisualTokens) -> int:
    """The cell whose token changed most."""
    change = (after.features - before.features).norm(dim=-1)
    return int(after.cells[change.argmax()])


def attention(name: str, layer: int):
    base = eager(name).base_model
    tower = base.vision_model if name in ("smolvlm", "idefics3") else base.vision_tower
    if name == "mistral3":
        return tower.transformer.layers[layer].attention
    if name == "internvl":
        return tower.encoder.layer[layer].attention
    return getattr(tower, "vision_model", tower).encoder.layers[layer].self_attn


def tiled(rows: int, columns: int) -> list[int]:
    """The placeholders of an image as the processors of Idefics3 and SmolVLM write them."""
    ids = []
    for r in range(rows):
        for c in range(columns):
            ids += [START, ROW + 3 * r + c, *[IMG] * 16]
        ids.append(LINE)
    return [*ids, *([LINE] if rows else []), START, GLOBAL, *[IMG] * 16, START]


def tiled_inputs(prompts: list[list[tuple[int, int]]], values: Tensor | None = None) -> dict[str, Tensor]:
    ids, mask = left_pad(
        [[*text(3, i), *[t for g in p for t in [*tiled(*g), 9]], *text(4, 7)] for i, p in enumerate(prompts)]
    )
    counts = [sum(r * c + 1 for r, c in p) for p in prompts]
    made = torch.zeros(len(prompts), max(counts), 3, 56, 56)
    for b, n in enumerate(counts):
        made[b, :n] = pixels(n, 3, 56, 56, seed=b)
    return dict(input_ids=ids, attention_mask=mask, pixel_values=made if values is None else values)
