"""Whether a strategy fits a model, and the error sentence if it does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .adapters.base import Adapter
from .adapters.encoders.encoder import Encoder, encoder_for
from .adapters.generic import GenericAdapter
from .adapters.refused import reason
from .adapters.registry import adapter_for, list_families, model_of, reads_visual_tokens
from .checks import listed
from .mechanism.attention_rows import check_projections, projects_visual_tokens
from .mechanism.drop_schedule import DropSchedule
from .mechanism.recurrent_states import layers_of_fixed_length
from .mechanism.storage_fit import check_storage
from .storage import MixedPrecision, Storage
from .strategies import EncoderStrategy, Strategy, list_names, strategy_info
from .strategies.trained import trained_part
from .streams import PixelReuse, Reuse
from .temporal import Temporal
from .tokens import Needs


@dataclass(frozen=True)
class Design:
    """The places where a strategy acts on a model, and its reads there: all that a patch's hooks depend on.

    Attributes:
        schedule: drops inside the LLM.
        needs: by modality, the values read for the strategy.
        merging: by modality, the tower layers after which tokens are merged.
        reuse: by modality, the reuse inside the tower.
        temporal: by modality, the strategy's attention across frames inside the tower.
        fuses_text: whether the prompt's text embeddings are replaced.
        storage: the form of the KV cache, None for that of transformers.
        positions: "original" or "renumber".
    """

    schedule: DropSchedule
    needs: dict[str, Needs]
    merging: dict[str, tuple[int, ...]]
    reuse: dict[str, Reuse | PixelReuse]
    positions: str
    temporal: dict[str, Temporal] = field(default_factory=dict)
    fuses_text: bool = False
    storage: Storage | None = None

    @property
    def wants_text(self) -> bool:
        """Whether the strategy reads the prompt's text before the LLM."""
        return self.fuses_text or any(n.text for n in self.needs.values())

    @property
    def together(self) -> bool:
        """Whether the strategy sees the images of a prompt as one video."""
        return any(n.together for n in self.needs.values())


def design_of(adapter: Adapter, strategy: Strategy, layers: int) -> Design:
    """The design of a strategy, with its present options, for a model with so many LLM layers."""
    needs = {m: needs_of(adapter, strategy, m) for m in adapter.modalities}
    if strategy.is_identity:
        idle = {m: Needs(modalities=n.modalities) for m, n in needs.items()}
        return Design(DropSchedule(layers), idle, {}, {}, strategy.positions)
    drops = tuple(strategy.prefill_layers(layers))
    part = trained_part(strategy)
    aligned = tuple(strategy.aligned_layers(layers)) if drops else ()
    hides = part is not None and part.hides_pictures
    schedule = DropSchedule(layers, drops, aligned, hides, strategy.attention())
    merging, reuse = merging_layers(adapter, strategy), reuse_of(adapter, strategy)
    fuses = part is not None and part.fuses_text
    temporal, storage = temporal_of(adapter, strategy), strategy.storage(layers)
    return Design(schedule, needs, merging, reuse, strategy.positions, temporal, fuses, storage)


def temporal_of(adapter: Adapter, strategy: Strategy) -> dict[str, Temporal]:
    """By modality, the strategy's attention across frames inside the tower."""
    declared = {m: strategy.temporal(t.info) for m, t in adapter.towers.items() if t.rows_are_frames}
    wanted = {m: temporal for m, temporal in declared.items() if temporal is not None and temporal.layers}
    return {m: temporal for m, temporal in wanted.items() if adapter.towers[m].can_mix}


def merging_layers(adapter: Adapter, strategy: Strategy) -> dict[str, tuple[int, ...]]:
    """By modality, the tower layers after which the strategy merges."""
    layers = {m: tuple(strategy.encoder_layers(tower.info)) for m, tower in adapter.towers.items()}
    return {m: some for m, some in layers.items() if some}


def reuse_of(adapter: Adapter, strategy: Strategy) -> dict[str, Reuse | PixelReuse]:
    """By modality, the reuse inside the tower, if the tower can reuse and the strategy wants it."""
    towers = {m: tower for m, tower in adapter.towers.items() if tower.can_reuse}
    declared = {m: strategy.reuse(tower.info) for m, tower in towers.items()}
    wanted = {m: reuse for m, reuse in declared.items() if reuse is not None}
    return {m: reuse for m, reuse in wanted.items() if isinstance(reuse, PixelReuse) or reuse.interval > 1}


