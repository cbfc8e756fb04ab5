"""The oracle: a model's answer from fewer visual tokens, computed without a line of vtoken.

``capture`` records what the unpatched model hands to its language model. ``generate`` then decodes greedily,
one prompt at a time, without padding and without a cache: the embeddings are shortened explicitly, with
explicit positions. Drops inside the language model are computed at full length, with a decoder loop written
out here in which dropped tokens are masked from their layer on.
"""

from __future__ import annotations

import inspect
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask

from .models import SPECIAL

STEPS = 5
# transformers 5.24 renamed the argument and the output
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"


@dataclass
class Prompt:
    """The input of the language model for one prompt of n tokens, padding removed.

    ``allowed`` holds the (n, n) attention pattern of every kind of layer if the model made its own (images
    that see themselves in both directions), ``deepstack`` one (n, hidden) tensor for each early layer,
    ``index`` the columns of the padded batch, ``types`` an (n,) tensor by name that says of what type each
    token is, ``per_layer`` the (n, layers, ...) embeddings that go into the layers, ``before`` one (n, hidden)
    tensor that is added before each of some layers.
    """

    embeds: Tensor
    positions: Tensor
    index: Tensor
    allowed: dict[str, Tensor] | None = None
    deepstack: list[Tensor] | None = None
    types: dict[str, Tensor] = field(default_factory=dict)
    per_layer: Tensor | None = None
    before: dict[int, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.embeds)

    def take(self, rows: Tensor) -> Prompt:
        return Prompt(
            self.embeds[rows],
            self.positions[..., rows],
            self.index[rows],
            None if self.allowed is None else {k: a[rows][:, rows] for k, a in self.allowed.items()},
            None if self.deepstack is None else [d[rows] for d in self.deepstack],
            {name: of[rows] for name, of in self.types.items()},
            None if self.per_layer is None else self.per_layer[rows],
            None if self.before is None else {k: d[rows] for k, d in self.before.items()},
        )

    def append(self, embed: Tensor, per_layer: Tensor | None = None) -> Prompt:
        n = len(self)
        allowed, deepstack = None, self.deepstack
        if self.allowed is not None:
            allowed = {k: torch.ones(n + 1, n + 1, dtype=torch.bool).tril() for k in self.allowed}
            for kind, pattern in self.allowed.items():
                allowed[kind][:n, :n] = pattern
        if self.per_layer is not None:
            per_layer = torch.cat([self.per_layer, per_layer])
        if deepstack is not None:
            deepstack = [torch.cat([d, torch.zeros_like(d[:1])]) for d in deepstack]
        positions = torch.cat([self.positions, self.positions[..., -1:] + 1], -1)
        index = torch.cat([self.index, self.index[-1:] + 1])
        types = {name: torch.cat([of, of.new_zeros(1)]) for name, of in self.types.items()}
        before = self.before
        if before is not None:
            before = {k: torch.cat([d, torch.zeros_like(d[:1])]) for k, d in before.items()}
        embeds = torch.cat([self.embeds, embed])
        return Prompt(embeds, positions, index, allowed, deepstack, types, per_layer, before)


@dataclass
class Inside:
    """What happens within the language model, for one prompt.

    ``drop[k]`` is a bool (m,) over the first m tokens: those that are False are seen by nobody from layer k
    on. ``mix[k]`` is a float (m, m) matrix that replaces the first m hidden states in front of layer k.
    ``evict[i]`` is a bool (m,): what later forwards still find in the cache of layer i; the prompt that was
    read in the first forward ends before column ``read``. ``hide`` is a bool (m, m): the first m tokens that
    each of them must not see in any layer; those after them see what the last of them sees. ``renumber``
    closes the gaps in the positions behind every drop. ``attended[i]`` is a bool (m,): the tokens that the
    attention of layer i reads; the others get zeros from it, and with ``keeps`` later forwards see them.
    ``forgotten[i]`` is a bool (n, n): the tokens that each of them no longer finds in the cache of layer i.
    """

    drop: dict[int, Tensor] = field(default_factory=dict)
    mix: dict[int, Tensor] = field(default_factory=dict)
    evict: dict[int, Tensor] = field(default_factory=dict)
    read: int = 0
    renumber: bool = False
    hide: Tensor | None = None
    attended: dict[int, Tensor] = field(default_factory=dict)
    keeps: bool = False
    forgotten: dict[int, Tensor] = field(default_factory=dict)


def clone(inputs: dict) -> dict:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}


def decoder_of(model):
    """The language model without a head."""
    decoder = model.get_decoder()
    return decoder.model if hasattr(decoder, "lm_head") else decoder


def head_of(model):
    """From hidden states to logits."""
    return model.get_output_embeddings() or model.get_decoder().get_output_embeddings()


