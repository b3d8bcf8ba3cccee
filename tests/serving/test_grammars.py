"""Answers that a grammar bounds: their forms, and where they end."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("llguidance")
from starlette.testclient import TestClient

from lorakit.errors import LorakitError
from lorakit.models.load import load_model
from lorakit.serving.api.app import build_app
from lorakit.serving.api.own_engine import OwnEngine
from lorakit.serving.catalog import Catalog
from lorakit.serving.engine import Engine
from lorakit.serving.grammars import Grammars, Rule
from lorakit.serving.worker import Limits
from tiny_models import build
from tiny_tokenizers import build_tokenizer

SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def post(tmp_path_factory):
    place = tmp_path_factory.mktemp("models") / "bytes"
    tokenizer = build_tokenizer(merges=('{"', '":'))
    build("llama", vocab_size=300, max_position_embeddings=1024).save_pretrained(place)
    tokenizer.save_pretrained(place)
    model, tokenizer = load_model(place)
    engine = Engine(model, Limits(slots=4))
    catalog = Catalog(model, tokenizer, "bytes")
    engine.start()
    client = TestClient(build_app(OwnEngine(engine, catalog)), raise_server_exceptions=False)

    def send(path="/v1/chat/completions", **body):
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 120} | body
        if path != "/v1/chat/completions":
            body.pop("messages")
        return client.post(path, json={"temperature": 1.0, "seed": 3} | body)

    yield send
    engine.close(drain=False)


def form(schema=SCHEMA):
    return {"type": "json_schema", "json_schema": {"name": "form", "schema": schema}}


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_every_answer_obeys_its_schema_and_ends_where_that_ends(post, temperature):
    found = post(response_format=form(), n=4, temperature=temperature).json()
    for choice in found["choices"]:
        assert choice["finish_reason"] == "stop"
        assert 1 <= json.loads(choice["message"]["content"])["age"] <= 99


def test_other_words_for_what_an_answer_must_be(post):
    for words, texts in (
        ({"guided_choice": ["yes", "no"]}, {"yes", "no"}),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, {"yes", "no"}),
        ({"guided_regex": "[ab]c"}, {"ac", "bc"}),
        ({"structured_outputs": {"grammar": 'start: "x" | "y"'}}, {"x", "y"}),
    ):
        found = post("/v1/completions", prompt="hi", n=4, **words).json()
        assert {choice["text"] for choice in found["choices"]} <= texts, words
    for words in ({"guided_json": SCHEMA}, {"structured_outputs": {"json": json.dumps(SCHEMA)}}):
        found = post("/v1/completions", prompt="hi", **words).json()
        assert "age" in json.loads(found["choices"][0]["text"])


def test_rows_with_and_without_grammars_share_a_batch(post):
    free = post(seed=9, max_tokens=12).json()["choices"][0]["message"]["content"]
    with ThreadPoolExecutor(4) as pool:
        bound = [pool.submit(post, guided_choice=["yes", "no"], seed=at) for at in range(6)]
        again = pool.submit(post, seed=9, max_tokens=12)
        texts = {b.result().json()["choices"][0]["message"]["content"] for b in bound}
    assert texts <= {"yes", "no"}
    assert again.result().json()["choices"][0]["message"]["content"] == free


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"response_format": form({"type": "wrong"})}, "cannot be compiled"),
        ({"guided_regex": "("}, "cannot be compiled"),
        ({"guided_grammar": "nothing"}, "cannot be compiled"),
        ({"guided_json": "{"}, "cannot be compiled"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "give one"),
        ({"response_format": {"type": "json_schema"}}, "json_schema"),
    ],
)
def test_what_cannot_be_obeyed_is_refused(post, body, message):
    response = post(**body)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


def test_a_token_that_is_not_allowed_is_an_error():
    matcher = Grammars(build_tokenizer(), 300).compiled(Rule.of_choice(["a"]), frozenset())
    allowed = matcher.allowed()
    assert int(allowed.sum()) == 1
    with pytest.raises(LorakitError, match="grammar failed"):
        matcher.take(int((~allowed).nonzero()[0]))
