"""Changes of a later transformers, simulated: each is answered by a sentence, none by a wrong answer."""

from __future__ import annotations

import functools
import gc
import inspect
import logging
import warnings
import weakref

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import Cache, DynamicCache

import vtoken
from tests.models import FAMILIES
from tests.oracle import CACHE, clone
from vtoken.adapters.registry import adapter_for
from vtoken.mechanism import transformers_names as names

from .common import ALIGNED, BOTH, FRONT, PATCHABLE, checkpointing, run
from .fixed import patched

KINDS = pytest.mark.parametrize(
    "options", [FRONT, BOTH, ALIGNED, dict(merge=True)], ids=["before", "both", "aligned", "merge"]
)
SENTENCE = f"vtoken is tested with transformers {names.OLDEST} to {names.NEWEST} and found"


def between(module, change):
    """Lets `module.forward` be called with `change(kwargs)` in place of its keyword arguments, after all
    hooks.
    """
    original = module.forward

    @functools.wraps(original)
    def forward(*args, **kwargs):
        return original(*args, **change(kwargs))

    module.forward = forward


def other_cache(kwargs):
    return {k: DynamicCache() if isinstance(v, Cache) else v for k, v in kwargs.items()}


def test_the_installed_transformers_was_tested():
    """Raise NEWEST once all tests have passed on the new release, and note it in docs/compatibility.md."""
    installed = Version(transformers.__version__)
    assert (installed.major, installed.minor) <= tuple(map(int, names.NEWEST.split("."))), (
        f"transformers {installed} is newer than the newest release that was tested, {names.NEWEST}."
    )
    assert (installed.major, installed.minor) >= tuple(map(int, names.OLDEST.split(".")))


