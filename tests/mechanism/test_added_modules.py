"""Weights of a strategy on a model: where they live, what the model's own files hold, training, saving, loading."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import pickle

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

import vtoken
from tests.models import FAMILIES
from tests.oracle import clone
from tests.strategies.trained import NAMES, OPTIONS, logits, patched, randomise
from vtoken.config import CONFIG_FILE, WEIGHTS_FILE
from vtoken.mechanism.layer_hooks import HOOKS_INSIDE_CHECKPOINT

NAME = "llava"


def test_the_model_s_own_weights_are_what_they_were(tmp_path):
    model = FAMILIES[NAME].build()
    before, trainable = model.state_dict(), [p.requires_grad for p in model.parameters()]
    vtoken.patch(model, "pvc")
    own = [n for n, p in model.named_parameters() if p.requires_grad]
    assert own and all(n.startswith("vtoken_strategy.") for n in own)
    assert list(model.state_dict()) == list(before)
    model.load_state_dict(before)  # strict
    model.save_pretrained(tmp_path)
    assert not [k for k in load_file(tmp_path / "model.safetensors") if "vtoken" in k]
    vtoken.unpatch(model)
    assert not hasattr(model, "vtoken_strategy") and not [m for m in model.modules() if "pvc" in str(type(m))]
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert list(model.state_dict()) == list(before) and not model._state_dict_hooks


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "checkpointed"])
@pytest.mark.parametrize("strategy", NAMES)
@pytest.mark.parametrize("name", ["llava", "llava_onevision/video", "internvl", "qwen2_5_vl"])
def test_gradients_reach_every_added_weight_and_no_other(name, strategy, checkpointing):
    if strategy == "pvc" and name == "qwen2_5_vl":
        pytest.skip("its tower reads no frames in rows")
    if name == "qwen2_5_vl" and checkpointing is False and HOOKS_INSIDE_CHECKPOINT:
        pytest.skip("this release computes tower layers again without what is read there")
    if strategy == "voco" and checkpointing is not None and HOOKS_INSIDE_CHECKPOINT:
        pytest.skip("this release computes layers again without the state of the forward")
    model, inputs = randomise(patched(name, strategy)), FAMILIES[name].batch("one")
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100  # the prompt, which strategies may read
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    model.train()
    model(**clone(inputs), labels=labels).loss.backward()
    missing = [
        n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert not missing
    assert not [n for n, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
    if checkpointing is not None:
        plain = randomise(patched(name, strategy)).train()
        plain(**clone(inputs), labels=labels).loss.backward()
        for (n, a), (_, b) in zip(model.named_parameters(), plain.named_parameters()):
            assert a.grad is None or torch.allclose(a.grad, b.grad, atol=1e-6), n


@pytest.mark.parametrize("strategy", NAMES)
def test_training_lowers_the_loss_and_survives_a_round_trip(strategy, tmp_path):
    model, inputs = patched(NAME, strategy), FAMILIES[NAME].batch("ragged")
    optimiser = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), 3e-3)
    losses, labels = [], inputs["input_ids"].clone()
    labels[:, :-2] = -100
    for _ in range(8):
        loss = model(**clone(inputs), labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    trained = logits(model, inputs)
    vtoken.save_strategy(model, tmp_path)
    config = vtoken.VTokenConfig.from_pretrained(tmp_path)
    assert (
        config.strategy == strategy
        and config.options == OPTIONS[strategy]
        and config.weights == tmp_path / WEIGHTS_FILE
    )
    other = vtoken.patch(FAMILIES[NAME].build(), config)
    assert torch.allclose(logits(other, inputs), trained, atol=1e-5)
    again = tmp_path / "again"
    vtoken.save_strategy(other, again)
    a, b = load_file(tmp_path / WEIGHTS_FILE), load_file(again / WEIGHTS_FILE)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_copies_pickles_and_casts_carry_the_weights():
    model, inputs = randomise(patched(NAME)), FAMILIES[NAME].batch("one")
    pickled = pickle.dumps(model)  # transformers' own hooks of a first call cannot be
    answer = logits(model, inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickled)):
        assert torch.allclose(logits(other, inputs), answer, atol=1e-5)
        mine, theirs = model.vtoken_strategy, other.vtoken_strategy
        assert mine is not theirs
        with torch.no_grad():
            theirs.connector.fc2.bias.add_(1.0)
        assert not torch.allclose(logits(other, inputs), answer, atol=1e-2)
        assert torch.allclose(logits(model, inputs), answer, atol=1e-5)
        vtoken.unpatch(other)
        assert not hasattr(other, "vtoken_strategy")
    model.double()
    assert all(p.dtype == torch.float64 for p in model.vtoken_strategy.parameters())
    wide = {k: v.double() if v.is_floating_point() else v for k, v in clone(inputs).items()}
    assert torch.allclose(logits(model, wide).float(), answer, atol=1e-4)


def test_a_folder_of_another_architecture_is_refused(tmp_path):
    vtoken.save_strategy(patched("llava_next"), tmp_path)
    config = vtoken.VTokenConfig.from_pretrained(tmp_path)
    model = FAMILIES["llava_onevision"].build()
    names = [n for n, _ in model.named_parameters()]
    state = load_file(tmp_path / WEIGHTS_FILE)
    save_file({k: v for k, v in state.items() if "fc1" not in k}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=r"pvc weights in .* do not fit this model, .* where \("):
        vtoken.patch(model, config)
    assert [n for n, _ in model.named_parameters()] == names and vtoken.patching.patch_of(model) is None
    (tmp_path / WEIGHTS_FILE).write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="cannot be read as a safetensors file"):
        vtoken.patch(model, config)
    (tmp_path / WEIGHTS_FILE).unlink()
    with pytest.raises(ValueError, match=r"has no vtoken_strategy\.safetensors"):
        vtoken.patch(model, vtoken.VTokenConfig.from_pretrained(tmp_path))


def test_weights_of_another_family_of_the_same_widths_are_refused(tmp_path):
    vtoken.save_strategy(patched("llava", "voco"), tmp_path)
    mode = (tmp_path / WEIGHTS_FILE).stat().st_mode
    assert mode == (tmp_path / CONFIG_FILE).stat().st_mode
    other = FAMILIES["vipllava"].build()
    with pytest.raises(ValueError, match="were trained for llava, and this model is vipllava"):
        vtoken.patch(other, vtoken.VTokenConfig.from_pretrained(tmp_path))
    assert not hasattr(other, "vtoken_strategy")


def test_sizes_in_a_config_allocate_nothing(tmp_path):
    vtoken.save_strategy(patched(NAME), tmp_path)
    path = tmp_path / "vtoken_config.json"
    told = json.loads(path.read_text())
    told["options"]["te_dim"] = 10**7
    path.write_text(json.dumps(told))
    with pytest.raises(ValueError, match="do not fit this model"):
        vtoken.patch(FAMILIES[NAME].build(), vtoken.VTokenConfig.from_pretrained(tmp_path))


def test_an_object_serves_one_model():
    strategy = vtoken.strategies.PVC(budget=0.3)
    model = vtoken.patch(FAMILIES[NAME].build(), strategy)
    with pytest.raises(ValueError, match="is on another model"):
        vtoken.patch(FAMILIES[NAME].build(), strategy)
    vtoken.unpatch(model)
    with pytest.raises(RuntimeError, match=r"vtoken\.patch puts on a model"):
        strategy.module  # noqa: B018
    vtoken.patch(FAMILIES[NAME].build(), strategy)
    other = patched(NAME)
    with pytest.raises(ValueError, match="weights of another strategy"), vtoken.applied(other, "pvc"):
        pass


def test_with_a_strategy_inside_the_llm():
    model, inputs = FAMILIES[NAME].build(), FAMILIES[NAME].batch("ragged")
    vtoken.patch(model, ["pvc", "fastv"], budget=0.4, pvc={"side": 2}, fastv={"layer": 2})
    randomise(model)
    answer = logits(model, inputs)
    with vtoken.disabled(model):
        assert not torch.equal(logits(model, inputs), answer)


def test_configs_of_strategies():
    of = vtoken.VTokenConfig.of
    made = vtoken.strategies.create("hired", budget=0.3, alpha=0.4)
    assert of(made) == vtoken.VTokenConfig("hired", 0.3, "original", {"alpha": 0.4})
    both = vtoken.strategies.combine(["hired", "fastv"], 0.3, split=0.4, fastv={"layer": 3})
    told = of(both)
    assert told.strategy == ["hired", "fastv"] and told.options == {"fastv": {"layer": 3}, "split": 0.4}
    model = vtoken.patch(FAMILIES[NAME].build(), told)
    assert vtoken.patching.patch_of(model).strategy.describe() == both.describe()
    with pytest.raises(ValueError, match="not patched"):
        vtoken.save_strategy(FAMILIES[NAME].build(), "nowhere")


@pytest.mark.parametrize(
    ("option", "value"), [("side", 3), ("window", 1), ("gate", "scalar"), ("tau_kind", "fraction")]
)
def test_options_that_the_weights_were_made_for_stay(option, value, tmp_path):
    model, inputs = randomise(patched(NAME)), FAMILIES[NAME].batch("one")
    answer, strategy = logits(model, inputs), vtoken.patching.patch_of(model).strategy
    was = getattr(strategy, option)
    setattr(strategy, option, value)
    with pytest.raises(RuntimeError, match=f"made for {option}={was!r}, .* set to {value!r}"):
        logits(model, inputs)
    with pytest.raises(RuntimeError, match=f"made for {option}="):
        vtoken.save_strategy(model, tmp_path)
    assert not list(tmp_path.iterdir())
    setattr(strategy, option, was)
    assert torch.equal(logits(model, inputs), answer)


def test_weights_are_not_loaded_into_a_strategy_with_other_options(tmp_path):
    vtoken.save_strategy(patched(NAME, window=3), tmp_path)
    with pytest.raises(ValueError, match="other options, the first is window: 3 there and 2 on the model"):
        vtoken.saving.load_weights(patched(NAME, window=2), tmp_path)
    vtoken.saving.load_weights(patched(NAME, window=3, budget=0.5), tmp_path)


def test_a_budget_assigned_to_a_combination_keeps_the_weights():
    def made(budget):
        model = FAMILIES[NAME].build()
        vtoken.patch(model, ["pvc", "fastv"], budget=budget, pvc={"side": 2}, fastv={"layer": 2})
        torch.manual_seed(1)
        return randomise(model)

    model, inputs = made(0.6), FAMILIES[NAME].batch("ragged")
    logits(model, inputs)
    vtoken.patching.patch_of(model).strategy.budget = 0.3
    assert torch.allclose(logits(model, inputs), logits(made(0.3), inputs), atol=1e-5)
    vtoken.unpatch(model)
    assert not hasattr(model, "vtoken_strategy")


def test_pushed_and_copied_configs_take_the_weights_along(tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(
        HfApi, "create_repo", lambda self, repo_id, **k: type("Url", (), {"repo_id": repo_id})
    )
    seen = lambda self, **k: pushed.append({p.name for p in k["folder_path"].iterdir()})  # noqa: E731
    monkeypatch.setattr(HfApi, "upload_folder", seen)
    model, inputs = randomise(patched(NAME)), FAMILIES[NAME].batch("one")
    vtoken.save_strategy(model, tmp_path / "a", push_to_hub=True, repo_id="me/pvc")
    assert pushed == [{CONFIG_FILE, WEIGHTS_FILE}]
    vtoken.VTokenConfig.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    other = vtoken.patch(FAMILIES[NAME].build(), vtoken.VTokenConfig.from_pretrained(tmp_path / "b"))
    assert torch.allclose(logits(other, inputs), logits(model, inputs), atol=1e-5)


def test_a_config_keeps_its_weights_when_it_is_changed_and_a_file_names_none(tmp_path):
    model, inputs = randomise(patched(NAME)), FAMILIES[NAME].batch("one")
    vtoken.save_strategy(model, tmp_path)
    config = dataclasses.replace(vtoken.VTokenConfig.from_pretrained(tmp_path), budget=0.3)
    other = vtoken.patch(FAMILIES[NAME].build(), config)
    assert torch.allclose(logits(other, inputs), logits(model, inputs), atol=1e-5)
    path = tmp_path / CONFIG_FILE
    told = json.loads(path.read_text())
    assert "weights" not in told
    path.write_text(json.dumps(told | {"weights": "/etc/passwd"}))
    with pytest.warns(UserWarning, match="unknown config key.*weights"):
        again = vtoken.VTokenConfig.from_pretrained(tmp_path)
    assert again.weights == tmp_path / WEIGHTS_FILE


def test_a_combination_named_with_a_plus_finds_its_weights(tmp_path):
    model, inputs = FAMILIES[NAME].build(), FAMILIES[NAME].batch("one")
    randomise(vtoken.patch(model, "pvc+fastv", budget=0.4, fastv={"layer": 2}))
    vtoken.save_strategy(model, tmp_path)
    path = tmp_path / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"strategy": "pvc + fastv"}))
    other = vtoken.patch(FAMILIES[NAME].build(), vtoken.VTokenConfig.from_pretrained(tmp_path))
    assert torch.allclose(logits(other, inputs), logits(model, inputs), atol=1e-5)


def test_a_model_patched_in_inference_mode_can_be_trained():
    model, inputs = FAMILIES[NAME].build(), FAMILIES[NAME].batch("one")
    with torch.inference_mode():
        vtoken.patch(model, "pvc", budget=0.3, side=2)
        model(**clone(inputs))
    model(**clone(inputs), labels=inputs["input_ids"]).loss.backward()
    assert model.vtoken_strategy.connector.fc2.weight.grad.any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: torch.full_like(x, float("nan")), "has values that are not finite"),
        (lambda x: x.to(torch.int64), "has torch.int64 numbers"),
        (lambda x: x.to(torch.complex64), "has torch.complex64 numbers"),
    ],
)
def test_weights_that_are_no_numbers(change, words, tmp_path):
    vtoken.save_strategy(patched(NAME), tmp_path)
    state = load_file(tmp_path / WEIGHTS_FILE)
    save_file({k: change(v) for k, v in state.items()}, tmp_path / WEIGHTS_FILE)
    model = FAMILIES[NAME].build()
    trainable = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=words):
        vtoken.patch(model, vtoken.VTokenConfig.from_pretrained(tmp_path))
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert not hasattr(model, "vtoken_strategy")


def test_weights_go_where_an_offloaded_tower_runs():
    accelerate = pytest.importorskip("accelerate")
    model, inputs = FAMILIES[NAME].build(), FAMILIES[NAME].batch("one")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    vtoken.patch(model, "pvc", budget=0.3, side=2)
    assert logits(model, inputs).isfinite().all()


def test_layers_replaced_by_peft_are_not_saved(tmp_path):
    peft = pytest.importorskip("peft")
    model = patched(NAME)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["fc1", "fc2"]))
    with pytest.raises(ValueError, match="merge adapters of peft"):
        vtoken.save_strategy(wrapped, tmp_path)
    vtoken.save_strategy(wrapped.merge_and_unload(), tmp_path)
    vtoken.patch(FAMILIES[NAME].build(), vtoken.VTokenConfig.from_pretrained(tmp_path))


@pytest.mark.parametrize("then", ["uniform", "pvc"])
def test_features_with_attention_across_frames_serve_their_patch_alone(then):
    model, inputs = randomise(patched(NAME)), FAMILIES[NAME].batch("one")
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        pytest.skip("this release takes no features")
    text = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        given = {"image": model.get_image_features(inputs["pixel_values"])}
    assert torch.equal(logits(model, text | {"mm_encoder_outputs": given}), logits(model, inputs))
    vtoken.unpatch(model)
    vtoken.patch(model, then, budget=0.3)
    with pytest.raises(ValueError, match="encoded under another strategy"):
        logits(model, text | {"mm_encoder_outputs": given})
