"""A front before several servers: each request at one that holds its adapter, as it should be."""

import json
import shutil
import threading

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx2")

from lorakit.config.serve import ServeConfig
from lorakit.errors import ConfigError
from lorakit.serving.api.app import Policy
from lorakit.serving.api.keys import Keys, Rights
from lorakit.serving.fleet.member import Patience
from lorakit.serving.fleet.member_keys import read_keys
from serving.fleets import Front, Port, Slow, Upstream, chunks, until
from serving.servers import save


@pytest.fixture(scope="module")
def root(folder, tmp_path_factory):
    """A folder that all see, with a folder of adapters in it."""
    made = tmp_path_factory.mktemp("shared")
    shutil.copytree(folder, made / "served")
    return made


@pytest.fixture(scope="module")
def upstreams(words, root):
    made = [Upstream(words, root) for _ in range(2)]
    for name in ("small", "wide"):
        made[0].server.catalog.load(name, f"served/{name}")
    yield made
    for each in made:
        each.close()


@pytest.fixture(scope="module")
def front(upstreams, root):
    made = Front([each.url for each in upstreams], root / "served")
    yield made
    made.close()


@pytest.fixture
def own(folder, root, request):
    """What makes servers and fronts with a folder of their own, and ends them."""
    place, made = shutil.copytree(folder, root / request.node.name), []

    def make(kind, *given, **more):
        made.append(kind(*given, **more))
        return made[-1]

    yield make, place
    for each in reversed(made):
        each.close()


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
def test_a_front_answers_as_one_server_does(front, upstreams, named, choice):
    server = upstreams[0].server
    found, alone = front.complete(**named).json(), server.complete(**named).json()
    assert found["choices"][0]["text"] == alone["choices"][0]["text"]
    ids = server.tokenizer("red cat")["input_ids"]
    assert found["choices"][0]["text"] == server.alone(choice, ids)
    assert found["model"] == alone["model"]
    assert found["system_fingerprint"] == alone["system_fingerprint"]
    assert found["usage"]["completion_tokens"] == 5


def test_streams_are_relayed_with_the_usage_where_it_is_asked_for(front, upstreams):
    server, asked = upstreams[0].server, {"model": "wide", "stream": True}
    for more in ({}, {"stream_options": {"include_usage": True}}):
        with front.stream(**asked, **more) as events:
            found = chunks(events)
        told = server.complete(**asked, **more).text.split("\n\n")
        alone = [json.loads(each.removeprefix("data: ")) for each in told[:-2]]
        without = ("id", "created", "usage")
        keys = [{k: v for k, v in each.items() if k not in without} for each in found]
        assert keys == [{k: v for k, v in each.items() if k not in without} for each in alone]
        assert ["usage" in each for each in found] == ["usage" in each for each in alone]
    assert found[-1]["usage"]["completion_tokens"] == 5
    text = front.chat(model="wide", stream=True).text
    assert text.count("chat.completion.chunk") == 6
    assert '"usage"' not in text


def test_log_probabilities_of_prompts_come_through_a_front(front, upstreams):
    server, how = upstreams[0].server, {"model": "wide", "prompt_logprobs": 2, "max_tokens": 0}
    found, alone = front.complete(**how).json(), server.complete(**how).json()
    told = found["choices"][0]["prompt_logprobs"]
    assert told == alone["choices"][0]["prompt_logprobs"]
    assert [entry and len(entry) for entry in told] in ([None, 2], [None, 3])
    assert (
        front.chat(**how).json()["prompt_logprobs"] == server.chat(**how).json()["prompt_logprobs"]
    )
    refused = front.complete(**how, stream=True)
    assert refused.status_code == refused.json()["error"]["code"] == 400
    assert refused.json()["error"]["param"] == "prompt_logprobs"


@pytest.mark.thorough
def test_other_paths_are_relayed_too(front, upstreams):
    assert front.post("/tokenize", model="small", prompt="red cat").json()["count"] == 2
    tokens = upstreams[0].server.tokenizer("red cat")["input_ids"]
    assert front.post("/detokenize", tokens=tokens).json() == {"prompt": "red cat"}
    assert front.client.get("/tokenizer_info?model=small").json()["pad_token"] == "<pad>"
    cards = front.client.get("/v1/models").json()["data"]
    assert [(card["id"], card["parent"]) for card in cards] == [
        ("tiny", None),
        ("small", "tiny"),
        ("wide", "tiny"),
    ]
    assert cards[0]["max_model_len"] == 32
    encoded = front.post("/v1/embeddings", input="red")
    assert encoded.status_code == encoded.json()["error"]["code"] == 400
    assert "writes text" in encoded.json()["error"]["message"]
    version = front.client.get("/version").json()
    assert version == upstreams[0].server.client.get("/version").json()


