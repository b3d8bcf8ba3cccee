"""`examples/ray_serve.py`: two replicas, each request at one that has its adapter."""

import os
import signal
import socket
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("httpx2")
pytest.importorskip("fastapi")

import httpx2 as httpx

from serving.servers import DEFAULTS, Server
from tools.environments import OF_RAY, python_of

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 180
pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def client(words, folder, tmp_path_factory):
    """A client of the example, which runs in processes of its own."""
    with socket.socket() as taken:
        # The example listens at Ray Serve's own port.
        if taken.connect_ex(("127.0.0.1", 8000)) == 0:
            pytest.skip("port 8000 is taken")
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "RAY_USAGE_STATS_ENABLED": "0"}
    environment |= OF_RAY
    example = [
        str(python_of("ray")),
        str(ROOT / "examples" / "ray_serve.py"),
        str(words),
        str(folder),
    ]
    told = tmp_path_factory.mktemp("ray") / "log"
    with told.open("w") as log:
        process = subprocess.Popen(
            example,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # A shell has what it starts in the background ignore Ctrl-C, and what that starts too.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
    made = httpx.Client(base_url="http://127.0.0.1:8000", timeout=TIMEOUT_S, trust_env=False)
    try:
        wait_for(made, process, told)
        yield made
    finally:
        made.close()
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def wait_for(client, process, told):
    end = time.monotonic() + TIMEOUT_S
    while time.monotonic() < end:
        assert process.poll() is None, told.read_text()[-3000:]
        try:
            if client.get("/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise AssertionError(told.read_text()[-3000:])


def test_two_replicas_answer_with_the_adapters_that_are_asked_for(client, words, folder):
    alone = Server(words, folder)
    replicas: dict[str, list[str]] = {name: [] for name in ("small", "wide")}
    for turn in range(8):
        for name, used in replicas.items():
            response = client.post(
                "/v1/completions", json=DEFAULTS | {"prompt": "red cat", "model": name}
            )
            expected = alone.complete(model=name).json()
            assert response.json()["choices"] == expected["choices"], turn
            assert response.json()["system_fingerprint"] == expected["system_fingerprint"]
            used.append(response.headers["x-replica"])
    alone.engine.close()
    # Once it is known who has an adapter, it is asked.
    assert [len(set(used[-4:])) for used in replicas.values()] == [1, 1]
    # What nobody has goes to either.
    asked = [DEFAULTS | {"prompt": "red", "model": f"nobody{number}"} for number in range(12)]
    responses = [client.post("/v1/completions", json=each) for each in asked]
    assert {each.status_code for each in responses} == {404}
    others = {each.headers["x-replica"] for each in responses}
    assert len({*others, *replicas["small"], *replicas["wide"]}) == 2


def test_streams_and_errors_come_through(client):
    asked = DEFAULTS | {"prompt": "red cat", "model": "small"}
    with client.stream("POST", "/v1/completions", json=asked | {"stream": True}) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert len(lines) == 6
    unknown = client.post("/v1/completions", json=asked | {"model": "smal"})
    assert unknown.status_code == unknown.json()["error"]["code"] == 404
    broken = client.post("/v1/completions", content=b"{")
    assert broken.status_code == 400