def needs_of(adapter: Adapter, strategy: Strategy, modality: str) -> Needs:
    """The needs of a strategy for one modality of this model."""
    tower = adapter.towers.get(modality)
    return strategy.needs(None if tower is None else tower.info)


CLS = "the attention of a CLS token"
WORDS = {
    "cls_attention": CLS,
    "cls_logits": CLS,
    "received_attention": "attention maps of the tower",
    "reuse": "layers that can be computed in part",
    "pixels": "square frames of one size",
    "question_attention": "an LLM whose attention vtoken recomputes from q_proj, k_proj and input_layernorm",
    "states": "outputs of tower layers",
    "temporal": "a tower with one row per frame",
    "merging": "patches of square images that are the LLM's tokens one by one",
    "grid": "the places of the tokens in the picture",
}


def served_of(adapter: Adapter, strategy: Strategy) -> list[str]:
    """The modalities of this model that a strategy is defined for."""
    return [m for m in adapter.modalities if m in needs_of(adapter, strategy, m).modalities]


def unmet(adapter: Adapter, strategy: Strategy) -> tuple[str, list[str]]:
    """A modality and the needs that keep a strategy from serving this model; empty if none do.

    Where a tower can merge the tokens of one modality and not the other's, these are refused when they come.
    """
    each = {m: lacking_of(adapter, strategy, m) for m in served_of(adapter, strategy)}
    elsewhere = any("merging" not in lacking for lacking in each.values())
    for modality, lacking in each.items():
        if lacking and not (lacking == ["merging"] and elsewhere):
            return modality, lacking
    return "", []


def check_fit(
    adapter: Adapter, strategy: Strategy, others: Callable[[Adapter], list[str]] | None = None
) -> None:
    """Raise ValueError, in one sentence, if this strategy cannot serve this model.

    Args:
        others: the names to recommend instead; None for all that fit the model.
    """
    others = others or fitting
    name, kind = strategy.info.name, adapter.config.model_type
    if not getattr(strategy.in_encoder, "serves_llms", True):
        raise ValueError(
            f"{name} is defined for plain encoders, such as CLIP's of open_clip, and {kind} is a"
            f" vision-language model: use {', '.join(others(adapter))}."
        )
    if not served_of(adapter, strategy):
        raise ValueError(
            f"{name} is defined for"
            f" {listed(needs_of(adapter, strategy, adapter.modalities[0]).modalities)} input, {kind}"
            f" models read {listed(adapter.modalities)}: use {', '.join(others(adapter))}."
        )
    modality, lacking = unmet(adapter, strategy)
    if lacking:
        missing = listed(WORDS.get(x, x.replace("_", " ")) for x in lacking)
        received = "received_attention" in adapter.provides(modality) and hasattr(strategy, "score")
        extension = ' pass score="received" to rank by attention received, or' if received else ""
        if lacking == ["pixels"] and hasattr(strategy, "thumbnail"):
            extension = " pass thumbnail=False, or"
        if set(lacking) <= {"states", "grid"} and hasattr(strategy, "vision"):
            extension = ' pass vision="projected" to compare projected features, or'
        if lacking == ["question_attention"] and hasattr(strategy, "relevance"):
            extension = " pass relevance=0.0 to read no text, or"
        where = "this" if lacking in (["grid"], ["question_attention"]) else "the vision tower of this"
        lacks = f"{where} {kind} model does not have"
        if isinstance(adapter, GenericAdapter):
            lacks = "the generic adapter does not read"
            if kind in list_families():
                extension = f" leave out adapter= to use that of {kind}, or"
        raise ValueError(
            f"{name} needs {missing}, which {lacks}:{extension} use {', '.join(others(adapter))}."
        )
    if adapter.features_in_layers and trained_part(strategy) is not None:
        raise ValueError(
            f"{name} has weights for features as wide as the LLM, and this {kind} model has others for"
            f" each of several layers: use {', '.join(others(adapter))}."
        )
    check_llm(adapter, strategy)


