"""Encoders behind the API: embeddings and classes, each as if its adapter were alone."""

import base64
import json
import random
import re
import shutil
import struct
from dataclasses import replace

import pytest
import torch

import lorakit as lk
from lorakit.errors import AdapterFileError, ConfigError, ModelError

pytest.importorskip("fastapi")
from starlette.testclient import TestClient

from lorakit.config.serve import ServeConfig
from lorakit.models.load import load_model
from lorakit.serving.api.app import build_app
from lorakit.serving.api.own_engine import OwnEngine
from lorakit.serving.pooling import way_of
from lorakit.serving.requests import Delta, Request
from lorakit.serving.serve import _encodes, prepared
from references import attach_random

SIZES = ("big", "old", "small")
LABELS = {"cats": ("no", "yes"), "sizes": SIZES, "dogs": ("no", "yes"), "kinds": SIZES}
TEXTS = ["red cat", "big old dog", "fish", "new bird green"]


def load(folder, labels):
    torch.manual_seed(0)
    return load_model(folder, task="classification", labels=labels)


def adapter(folder, name, **config):
    """A classifier's adapter with random weights, as training would save it."""
    model, _ = load(folder, LABELS[name])
    how = {"rank": 2 + len(name), "targets": ("all-linear",), **config}
    attach_random(model, seed=list(LABELS).index(name), std=0.3, **how)
    card = {"task": "classification", "labels": LABELS[name]}
    return replace(lk.extract(model), card=card)


@pytest.fixture(scope="module")
def adapters(tiny_bert, tmp_path_factory):
    root = tmp_path_factory.mktemp("classifiers")
    for name in LABELS:
        adapter(tiny_bert, name, use_dora=name == "sizes").save(root / name)
    headless, _ = load(tiny_bert, None)
    attach_random(headless, seed=9, std=0.3, rank=2, targets=("q",), modules_to_save=())
    lk.extract(headless).save(root / "headless")
    return root


@pytest.fixture(scope="module")
def server(tiny_bert, adapters):
    engine, catalog = prepared(ServeConfig(adapters=adapters, model=str(tiny_bert), name="tiny"))
    engine.start()
    yield engine, TestClient(build_app(OwnEngine(engine, catalog)), raise_server_exceptions=False)
    engine.close(drain=False)


@pytest.fixture
def post(server):
    return lambda path, **body: server[1].post(path, json=body)


@pytest.fixture(scope="module")
def expected(tiny_bert, adapters):
    """The embedding and logits of each text, each adapter attached to a model of its own."""
    return {
        (name, text): found
        for name in (*LABELS, "headless", None)
        for text, found in zip(TEXTS, alone(tiny_bert, adapters, name), strict=True)
    }


def alone(folder, root, name):
    model, tokenizer = load(folder, LABELS.get(name))
    if name is not None:
        lk.attach(model, root / name)
    for text in TEXTS:
        batch = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            hidden = model.bert(**batch).last_hidden_state[0]
            logits = model(**batch).logits[0]
        yield torch.nn.functional.normalize(hidden.mean(0), dim=0), logits


def test_each_text_has_the_classes_that_its_adapter_gives_alone(post, expected):
    for name, labels in LABELS.items():
        data = post("/v1/classify", model=name, input=TEXTS).json()["data"]
        for text, each in zip(TEXTS, data, strict=True):
            _, logits = expected[name, text]
            assert each["probs"] == pytest.approx(logits.softmax(-1).tolist(), abs=2e-6)
            assert each["label"] == labels[int(logits.argmax())]
            assert each["num_classes"] == len(labels)


@pytest.mark.thorough
def test_rows_with_unlike_heads_are_in_one_batch(tiny_bert, adapters, expected):
    engine, catalog = prepared(ServeConfig(adapters=adapters, model=str(tiny_bert), name="tiny"))
    draw = random.Random(0)
    for _ in range(40):
        rows = draw.choices([*LABELS, None], k=draw.randrange(1, 7))
        texts = draw.choices(TEXTS, k=len(rows))
        told = [ask(engine, catalog, name, text) for name, text in zip(rows, texts, strict=True)]
        with torch.no_grad():
            engine._step()
        for name, text, deltas in zip(rows, texts, told, strict=True):
            embedding, logits = expected[name, text]
            output = deltas[0].output
            if name is None:
                torch.testing.assert_close(output, embedding, atol=2e-6, rtol=0)
            else:
                torch.testing.assert_close(output[: len(logits)], logits, atol=1e-5, rtol=1e-5)
                assert all(output[len(logits) :] == float("-inf"))


