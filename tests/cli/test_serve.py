"""`lorakit serve` as a process: it answers, and at SIGTERM ends once its answers are whole."""

import contextlib
import json
import os
import re
import signal
import socket
import time

import pytest
from transformers import AutoTokenizer

import lorakit as lk
from forks import Forks
from lorakit.cli.main import main
from references import attach_random
from tiny_models import build

httpx = pytest.importorskip("httpx2")
pytest.importorskip("uvicorn")

SERVE = """
import sys
from lorakit.cli.main import main
sys.exit(main(["serve", *sys.argv[1:]]))
"""
TIMEOUT_S = 60


@pytest.fixture(scope="module")
def adapters(tiny_llama, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    model, _ = lk.load_model(tiny_llama)
    attach_random(model, std=0.3, rank=2)
    lk.extract(model).save(root / "mine")
    return root


def free_port():
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return made.getsockname()[1]


def wait_for(client):
    end = time.monotonic() + TIMEOUT_S
    while time.monotonic() < end:
        with contextlib.suppress(httpx.TransportError):
            return client.get("/ready").raise_for_status()
        time.sleep(0.05)
    raise AssertionError("the server did not start")


@pytest.mark.thorough
def test_a_server_answers_over_http_and_drains_at_sigterm(forks, tiny_llama, adapters):
    port = free_port()
    words = ["--model", str(tiny_llama), "--name", "tiny", "--adapters", str(adapters)]
    server = forks.start(SERVE, *words, "--port", str(port))
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT_S) as client:
        wait_for(client)
        names = [card["id"] for card in client.get("/v1/models").json()["data"]]
        assert names == ["tiny", "mine"]
        body = {"model": "mine", "prompt": "red", "max_tokens": 20, "temperature": 0}
        body |= {"ignore_eos": True}
        whole = client.post("/v1/completions", json=body).raise_for_status().json()
        body |= {"stream": True}
        with client.stream("POST", "/v1/completions", json=body) as response:
            lines = (line for line in response.iter_lines() if line)
            first = next(lines)
            os.kill(server.pid, signal.SIGTERM)
            rest = list(lines)
    assert rest[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in (first, *rest[:-1])]
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert text == whole["choices"][0]["text"]
    code, printed, problem = server.finish()
    assert (code, printed) == (0, "")
    assert f"http://127.0.0.1:{port}/v1" in problem
    assert "those that came are answered" in problem


@pytest.fixture(scope="module")
def long_llama(tiny_llama, tmp_path_factory):
    """A tiny model with room for answers that take seconds."""
    place = tmp_path_factory.mktemp("models") / "long"
    build("llama", max_position_embeddings=8192).save_pretrained(place)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.save_pretrained(place)
    return place


@pytest.mark.thorough
def test_closed_connections_free_their_slots(forks, long_llama):
    port = free_port()
    server = forks.start(SERVE, "--model", str(long_llama), "--slots", "1", "--port", str(port))
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT_S) as client:
        wait_for(client)
        endless = {"prompt": "red", "max_tokens": 8000, "ignore_eos": True}
        with client.stream("POST", "/v1/completions", json=endless | {"stream": True}) as response:
            next(response.iter_lines())
        with pytest.raises(httpx.TimeoutException):
            client.post("/v1/completions", json=endless, timeout=0.3)
        # The one slot is free again, or this would wait for 8,000 tokens.
        body = {"prompt": "red", "max_tokens": 2, "ignore_eos": True}
        assert client.post("/v1/completions", json=body).json()["usage"]["completion_tokens"] == 2
        metrics = client.get("/metrics").text
    assert 'finished_reason="abort"' in metrics
    assert 'request_success_total{finished_reason="length",model_name' in metrics
    (written,) = re.findall(r"^vllm:generation_tokens_total.* ([0-9.]+)$", metrics, re.MULTILINE)
    assert float(written) < 8000
    os.kill(server.pid, signal.SIGTERM)
    assert server.finish()[0] == 0