# -- after a prompt ------------------------------------------------------------------------------------------
@KINDS
@pytest.mark.parametrize("kind", ["one", "ragged"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_prepared_cache_that_is_not_filled(name, kind, options):
    model, inputs = FAMILIES[name].build(), FAMILIES[name].batch(kind)
    between(model.get_decoder(), other_cache)
    with patched(model, **options), pytest.raises(RuntimeError, match=SENTENCE):
        run(model, inputs)


def test_a_later_turn_whose_cache_does_not_reach_the_language_model():
    model, inputs = FAMILIES["llava"].build(), FAMILIES["llava"].batch("ragged")
    with patched(model), torch.no_grad():
        cache = model(**clone(inputs), use_cache=True)[CACHE]
        model.get_decoder().register_forward_pre_hook(
            lambda module, args, kwargs: (args, other_cache(kwargs)), with_kwargs=True, prepend=True
        )
        with pytest.raises(RuntimeError, match=SENTENCE):
            model(input_ids=torch.ones(2, 1, dtype=torch.long), **{CACHE: cache})


@KINDS
@pytest.mark.parametrize("use_cache", [False, True])
def test_unshortened_embeddings_that_are_read_all_the_same(options, use_cache):
    model, inputs = FAMILIES["llava"].build(), FAMILIES["llava"].batch("one")
    whole = {}
    model.get_decoder().register_forward_pre_hook(
        lambda m, a, kw: whole.update(kw), with_kwargs=True, prepend=True
    )
    between(
        model.get_decoder(),
        lambda kw: kw | {k: whole[k] for k in ("inputs_embeds", "position_ids", "attention_mask")},
    )
    with patched(model, **options), pytest.raises(RuntimeError, match=SENTENCE):
        run(model, inputs, 1, use_cache=use_cache)


@pytest.mark.parametrize("options", [BOTH, ALIGNED, dict(layers=(2,), projector=False)])
def test_layers_that_are_called_without_their_hooks(options):
    model, inputs = FAMILIES["llava"].build(), FAMILIES["llava"].batch("one")
    with patched(model, **options), pytest.raises(RuntimeError, match=SENTENCE):
        for layer in model.get_decoder().layers:
            layer._forward_pre_hooks.clear()
        run(model, inputs)


def test_the_sentence_leaves_nothing_behind():
    model, inputs = FAMILIES["llava"].build(), FAMILIES["llava"].batch("ragged")
    decoder = model.get_decoder()
    with patched(model, **BOTH):
        want = run(model, inputs).sequences
        between(decoder, other_cache)
        with pytest.raises(RuntimeError, match=SENTENCE):
            run(model, inputs)
        del decoder.forward
        assert torch.equal(run(model, inputs).sequences, want)


class Wrapper:
    """Counts and stores as the cache inside does, and is no `Cache`."""

    def __init__(self, cache):
        self.cache = cache

    def __getattr__(self, name):
        if name.startswith("__") or name == "cache":
            raise AttributeError(name)
        return getattr(self.cache, name)


@pytest.mark.parametrize("options", [FRONT, BOTH], ids=["before", "both"])
def test_a_wrapper_around_a_cache(options):
    model, inputs, step = (
        FAMILIES["llava"].build(),
        FAMILIES["llava"].batch("ragged"),
        torch.tensor([[7], [8]]),
    )
    with patched(model, **options), torch.no_grad():
        got = []
        for wrap in (lambda cache: cache, Wrapper):
            cache = wrap(DynamicCache())
            model(**clone(inputs), **{CACHE: cache})
            got.append(model(input_ids=step, **{CACHE: cache}).logits)
    assert torch.equal(*got)


def test_a_cache_without_layers_is_refused():
    class Other:
        def get_seq_length(self, *args):
            return 0

    model, inputs = FAMILIES["llava"].build(), FAMILIES["llava"].batch("ragged")
    with (
        patched(model),
        torch.no_grad(),
        pytest.raises(NotImplementedError, match="consists of layers, found Other"),
    ):
        model(**clone(inputs), **{CACHE: Other()})


@pytest.mark.parametrize("options", [FRONT, BOTH], ids=["before", "both"])
def test_a_language_model_that_is_called_positionally(options):
    model, inputs = FAMILIES["llava"].build(), FAMILIES["llava"].batch("ragged")
    with patched(model, **options), torch.no_grad():
        want = model(**clone(inputs), use_cache=False).logits
    decoder, call = model.get_decoder(), type(model.get_decoder()).__call__

    class Positional(type(decoder)):
        def __call__(self, **kwargs):
            names = list(inspect.signature(type(decoder).forward).parameters)[1:]
            last = max(i for i, name in enumerate(names) if kwargs.get(name) is not None and name in SHARED)
            return call(self, *[kwargs.pop(name, None) for name in names[: last + 1]], **kwargs)

    decoder.__class__ = Positional
    with patched(model, **options), torch.no_grad():
        assert torch.equal(model(**clone(inputs), use_cache=False).logits, want)


SHARED = ("inputs_embeds", "attention_mask", "position_ids")


@pytest.mark.parametrize("options", [FRONT, BOTH], ids=["before", "both"])
def test_a_language_model_that_is_not_called(options):
    """The base model reads the images with another module than the one that carries the hooks."""
    model, inputs = FAMILIES["llava"].build(), FAMILIES["llava"].batch("one")
    decoder = model.get_decoder()
    other = FAMILIES["llava"].build().get_decoder()
    with patched(model, **options), torch.no_grad(), pytest.raises(RuntimeError, match=SENTENCE):
        decoder.__class__ = type("Other", (type(decoder),), {"__call__": lambda self, **kw: other(**kw)})
        model(**clone(inputs))


def test_layers_that_are_called_in_another_way():
    model, inputs = FAMILIES["llava"].build(), FAMILIES["llava"].batch("one")
    layer = model.get_decoder().layers[2]
    call = type(layer).__call__
    layer.__class__ = type(
        "Other", (type(layer),), {"__call__": lambda self, x, **kw: call(self, hidden_states=x, **kw)}
    )
    with patched(model, **BOTH), pytest.raises(RuntimeError, match=SENTENCE):
        run(model, inputs)


@pytest.mark.parametrize("part", ["decoder", "features"])
def test_an_output_without_its_field(part):
    model, inputs = FAMILIES["llava"].build(), FAMILIES["llava"].batch("one")
    if part == "decoder":
        between(model.get_decoder(), dict)
        forward = model.get_decoder().forward
        model.get_decoder().forward = functools.wraps(forward)(
            lambda **kw: transformers.utils.ModelOutput(other=1)
        )
    else:
        inner = model.base_model.get_image_features
        model.base_model.get_image_features = functools.wraps(inner)(
            lambda *a, **kw: transformers.utils.ModelOutput(x=1)
        )
    with patched(model), torch.no_grad(), pytest.raises(RuntimeError, match=SENTENCE):
        model(**clone(inputs))


@pytest.mark.parametrize("given", [False, True])
def test_training_with_a_cache_that_checkpointing_leaves_empty(given):
    """transformers hands no cache to layers that are computed again in backward."""
    model, inputs = FAMILIES["llava"].build(), FAMILIES["llava"].batch("one")
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= 100, -100)
    losses = []
    for cache in ({CACHE: DynamicCache()} if given else {}, {}):
        with patched(checkpointing(model).train()):
            out = model(**clone(inputs), labels=labels, **cache)
        out.loss.backward()
        losses.append(out.loss.detach())
    assert torch.equal(*losses)


def test_a_model_with_an_instance_forward_is_freed():
    """What accelerate does: `forward` is a partial that holds the module."""
    model = FAMILIES["llava"].build()
    decoder = model.get_decoder()
    decoder.forward = functools.partial(decoder.forward)
    functools.update_wrapper(decoder.forward, decoder.forward.func)
    vtoken.unpatch(vtoken.patch(model, "random", budget=0.5))
    alive = weakref.ref(decoder)
    del model, decoder
    gc.collect()
    assert alive() is None


# -- when a model is patched ---------------------------------------------------------------------------------
def renamed(function, old: str):
    """`function` with a signature in which `old` has another name."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def forward(*args, **kwargs):
        return function(*args, **kwargs)

    parameters = [p.replace(name="renamed") if p.name == old else p for p in signature.parameters.values()]
    assert parameters != list(signature.parameters.values())
    forward.__signature__ = signature.replace(parameters=parameters)
    return forward


@pytest.mark.parametrize(
    ("part", "name"),
    [("decoder", n) for n in ("inputs_embeds", "attention_mask", "position_ids")]
    + [("base", n) for n in ("inputs_embeds", "attention_mask", "position_ids", "pixel_values")]
    + [("layer", n) for n in ("attention_mask", "position_embeddings")]
    + [("attention", n) for n in ("hidden_states", "attention_mask", "position_embeddings")],
)
def test_a_renamed_argument_is_refused(part, name):
    model = FAMILIES["llava"].build()
    layer = model.get_decoder().layers[0]
    module = dict(base=model.base_model, decoder=model.get_decoder(), layer=layer, attention=layer.self_attn)[
        part
    ]
    module.forward = renamed(module.forward, name)
    with pytest.raises(RuntimeError, match=name) as error, patched(model, **BOTH):
        pass
    assert SENTENCE in str(error.value) and not model.get_decoder()._forward_pre_hooks


@pytest.mark.parametrize("name", ["visual_pos_masks", "deepstack_visual_embeds"])
def test_renamed_deepstack_arguments_are_refused(name):
    model = FAMILIES["qwen3_vl"].build()
    model.get_decoder().forward = renamed(model.get_decoder().forward, name)
    with pytest.raises(RuntimeError, match=name), patched(model):
        pass


@pytest.mark.parametrize("part", ["base", "decoder"])
def test_a_part_that_takes_no_cache_is_refused(part):
    model = FAMILIES["llava"].build()
    module = dict(base=model.base_model, decoder=model.get_decoder())[part]
    signature = inspect.signature(module.forward)
    module.forward = functools.partial(module.forward)
    module.forward.__signature__ = signature.replace(
        parameters=[p for p in signature.parameters.values() if "Cache" not in str(p.annotation)]
    )
    with pytest.raises(RuntimeError, match="takes no KV cache") as error, patched(model):
        pass
    assert SENTENCE in str(error.value)


@pytest.mark.parametrize("name", PATCHABLE)
def test_every_family_keeps_the_contract(name):
    adapter = adapter_for(FAMILIES[name].build())
    names.check_names(adapter, inside=True)
    assert (
        names.cache_argument(adapter.decoder.forward) == names.cache_argument(adapter.base.forward) == CACHE
    )


# -- what a user sees ----------------------------------------------------------------------------------------
def turns(model, inputs) -> None:
    """generate(), a second turn on its cache, and decode steps by hand."""
    out = run(model, inputs, 2)
    again = dict(input_ids=out.sequences, attention_mask=torch.ones_like(out.sequences))
    run(model, again | {CACHE: out[CACHE]}, 2)
    with torch.no_grad():
        first = model(**clone(inputs), use_cache=True)
        model(input_ids=out.sequences[:, -1:], **{CACHE: first[CACHE]}, use_cache=True)


@pytest.mark.parametrize("options", [FRONT, BOTH, ALIGNED], ids=["before", "both", "aligned"])
@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_no_warning_of_transformers_comes_from_a_patched_model(name, options):
    """As many lines are logged, and as many warnings shown, as without the patch."""
    model, inputs = FAMILIES[name].build(), FAMILIES[name].batch("one")
    logged: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = logged.append

    def heard() -> list[str]:
        logged.clear()
        with warnings.catch_warnings(record=True) as shown:
            warnings.simplefilter("always")
            turns(model, inputs)
        return sorted([r.getMessage() for r in logged] + [str(w.message) for w in shown])

    logger, level = logging.getLogger("transformers"), transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_warning()
    logger.addHandler(handler)
    try:
        plain = heard()
        with patched(model, **options):
            assert heard() == plain
    finally:
        transformers.logging.set_verbosity(level)
        logger.removeHandler(handler)


@pytest.mark.skipif(CACHE == "past_key_values", reason="this release knows the old name only")
@pytest.mark.parametrize("options", [FRONT, BOTH], ids=["before", "both"])
@pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning")
def test_a_user_who_writes_the_old_name(options):
    """`past_key_values=` still works in transformers; the answer is that of the new name."""
    model, inputs = FAMILIES["llava"].build(), FAMILIES["llava"].batch("ragged")
    step = torch.tensor([[7], [8]])
    with patched(model, **options), torch.no_grad():
        got = [
            model(input_ids=step, **{name: model(**clone(inputs), use_cache=True)[CACHE]}).logits
            for name in (CACHE, "past_key_values")
        ]
    assert torch.equal(*got)


@pytest.mark.parametrize("part", ["base", "decoder", "layer", "attention"])
def test_a_wrapper_without_names_is_not_refused(part):
    """`(*args, **kwargs)` tells nothing about names; what happened is checked after the prompt."""
    model, inputs = FAMILIES["llava"].build(), FAMILIES["llava"].batch("ragged")
    with patched(model, **BOTH):
        want = run(model, inputs, cache_implementation=None).sequences
    layer = model.get_decoder().layers[0]
    module = dict(base=model.base_model, decoder=model.get_decoder(), layer=layer, attention=layer.self_attn)[
        part
    ]
    forward = module.forward
    module.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    with patched(model, **BOTH):
        assert torch.equal(run(model, inputs).sequences, want)


def test_disabled_calls_are_not_checked():
    """budget=1.0 and `disabled` go through untouched, whatever the parts do."""
    model, inputs = FAMILIES["llava"].build(), FAMILIES["llava"].batch("one")
    want = run(model, inputs).sequences
    with patched(model), vtoken.disabled(model):
        assert torch.equal(run(model, inputs).sequences, want)