def ask(engine, catalog, name, text):
    """What a request that waits in a queue will be told."""
    chosen, told = catalog.choose(name), list[Delta]()
    request = Request(
        prompt=chosen.tokenizer(text)["input_ids"],
        use=chosen.use,
        tokenizer=chosen.tokenizer,
        deliver=told.append,
        goal="embedding" if name is None else "classes",
    )
    engine.queue.put([request])
    return told


def test_embeddings_are_pooled_and_of_length_one(post, expected):
    for name in (None, "headless"):
        found = post("/v1/embeddings", model=name, input=TEXTS).json()
        for text, each in zip(TEXTS, found["data"], strict=True):
            embedding, _ = expected[name, text]
            assert each["embedding"] == pytest.approx(embedding.tolist(), abs=2e-6)
    assert found["usage"]["prompt_tokens"] == sum(len(text.split()) for text in TEXTS)


def test_the_forms_of_an_input_mean_the_same(post, tiny_bert):
    _, tokenizer = load(tiny_bert, None)
    ids = tokenizer("red cat")["input_ids"]
    forms = ["red cat", ["red cat"], ids, [ids], {"text": "red cat"}, [{"text": "red cat"}]]
    made = [post("/v1/embeddings", input=form).json()["data"][0]["embedding"] for form in forms]
    assert all(each == pytest.approx(made[0], abs=1e-6) for each in made)
    coded = post("/v1/embeddings", input="red cat", encoding_format="base64").json()
    raw = base64.b64decode(coded["data"][0]["embedding"])
    assert struct.unpack(f"<{len(raw) // 4}f", raw) == pytest.approx(made[0], abs=1e-6)
    pair = post("/v1/embeddings", input={"text": "red", "text_pair": "cat"}).json()
    assert pair["usage"]["prompt_tokens"] == 2


def test_a_long_list_is_answered_in_order(post):
    texts = [TEXTS[at % 4] for at in range(150)]
    data = post("/v1/embeddings", input=texts).json()["data"]
    assert [each["index"] for each in data] == list(range(150))
    assert data[0]["embedding"] == pytest.approx(data[148]["embedding"], abs=1e-6)


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v1/classify", {"model": "tiny"}, "no trained head"),
        ("/v1/classify", {"model": "headless"}, "no trained head"),
        (
            "/v1/classify",
            {"adapters": [{"name": "cats"}, {"name": "sizes"}]},
            "do not have the same classes",
        ),
        (
            "/v1/classify",
            {"adapters": [{"name": "cats"}, {"name": "dogs"}]},
            "another number of classes",
        ),
        (
            "/v1/embeddings",
            {"model": "cats"},
            "cats was trained for classification, and gives no embeddings: ask /v1/classify",
        ),
        ("/v1/embeddings", {"input": []}, "give 1 to 2,048"),
        ("/v1/embeddings", {"input": [[]]}, "no tokens"),
        ("/v1/embeddings", {"input": [7000]}, "no token id"),
        ("/v1/embeddings", {"input": "red " * 33}, "maximum context length is 32"),
        ("/v1/embeddings", {"dimensions": 7}, "have 32"),
        ("/v1/embeddings", {"inputs": "red"}, "did you mean 'input'"),
        ("/v1/embeddings", {"model": "cat"}, "cats"),
        ("/v1/completions", {"prompt": "red"}, "is an encoder"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "red"}]},
            "is an encoder",
        ),
    ],
)
def test_what_is_refused_says_why(post, path, body, message):
    text = {} if "completions" in path else {"input": "red"}
    response = post(path, **(text | body))
    assert response.status_code in (400, 404)
    assert message in response.json()["error"]["message"]


def test_a_long_text_is_cut_where_that_is_asked(post):
    cut = post("/v1/embeddings", input="red " * 40, truncate_prompt_tokens=-1).json()
    assert cut["usage"]["prompt_tokens"] == 32
    short = post("/v1/embeddings", input="red cat dog", truncate_prompt_tokens=2).json()
    assert short["usage"]["prompt_tokens"] == 2


def test_a_combination_of_classifiers_adds_their_updates(post):
    pair = [{"name": "sizes", "weight": 0.5}, {"name": "kinds", "weight": 0.5}]
    response = post("/v1/classify", input="red", adapters=pair)
    assert response.status_code == 200, response.text
    found = response.json()["data"][0]
    assert found["labels"] == ["big", "old", "small"]
    assert sum(found["probs"]) == pytest.approx(1)


def test_fingerprints_do_not_depend_on_the_head_that_is_drawn(server, tiny_bert, adapters):
    torch.manual_seed(123)
    _, catalog = prepared(ServeConfig(adapters=adapters, model=str(tiny_bert), name="tiny"))
    again = catalog.choose("cats").fingerprint
    own = server[1].post("/v1/classify", json={"model": "cats", "input": "red"}).json()
    assert own["system_fingerprint"] == again