def test_errors_have_the_words_of_the_names_that_were_asked_for(front):
    for body, status, message in (
        ({"model": "smal"}, 404, "did you mean 'small'?"),
        ({"temprature": 1}, 400, "did you mean 'temperature'?"),
        ({"model": "small", "prompt": "red " * 40}, 400, "maximum context length is 32"),
        ({"model": "small", "max_tokens": 0}, 400, "goes with echo"),
    ):
        for stream in (False, True):
            response = front.complete(**{"stream": stream} | body)
            assert response.status_code == response.json()["error"]["code"] == status
            assert message in response.json()["error"]["message"]
            assert "@" not in response.text


def test_requests_are_spread_and_counted(front, upstreams):
    before = front.client.get("/v1/adapters").json()["upstreams"]
    for _ in range(4):
        assert front.complete(model="small").status_code == 200
    told = front.client.get("/v1/adapters").json()
    for was, now in zip(before, told["upstreams"], strict=True):
        assert now["answered"] - was["answered"] == 2
    hashes = {each["name"]: each["content_hash"] for each in told["data"]}
    held = {f"{name}@{hashes[name][:16]}" for name in ("small", "wide")}
    assert [set(each["holds"]) for each in told["upstreams"]] == [held, held]
    assert [each.held & held for each in upstreams] == [held, held]
    small = next(each for each in told["data"] if each["name"] == "small")
    assert (small["base"], small["in_memory"]) == ("same", True)
    health = front.client.get("/health").json()
    assert health == {"status": "ok", "upstreams": ["up", "up"]}
    text = front.client.get("/metrics").text
    for line in (
        f'lora_upstream_up{{upstream="{upstreams[0].url}"}} 1.0',
        'lora_adapter_loaded{adapter_name="small",level="memory",pinned="false",rank="2"} 1.0',
        'vllm:request_success_total{finished_reason="length",model_name="tiny"}',
        'lora_generation_tokens_total{adapter_name="small",model_name="tiny"}',
    ):
        assert line in text


@pytest.mark.thorough
def test_the_least_busy_server_is_asked(front, upstreams):
    slow = [Slow(each.server.model, after=2) for each in upstreams]
    try:
        with front.stream(model="small") as events:
            next(events)
            members = front.fleet.members
            busy = max(members, key=lambda member: member.busy)
            slow[1 - members.index(busy)].end()
            before = busy.answered
            for _ in range(3):
                assert front.complete(model="small").status_code == 200
            assert busy.answered == before
            slow[members.index(busy)].end()
            chunks(events)
    finally:
        for each in slow:
            each.end()


@pytest.mark.thorough
def test_a_client_that_goes_away_frees_the_server(front, upstreams):
    slow = [Slow(each.server.model, after=2) for each in upstreams]
    try:
        with front.stream(model="small", max_tokens=20) as events:
            next(events)
        until(lambda: all(member.busy == 0 for member in front.fleet.members))
    finally:
        for each in slow:
            each.end()
    until(lambda: not any(each.server.engine.running() for each in upstreams))
    text = "".join(each.server.client.get("/metrics").text for each in upstreams)
    assert 'request_success_total{finished_reason="abort"' in text
    assert 'finished_reason="abort"' in front.client.get("/metrics").text


def test_a_reload_in_place_leaves_no_old_answers(own, words, upstreams):
    make, place = own
    upstream = upstreams[1]
    (place / "small").rename(place / "mine")
    front = make(Front, [upstream.url], place)
    old = front.complete(model="mine").json()

    def held():
        return {key for key in upstream.held if key.startswith("mine")}

    (old_key,) = held()
    slow = Slow(upstream.server.model, after=2)
    with front.stream(model="mine") as events:
        first = json.loads(next(events))
        save(words, place / "mine", 9, rank=5)
        body = {"lora_name": "mine", "lora_path": "mine", "load_inplace": True}
        loaded = front.post("/v1/load_lora_adapter", **body)
        assert loaded.text == "Success: LoRA adapter 'mine' added successfully."
        # What has begun goes on with what it began with, which stays there until then.
        assert {old_key} < held()
        slow.end()
        rest = chunks(events)
    text = "".join(c["choices"][0]["text"] for c in [first, *rest])
    assert text == old["choices"][0]["text"]
    new = front.complete(model="mine").json()
    assert new["system_fingerprint"] != first["system_fingerprint"] == old["system_fingerprint"]
    upstream.server.catalog.load("direct", str(place / "mine"))
    assert new["choices"] == upstream.server.complete(model="direct").json()["choices"]
    until(lambda: old_key not in held())
    copies = place / ".copies" / "front"
    until(lambda: len(list(copies.iterdir())) == 2)
    assert len(held()) == 1
    assert front.post("/v1/unload_lora_adapter", lora_name="mine").status_code == 200
    assert front.complete(model="mine").status_code == 404
    until(lambda: not held())
    upstream.server.catalog.unload("direct")


