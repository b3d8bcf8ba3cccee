"""Keys: who may ask what, and how often."""

import pytest

from lorakit.errors import ConfigError

pytest.importorskip("fastapi")
from lorakit.serving.api.app import Policy
from lorakit.serving.api.guard import check_host
from lorakit.serving.api.keys import Keys, Rights
from lorakit.serving.refusals import RefusalError
from serving.servers import DEFAULTS, Server


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


def test_a_key_sees_no_adapters_but_those_that_it_may_ask(words, folder, tmp_path):
    file = tmp_path / "keys"
    file.write_text("boss\nguest adapters=small,gone load=no\n")
    server = Server(words, folder, Policy(keys=Keys.read(file)))
    server.catalog.unload("small")

    def get(path, key):
        return server.client.get(path, headers={"Authorization": f"Bearer {key}"}).json()

    for key, loaded, left, loads in (
        ("boss", ["wide"], ["small"], True),
        ("guest", [], ["small"], False),
    ):
        assert [card["id"] for card in get("/v1/models", key)["data"]] == ["tiny", *loaded]
        told = get("/v1/adapters", key)
        assert [each["name"] for each in told["data"]] == loaded
        assert (told["not_loaded"], told["loads"]) == (left, loads)
    server.catalog.load("small", "small")
    assert [card["id"] for card in get("/v1/models", "guest")["data"]] == ["tiny", "small"]
    assert [each["name"] for each in get("/v1/adapters", "guest")["data"]] == ["small"]
    # Nor does an error name others, or tell whether there are any.
    for name in ("wide", "nobody"):
        refused = server.client.post(
            "/v1/completions",
            json=DEFAULTS | {"prompt": "red", "model": name},
            headers={"Authorization": "Bearer guest"},
        )
        assert refused.status_code == 403
        assert refused.json()["error"]["message"] == (
            f"this key may not ask {name}; it may ask the base, gone, small"
        )
    unknown = get("/v1/models/gone", "guest")["error"]
    assert (unknown["code"], "small" in unknown["message"]) == (404, True)
    assert "wide" not in unknown["message"]
    server.engine.close()


def test_a_key_loads_and_reads_metrics_of_what_it_may_ask(words, folder, tmp_path):
    file = tmp_path / "keys"
    file.write_text("boss\nguest adapters=small\n")
    server = Server(words, folder, Policy(keys=Keys.read(file)))

    def told(key):
        return server.client.get("/metrics", headers={"Authorization": f"Bearer {key}"}).text

    def post(path, key, **body):
        header = {"Authorization": f"Bearer {key}"}
        return server.client.post(path, json=body, headers=header)

    asked = DEFAULTS | {"prompt": "red", "model": ""}
    for adapters in (["small"], ["wide"], ["small", "wide"]):
        named = [{"name": name} for name in adapters]
        assert post("/v1/completions", "boss", **asked, adapters=named).status_code == 200
    for name in ("wide", "small+wide"):
        assert f'lora_requests_total{{adapter_name="{name}"' in told("boss")
    seen = told("guest")
    assert "wide" not in seen
    assert 'lora_requests_total{adapter_name="small",model_name="tiny"} 1.0' in seen
    assert 'lora_adapter_loaded{adapter_name="small"' in seen
    assert 'vllm:request_success_total{finished_reason="length",model_name="tiny"} 3.0' in seen
    # Under its own name it gets nobody else's adapter either.
    for body in (
        {"lora_name": "wide", "lora_path": "small"},
        {"lora_name": "small", "lora_path": "wide"},
        {"lora_name": "small", "lora_path": f"{folder}/wide/."},
    ):
        refused = post("/v1/load_lora_adapter", "guest", **body, load_inplace=True)
        assert refused.status_code == 403, body
        assert "may not ask wide" in refused.json()["error"]["message"]
    assert post("/v1/unload_lora_adapter", "guest", lora_name="wide").status_code == 403
    own = {"lora_name": "small", "lora_path": "small"}
    assert post("/v1/load_lora_adapter", "guest", **own, load_inplace=True).status_code == 200
    server.engine.close()


def test_labels_that_list_adapters_have_only_those_that_may_be_named(server):
    from prometheus_client.core import GaugeMetricFamily

    from lorakit.serving.api.metrics import Gauges, Metrics

    class Running(Gauges):
        def collect(self):
            labels = ["running_lora_adapters", "waiting_lora_adapters"]
            info = GaugeMetricFamily("vllm:lora_requests_info", "In use.", labels=labels)
            info.add_metric(["small,wide", "wide"], 1.0)
            yield info

    text = Metrics(server.catalog, Running()).text(lambda name: name == "small").decode()
    assert 'lora_requests_info{running_lora_adapters="small",waiting_lora_adapters=""} 1.0' in text
    assert "wide" not in text
