"""Adapters that are loaded when they are first asked for, and what is not looked for."""

import os
import shutil

import pytest

pytest.importorskip("fastapi")

import lorakit.serving.places as places
from lorakit.errors import AdapterFileError
from lorakit.serving.api.app import Policy
from lorakit.serving.api.keys import Keys, Rights
from serving.servers import DEFAULTS, Server


@pytest.fixture
def server(words, folder, tmp_path):
    own = shutil.copytree(folder, tmp_path / "served")
    os.symlink(shutil.copytree(folder / "small", tmp_path / "outside"), own / "linked")
    rights = {"all": Rights(), "few": Rights(adapters=frozenset(["small"]), load=False)}
    made = Server(words, own, Policy(keys=Keys(rights)), resolve=True)
    made.client.headers["Authorization"] = "Bearer all"
    yield made
    made.engine.close(drain=False)


def test_an_adapter_is_loaded_when_it_is_first_asked_for(server):
    assert set(server.catalog.adapters) == set()
    for path in ("nobody", "../outside", ".", "", "served/small", "/etc", "small/"):
        found = server.complete(model="tiny:" + path)
        assert found.status_code == 404, path
    assert server.complete(model="linked").status_code == 403
    assert set(server.catalog.adapters) == set()
    found = server.complete(model="small").json()["choices"][0]["text"]
    assert set(server.catalog.adapters) == {"small"}
    assert found == server.alone("small", server.tokenizer("red cat")["input_ids"])
    assert server.complete(adapters=[{"name": "small"}, {"name": "wide"}]).status_code == 200


def test_what_was_unloaded_stays_so_until_it_is_loaded(server):
    assert server.complete(model="small").status_code == 200
    assert server.post("/v1/unload_lora_adapter", lora_name="small").status_code == 200
    assert server.complete(model="small").status_code == 404
    body = {"lora_name": "small", "lora_path": "small"}
    assert server.post("/v1/load_lora_adapter", **body).status_code == 200
    assert server.complete(model="small").status_code == 200


def test_a_key_loads_only_what_it_may_ask(server):
    header = {"Authorization": "Bearer few"}
    asked = DEFAULTS | {"prompt": "red"}
    for path, body in (
        ("/v1/completions", asked | {"model": "wide"}),
        ("/tokenize", {"model": "wide", "prompt": "red"}),
        ("/detokenize", {"model": "wide", "tokens": [1]}),
    ):
        assert server.client.post(path, json=body, headers=header).status_code == 403
    for path in ("/v1/models/wide", "/tokenizer_info?model=wide"):
        assert server.client.get(path, headers=header).status_code == 403
    assert set(server.catalog.adapters) == set()
    body = asked | {"model": "small"}
    assert server.client.post("/v1/completions", json=body, headers=header).status_code == 200


def test_a_namespace_of_the_hub_is_asked_after_the_folder(words, folder, tmp_path, monkeypatch):
    asked = []

    def fetch(name):
        asked.append(name)
        if name != "team/hubbed":
            raise AdapterFileError(f"there is no {name} on the hub")
        return folder / "wide"

    monkeypatch.setattr(places, "local_path", fetch)
    own = shutil.copytree(folder, tmp_path / "served")
    server = Server(words, own, hub="team")
    assert server.complete(model="small").status_code == 200
    found = server.complete(model="hubbed").json()["choices"][0]["text"]
    assert found == server.alone("hubbed", server.tokenizer("red cat")["input_ids"])
    missing = server.complete(model="missing")
    assert missing.status_code == 404
    assert "no team/missing on the hub" in missing.json()["error"]["message"]
    assert server.complete(model="other/hubbed").status_code == 404
    assert asked == ["team/hubbed", "team/missing"]
    server.engine.close(drain=False)


def test_tokenizers_are_told_of(server):
    found = server.client.get("/tokenizer_info").json()
    assert found["chat_template"] == server.tokenizer.chat_template
    assert found["model_max_length"] == 32
    assert found["pad_token"] == "<pad>"
