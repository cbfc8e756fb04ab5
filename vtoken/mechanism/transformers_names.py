"""Names of transformers' arguments, and checks that a call did as planned.

Argument names and call chains in transformers change between minor releases, and a hook with an old name
is ignored without an error. Names are therefore read from signatures, a KV cache is known by its type,
`check_names` refuses a model whose parts no longer take what the hooks replace, and `check_prompt` compares
the tokens that the language model read and stored with the plan.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import transformers
from packaging.version import Version
from torch import Tensor
from transformers import Cache, masking_utils
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.masking_utils import create_causal_mask

from ..adapters.base import Adapter
from .cache_crop import physical_length
from .drop_schedule import DropSchedule
from .forward_context import Run
from .recurrent_states import counting_layers

# the minor releases of transformers that all tests have passed on, and those between
OLDEST, NEWEST = "5.17", "5.24"

# arguments of language models: the visual tokens, and their features for some layers
FOR_LAYERS = {"visual_pos_masks": "deepstack_visual_embeds", "vision_mask": "deepstack_features"}


def changed(what: str) -> RuntimeError:
    """The error for a model that breaks an assumption of vtoken: `what` was found, and what would help."""
    installed = Version(transformers.__version__)
    if Version(OLDEST) <= installed < Version(f"{NEWEST}.999"):
        advice = (
            "so a part of the model was replaced, or is called in another way: load the model anew, or"
            " unpatch it"
        )
        return RuntimeError(f"{what}: {_tested(installed)}; {advice}.")
    advice = f"run pip install --upgrade vtoken, or pip install 'transformers=={NEWEST}.*'"
    return RuntimeError(f"{what}: {_tested(installed)}; {advice}.")


def _tested(installed: Version) -> str:
    return f"vtoken is tested with transformers {OLDEST} to {NEWEST} and found {installed}"


# -- names and types -----------------------------------------------------------------------------------------
def cache_in(call: Mapping[str, Any] | tuple[Any, ...]) -> Any:
    """The KV cache among the arguments or the outputs of a call, None if there is none.

    A cache is known by its type, or as an object that counts like one: a wrapper need not be a `Cache`.
    """
    values = call if isinstance(call, tuple) else call.values()
    return next(
        (value for value in values if isinstance(value, Cache) or hasattr(value, "get_seq_length")), None
    )


def cache_argument(function: Callable[..., Any]) -> str:
    """The name of the parameter of `function` that takes a KV cache, by its annotation.

    A wrapper without names, or a parameter with another annotation, has the name that all others use.

    Raises:
        RuntimeError: if no parameter is annotated as a cache.
    """
    parameters = inspect.signature(function).parameters
    for parameter in parameters.values():
        if "Cache" in str(parameter.annotation):
            return parameter.name
    usual = "" if function is create_causal_mask else cache_argument(create_causal_mask)
    if usual in parameters or (usual and _nameless(parameters.values())):
        return usual
    raise changed(f"{_name(function)} takes no KV cache")


def mask_for_kind(kind: str, config: Any, embeds: Tensor, mask: Tensor, cache: Any) -> Any:
    """transformers' own mask for layers of one kind from a 2-D mask, as `create_masks_for_generate` does."""
    make: Any = masking_utils.LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING[kind]
    given = {"config": config, "inputs_embeds": embeds, "attention_mask": mask}
    return make(**given, **{cache_argument(create_causal_mask): cache})


def hidden_states_of(output: Any) -> Tensor:
    """(B, n, d) from the output of the language model. Raises RuntimeError without it."""
    hidden = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", None)
    if not isinstance(hidden, Tensor):
        raise changed(f"{type(output).__name__} of the language model has no last_hidden_state")
    return hidden


def recomputes(decoder: Any) -> bool:
    """Whether backward computes layers again (gradient checkpointing); they are given no KV cache then."""
    return bool(decoder.training and getattr(decoder, "gradient_checkpointing", False))


def check_features(output: Any, adapter: Adapter) -> None:
    """Raise RuntimeError if the output of `get_*_features` lacks the field that the adapter reads."""
    field = adapter.features_field
    if getattr(output, field, None) is not None:
        return
    lacks = f"{type(output).__name__} of the vision side has no {field}"
    if adapter.config.model_type not in adapter.model_types:
        raise NotImplementedError(f"{lacks}: {adapter.advice}.")
    raise changed(lacks)


