"""The API: OpenAI's and vLLM's forms, and the right weights."""

import pytest

pytest.importorskip("fastapi")
from serving.servers import Server, events, ids_of


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


def test_a_stream_gives_the_prompt_back_before_a_text_that_is_kept_back(server):
    first = server.alone("wide", ids_of(server, "red cat"), 1)
    how = {"model": "wide", "echo": True, "stop": [f"{first} no such words"]}
    whole = server.complete(**how).json()["choices"][0]["text"]
    assert whole.startswith("red cat")
    streamed = events(server.complete(**how, stream=True))
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == whole


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


@pytest.mark.parametrize("asks", ["complete", "chat"])
def test_each_field_of_sampling_reaches_the_engine(server, monkeypatch, asks):
    came = []
    submit = server.engine.submit
    monkeypatch.setattr(server.engine, "submit", lambda given: came.extend(given) or submit(given))
    fields = {
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 9,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "logit_bias": {"7": -3.5},
        "seed": 11,
    }
    more = {
        "stop": ["fish", "dog"],
        "stop_token_ids": [6],
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "max_tokens": 3,
        "n": 2,
    }
    alternatives = {"complete": {"logprobs": 4}, "chat": {"logprobs": True, "top_logprobs": 4}}
    ask = getattr(server, asks)
    assert ask(**fields, **more, **alternatives[asks]).status_code == 200
    for number, request in enumerate(came):
        expected = fields | {"logit_bias": {7: -3.5}, "seed": 11 + number, "alternatives": 4}
        assert vars(request.sampling) == expected
        assert (request.stops, request.stop_tokens) == (("fish", "dog"), frozenset({6}))
        assert (request.include_stop, request.skip_special) == (True, False)
        assert (request.max_tokens, request.ends) == (3, frozenset())
    assert len(came) == 2
    assert ask(top_k=-1, temperature=None, ignore_eos=False).status_code == 200
    assert (came[2].sampling.top_k, came[2].sampling.temperature) == (0, 1.0)
    assert came[2].ends


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
        'lora_adapter_loaded{adapter_name="small",level="memory",pinned="false",rank="2"} 1.0',
        'lora_adapter_loaded{adapter_name="wide",level="memory",pinned="false",rank="7"} 1.0',
        f'lora_adapter_bytes{{adapter_name="wide"}} {server.catalog.bank.size_bytes("wide"):.1f}',
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