def capture(model, inputs: dict, door: str = "generate") -> list[Prompt]:
    """The language model's input at prefill, one ``Prompt`` for each row; ``door`` is "generate" or
    "forward".
    """
    got: dict = {}
    hook = decoder_of(model).register_forward_pre_hook(
        lambda m, a, kw: got or got.update(kw), with_kwargs=True
    )
    try:
        if door == "generate":
            model.generate(**clone(inputs), max_new_tokens=1, do_sample=False, suppress_tokens=SPECIAL)
        else:
            model(**clone(inputs))
    finally:
        hook.remove()
    embeds, positions, deepstack = got["inputs_embeds"], got.get("position_ids"), None
    batch, length = embeds.shape[:2]
    if positions is None:
        positions = torch.arange(length)[None]
    positions = positions.expand(*positions.shape[:-2], batch, length)
    if got.get("visual_pos_masks") is not None:
        visual = got["visual_pos_masks"]
        deepstack = [
            torch.zeros_like(embeds).masked_scatter(visual[..., None], d)
            for d in got["deepstack_visual_embeds"]
        ]
    planes = None
    if got.get("vision_mask") is not None:
        marks = got["vision_mask"]
        planes = {
            k: torch.zeros_like(embeds).masked_scatter(marks, d) for k, d in got["deepstack_features"].items()
        }
    allowed = _pattern(got.get("attention_mask"))
    if got.get("attention_mask") is None and _sees_both_ways(model):
        allowed = {"": torch.ones(1, length, length, dtype=torch.bool)}
    prompts = []
    for b in range(batch):
        index = inputs["attention_mask"][b].bool().nonzero()[:, 0]
        rows = None if deepstack is None else [d[b, index] for d in deepstack]
        pattern = {k: a[min(b, len(a) - 1)][index][:, index] for k, a in allowed.items()}
        if all(torch.equal(a, torch.ones_like(a).tril()) for a in pattern.values()):
            pattern = None
        types = {
            name: of[b, index]
            for name, of in got.items()
            if name.endswith("token_type_ids") and of is not None
        }
        per_layer = got.get("per_layer_inputs")
        per_layer = None if per_layer is None else per_layer[b, index]
        before = None if planes is None else {k: d[b, index] for k, d in planes.items()}
        prompts.append(
            Prompt(embeds[b, index], positions[..., b, index], index, pattern, rows, types, per_layer, before)
        )
    return prompts


def _sees_both_ways(model) -> bool:
    """Whether attention is in both directions if there is no mask, as in PaliGemma."""
    layer = decoder_of(model).layers[0] if hasattr(decoder_of(model), "layers") else None
    return getattr(getattr(layer, "self_attn", None), "is_causal", True) is False


def _pattern(mask) -> dict[str, Tensor]:
    """By kind of layer ("" for all), (batch, L, L) of a 4-D mask, bool or additive; empty without one."""
    masks = mask if isinstance(mask, dict) else {"": mask}
    return {
        kind: (m if m.dtype == torch.bool else m >= 0)[:, 0, :, : m.shape[2]]
        for kind, m in masks.items()
        if m is not None and m.ndim == 4
    }


def hidden(model, prompt: Prompt, inside: Inside | None = None) -> Tensor:
    """(n, hidden): the language model's output for one prompt."""
    lm, n = decoder_of(model), len(prompt)
    if inside is not None or prompt.allowed is not None:
        return _layer_by_layer(lm, prompt, inside or Inside())
    extra: dict = {name: of[None] for name, of in prompt.types.items()}
    if prompt.per_layer is not None:
        extra["per_layer_inputs"] = prompt.per_layer[None]
    if prompt.before is not None:
        everywhere = torch.ones(1, n, 1, dtype=torch.bool)
        extra |= dict(vision_mask=everywhere, deepstack_features=prompt.before)
    if prompt.deepstack is not None:
        everywhere = torch.ones(1, n, dtype=torch.bool)
        extra |= dict(visual_pos_masks=everywhere, deepstack_visual_embeds=prompt.deepstack)
    mask = torch.ones(1, n, dtype=torch.long)
    where = dict(position_ids=prompt.positions[..., None, :], attention_mask=mask)
    return lm(inputs_embeds=prompt.embeds[None], **where, use_cache=False, **extra).last_hidden_state[0]


