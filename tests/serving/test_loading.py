"""Adapters over HTTP: loaded, replaced, unloaded, refused, and asked as they were trained."""

import os
import shutil
import threading

import pytest

import lorakit as lk

pytest.importorskip("fastapi")
from serving.servers import Server, ids_of, save


def test_models_are_listed_with_their_parents(server):
    listed = server.client.get("/v1/models").json()["data"]
    assert [(card["id"], card["parent"]) for card in listed] == [
        ("tiny", None),
        ("small", "tiny"),
        ("wide", "tiny"),
    ]
    assert server.client.get("/v1/models/small").json() == listed[1]


def test_adapters_are_loaded_replaced_and_unloaded_in_vllms_words(words, folder, tmp_path):
    folder = shutil.copytree(folder, tmp_path / "served")
    server = Server(words, folder)
    save(words, folder / "late", 7, rank=3)
    body = {"lora_name": "late", "lora_path": "late"}
    response = server.post("/v1/load_lora_adapter", **body)
    assert response.text == "Success: LoRA adapter 'late' added successfully."
    old = server.complete(model="late").json()
    assert old["choices"][0]["text"] == server.alone("late", ids_of(server, "red cat"))
    again = server.post("/v1/load_lora_adapter", **body)
    assert again.status_code == 400
    assert again.json()["error"]["type"] == "InvalidUserInput"
    assert "has already been loaded" in again.json()["error"]["message"]
    save(words, folder / "late", 8, rank=5)
    assert server.post("/v1/load_lora_adapter", **body, load_inplace=True).status_code == 200
    new = server.complete(model="late").json()
    assert new["choices"][0]["text"] == server.alone("late", ids_of(server, "red cat"))
    assert new["system_fingerprint"] != old["system_fingerprint"]
    response = server.post("/v1/unload_lora_adapter", lora_name="late")
    assert response.text == "Success: LoRA adapter 'late' removed successfully."
    assert server.complete(model="late").status_code == 404
    gone = server.post("/v1/unload_lora_adapter", lora_name="late")
    assert gone.status_code == 404
    assert "The lora adapter 'late' cannot be found" in gone.json()["error"]["message"]
    server.engine.close()


def test_bad_adapters_are_refused_and_change_nothing(words, folder, tmp_path):
    folder = shutil.copytree(folder, tmp_path / "served")
    server = Server(words, folder)
    outside = save(words, tmp_path / "outside", 1, rank=2)
    os.symlink(outside, folder / "linked")
    inner = save(words, folder / "inner", 1, rank=2)
    weights = inner / "adapter_model.safetensors"
    os.rename(weights, tmp_path / "weights")
    os.symlink(tmp_path / "weights", weights)
    for path, status, words in (
        (str(outside), 403, "not within the folder"),
        ("../outside", 403, "not within the folder"),
        ("linked", 403, "not within the folder"),
        ("inner", 403, "a link in it leaves"),
        ("nowhere", 404, "there is no adapter folder"),
        ("null\0", 400, "is no path"),
        ("long" * 2000, 400, "is no path"),
        (".", 403, "a link in it leaves"),
    ):
        for name in ("bad", "small"):
            how = {"load_inplace": True}
            response = server.post("/v1/load_lora_adapter", lora_name=name, lora_path=path, **how)
            assert response.status_code == status, (path, response.text)
            assert words in response.json()["error"]["message"]
    assert set(server.catalog.adapters) == {"small", "wide"}
    assert server.catalog.bank.names == ("small", "wide")
    found = server.complete(model="small").json()["choices"][0]["text"]
    assert found == server.alone("small", ids_of(server, "red cat"))
    base = server.post("/v1/load_lora_adapter", lora_name="tiny", lora_path="small")
    assert base.status_code == 400
    server.engine.close()


