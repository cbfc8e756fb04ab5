"""VTokenConfig through memory, disk and a stand-in for the Hub."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtoken.config import CONFIG_FILE, FORMAT_VERSION, VTokenConfig

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
configs = st.builds(
    VTokenConfig,
    strategy=st.text(min_size=1) | st.lists(st.text(min_size=1), min_size=1, max_size=3),
    budget=st.none() | st.integers(1, 10_000) | st.floats(0, 1, exclude_min=True),
    positions=st.sampled_from([None, "original", "renumber"]),
    options=st.dictionaries(st.text(), json_values, max_size=4),
)


@given(configs)
def test_dict_round_trip(config):
    assert VTokenConfig.from_dict(config.to_dict()) == config
    assert VTokenConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@given(configs)
def test_disk_round_trip(tmp_path_factory, config):
    folder = tmp_path_factory.mktemp("config")
    config.save_pretrained(folder)
    loaded = VTokenConfig.from_pretrained(folder)
    assert loaded == config and type(loaded.budget) is type(config.budget)
    assert VTokenConfig.from_pretrained(folder / CONFIG_FILE) == config


def test_share_and_count_of_one_stay_apart(tmp_path):
    VTokenConfig("hired", 1.0).save_pretrained(tmp_path / "share")
    VTokenConfig("hired", 1).save_pretrained(tmp_path / "count")
    share, count = (VTokenConfig.from_pretrained(tmp_path / name).budget for name in ("share", "count"))
    assert isinstance(share, float) and isinstance(count, int)


def test_tuples_are_equal_to_what_comes_back(tmp_path):
    config = VTokenConfig(("hired", "vtc_cls"), options={"hired": {"layers": (1, 2)}})
    config.save_pretrained(tmp_path)
    assert VTokenConfig.from_pretrained(tmp_path) == config
    assert config.strategy == ["hired", "vtc_cls"] and config.options == {"hired": {"layers": [1, 2]}}


def test_neighbouring_files_are_left_alone(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    VTokenConfig("hired").save_pretrained(str(tmp_path))
    assert (tmp_path / "config.json").read_text() == '{"model_type": "llava"}'
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", CONFIG_FILE]


def test_unknown_keys_are_named_and_ignored(tmp_path):
    written = {"strategy": "hired", "budget": 0.3, "flavour": "vanilla", "colour": 3}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(written))
    with pytest.warns(UserWarning, match="'colour', 'flavour'") as caught:
        config = VTokenConfig.from_pretrained(tmp_path)
    assert config == VTokenConfig("hired", 0.3) and len(caught) == 1


def test_newer_format_warns():
    with pytest.warns(UserWarning, match=f"format version {FORMAT_VERSION + 1}"):
        VTokenConfig.from_dict({"strategy": "hired", "version": FORMAT_VERSION + 1})


def test_equality_repr_and_pickle():
    config = VTokenConfig("hired", 0.25, options={"alpha": 0.4})
    assert config != VTokenConfig("hired", 0.25) and config != VTokenConfig(
        "hired", 64, options={"alpha": 0.4}
    )
    assert eval(repr(config)) == config
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"strategy": ""}, "strategy must be a name"),
        ({"strategy": []}, "strategy must be a name"),
        ({"strategy": 3}, "strategy must be a name"),
        ({"strategy": "hired", "budget": 0}, "at least 1"),
        ({"strategy": "hired", "budget": -0.5}, r"\(0, 1\]"),
        ({"strategy": "hired", "budget": 1.5}, r"\(0, 1\]"),
        ({"strategy": "hired", "budget": True}, "must be a number"),
        ({"strategy": "hired", "budget": float("nan")}, r"\(0, 1\]"),
        ({"strategy": "hired", "options": {"a": object()}}, "JSON values only"),
        ({"strategy": "hired", "options": {"a": float("nan")}}, "JSON values only"),
        ({"strategy": "hired", "options": [1]}, "options must map"),
    ],
)
def test_bad_values_are_refused_in_one_sentence(arguments, words):
    with pytest.raises(ValueError, match=words) as caught:
        VTokenConfig(**arguments)
    assert "\n" not in str(caught.value)


def test_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match=CONFIG_FILE) as caught:
        VTokenConfig.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["no/such/folder/here", "someone/no-such-repository"])
def test_missing_repository_is_one_sentence(name, tmp_path):
    with pytest.raises(OSError, match=CONFIG_FILE) as caught:
        VTokenConfig.from_pretrained(name, local_files_only=True, cache_dir=tmp_path)
    assert "\n" not in str(caught.value) and name in str(caught.value)


@pytest.mark.parametrize("text", ["not json", "[]", '{"budget": 0.2}', "3"])
def test_broken_file_is_one_sentence(text, tmp_path):
    (tmp_path / CONFIG_FILE).write_text(text)
    with pytest.raises(ValueError) as caught:
        VTokenConfig.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


class StandInHub:
    """Records what `push_to_hub` would upload."""

    def __init__(self, token=None):
        self.token = token

    def create_repo(self, repo_id, **kwargs):
        return type("Repo", (), {"repo_id": repo_id})()

    def upload_folder(self, *, repo_id, folder_path, **kwargs):
        StandInHub.uploaded = (
            repo_id,
            {p.name: p.read_text() for p in Path(folder_path).rglob("*") if p.is_file()},
        )
        return f"https://hub/{repo_id}/commit/1"


def test_push_to_hub_uploads_the_config_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", StandInHub)
    config = VTokenConfig("vtc_cls", 128, options={"layers": 3})
    assert config.push_to_hub("me/thrifty") == "https://hub/me/thrifty/commit/1"
    repo, files = StandInHub.uploaded
    assert repo == "me/thrifty" and set(files) == {CONFIG_FILE}
    assert VTokenConfig.from_dict(json.loads(files[CONFIG_FILE])) == config
    url = config.save_pretrained(tmp_path / "thrifty", push_to_hub=True, repo_id="me/other")
    assert url == "https://hub/me/other/commit/1"