def _layer_by_layer(lm, prompt: Prompt, inside: Inside) -> Tensor:
    n, h = len(prompt), prompt.embeds[None]
    positions = prompt.positions[..., None, :]
    positions = positions[1:] if positions.ndim == 3 and len(positions) == 4 else positions
    if positions.ndim == 2 and "mrope_section" in str(getattr(lm.config, "rope_parameters", "")):
        positions = positions.expand(3, *positions.shape)  # as the model does without ids
    kinds = getattr(lm.config, "layer_types", None) or [""] * len(lm.layers)
    typed = "layer_type" in inspect.signature(lm.rotary_emb.forward).parameters
    itself = torch.eye(n, dtype=torch.bool)
    lowest = torch.finfo(torch.float32 if h.dtype == torch.float64 else h.dtype).min
    causal, hide = torch.ones(n, n, dtype=torch.bool).tril(), torch.zeros(n, n, dtype=torch.bool)
    if inside.hide is not None:
        m = len(inside.hide)
        hide[:m, :m], hide[m:, :m] = inside.hide, inside.hide[-1]
    patterns, shared, per_layer = prompt.allowed or {}, {}, None
    if prompt.per_layer is not None:
        per_layer = lm.project_per_layer_inputs(h, prompt.per_layer[None])
    alive, later = torch.ones(n, dtype=torch.bool), prompt.index >= inside.read
    for i, layer in enumerate(lm.layers):
        if i in inside.mix:
            m = len(inside.mix[i])
            h = torch.cat([(inside.mix[i].to(h.dtype) @ h[0, :m])[None], h[:, m:]], 1)
        if i in inside.drop:
            alive = alive & _longer(inside.drop[i], n)
        allowed = patterns.get(kinds[i], patterns.get("", causal)) & ~hide
        seen = allowed & (alive[None] | itself)
        if i in inside.evict:
            seen = seen & (_longer(inside.evict[i], n)[None] | ~later[:, None])
        attends = torch.ones(n, dtype=torch.bool)
        if i in inside.attended:
            attends = _longer(inside.attended[i], n)
            seen = seen & (attends[None] | itself | (later[:, None] if inside.keeps else False))
        if i in inside.forgotten:
            seen = seen & ~inside.forgotten[i]
        mask = torch.zeros(n, n, dtype=h.dtype).masked_fill(~seen, lowest)[None, None]
        gaps = (~alive).cumsum(0) if inside.renumber else 0
        rotary = lm.rotary_emb(h, (positions - gaps).clamp(min=0), *[kinds[i]] * typed)
        extra: dict = {} if per_layer is None else dict(per_layer_input=per_layer[:, :, i])
        if "shared_kv_states" in inspect.signature(layer.forward).parameters:
            extra["shared_kv_states"] = shared
        with _silent(layer.self_attn, ~attends) if i in inside.attended else nullcontext():
            h = layer(h, attention_mask=mask, position_embeddings=rotary, **extra)
        h = h[0] if isinstance(h, tuple) else h
        if prompt.deepstack is not None and i < len(prompt.deepstack):
            h = h + prompt.deepstack[i][None]
    return lm.norm(h)[0]


@contextmanager
def _silent(attention, rows: Tensor):
    """Attention gives zeros to `rows` (n,) bool."""

    def mute(module, args, out):
        made = out[0].masked_fill(rows[None, :, None], 0)
        return (made, *out[1:])

    hook = attention.register_forward_hook(mute)
    try:
        yield
    finally:
        hook.remove()


def _longer(mask: Tensor, n: int) -> Tensor:
    """What holds for the prompt, with True for everything said since."""
    return torch.cat([mask, torch.ones(n - len(mask), dtype=torch.bool)])


def shortened(
    model,
    inputs: dict,
    keep: Tensor | None = None,
    merge: list[Tensor | None] | None = None,
    features: list[Tensor] | None = None,
    renumber: bool = False,
    door: str = "generate",
    deepstack: list[list[Tensor]] | None = None,
) -> list[Prompt]:
    """The prompts of a batch after pruning in front of the language model.

    ``keep`` is a bool (batch, L). ``merge[b]`` is a (kept, all) matrix over the visual tokens of row b, in
    order: what the kept ones are made of. ``features[b]`` stands for the visual tokens of row b if something
    in front of the language model changed them, ``deepstack[b]`` for their rows of each early layer.
    ``renumber`` gives the survivors consecutive positions.
    """
    prompts = []
    for b, prompt in enumerate(capture(model, inputs, door)):
        kept = torch.ones(len(prompt), dtype=torch.bool) if keep is None else keep[b, prompt.index]
        visual = torch.isin(inputs["input_ids"][b, prompt.index], torch.tensor(_placeholders(model)))
        if features is not None and prompt.before is not None:
            parts = features[b].chunk(len(prompt.before), -1)
            planes = zip(prompt.before.items(), parts, strict=True)
            before = {k: d.masked_scatter(visual[:, None], part) for (k, d), part in planes}
            prompt = replace(prompt, before=before)
        elif features is not None:
            prompt = replace(prompt, embeds=prompt.embeds.masked_scatter(visual[:, None], features[b]))
        if deepstack is not None and prompt.deepstack is not None:
            planes = zip(prompt.deepstack, deepstack[b], strict=True)
            prompt = replace(
                prompt, deepstack=[p.masked_scatter(visual[:, None], mine) for p, mine in planes]
            )
        if merge is not None and merge[b] is not None and prompt.before is not None:
            before = {k: d.clone() for k, d in prompt.before.items()}
            for plane in before.values():
                plane[visual & kept] = merge[b].to(plane.dtype) @ plane[visual]
            prompt = replace(prompt, before=before)
        elif merge is not None and merge[b] is not None:
            embeds = prompt.embeds.clone()
            embeds[visual & kept] = merge[b].to(embeds.dtype) @ prompt.embeds[visual]
            prompt = replace(prompt, embeds=embeds)
        short = prompt.take(kept)
        if renumber:
            first = int(prompt.positions.min())
            short = replace(
                short, positions=torch.arange(first, first + len(short)).expand(short.positions.shape)
            )
        prompts.append(short)
    return prompts