def test_answers_of_an_encoder_are_no_texts_that_depend_on_a_batch(tiny_bert):
    with pytest.raises(ConfigError, match="models that write text"):
        prepared(ServeConfig(model=str(tiny_bert), batch_invariant=True))


def test_a_base_is_an_encoder_by_its_config(tiny_bert, tiny_llama):
    assert _encodes(str(tiny_bert))
    assert not _encodes(str(tiny_llama))


def test_a_base_pools_as_its_files_say(tiny_bert, tmp_path):
    place = tmp_path / "pooled"
    shutil.copytree(tiny_bert, place)
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [{"path": p, "type": f"sentence_transformers.models.{kind}"} for p, kind in kinds]
    (place / "modules.json").write_text(json.dumps(modules))
    (place / "1_Pooling").mkdir()
    pooling = place / "1_Pooling" / "config.json"
    pooling.write_text('{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}')
    model, _ = load(place, None)
    assert way_of(model) == "cls_token"
    pooling.write_text('{"pooling_mode_weightedmean_tokens": true}')
    with pytest.raises(ModelError, match="weightedmean_tokens"):
        way_of(model)


@pytest.mark.thorough
def test_minilm_gives_the_embeddings_of_its_own_recipe():
    engine, catalog = prepared(ServeConfig(model="minilm"))
    engine.start()
    client = TestClient(build_app(OwnEngine(engine, catalog)))
    texts = ["A cat sits on the mat.", "A kitten lies on a rug.", "Stocks fell sharply today."]
    data = client.post("/v1/embeddings", json={"input": texts}).json()["data"]
    engine.close()
    found = torch.tensor([each["embedding"] for each in data])
    model, tokenizer = load_model("minilm", task="classification")
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        hidden = model.bert(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    expected = (hidden * mask).sum(1) / mask.sum(1)
    torch.testing.assert_close(found, expected / expected.norm(dim=1, keepdim=True))
    assert found[0] @ found[1] > 0.5 > 0.2 > found[0] @ found[2]


def test_adapters_of_embeddings_are_served_on_a_base_without_a_head(tiny_bert, adapters, tmp_path):
    model, tokenizer = load_model(tiny_bert, task="embedding")
    attach_random(model, seed=3, std=0.3, rank=2, targets=("q", "v"))
    near = replace(lk.extract(model), card={"task": "embedding"})
    near.save(tmp_path / "near")
    settings = ServeConfig(adapters=tmp_path, model=str(tiny_bert), name="tiny")
    engine, catalog = prepared(settings)
    engine.start()
    client = TestClient(build_app(OwnEngine(engine, catalog)))
    body = {"model": "near", "input": TEXTS}
    found = client.post("/v1/embeddings", json=body).json()["data"]
    refused = client.post("/v1/classify", json=body)
    engine.close()
    for text, each in zip(TEXTS, found, strict=True):
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        expected = torch.nn.functional.normalize(hidden, dim=0)
        assert each["embedding"] == pytest.approx(expected.tolist(), abs=2e-6)
    assert (
        "near was trained for embedding, and gives no classes: ask /v1/embeddings" in refused.text
    )
    shutil.copytree(adapters / "cats", tmp_path / "of-classes")
    refusal = "of-classes: the adapter does classification, and this model was loaded for embedding"
    with pytest.raises(ConfigError, match=refusal) as error:
        prepared(settings)
    assert len(str(error.value).splitlines()) == 2


def test_an_adapter_of_another_task_is_refused_by_its_task(
    tiny_bert, tiny_llama, adapters, tmp_path
):
    for task, base in (("embedding", tiny_bert), ("generation", tiny_llama)):
        model, _ = load_model(base, task=task)
        attach_random(model, seed=3, std=0.3, rank=2, targets=("q", "v"))
        replace(lk.extract(model), card={"task": task}).save(tmp_path / task)
    shutil.copytree(adapters / "cats", tmp_path / "classification")
    refused = []
    for base, own in ((tiny_bert, "classification"), (tiny_llama, "generation")):
        folder = tmp_path / f"of-{own}"
        folder.mkdir()
        _, catalog = prepared(ServeConfig(model=str(base), name="tiny", adapters=folder))
        for task in ("classification", "embedding", "generation"):
            place = shutil.copytree(tmp_path / task, folder / task)
            if task == own:
                catalog.load(place.name, str(place))
                continue
            with pytest.raises(AdapterFileError) as error:
                catalog.load(place.name, str(place))
            refused.append(str(error.value))
    assert len(refused) == 4
    for line in refused:
        assert "\n" not in line
        assert re.fullmatch(
            r"the adapter does \w+, and this model was loaded for \w+: load .*", line
        )
