"""What the API refuses: every error in one envelope, with what was wrong and what to do."""

import pytest

pytest.importorskip("fastapi")
from lorakit.serving.api.app import Policy
from serving.servers import Server, events

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
    ({"max_tokens": 0}, 400, "goes with echo or prompt_logprobs"),
    ({"prompt_logprobs": -1}, 400, "prompt_logprobs: Input should be greater than or equal to 0"),
    ({"prompt_logprobs": 21}, 400, "prompt_logprobs: Input should be less than or equal to 20"),
    ({"prompt_logprobs": "all"}, 400, "prompt_logprobs: "),
    (
        {"prompt_logprobs": 0, "stream": True},
        400,
        "prompt_logprobs: Value error, goes with stream: false",
    ),
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
    ({"prompt_logprobs": 99}, "prompt_logprobs: Input should be less than or equal to 20"),
    (
        {"prompt_logprobs": 1, "stream": True},
        "prompt_logprobs: Value error, goes with stream: false",
    ),
    ({"max_tokens": 0}, "ask for prompt_logprobs"),
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
    server = Server(words, folder, slots=1, waiting_requests=2)
    with server.engine.queue.reserved(1):
        response = server.complete(prompt=["red", "cat"])
        assert response.status_code == response.json()["error"]["code"] == 429
        assert response.headers["retry-after"] == "1"
    with server.engine.queue.reserved(2):
        # The body is not even read, in which something is wrong.
        assert server.complete(temprature=1).status_code == 429
    assert server.complete(temprature=1).status_code == 400
    server.engine.close()


def test_more_answers_than_may_ever_wait_are_400(words, folder):
    server = Server(words, folder, slots=4, waiting_requests=3)
    assert server.complete(prompt=["red", "cat", "old"]).status_code == 200
    many = [server.complete(prompt=["red", "cat"], n=2), server.chat("red", n=4)]
    for response in many:
        assert response.status_code == response.json()["error"]["code"] == 400
        assert "retry-after" not in response.headers
        assert (
            "are 4 answers, and no more than 3 requests may wait (the server's waiting_req"
            in (response.json()["error"]["message"])
        )
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