def check_llm(adapter: Adapter, strategy: Strategy) -> None:
    """Raise ValueError, in one sentence, if the language model of this model cannot serve this strategy."""
    name, kind = strategy.info.name, adapter.config.model_type
    if strategy.positions == "renumber" and hasattr(adapter.base, "get_rope_index"):
        raise ValueError(
            f"positions='renumber' has no meaning for the multimodal rope of {kind}: use"
            " positions='original'."
        )
    attention = getattr(adapter.decoder.config, "_attn_implementation", None) or ""
    if "flex" in attention:
        raise ValueError(
            "flex_attention masks cannot be cut: load the model with attn_implementation='sdpa', 'eager' or "
            "'flash_attention_2'."
        )
    if not strategy.is_identity and (strategy.acts_inside or strategy.acts_in_attention):
        check_inside(adapter, strategy)
    check_cache(adapter, strategy)
    part = trained_part(strategy)
    if part is not None and part.hides_pictures and "flash" in attention:
        raise ValueError(
            f"{name} hides pictures from what follows them, which flash attention cannot: load the model with"
            " attn_implementation='sdpa'."
        )


def check_encoder(encoder: Encoder, strategy: Any) -> None:
    """Raise ValueError, in one sentence, if this strategy cannot serve this plain encoder."""
    name = type(encoder.model).__name__
    if not isinstance(strategy, EncoderStrategy):
        if (why := reason(encoder.model)) is not None:
            raise ValueError(why)
        encoder.check()
        raise ValueError(
            f"{strategy.info.name} chooses among the visual tokens of an LLM, and {name} is an encoder"
            f" without one: use {', '.join(fitting_encoder(encoder))}."
        )
    if not strategy.is_identity:
        encoder.check()
    if strategy.needs_cls and not encoder.has_cls:
        raise ValueError(
            f"{strategy.info.name} needs a class token, which {name} does not have: use"
            f" {', '.join(fitting_encoder(encoder))}."
        )


def fitting_encoder(encoder: Encoder, pattern: str = "*") -> list[str]:
    """Names of strategies that fit a plain encoder."""
    classes = {name: strategy_info(name).cls for name in list_names(pattern)}
    return [
        name
        for name, cls in classes.items()
        if issubclass(cls, EncoderStrategy) and (encoder.has_cls or not cls.needs_cls)
    ]


def lacking_of(adapter: Adapter, strategy: Strategy, modality: str) -> list[str]:
    """The needs of a strategy that this model cannot meet, in words."""
    needs = needs_of(adapter, strategy, modality)
    lacking = adapter.lacking(needs, modality)
    looks = needs.question_attention is not None
    if looks and (adapter.features_in_layers or not projects_visual_tokens(adapter.decoder)):
        lacking = [*lacking, "question_attention"]
    tower = adapter.towers.get(modality)
    if strategy.acts_between_frames and (tower is None or not tower.can_reuse):
        lacking = [*lacking, "reuse"]
    across = tower is not None and strategy.in_encoder.temporal(tower.info) is not None
    if across and not tower.can_mix:  # type: ignore[union-attr]
        lacking = [*lacking, "temporal"]
    if isinstance(strategy.in_encoder, EncoderStrategy) and (tower is None or not tower.can_merge):
        lacking = [*lacking, "merging"]
    return lacking


