"""Common wrappers of a model: accelerate's dispatch hooks, and pipelines."""

from __future__ import annotations

import copy

import accelerate
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

import vtoken
from tests.models import FAMILIES, SPECIAL
from tests.models.common import IMG, PAD
from tests.oracle import clone

from .common import BOTH, SOME, assert_moved, assert_same, expected, run, subject
from .fixed import Fixed, Spy, patched


@pytest.mark.parametrize("order", ["dispatch, then patch", "patch, then dispatch"])
@pytest.mark.parametrize("name", [n for n in SOME if n != "idefics3"])
def test_offloaded_model(name, order):
    """cpu_offload leaves meta tensors between calls and replaces every module's forward. (Idefics3 itself
    fails there.)
    """
    model, inputs = FAMILIES[name].build(), FAMILIES[name].batch("ragged")
    spy = Spy(Fixed(**BOTH))
    if order.startswith("patch"):
        vtoken.patch(model, spy.strategy)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(model.parameters()).device.type == "meta"
    if not order.startswith("patch"):
        vtoken.patch(model, spy.strategy)
    out = run(model, inputs)
    assert_same(out, inputs, expected(name, inputs, spy))
    assert_moved(out, name, inputs)
    print(vtoken.report(model))
    vtoken.unpatch(model)
    dense = run(model, inputs)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert (torch.stack(dense.logits)[0] - out.logits[0]).abs().max() > 1e-2


@pytest.mark.parametrize("name", SOME)
def test_dispatched_model(name):
    """A device map puts hooks on whole sub-models that move their inputs."""
    model, inputs = FAMILIES[name].build(), FAMILIES[name].batch("ragged")
    for module in (model.get_decoder(), model.get_output_embeddings(), *model.get_decoder().layers):
        accelerate.hooks.add_hook_to_module(
            module, accelerate.hooks.AlignDevicesHook("cpu", io_same_device=True)
        )
    with patched(model, **BOTH) as spy:
        out = run(model, inputs)
    assert_same(out, inputs, expected(name, inputs, spy))


@pytest.mark.parametrize("order", ["prepare, then patch", "patch, then prepare"])
def test_mixed_precision_taken_off_again(order):
    """`unwrap_model` binds the patch's own forward to the model."""
    model, inputs = FAMILIES["llava"].build(), FAMILIES["llava"].batch("ragged")
    with torch.no_grad(), vtoken.applied(model, Fixed()):
        want = model(**clone(inputs)).logits
    accelerate.state.AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    if order.startswith("patch"):
        vtoken.patch(model, Fixed())
    model = accelerator.prepare(model)
    if order.startswith("prepare"):
        vtoken.patch(model, Fixed())
    with torch.no_grad():
        rounded = model(**clone(inputs)).logits
        model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        assert torch.equal(model(**clone(inputs)).logits, want)
        assert not torch.equal(rounded, want)
        vtoken.unpatch(model)
        dense = FAMILIES["llava"].build()(**clone(inputs)).logits
        assert torch.equal(model(**clone(inputs)).logits, dense) and not torch.equal(dense, want)
    accelerate.state.AcceleratorState._reset_state(True)


def test_a_copy_after_mixed_precision_was_taken_off():
    model, inputs = FAMILIES["llava"].build(), FAMILIES["llava"].batch("ragged")
    accelerate.state.AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model = accelerator.prepare(vtoken.patch(model, Fixed()))
    model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match=r"call vtoken.unpatch\(model\) before you copy it"),
    ):
        copy.deepcopy(model)(**clone(inputs))  # of the first model's weights, if it ran
    vtoken.unpatch(model)
    accelerate.state.AcceleratorState._reset_state(True)


def processor() -> transformers.LlavaProcessor:
    """CLIP pixels and one word per id, for the tiny LLaVA."""
    words = {f"w{i}": i for i in range(IMG)} | {"<image>": IMG} | {f"s{i}": i for i in SPECIAL[1:]}
    words = {("<pad>" if i == PAD else word): i for word, i in words.items()}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="w3", additional_special_tokens=["<image>"]
    )
    fast.padding_side = "left"
    size = dict(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(**size),
        tokenizer=fast,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="{% for m in messages %}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}",
    )


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 30, 3), dtype=np.uint8))


def test_pipeline():
    model, tools = subject("llava"), processor()
    pipe = transformers.pipeline(
        "image-text-to-text",
        model=model,
        image_processor=tools.image_processor,
        tokenizer=tools.tokenizer,
        processor=tools,
    )
    options = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, suppress_tokens=SPECIAL)
    asked = [
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": picture(1)}, {"type": "text", "text": "w5 w6 w7"}],
            }
        ],
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": picture(2)},
                    {"type": "image", "image": picture(3)},
                    {"type": "text", "text": "w8 w9 w10 w11"},
                ],
            }
        ],
    ]

    def answers() -> list[str]:
        return [
            pipe(text=chat, return_full_text=False, generate_kwargs=options)[0]["generated_text"]
            for chat in asked
        ]

    dense = answers()
    inputs = [
        dict(tools.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt"))
        for chat in asked
    ]
    want = []
    for chat, row in zip(asked, inputs):
        with patched(model) as spy:
            got = pipe(text=chat, return_full_text=False, generate_kwargs=options)[0]["generated_text"]
        want.append(got)
        ids = expected("llava", row, spy)[0]
        assert got.split() == tools.tokenizer.batch_decode(ids, skip_special_tokens=True)[0].split()
    assert want != dense
    with vtoken.applied(model, Fixed()):
        assert answers() == want
    assert answers() == dense
