"""An adapter by its hub id: from the hub's cache, with no file fetched that could run code."""

import re
import shutil
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

import lorakit as lk
from hub_stand_in import hub_at, stand_in
from lorakit.adapter.folder import READ
from lorakit.adapter.hub import short_name
from lorakit.errors import AdapterFileError
from references import attach_random, outputs
from tiny_models import build, example_inputs

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def model():
    return build("llama")


@pytest.fixture
def folder(model, tmp_path):
    """The folder of an adapter, which is no folder OWNER/NAME."""
    attach_random(model)
    made = lk.extract(model).save(tmp_path / "saved")
    lk.detach(model)
    return made


@pytest.fixture
def cache(folder, tmp_path, monkeypatch):
    """The hub's cache, which holds the adapter as someone/e2e, its branch main and its tag v1."""
    repository = tmp_path / "cache" / "models--someone--e2e"
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    for ref in ("main", "v1"):
        (repository / "refs" / ref).write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return repository


def test_a_hub_id_is_taken_wherever_an_adapter_is(model, folder, cache):
    expected = lk.Adapter.load(folder)
    inputs = example_inputs(model)
    lk.attach(model, folder)
    answers = outputs(model, inputs)
    lk.detach(model)
    for revision in (None, "v1", COMMIT):
        loaded = lk.Adapter.load("someone/e2e", revision=revision)
        assert loaded.content_hash() == expected.content_hash()
    for revision in ("v1", COMMIT):
        named = lk.Adapter.load(f"someone/e2e@{revision}")
        assert named.content_hash() == expected.content_hash()
    with lk.attached(model, "someone/e2e") as plan:
        assert torch.equal(outputs(model, inputs), answers)
    assert plan.parameters == lk.plan(model, "someone/e2e").parameters == expected.parameters
    bank = lk.AdapterBank(model)
    for name, source in (("hub", "someone/e2e"), ("folder", folder), ("object", expected)):
        bank.load(name, source)
        with bank.route(name):
            assert torch.equal(outputs(model, inputs), answers)


def test_offline_the_message_says_how_to_get_it(model, cache):
    with pytest.raises(AdapterFileError, match=r"run `hf download someone/other` where there is"):
        lk.attach(model, "someone/other")
    with pytest.raises(AdapterFileError, match=r"`hf download someone/e2e --revision v2`"):
        lk.Adapter.load("someone/e2e", revision="v2")
    with pytest.raises(AdapterFileError, match=r"`hf download someone/e2e --revision v2`"):
        lk.Adapter.load("someone/e2e@v2")
    assert not hasattr(model, "_lorakit")


def test_a_path_comes_first_and_a_mistyped_one_asks_no_hub(folder, cache, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the hub was asked")

    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "someone" / "e2e")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    assert lk.Adapter.load("someone/e2e").parameters
    for mistyped in ("someone/e2f", "./other/e2e", "a/b/c", "e2e", tmp_path / "none"):
        with pytest.raises(AdapterFileError, match="there is no adapter folder"):
            lk.Adapter.load(mistyped)
    with pytest.raises(AdapterFileError, match="revision goes with a hub id"):
        lk.Adapter.load(tmp_path / "saved", revision="main")
    with pytest.raises(AdapterFileError, match="revision goes with a hub id, OWNER/NAME, not with"):
        lk.Adapter.load("someone/e2e@v1", revision="main")


def test_a_folder_with_an_at_sign_comes_first(folder, cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "someone" / "e2e@v1")
    assert lk.Adapter.load("someone/e2e@v1").parameters
    assert short_name("someone/e2e@v1") == "e2e@v1"
    assert short_name("other/e2e@v1") == short_name("out/e2e/") == "e2e"


def test_only_json_safetensors_and_a_template_are_fetched(cache, monkeypatch):
    asked: dict[str, Any] = {}

    def download(name, *, revision, allow_patterns, local_files_only):
        asked.update(name=name, revision=revision, files=allow_patterns, here=local_files_only)
        return str(cache / "snapshots" / COMMIT)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    lk.Adapter.load("someone/e2e", revision="v1")
    assert asked == {"name": "someone/e2e", "revision": "v1", "files": list(READ), "here": True}
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    lk.Adapter.load("someone/e2e", revision="v1")
    assert not asked["here"]
    assert {name.rpartition(".")[2] for name in READ} == {"json", "safetensors", "jinja"}
    (cache / "snapshots" / COMMIT / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterFileError, match=r"has no adapter_model\.safetensors on the hub"):
        lk.Adapter.load("someone/e2e")


def test_a_failing_connection_is_told_in_one_line(monkeypatch):
    def fail(*_, **__):
        raise LocalEntryNotFoundError("Got: ConnectError: no route\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    with pytest.raises(AdapterFileError) as caught:
        lk.Adapter.load("someone/e2e")
    assert str(caught.value) == (
        "someone/e2e cannot be fetched from the hub: Got: ConnectError: no route; run `hf download "
        "someone/e2e` where there is a network, or give a folder"
    )


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def test_a_gated_repository_says_where_access_is_given(model, empty_cache):
    with stand_in() as asked, pytest.raises(AdapterFileError) as caught:
        lk.attach(model, "someone/gated")
    assert asked
    assert re.fullmatch(
        r"someone/gated is gated: ask for access on its page, http://127\.0\.0\.1:\d+/someone/gated"
        ", then log in here by `hf auth login`",
        str(caught.value),
    )


def test_a_repository_without_an_adapter_is_told_and_nothing_of_it_fetched(model, empty_cache):
    with stand_in() as asked, pytest.raises(AdapterFileError) as caught:
        lk.attach(model, "someone/base")
    assert str(caught.value).startswith(
        "someone/base is no adapter: it has no adapter_config.json on the hub. A base is named by"
    )
    assert not [path for path in asked if "/resolve/" in path]


def test_a_repository_that_nobody_knows_is_told(model, empty_cache):
    with stand_in(), pytest.raises(AdapterFileError, match="on the hub no repository of this name"):
        lk.attach(model, "nobody/knows")


def test_without_a_network_there_is_one_message(model, empty_cache):
    with hub_at("http://127.0.0.1:1"), pytest.raises(AdapterFileError) as caught:
        lk.attach(model, "someone/e2e")
    assert str(caught.value).startswith("someone/e2e cannot be fetched from the hub: ")
    assert len(str(caught.value).splitlines()) == 1