@pytest.mark.thorough
def test_requests_of_a_server_that_can_not_be_reached_go_to_another(own, upstreams):
    make, place = own
    port = make(Port, upstreams[0].server.app)
    front = make(Front, [port.url, upstreams[1].url], place, patience=Patience(poll_s=60.0))
    port.close()
    # Nobody has looked yet whether they answer.
    for _ in range(3):
        assert front.complete(model="small").status_code == 200
    assert front.client.get("/ready").json()["upstreams"] == ["down", "up"]


@pytest.mark.thorough
def test_a_server_that_dies_is_taken_out_and_tried_again(own, words):
    make, place = own
    dying, staying = (make(Upstream, words, place) for _ in range(2))
    front = make(Front, [dying.url, staying.url], place)
    held = dying.held
    slow = [Slow(each.server.model, after=2) for each in (dying, staying)]
    whole = []
    asking = threading.Thread(target=lambda: whole.append(front.complete(model="small")))
    with front.stream(model="small", max_tokens=20) as events:
        next(events)
        asking.start()
        until(lambda: [member.busy for member in front.fleet.members] == [1, 1])
        dying.port.close()
        *_, error, done = events
    for each in slow:
        each.end()
    asking.join()
    assert json.loads(error)["error"]["code"] == 502
    assert dying.url in json.loads(error)["error"]["message"]
    assert done == "[DONE]"
    assert whole[0].status_code == 200
    for _ in range(3):
        assert front.complete(model="small").status_code == 200
    assert front.client.get("/ready").json()["upstreams"] == ["down", "up"]
    # It has restarted, and knows nothing of what it was told.
    again = make(Upstream, words, place, port=dying.port.number)
    until(lambda: front.client.get("/ready").json()["upstreams"] == ["up", "up"])
    assert again.held == held
    staying.port.close()
    assert front.complete(model="wide").status_code == 200
    again.port.close()
    none = front.complete(model="wide")
    assert none.status_code == none.json()["error"]["code"] == 503
    assert none.headers["retry-after"]
    until(lambda: front.client.get("/ready").status_code == 503)
    assert front.client.get("/health").status_code == 200


@pytest.mark.thorough
def test_a_whole_answer_that_is_broken_off_is_502(own, words):
    make, place = own
    upstream = make(Upstream, words, place)
    front = make(Front, [upstream.url], place)
    slow = Slow(upstream.server.model, after=0)
    found = []
    asking = threading.Thread(target=lambda: found.append(front.complete(model="small")))
    asking.start()
    until(lambda: front.fleet.members[0].busy == 1 and slow.left < 0)
    upstream.port.close()
    slow.end()
    asking.join()
    assert found[0].status_code == found[0].json()["error"]["code"] == 502
    assert "has broken off the answer" in found[0].json()["error"]["message"]


@pytest.mark.thorough
def test_what_a_server_has_lost_is_loaded_once_more(own, words):
    make, place = own
    upstream = make(Upstream, words, place)
    front = make(Front, [upstream.url], place)
    expected = front.complete(model="small").json()["choices"]
    for key in upstream.held:
        upstream.server.catalog.unload(key)
    assert front.complete(model="small").json()["choices"] == expected
    with front.stream(model="wide") as events:
        assert chunks(events)
    assert len(upstream.held) == 2
    # What is in the folder by now does not answer in the place of what was loaded.
    for key in upstream.held:
        upstream.server.catalog.unload(key)
    save(words, place / "small", 9, rank=5)
    assert front.complete(model="small").json()["choices"] == expected