@pytest.mark.thorough
def test_a_reload_under_load_is_wholly_old_or_wholly_new(words, tmp_path):
    server, folder = Server(words, tmp_path), tmp_path
    for name, seed in (("old", 3), ("new", 4)):
        save(words, folder / name, seed, rank=4, targets=("all-linear",))
    server.post("/v1/load_lora_adapter", lora_name="x", lora_path="old")
    texts = {}
    for path in ("old", "new"):
        server.catalog.load("x", path, in_place=True)
        found = server.complete(model="x", max_tokens=12).json()
        texts[found["system_fingerprint"]] = found["choices"][0]["text"]
    assert len(set(texts.values())) == 2
    answers, over = [], threading.Event()

    def ask():
        while not over.is_set():
            answers.append(server.complete(model="x", max_tokens=12).json())

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for turn in range(6):
        path = ("old", "new")[turn % 2]
        server.catalog.load("x", path, in_place=True)
        latest = server.complete(model="x", max_tokens=12).json()
        expected = list(texts)[turn % 2]
        assert latest["system_fingerprint"] == expected
    over.set()
    for thread in threads:
        thread.join()
    for answer in answers:
        assert answer["choices"][0]["text"] == texts[answer["system_fingerprint"]]
    server.engine.close()


def test_an_adapters_own_template_and_way_of_asking_are_used(words, folder, tmp_path):
    import dataclasses

    for name, card in (
        ("talks", {"chat_template": "{{ messages[0].content }} dog", "rows_kind": "messages"}),
        ("prompted", {"rows_kind": "prompt", "data": {"separator": " fish"}}),
    ):
        adapter = lk.Adapter.load(folder / "small")
        dataclasses.replace(adapter, card=card).save(tmp_path / name)
    server = Server(words, tmp_path)
    found = server.post("/tokenize", model="talks", messages=[{"role": "user", "content": "red"}])
    assert found.json()["tokens"] == ids_of(server, "red dog")
    text = server.complete(model="prompted").json()["choices"][0]["text"]
    asked = ids_of(server, "red cat fish")
    assert text == server.alone("prompted", asked)
    assert server.complete("red cat fish", model="prompted").json()["choices"][0]["text"] == text
    assert server.chat("red cat", model="prompted").json()["choices"][0]["message"]["content"] == (
        text
    )
    two = [{"role": r, "content": "red"} for r in ("system", "user")]
    assert "knows no conversations" in server.chat(model="prompted", messages=two).text
    server.engine.close()


def test_a_combination_is_asked_as_all_its_adapters_were_trained(words, folder, tmp_path):
    import dataclasses

    ends = {"rows_kind": "prompt", "data": {"separator": " fish"}}
    talks = {"chat_template": "{{ messages[0].content }} dog", "rows_kind": "messages"}
    cards = {
        "one": ends,
        "two": ends,
        "other": ends | {"data": {"separator": " bird"}},
        "silent": {},
        "talks": talks,
        "talks-too": talks,
        "plain": {"rows_kind": "messages"},
    }
    for seed, (name, card) in enumerate(cards.items()):
        adapter = lk.Adapter.load(folder / ("small", "wide")[seed % 2])
        dataclasses.replace(adapter, card=card).save(tmp_path / name)
    server = Server(words, tmp_path)

    def combined(*names):
        return {"adapters": [{"name": name, "weight": 0.6} for name in names], "model": ""}

    for names in (("one", "two"), ("one", "silent")):
        asked = ids_of(server, "red cat fish")
        alone = server.alone(dict.fromkeys(names, 0.6), asked)
        for found in (server.complete(**combined(*names)), server.chat(**combined(*names))):
            assert found.json()["usage"]["prompt_tokens"] == len(asked)
        text = server.complete(**combined(*names)).json()["choices"][0]["text"]
        assert text == alone
    two = [{"role": r, "content": "red"} for r in ("system", "user")]
    refused = server.chat(messages=two, **combined("one", "two"))
    assert "one, two were trained on prompts, and know no conversations" in refused.text
    found = server.chat("red", **combined("talks", "talks-too", "silent")).json()
    assert found["usage"]["prompt_tokens"] == len(ids_of(server, "red dog"))
    for names, ways in (
        (("one", "other"), "prompts that end with ' fish'; prompts that end with ' bird'"),
        (("one", "talks"), "prompts that end with ' fish'; the chat template '{{ mess"),
        (("plain", "talks"), "the base's chat template; the chat template '{{ mess"),
    ):
        refused = server.chat("red", **combined(*names))
        assert refused.status_code == refused.json()["error"]["code"] == 400
        assert (
            f"{', '.join(names)} were not trained alike ({ways}"
            in (refused.json()["error"]["message"])
        )
    # No template is needed to go on with a text, and none of this for tokens.
    assert server.complete("red", **combined("plain", "talks")).status_code == 200
    assert server.complete("red", **combined("one", "talks")).status_code == 400
    assert server.complete([5, 6], **combined("one", "talks")).status_code == 200
    server.engine.close()
