"""A tiny server with adapters, and a client of it."""

import json

from starlette.testclient import TestClient

import lorakit as lk
from lorakit.models.load import load_model
from lorakit.serving.api.app import build_app
from lorakit.serving.api.own_engine import OwnEngine
from lorakit.serving.catalog import Catalog
from lorakit.serving.engine import Engine
from lorakit.serving.worker import Limits
from references import attach_random
from serving.engines import greedy_alone

TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}bird{% endif %}"
)

DEFAULTS = {"model": "tiny", "temperature": 0, "max_tokens": 5, "ignore_eos": True}


class Server:
    """A tiny server, and a client of it."""

    def __init__(self, model_folder, adapters, policy=None, *, resolve=False, hub=None, **limits):
        self.model, tokenizer = load_model(model_folder)
        tokenizer.chat_template = TEMPLATE
        self.tokenizer = tokenizer
        self.engine = Engine(self.model, Limits(**({"slots": 4} | limits)))
        self.catalog = Catalog(
            self.model, tokenizer, "tiny", folder=adapters, resolve=resolve, hub=hub
        )
        self.catalog.load_all()
        self.engine.start()
        self.app = build_app(OwnEngine(self.engine, self.catalog), policy)
        self.client = TestClient(self.app, raise_server_exceptions=False)

    def post(self, path, **body):
        return self.client.post(path, json=body)

    def complete(self, prompt="red cat", **body):
        body = DEFAULTS | {"prompt": prompt} | body
        return self.post("/v1/completions", **body)

    def chat(self, text="red cat", **body):
        messages = [{"role": "user", "content": text}]
        body = DEFAULTS | {"messages": messages} | body
        return self.post("/v1/chat/completions", **body)

    def alone(self, choice, prompt, count=5):
        ids = greedy_alone(self.catalog.bank, choice, prompt, count)
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def save(model_folder, place, seed=0, **config):
    model, _ = load_model(model_folder)
    attach_random(model, seed=seed, std=0.3, **config)
    return lk.extract(model).save(place, overwrite=True)


def ids_of(server, text):
    return server.tokenizer(text)["input_ids"]


def events(response):
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]