@pytest.mark.thorough
def test_a_second_signal_ends_at_once(forks, long_llama):
    port = free_port()
    server = forks.start(SERVE, "--model", str(long_llama), "--port", str(port))
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT_S) as client:
        wait_for(client)
        endless = {"prompt": "red", "max_tokens": 8000, "ignore_eos": True, "stream": True}
        with client.stream("POST", "/v1/completions", json=endless) as response:
            lines = response.iter_lines()
            next(lines)
            os.kill(server.pid, signal.SIGTERM)
            with httpx.Client(base_url=client.base_url, timeout=TIMEOUT_S) as other:
                while other.get("/ready").status_code == 200:
                    time.sleep(0.02)
                refused = other.post("/v1/completions", json=endless)
                assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
            os.kill(server.pid, signal.SIGTERM)
            with contextlib.suppress(httpx.TransportError):
                count = sum(1 for _ in lines)
                assert count < 8000
    code, printed, problem = server.finish()
    assert (code, printed) == (0, "")
    assert "told twice: ending at once" in problem
    assert "Traceback" not in problem


def told(capsys, *words):
    assert main(["serve", *map(str, words)]) == 2
    return capsys.readouterr().err


def test_mistakes_are_told_before_anything_slow(capsys, tiny_llama, adapters, tmp_path):
    assert "--api-key-file" in told(capsys, "--model", tiny_llama, "--host", "0.0.0.0")
    assert "name the base" in told(capsys, "--adapters", adapters)
    missing = told(capsys, "--model", tiny_llama, "--api-key-file", tmp_path / "none")
    assert "cannot be read" in missing
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert "can't listen" in told(capsys, "--model", tiny_llama, "--port", port)


def test_adapters_that_cannot_be_served_are_all_told(capsys, tiny_llama, adapters, tmp_path):
    for name in ("one", "two"):
        place = tmp_path / name
        place.mkdir()
        (place / "adapter_config.json").write_text("{}")
    problem = told(capsys, "--model", tiny_llama, "--adapters", tmp_path, "--port", 0)
    assert "2 problems" in problem
    assert "one: " in problem
    assert "two: " in problem


@pytest.mark.thorough
def test_a_front_has_a_server_answer_and_leaves_nothing_behind(
    tmp_path_factory, tiny_llama, adapters
):
    # `forks` runs one program at a time.
    ports = [free_port(), free_port()]
    several = [Forks(tmp_path_factory.mktemp("forks")) for _ in ports]
    words = ["--adapters", str(adapters), "--port"]
    server = several[0].start(
        SERVE, "--model", str(tiny_llama), "--name", "tiny", *words, str(ports[0])
    )
    url = f"http://127.0.0.1:{ports[0]}"
    with (
        httpx.Client(base_url=url, timeout=TIMEOUT_S) as behind,
        httpx.Client(base_url=f"http://127.0.0.1:{ports[1]}", timeout=TIMEOUT_S) as client,
    ):
        wait_for(behind)
        front = several[1].start(SERVE, "--upstream", url, *words, str(ports[1]))
        wait_for(client)
        body = {"model": "mine", "prompt": "red", "max_tokens": 20, "temperature": 0}
        body |= {"ignore_eos": True}
        expected = behind.post("/v1/completions", json=body).json()
        found = client.post("/v1/completions", json=body).json()
        assert found["choices"] == expected["choices"]
        names = [card["id"] for card in behind.get("/v1/models").json()["data"]]
        assert [name.partition("@")[0] for name in names] == ["tiny", "mine", "mine"]
        with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
            lines = (line for line in response.iter_lines() if line)
            next(lines)
            os.kill(front.pid, signal.SIGTERM)
            assert list(lines)[-1] == "data: [DONE]"
        assert front.finish()[:2] == (0, "")
        names = [card["id"] for card in behind.get("/v1/models").json()["data"]]
        assert names == ["tiny", "mine"]
    assert not any((adapters / ".copies").iterdir())
    os.kill(server.pid, signal.SIGTERM)
    assert server.finish()[:2] == (0, "")
    for each in several:
        each.close()
