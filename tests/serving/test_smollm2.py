"""A real model is served: its chat template, its tokenizer's spaces, adapters beside the base."""

import pytest

import lorakit as lk
from references import attach_random

pytest.importorskip("fastapi")
from starlette.testclient import TestClient

from lorakit.serving.api.app import build_app
from lorakit.serving.api.own_engine import OwnEngine
from lorakit.serving.catalog import Catalog
from lorakit.serving.engine import Engine
from lorakit.serving.worker import Limits
from serving.engines import greedy_alone

PROMPT = "The capital of France is"


@pytest.mark.thorough
def test_smollm2_answers_over_the_api_as_generate_does(tmp_path):
    model, tokenizer = lk.load_model("smollm2")
    for seed, name in enumerate(("one", "two")):
        attach_random(model, seed=seed, std=0.1, rank=4, targets=("all-linear",))
        lk.extract(model).save(tmp_path / name)
        lk.detach(model)
    engine = Engine(model, Limits(slots=3))
    catalog = Catalog(model, tokenizer, "smollm2", folder=tmp_path)
    catalog.load_all()
    ids = tokenizer(PROMPT)["input_ids"]
    alone = {
        name: tokenizer.decode(greedy_alone(catalog.bank, choice, ids, 6))
        for name, choice in (("smollm2", None), ("one", "one"), ("two", "two"))
    }
    assert "Paris" in alone["smollm2"]
    assert len(set(alone.values())) == 3
    engine.start()
    client = TestClient(build_app(OwnEngine(engine, catalog)))
    body = {"prompt": PROMPT, "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    for name, text in alone.items():
        found = client.post("/v1/completions", json=body | {"model": name}).json()
        assert found["choices"][0]["text"] == text
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    chat = {"messages": messages, "max_tokens": 12, "temperature": 0}
    answer = client.post("/v1/chat/completions", json=chat).json()["choices"][0]["message"]
    assert "Paris" in answer["content"]
    assert engine.close()