def check_inside(adapter: Adapter, strategy: Strategy) -> None:
    """Raise ValueError, in one sentence, if this strategy cannot drop inside the LLM of this model."""
    name, kind, decoder = strategy.info.name, adapter.config.model_type, adapter.decoder
    if not hasattr(decoder, "layers"):
        raise ValueError(
            f"{name} drops inside the LLM, whose layers vtoken cannot see in {kind}: use a projector"
            " strategy."
        )
    odd = sorted(
        set(getattr(decoder.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    )
    odd = odd or layers_of_fixed_length(decoder.config)
    if odd:
        raise ValueError(
            f"{name} drops inside the LLM, which cannot be done to layers of type {', '.join(odd)}: use a"
            " projector strategy."
        )
    if adapter.features_in_layers:
        raise ValueError(
            f"{name} drops inside the LLM, where this {kind} model goes on to add features of its pictures:"
            " use a projector strategy."
        )
    if not adapter.rotates_everywhere:
        raise ValueError(
            f"{name} reads the LLM's attention, which vtoken recomputes with rotary embeddings; the LLM of"
            f" this {kind} model has layers without positions: use a projector strategy."
        )
    check_projections(decoder, name, kind)
    check_attention(decoder, strategy, kind)
    strategy.check_depth(len(decoder.layers))


def check_cache(adapter: Adapter, strategy: Strategy) -> None:
    """Raise ValueError, in one sentence, if the KV cache of this model cannot take the strategy's form."""
    acts = (strategy.acts_on_cache or strategy.acts_in_attention) and not strategy.is_identity
    if acts and not adapter.answers:
        raise ValueError(
            f"{strategy.info.name} acts on what an answer reads, and this {adapter.config.model_type} model"
            " generates none: use a projector strategy."
        )
    storage = strategy.storage(len(getattr(adapter.decoder, "layers", ())))
    if storage is not None and not strategy.is_identity:
        check_storage(adapter, storage, strategy.info.name, strategy.acts_inside)


def holds_cache(adapter: Adapter, strategy: Strategy) -> bool:
    """Whether the KV cache of this model can take the strategy's form."""
    try:
        check_cache(adapter, strategy)
    except ValueError:
        return False
    return True


def check_attention(decoder: Any, strategy: Strategy, kind: str) -> None:
    """Raise ValueError if the LLM's layers cannot attend to tokens of a strategy's choice."""
    sparse, name = strategy.attention(), strategy.info.name
    if sparse is None:
        return
    if sparse.evicts and strategy.aligned_layers(len(decoder.layers)):
        raise ValueError(
            f"Two parts of {name} choose what the KV cache of a layer keeps: pass align_cache=False to the"
            " one that drops inside the LLM, or choose one of them."
        )
    storage = strategy.storage(len(decoder.layers))
    if storage is not None and not isinstance(storage, MixedPrecision):
        raise ValueError(f"Two parts of {name} choose how the KV cache is stored: choose one of them.")
    if not sparse.evicts and not all(getattr(x.self_attn, "v_proj", None) for x in decoder.layers):
        raise ValueError(
            f"{name} computes the values of all tokens from v_proj, which the LLM of this {kind} model lacks:"
            " use kv='evict', or a projector strategy."
        )


def goes_inside(adapter: Adapter, strategy: Strategy) -> bool:
    """Whether a strategy can drop tokens inside the LLM of this model."""
    try:
        check_inside(adapter, strategy)
    except ValueError:
        return False
    return True


def fitting(adapter: Adapter, pattern: str = "*") -> list[str]:
    """Names of strategies that fit a model, by the abilities of its adapter."""
    out = []
    for name in list_names(pattern):
        strategy = strategy_info(name).cls()
        if (
            getattr(strategy, "serves_llms", True)
            and served_of(adapter, strategy)
            and not unmet(adapter, strategy)[1]
            and (not (strategy.acts_inside or strategy.acts_in_attention) or goes_inside(adapter, strategy))
            and holds_cache(adapter, strategy)
            and not (adapter.features_in_layers and trained_part(strategy) is not None)
        ):
            out.append(name)
    return out


def list_strategies(
    pattern: str = "*", model: Any = None, adapter: str | type[Adapter] | None = None
) -> list[str]:
    """Names of strategies that match a shell pattern, such as "*cls*"; with `model`, those that fit it.

    `adapter` is as in `vtoken.patch`.

    Raises:
        TypeError, ValueError: if `model` is no model, or no strategy can serve it.
    """
    if model is None:
        if adapter is not None:
            raise ValueError("adapter= tells how a model is read: pass model= as well.")
        return list_names(pattern)
    encoder = plain_encoder(model) if adapter is None else None
    if encoder is None:
        return fitting(adapter_for(model, adapter), pattern)
    encoder.check()
    return fitting_encoder(encoder, pattern)


def plain_encoder(model: Any) -> Encoder | None:
    """The encoder of a model that is none but an encoder; None for a vision-language model.

    Raises:
        ValueError: for a model of timm or open_clip that has no layers to merge tokens between.
    """
    inner = model_of(model)
    if reads_visual_tokens(inner):
        return None
    encoder = encoder_for(inner)
    library = type(inner).__module__.partition(".")[0]
    if encoder is None and library in ("timm", "open_clip"):
        raise ValueError(
            f"Tokens cannot be merged in {type(inner).__name__} of {library}: it has no sequence of"
            " transformer blocks of one width; vision transformers (ViT, DeiT, DINOv2, EVA, CLIP, SigLIP)"
            " work."
        )
    return encoder
