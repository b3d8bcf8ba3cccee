"""A front before a stand-in for vLLM's server: what it is asked, and what is refused."""

import dataclasses

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx2")

import lorakit as lk
from lorakit.errors import ConfigError
from lorakit.serving.fleet.version import vllm_obstacles
from references import attach_random
from serving.engines import KINDS
from serving.fleets import Front, Port, Upstream, chunks, until
from serving.servers import save
from serving.vllm_stand_in import VllmStandIn
from tiny_models import build

LOADS = "/v1/load_lora_adapter"
ASKS = "/v1/completions"


@pytest.fixture
def vllm():
    made = VllmStandIn()
    port = Port(made.app)
    made.url = port.url
    yield made
    port.close()


@pytest.fixture
def front(words, folder, tmp_path, vllm):
    save(words, tmp_path / "plain", 3, rank=4, targets=("q", "v"))
    made = Front([vllm.url], tmp_path)
    yield made
    made.close()


def test_adapters_answer_under_names_of_their_content(front, vllm):
    (name,) = vllm.adapters
    assert name.startswith("plain@")
    found = front.complete(model="plain").json()
    base = front.complete().json()
    asked = [body["model"] for body in vllm.bodies(ASKS)]
    assert asked == [name, "tiny"]
    assert (found["model"], base["model"]) == ("plain", "tiny")
    assert found["system_fingerprint"] != base["system_fingerprint"]
    with front.stream(model="plain") as events:
        (chunk,) = chunks(events)
    assert (chunk["model"], chunk["system_fingerprint"]) == ("plain", found["system_fingerprint"])
    assert vllm.bodies(ASKS)[-1]["stream_options"] == {"include_usage": True}
    vllm.adapters.clear()
    assert front.complete(model="plain").status_code == 200
    assert set(vllm.adapters) == {name}
    unknown = front.complete(model="plane")
    assert "did you mean 'plain'" in unknown.json()["error"]["message"]
    assert front.post("/v1/unload_lora_adapter", lora_name="plain").status_code == 200
    until(lambda: not vllm.adapters)
    assert 'lora_generation_tokens_total{adapter_name="plain"' in front.client.get("/metrics").text


@pytest.mark.thorough
def test_what_is_there_under_a_name_is_not_trusted(front, vllm, words, tmp_path):
    save(words, tmp_path / "late", 5, rank=2)
    name = f"late@{lk.Adapter.load(tmp_path / 'late').content_hash()[:16]}"
    vllm.adapters[name] = "/somewhere/else"
    response = front.post(LOADS, lora_name="late", lora_path="late")
    assert response.status_code == 200
    assert lk.Adapter.load(vllm.adapters[name]).content_hash()[:16] == name.partition("@")[2]


def test_an_adapter_is_asked_as_it_was_trained(front, vllm, tmp_path):
    cards = {
        "prompted": {"rows_kind": "prompt", "data": {"separator": ' "fish"\n'}, "end_tokens": [7]},
        "talks": {"rows_kind": "messages", "chat_template": "{{ messages }}"},
    }
    for name, card in cards.items():
        adapter = lk.Adapter.load(tmp_path / "plain")
        dataclasses.replace(adapter, card=card).save(tmp_path / name)
        assert front.post(LOADS, lora_name=name, lora_path=name).status_code == 200
    front.complete("red", model="prompted", stop_token_ids=[5], ignore_eos=False)
    front.complete(["red", 'old "fish"\n'], model="prompted")
    front.complete([1, 2], model="prompted")
    prompts = [body["prompt"] for body in vllm.bodies(ASKS)]
    assert prompts == ['red "fish"\n', ['red "fish"\n', 'old "fish"\n'], [1, 2]]
    assert vllm.bodies(ASKS)[0]["stop_token_ids"] == [5, 7]
    front.chat(model="prompted")
    front.chat(model="talks")
    asked = vllm.bodies("/v1/chat/completions")
    template = '{{ messages[0].content }}{{ " \\"fish\\"\\n" }}'
    assert (asked[0]["chat_template"], asked[0]["add_special_tokens"]) == (template, True)
    assert asked[1]["chat_template"] == "{{ messages }}"
    two = [{"role": role, "content": "red"} for role in ("system", "user")]
    assert "knows no conversations" in front.chat(model="prompted", messages=two).text
    front.complete(guided_choice=["red", "old"])
    assert vllm.bodies(ASKS)[-1]["structured_outputs"] == {"choice": ["red", "old"]}
    assert "guided_choice" not in vllm.bodies(ASKS)[-1]


def adapter_of(config):
    model = build("gpt2" if isinstance(config, dict) and "bias" in config else "llama")
    if isinstance(config, dict):
        attach_random(model, **config)
    else:
        lk.attach(model, config)
    return lk.extract(model)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"rank": 2, "rank_pattern": {"v": 4}}, "different ranks (2, 4)"),
        ({"rank": 2, "alpha_pattern": {"v": 4}}, "different scales"),
        ({"rank": 2, "use_dora": True}, "it is DoRA"),
        ({"rank": 2, "bias": "all"}, "it has trained biases"),
        ({"rank": 2, "modules_to_save": ("lm_head",)}, "modules of its own (lm_head)"),
        (lk.PrefixConfig(prefix=2), "made by prefix"),
    ],
)
def test_what_vllm_can_not_serve_has_a_reason(config, reason):
    adapter = adapter_of(config)
    problems = vllm_obstacles(adapter)
    assert any(reason in problem for problem in problems), problems


def test_what_vllm_can_not_serve_is_refused_before_anything_is_sent(front, vllm, words, tmp_path):
    assert vllm_obstacles(lk.Adapter.load(tmp_path / "plain")) == []
    save(words, tmp_path / "dora", 1, **KINDS["dora"])
    before = len(vllm.sent)
    refused = front.post(LOADS, lora_name="dora", lora_path="dora")
    assert refused.status_code == 400
    assert "it is DoRA" in refused.json()["error"]["message"]
    weighted = front.complete(adapters=[{"name": "plain", "weight": 0.5}])
    assert weighted.status_code == 400
    assert "can't weight or combine" in weighted.json()["error"]["message"]
    assert len(vllm.sent) == before
    assert front.complete(adapters=[{"name": "plain", "weight": 1}]).status_code == 200


@pytest.mark.thorough
def test_a_server_of_lorakit_takes_what_vllm_can_not(words, tmp_path, vllm):
    save(words, tmp_path / "plain", 3, rank=4)
    save(words, tmp_path / "dora", 1, **KINDS["dora"])
    upstream = Upstream(words, tmp_path)
    front = Front([vllm.url, upstream.url], tmp_path)
    try:
        assert {key.partition("@")[0] for key in vllm.adapters} == {"plain"}
        assert {key.partition("@")[0] for key in upstream.held} == {"plain", "dora"}
        alone = upstream.server.complete(model="dora").json()
        for _ in range(2):
            assert front.complete(model="dora").json()["choices"] == alone["choices"]
        both = [{"name": "plain", "weight": 0.5}, {"name": "dora"}]
        assert front.complete(adapters=both).status_code == 200
        answers = {front.complete(model="plain").json()["system_fingerprint"] for _ in range(4)}
        # vLLM does not tell which weights its base has.
        assert len(answers) == 2
    finally:
        front.close()
        upstream.close()


def test_what_vllm_needs_is_said(words, tmp_path):
    save(words, tmp_path / "plain", 3, rank=4)
    port = Port(VllmStandIn(loads=False).app)
    with pytest.raises(ConfigError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        Front([port.url], tmp_path)
    port.close()