@pytest.mark.thorough
def test_an_answer_of_other_weights_is_none(own, words):
    make, place = own
    upstream = make(Upstream, words, place)
    front = make(Front, [upstream.url], place)
    (key,) = (key for key in upstream.held if key.startswith("small"))
    # Somebody has another adapter answer under this very name.
    upstream.server.catalog.load(key, "wide", in_place=True)
    wrong = front.complete(model="small")
    assert wrong.status_code == 502
    assert "answers with other weights" in wrong.json()["error"]["message"]
    until(lambda: front.fleet.members[0].is_up)
    assert front.complete(model="small").status_code == 200
    upstream.server.catalog.load(key, "wide", in_place=True)
    with front.stream(model="small") as events:
        (event,) = chunks(events)
    assert event["error"]["code"] == 502


@pytest.mark.thorough
def test_servers_that_do_not_belong_together_are_refused(own, words, tiny_llama, tmp_path):
    make, place = own
    upstream = make(Upstream, words, place)
    (tmp_path / "none").mkdir()
    other = make(Upstream, tiny_llama, tmp_path / "none")
    front = make(Front, [upstream.url, other.url, "http://127.0.0.1:9"], place)
    told = front.client.get("/v1/adapters").json()["upstreams"]
    assert [each["state"] for each in told] == ["up", "refused", "down"]
    assert "has other weights" in told[1]["reason"]
    with pytest.raises(ConfigError, match="does not answer"):
        Front(["http://127.0.0.1:9"], place)
    apart = make(Upstream, words, shutil.copytree(place, tmp_path / "apart"))
    with pytest.raises(ConfigError, match="the same files under the same paths"):
        Front([apart.url], place)
    bad = shutil.copytree(place / "small", place / "bad") / "adapter_model.safetensors"
    bad.write_bytes(bad.read_bytes()[:-4])
    body = {"lora_name": "bad", "lora_path": "bad"}
    response = front.post("/v1/load_lora_adapter", **body)
    assert response.status_code == 400
    assert front.post("/v1/load_lora_adapter", lora_name="x", lora_path="..").status_code == 403
    assert len(upstream.held) == 2


@pytest.mark.thorough
def test_each_adapter_is_at_as_many_servers_as_it_should_be(own, words):
    make, place = own
    servers = [make(Upstream, words, place) for _ in range(2)]
    front = make(Front, [each.url for each in servers], place, holders=1)
    assert [len(each.held) for each in servers] == [1, 1]
    for name in ("small", "wide"):
        assert front.complete(model=name).status_code == 200
    # A combination is where both are.
    both = [{"name": "small"}, {"name": "wide"}]
    assert front.complete(adapters=both).status_code == 200
    assert sorted(len(each.held) for each in servers) == [1, 2]
    servers[0].port.close()
    assert front.complete(adapters=both).status_code == 200


@pytest.mark.thorough
def test_keys_are_asked_for_on_both_sides(own, words, tmp_path):
    make, place = own
    file = tmp_path / "keys"
    upstream = make(Upstream, words, place, Policy(keys=Keys({"inner": Rights()})))
    with pytest.raises(ConfigError, match="give --upstream-key-file"):
        Front([upstream.url], place)
    file.write_text(f"# ours\nother\n{upstream.url} inner\n")
    keys = read_keys(file, [upstream.url])
    few = Rights(adapters=frozenset(["small"]), load=False)
    policy = Policy(keys=Keys({"all": Rights(), "few": few}))
    front = make(Front, [upstream.url], place, policy=policy, keys=keys, resolve=True)
    assert front.complete(model="small").status_code == 401
    assert front.client.get("/health").json()["upstreams"] == ["up"]
    front.client.headers["Authorization"] = "Bearer few"
    assert front.complete(model="wide").status_code == 403
    assert upstream.held == set()
    assert front.complete(model="small").status_code == 200
    assert {key.partition("@")[0] for key in upstream.held} == {"small"}
    assert front.post("/v1/unload_lora_adapter", lora_name="small").status_code == 403


def test_files_and_settings_that_say_something_else_are_refused(tmp_path):
    file = tmp_path / "keys"
    file.write_text("http://b key\nhttp://a one two\n")
    with pytest.raises(ConfigError, match="2 problems") as told:
        read_keys(file, ["http://a"])
    assert "http://b is none of the upstream servers" in str(told.value)
    file.write_text("# none\n")
    with pytest.raises(ConfigError, match="has no keys"):
        read_keys(file, ["http://a"])
    for settings, message in (
        ({"upstream": "a:8000"}, "begins with http"),
        ({"upstream": "http://a,http://a"}, "one server twice"),
        ({"upstream": "http://a", "slots": 3}, "slots: of a model"),
        ({"upstream_holders": 2}, "of upstream; give it too"),
    ):
        with pytest.raises(ConfigError, match=message):
            ServeConfig(**settings)