def _nameless(parameters: Iterable[inspect.Parameter]) -> bool:
    """Whether a signature is a wrapper's, `(*args, **kwargs)`, which has no names."""
    return all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


def _name(function: Any) -> str:
    return str(getattr(function, "__qualname__", function))


# -- when a model is patched ---------------------------------------------------------------------------------
def check_names(adapter: Adapter, inside: bool) -> None:
    """Raise RuntimeError if a part of the model lacks arguments that the hooks replace; takes under 1 ms.

    Args:
        adapter: the model's parts.
        inside: whether the hooks on the LLM's layers are used.
    """
    base, decoder = adapter.base, adapter.decoder
    _check_takes(base.forward, "attention_mask", "position_ids", "inputs_embeds")
    takes = inspect.signature(base.forward).parameters
    if not _nameless(takes.values()) and not set(takes) & set(adapter.pixel_arguments):
        raise changed(f"{_name(base.forward)} takes none of {', '.join(adapter.pixel_arguments)}")
    _check_takes(decoder.forward, "inputs_embeds", "attention_mask", "position_ids")
    if adapter.caches:
        cache_argument(base.forward)
        cache_argument(decoder.forward)
    for modality in adapter.modalities:
        if not hasattr(base, f"get_{modality}_features") and not hasattr(base, "get_image_features"):
            raise changed(f"{type(base).__name__} has no get_{modality}_features")
    find = getattr(base, "get_placeholder_mask", None)
    told = find is not None and "image_features" in inspect.signature(find).parameters
    shared = getattr(adapter.config, "video_token_id", None) == getattr(
        adapter.config, "image_token_id", None
    )
    if told and len(adapter.modalities) > 1 and not shared:  # others find placeholders by their ids
        _check_takes(base.get_placeholder_mask, "video_features")
    if hasattr(decoder, "_deepstack_process"):
        _check_takes(decoder.forward, "visual_pos_masks", "deepstack_visual_embeds")
    layer = next((x for x in getattr(decoder, "layers", ()) if hasattr(x, "self_attn")), None)
    if inside and layer is not None:  # strategies that drop inside are refused where a layer has none
        _check_takes(layer.forward, "attention_mask", "position_embeddings")
        _check_takes(layer.self_attn.forward, "hidden_states", "attention_mask", "position_embeddings")
        _check_takes(create_causal_mask, "config", "inputs_embeds", "attention_mask", "layer_idx")
        cache_argument(create_causal_mask)


def _check_takes(function: Callable[..., Any], *names: str) -> None:
    parameters = inspect.signature(function).parameters
    lacking = [name for name in names if name not in parameters]
    if lacking and not _nameless(parameters.values()):
        raise changed(f"{_name(function)} takes no {' and no '.join(lacking)}")


# -- after every prompt --------------------------------------------------------------------------------------
def check_prompt(run: Run, schedule: DropSchedule, tokens: int) -> None:
    """Raise RuntimeError unless the language model read and stored the planned number of tokens.

    Reads lengths only, of dynamic caches without a device synchronisation.

    Args:
        run: the forward, before its ledger notes it.
        schedule: the drops inside the LLM.
        tokens: length of the language model's output.
    """
    if len(run.now) <= schedule.count:
        raise changed(f"{len(run.now) - 1} of {schedule.count} drops inside the LLM took place")
    if schedule.sparse is not None and len(run.attended) != schedule.layers:
        raise changed(f"{len(run.attended)} of {schedule.layers} layers chose the tokens that they attend to")
    planned = [index.shape[1] for index, _ in run.stages()]
    if tokens != run.asked or tokens > planned[schedule.last]:
        check_length("The language model answered for", tokens, planned[schedule.last])
    layers = [] if run.cache is None else run.cache.layers[: schedule.layers]
    used = any(layer.is_initialized for layer in counting_layers(run.cache))
    for i, layer in enumerate(layers):
        # other classes count in ways of their own; layers that read another's keys store nothing
        if isinstance(layer, DynamicLayer | StaticLayer) and (layer.is_initialized or not used):
            stored = physical_length(layer) if layer.is_initialized else 0
            before = run.ledger.slots[schedule.stores(i)].shape[1]
            given = schedule.stores(i) if schedule.evicts else schedule.reads(i)
            check_length(f"The KV cache of layer {i} holds", stored, before + planned[given])


def check_length(what: str, found: int, planned: int) -> None:
    """Raise RuntimeError unless the number of tokens found is the planned one."""
    if found != planned:
        raise changed(f"{what} {found} tokens where {planned} were planned")
