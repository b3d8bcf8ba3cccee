"""The API: OpenAI's and vLLM's forms, every error in one envelope, and the right weights."""

import json
import os
import shutil
import threading

import pytest

import lorakit as lk
from lorakit.errors import ConfigError

pytest.importorskip("fastapi")
from lorakit.models.load import load_model
from lorakit.serving.api.app import Policy
from lorakit.serving.api.guard import check_host
from lorakit.serving.api.keys import Keys, Rights
from lorakit.serving.refusals import RefusalError
from serving.servers import DEFAULTS, Server, save


@pytest.fixture(scope="module")
def server(words, folder):
    made = Server(words, folder)
    yield made
    made.engine.close(drain=False)


def ids_of(server, text):
    return server.tokenizer(text)["input_ids"]


def events(response):
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("named", "choice"),
    [
        ({"model": "tiny"}, None),
        ({"model": "small"}, "small"),
        ({"model": "tiny:wide"}, "wide"),
        ({"model": "", "adapter_id": "small"}, "small"),
        (
            {"adapters": [{"name": "small", "weight": 0.7}, {"name": "wide", "weight": 0.4}]},
            {"small": 0.7, "wide": 0.4},
        ),
    ],
)
def test_a_request_is_answered_by_the_weights_that_it_names(server, named, choice):
    found = server.complete(**named).json()
    expected = server.alone(choice, ids_of(server, "red cat"))
    assert found["choices"][0]["text"] == expected
    assert found["object"] == "text_completion"
    assert found["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 5,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert found["choices"][0]["finish_reason"] == "length"


def test_fingerprints_tell_weights_apart(server):
    names = ["tiny", "small", "wide", "tiny:small"]
    prints = [server.complete(model=name).json()["system_fingerprint"] for name in names]
    assert prints[1] == prints[3]
    assert len(set(prints)) == 3


def test_several_prompts_and_answers_come_in_order(server):
    body = {"prompt": ["red cat", "old"], "n": 2, "temperature": 1.0, "seed": 5}
    found = server.complete(**body).json()
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
    again = server.complete(**body).json()
    assert found["choices"] == again["choices"]
    ids = ids_of(server, "red cat")
    assert server.complete(prompt=[ids, ids]).json()["usage"]["completion_tokens"] == 10


def test_a_stream_gives_the_same_text_and_the_usage(server):
    whole = server.complete(model="wide").json()
    stream = server.complete(model="wide", stream=True, stream_options={"include_usage": True})
    chunks = events(stream)
    assert (
        "".join(c["choices"][0]["text"] for c in chunks if c["choices"])
        == (whole["choices"][0]["text"])
    )
    finishes = [c["choices"][0]["finish_reason"] for c in chunks if c["choices"]]
    assert [f for f in finishes if f] == ["length"]
    assert chunks[-1]["usage"] == whole["usage"]
    assert chunks[-1]["choices"] == []
    assert {c["system_fingerprint"] for c in chunks} == {whole["system_fingerprint"]}


def test_chat_goes_through_the_template_and_streams(server):
    found = server.chat("red cat", model="small").json()
    asked = ids_of(server, "user red cat bird")
    message = found["choices"][0]["message"]
    assert message["role"] == "assistant"
    assert message["content"] == server.alone("small", asked)
    assert found["object"] == "chat.completion"
    chunks = events(server.chat("red cat", model="small", stream=True))
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert (
        "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == (message["content"])
    )
    parts = [{"role": "user", "content": [{"type": "text", "text": "red cat"}]}]
    assert server.chat(messages=parts, model="small").json()["choices"] == found["choices"]


def test_log_probabilities_have_openais_forms(server):
    found = server.complete(logprobs=2, echo=True, max_tokens=2).json()["choices"][0]
    told = found["logprobs"]
    assert found["text"].startswith("red cat")
    assert told["tokens"][:2] == ["red", "cat"]
    assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
    assert len(told["tokens"]) == len(told["token_logprobs"]) == len(told["text_offset"]) == 4
    assert all(2 <= len(top) <= 3 for top in told["top_logprobs"][1:])
    only = server.complete(logprobs=1, echo=True, max_tokens=0).json()["choices"][0]
    assert only["text"] == "red cat"
    assert only["logprobs"]["token_logprobs"][1] == pytest.approx(told["token_logprobs"][1])
    content = server.chat(logprobs=True, top_logprobs=3).json()["choices"][0]["logprobs"]["content"]
    assert len(content) == 5
    assert content[0]["bytes"] == list(content[0]["token"].encode())
    assert len(content[0]["top_logprobs"]) == 3
    best = content[0]["top_logprobs"][0]
    assert (best["token"], best["logprob"]) == (content[0]["token"], content[0]["logprob"])


def test_stops_end_answers(server):
    whole = server.alone("wide", ids_of(server, "red cat"), 8)
    stop = whole.split()[-1]
    found = server.complete(model="wide", max_tokens=8, stop=[stop]).json()["choices"][0]
    assert (found["finish_reason"], found["stop_reason"]) == ("stop", stop)
    assert found["text"] == whole.partition(stop)[0]
    kept = {"stop": stop, "include_stop_str_in_output": True}
    found = server.complete(model="wide", max_tokens=8, **kept).json()["choices"][0]
    assert found["text"] == whole.partition(stop)[0] + stop


BAD = [
    ({"model": "smal"}, 404, "The model `smal` does not exist; did you mean 'small'?"),
    ({"model": "tiny:nobody"}, 404, "`nobody` does not exist"),
    ({"adapter_id": "smoll"}, 404, "did you mean 'small'"),
    ({"temprature": 1}, 400, "unknown field temprature; did you mean 'temperature'?"),
    (
        {"stream": True, "stream_options": {"usage": True}},
        400,
        "unknown field stream_options.usage",
    ),
    ({"adapters": [{"name": "small", "wieght": 1}]}, 400, "did you mean 'weight'"),
    ({"adapters": [{"name": "small"}], "model": "wide"}, 400, "adapters too: give one"),
    ({"adapters": []}, 400, "adapters: "),
    ({"temperature": -1}, 400, "temperature: "),
    ({"temperature": "warm"}, 400, "temperature: "),
    ({"top_p": 0, "n": 99}, 400, "top_p: "),
    ({"max_tokens": -1}, 400, "max_tokens: "),
    ({"repetition_penalty": 1e-300}, 400, "repetition_penalty: "),
    ({"prompt": ""}, 400, "the prompt is empty"),
    ({"prompt": []}, 400, "prompt is an empty list"),
    ({"prompt": [1, 9999]}, 400, "9999 is no token id"),
    ({"prompt": "red " * 40}, 400, "maximum context length is 32 tokens"),
    ({"prompt": 5}, 400, "prompt: "),
    ({"prompt": None}, 400, "prompt: "),
    ({"logit_bias": {"99999": 1}}, 400, "99999 is no token id"),
    ({"stop_token_ids": [-1]}, 400, "-1 is no token id"),
    ({"best_of": 4}, 400, "best_of must be n"),
    ({"suffix": "end"}, 400, "suffix: "),
    ({"stream_options": {"include_usage": True}}, 400, "goes with stream: true"),
    ({"max_tokens": 0}, 400, "goes with echo"),
]


@pytest.mark.parametrize(("body", "status", "message"), BAD, ids=lambda x: str(x)[:40])
def test_a_bad_request_says_what_is_wrong(server, body, status, message):
    response = server.complete(**body)
    error = response.json()["error"]
    assert response.status_code == error["code"] == status
    assert message in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == {400: "BadRequestError", 404: "NotFoundError"}[status]


BAD_CHATS = [
    ({"messages": []}, "messages: "),
    ({"messages": [{"role": "assistant", "content": "red"}]}, "nothing to answer"),
    ({"messages": [{"role": "user", "content": "red", "nam": "x"}]}, "did you mean 'name'"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
    ({"top_logprobs": 3}, "goes with logprobs: true"),
    ({"max_completion_tokens": 3}, "are the same: give one"),
    ({"tools": [{"type": "function"}]}, "tools.0"),
    ({"response_format": {"type": "xml"}}, "response_format.type: "),
]


@pytest.mark.parametrize(("body", "message"), BAD_CHATS, ids=lambda x: str(x)[:40])
def test_a_bad_conversation_says_what_is_wrong(server, body, message):
    response = server.chat(**body)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


def test_errors_of_http_have_the_envelope_too(server):
    broken = server.client.post(
        "/v1/completions", content="{", headers={"content-type": "application/json"}
    )
    assert broken.status_code == broken.json()["error"]["code"] == 400
    # Half of a surrogate pair, which no UTF-8 can tell again.
    half = server.client.post(
        "/v1/completions",
        content='{"prompt": "red", "\\ud800": 1}',
        headers={"content-type": "application/json"},
    )
    assert half.status_code == half.json()["error"]["code"] == 400
    twice = server.client.post(
        "/v1/completions",
        content='{"prompt": "red", "adapters": [{"name": "small", "name": "wide"}]}',
        headers={"content-type": "application/json"},
    )
    assert twice.status_code == twice.json()["error"]["code"] == 400
    assert "'name' more than once" in twice.json()["error"]["message"]
    for method, path, status in (
        ("GET", "/nowhere", 404),
        ("GET", "/v1/completions", 405),
        ("GET", "/v1/models/nobody", 404),
    ):
        response = server.client.request(method, path)
        assert response.status_code == response.json()["error"]["code"] == status


def test_lenient_servers_ignore_unknown_fields(words, folder):
    server = Server(words, folder, Policy(lenient=True, most_bytes=500))
    assert server.complete(temprature=1).status_code == 200
    assert server.complete(prompt="red " * 500).status_code == 413
    long = iter([b'{"prompt": "', b"red " * 300, b'"}'])
    headers = {"content-type": "application/json"}
    response = server.client.post("/v1/completions", content=long, headers=headers)
    assert response.status_code == response.json()["error"]["code"] == 413
    server.engine.close()
    ended = server.complete()
    assert ended.status_code == ended.json()["error"]["code"] == 503
    assert ended.headers["retry-after"]
    assert server.client.get("/ready").status_code == 503


def test_a_full_queue_is_429(words, folder):
    server = Server(words, folder, slots=1, waiting_requests=1)
    response = server.complete(prompt=["red", "cat", "old"])
    assert response.status_code == response.json()["error"]["code"] == 429
    assert response.headers["retry-after"] == "1"
    with server.engine.queue.reserved(1):
        # The body is not even read, in which something is wrong.
        assert server.complete(temprature=1).status_code == 429
    assert server.complete(temprature=1).status_code == 400
    server.engine.close()


def test_an_error_of_the_model_is_500_and_an_event(server):
    def fail(*_):
        raise RuntimeError("out of memory")

    hook = server.model.register_forward_pre_hook(fail)
    response = server.complete()
    assert response.status_code == response.json()["error"]["code"] == 500
    assert "out of memory" in response.json()["error"]["message"]
    (event,) = events(server.complete(stream=True))
    assert event["error"]["code"] == 500
    hook.remove()
    assert server.complete().status_code == 200


def test_models_are_listed_with_their_parents(server):
    listed = server.client.get("/v1/models").json()["data"]
    assert [(card["id"], card["parent"]) for card in listed] == [
        ("tiny", None),
        ("small", "tiny"),
        ("wide", "tiny"),
    ]
    assert server.client.get("/v1/models/small").json() == listed[1]


def test_tokenize_and_detokenize(server):
    found = server.post("/tokenize", prompt="red cat", return_token_strs=True).json()
    assert found["token_strs"] == ["red", "cat"]
    assert found["count"] == 2
    assert server.post("/detokenize", tokens=found["tokens"]).json() == {"prompt": "red cat"}
    messages = [{"role": "user", "content": "red"}]
    assert server.post("/tokenize", messages=messages).json()["count"] == 3
    assert server.post("/detokenize", tokens=[12345]).status_code == 400


def test_health_version_and_metrics(server):
    server.complete(model="small")
    assert server.client.get("/health").status_code == 200
    assert server.client.get("/version").json()["version"]
    text = server.client.get("/metrics").text
    for line in (
        'vllm:num_requests_running{model_name="tiny"} 0.0',
        'vllm:request_success_total{finished_reason="length",model_name="tiny"}',
        'vllm:time_to_first_token_seconds_bucket{le="0.01",model_name="tiny"}',
        'vllm:lora_requests_info{max_lora="4",running_lora_adapters="",waiting_lora_adapters=""}',
        'lora_adapter_loaded{adapter_name="small",level="memory"} 1.0',
        'lora_requests_total{adapter_name="small",model_name="tiny"}',
    ):
        assert line in text
    paths = server.client.get("/openapi.json").json()["paths"]
    assert {"/v1/completions", "/v1/chat/completions", "/v1/load_lora_adapter"} <= set(paths)
    told = paths["/v1/load_lora_adapter"]["post"]["responses"]
    assert {status: list(each.get("content", {})) for status, each in told.items()} == {
        "200": ["text/plain"],
        "4XX": ["application/json"],
        "5XX": ["application/json"],
    }


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
    model, _ = load_model(words)
    lk.attach(model, lk.PrefixConfig(prefix=2))
    lk.extract(model).save(folder / "tokens")
    for path, status, words in (
        (str(outside), 403, "not within the folder"),
        ("../outside", 403, "not within the folder"),
        ("linked", 403, "not within the folder"),
        ("inner", 403, "a link in it leaves"),
        ("nowhere", 404, "there is no adapter folder"),
        ("null\0", 400, "is no path"),
        ("long" * 2000, 400, "is no path"),
        ("tokens", 400, "virtual tokens"),
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


def test_keys_open_the_api_and_nothing_else_does(words, folder, tmp_path):
    file = tmp_path / "keys"
    file.write_text("# ours\nsecret-one\n\nsecret-two\n")
    server = Server(words, folder, Policy(keys=Keys.read(file)))
    for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret-one"}):
        refused = server.client.get("/v1/models", headers=header)
        assert refused.status_code == refused.json()["error"]["code"] == 401
        assert refused.headers["www-authenticate"] == "Bearer"
    for key in ("secret-one", "secret-two"):
        header = {"Authorization": f"Bearer {key}"}
        assert server.client.get("/v1/models", headers=header).status_code == 200
    assert server.client.get("/health").status_code == 200
    assert server.client.get("/metrics").status_code == 401
    server.engine.close()
    check_host("0.0.0.0", Keys.read(file))
    with pytest.raises(ConfigError, match="other machines"):
        check_host("0.0.0.0", Keys())
    file.write_text("# none\n")
    with pytest.raises(ConfigError, match="has no keys"):
        Keys.read(file)
    file.write_text("one lod=no\ntwo load=maybe\nthree requests=0 adapters=a\n")
    with pytest.raises(ConfigError, match="3 problems") as told:
        Keys.read(file)
    assert "line 1: lod=no is none of" in str(told.value)
    assert "did you mean 'load'" in str(told.value)
    assert "three" not in str(told.value)


def test_keys_have_the_rights_that_their_line_says(words, folder, tmp_path):
    file = tmp_path / "keys"
    file.write_text("boss\nguest adapters=small load=no requests=4\n")
    server = Server(words, folder, Policy(keys=Keys.read(file)))
    header = {"Authorization": "Bearer guest"}
    asked = DEFAULTS | {"prompt": "red"}

    def ask(path="/v1/completions", **body):
        return server.client.post(path, json=body, headers=header)

    assert ask(**asked | {"model": "small"}).status_code == 200
    barred = ask(**asked, adapters=[{"name": "small"}, {"name": "wide"}])
    assert barred.status_code == barred.json()["error"]["code"] == 403
    assert "may not ask wide; it may ask the base, small" in barred.json()["error"]["message"]
    assert ask("/v1/unload_lora_adapter", lora_name="small").status_code == 403
    assert ask(**asked).status_code == 200
    fifth = ask(**asked)
    assert fifth.status_code == 429
    assert 0 < int(fifth.headers["retry-after"]) <= 61
    header["Authorization"] = "Bearer boss"
    assert ask(**asked | {"model": "wide"}).status_code == 200
    server.engine.close()


def test_a_minute_goes_by():
    rights = Rights(requests=2)
    for now in (0.0, 30.0, 60.5, 90.5):
        rights.count_request(now)
    with pytest.raises(RefusalError, match="2 requests a minute") as told:
        rights.count_request(91.0)
    assert told.value.retry_after_s == 30


def test_a_prompt_that_begins_like_another_is_read_from_there(words, folder):
    server = Server(words, folder)
    prompt = "red cat old dog new bird big fish small green blue"
    first = server.complete(prompt, model="wide").json()
    again = server.complete(prompt, model="wide").json()
    base = server.complete(prompt).json()
    text = server.client.get("/metrics").text
    server.engine.close()
    assert first["choices"] == again["choices"]
    cached = [each["usage"]["prompt_tokens_details"]["cached_tokens"] for each in (first, again)]
    assert cached == [0, 10]
    assert base["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert 'vllm:prefix_cache_queries_total{model_name="tiny"} 33.0' in text
    assert 'vllm:prefix_cache_hits_total{model_name="tiny"} 10.0' in text