def _placeholders(model) -> list[int]:
    ids = [getattr(model.config, f"{kind}_token_id", None) for kind in ("image", "video")]
    return [i for i in ids if i is not None]


def pick(logits: Tensor) -> Tensor:
    return logits.index_fill(-1, torch.tensor(SPECIAL), -torch.inf).argmax(-1)


@torch.no_grad()
def generate(
    model,
    inputs: dict,
    keep: Tensor | None = None,
    steps: int = STEPS,
    *,
    merge: list[Tensor | None] | None = None,
    features: list[Tensor] | None = None,
    deepstack: list[list[Tensor]] | None = None,
    drop: dict[int, Tensor] | None = None,
    mix: list[dict[int, Tensor]] | None = None,
    evict: dict[int, Tensor] | None = None,
    read: int | None = None,
    renumber: bool = False,
    forced: Tensor | None = None,
    hide: Tensor | None = None,
    attended: dict[int, Tensor] | None = None,
    keeps: bool = False,
) -> tuple[Tensor, Tensor]:
    """Greedy decoding -> ids (batch, steps) and logits (steps, batch, vocabulary).

    ``drop``, ``evict`` and ``attended`` map a layer to a bool (batch, L), ``mix`` holds for each row ``{layer: matrix}``,
    ``read`` is L unless some of the columns were said later (see ``Inside``); ``forced`` (batch, steps) are
    the ids to be scored instead of the greedy ones, ``hide`` a bool (batch, L, L). For the others see
    ``shortened``.
    """
    head = head_of(model)
    embed = model.get_input_embeddings()
    ids, logits = [], []
    for b, prompt in enumerate(
        shortened(model, inputs, keep, merge, features, renumber, deepstack=deepstack)
    ):
        inside = None
        if drop or evict or attended or any(mix or ()) or hide is not None:
            cuts = [{k: d[b, prompt.index] for k, d in (of or {}).items()} for of in (drop, evict, attended)]
            length = inputs["input_ids"].shape[1] if read is None else read
            hidden_here = None if hide is None else hide[b, prompt.index][:, prompt.index]
            others = length, renumber, hidden_here, cuts[2], keeps
            inside = Inside(cuts[0], mix[b] if mix else {}, cuts[1], *others)
        row_ids, row_logits = [], []
        for t in range(steps):
            out = head(hidden(model, prompt, inside)[-1])
            row_logits.append(out)
            row_ids.append(pick(out) if forced is None else forced[b, t])
            said = row_ids[-1][None]
            per_layer = None if prompt.per_layer is None else _per_layer(decoder_of(model), said, embed(said))
            prompt = prompt.append(embed(said), per_layer)
        ids.append(torch.stack(row_ids))
        logits.append(torch.stack(row_logits))
    return torch.stack(ids), torch.stack(logits, 1)


def _per_layer(lm, ids: Tensor, embeds: Tensor) -> Tensor:
    """(n, layers, ...): the embeddings of ids (n,) that go into the layers; some models want both arguments."""
    takes = len(inspect.signature(lm.get_per_layer_inputs).parameters)
    return lm.get_per_layer_inputs(*(ids[None], embeds[None])[:takes])[0]


def loss(
    model, inputs: dict, labels: Tensor, keep: Tensor, merge: list[Tensor | None] | None = None
) -> Tensor:
    """Mean next-token cross-entropy over the label tokens of all shortened prompts, with gradients."""
    total, count = torch.zeros(()), 0
    for b, prompt in enumerate(shortened(model, inputs, keep, merge, door="forward")):
        logits = head_of(model)(hidden(model, prompt))
        target = labels[b, prompt.index][1:]
        total = total + torch.nn.functional.cross_entropy(
            logits[:-1].float(), target, ignore_index=-100, reduction="sum"
        )
        count += int((target != -100).sum())
    return total / count
