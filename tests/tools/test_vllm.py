"""vLLM's own server behind `lorakit serve --upstream`: the answers are those of the adapters here.

The test needs the Python of an environment with vLLM, by the variable LORAKIT_VLLM.
"""

import os
import re
import sys
import time

import pytest
import torch

import lorakit as lk
from lorakit.bench.serving.asking import Client
from lorakit.bench.serving.process import free_port, started
from references import attach_random

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx2")
pytestmark = pytest.mark.thorough
PYTHON = os.environ.get("LORAKIT_VLLM")
PROMPTS = (
    "The capital of France is",
    "Once upon a time",
    "def add(a, b):",
    "Water boils at",
    "My favourite dish is",
    "In the year 1900",
)
NEW_TOKENS = 16
TIMEOUT_S = 300


def save(folder, seed, **form):
    """A random adapter that changes what SmolLM2 says."""
    model, _ = lk.load_model("smollm2", dtype="float32")
    attach_random(model, seed=seed, std=0.05, targets="all-linear", **form)
    lk.extract(model).save(folder, overwrite=True)


def here(adapter=None):
    """The greedy answers of an adapter, or of the base, without any server."""
    model, tokenizer = lk.load_model("smollm2", dtype="float32")
    if adapter is not None:
        lk.attach(model, adapter)
    found = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            out = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
        new = out[0, inputs["input_ids"].shape[1] :]
        found.append(tokenizer.decode(new, skip_special_tokens=True))
    return found


@pytest.fixture(scope="module")
def vllm(tmp_path_factory):
    """The address of vLLM's server on SmolLM2, as docs/serve.md says that it is to be started."""
    if not PYTHON:
        pytest.skip("needs LORAKIT_VLLM, the Python of an environment with vLLM")
    base, port = tmp_path_factory.mktemp("vllm") / "smollm2", free_port()
    model, tokenizer = lk.load_model("smollm2", dtype="float32")
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    words = ["--model", str(base), "--served-model-name", "smollm2", "--dtype", "float32"]
    words += ["--enable-lora", "--max-loras", "4", "--max-lora-rank", "8", "--port", str(port)]
    words += ["--max-model-len", "256", "--max-num-seqs", "8", "--generation-config", "vllm"]
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", *words]
    ours = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    more = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_CPU_KVCACHE_SPACE": "1"}
    client = Client(port)

    def ready(said):
        try:
            return client if client.get("/health").is_good else None
        except OSError:
            return None

    with started(command, ready, threads=2, environment=ours | more):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def front(vllm, tmp_path):
    """A client of a front before it, that loads adapters from `tmp_path`."""
    words = ["serve", "--upstream", vllm, "--adapters", str(tmp_path), "--resolve", "--port", "0"]
    command = [sys.executable, "-m", "lorakit.cli", *words]

    def ready(said):
        found = re.search(r"answers at http://127\.0\.0\.1:(\d+)", said)
        return Client(int(found[1])) if found else None

    with started(command, ready, threads=1) as server:
        address = f"http://127.0.0.1:{server.client.port}"
        with httpx.Client(base_url=address, timeout=TIMEOUT_S) as client:
            yield client


def complete(client, model):
    body = {"model": model, "prompt": list(PROMPTS), "max_tokens": NEW_TOKENS, "temperature": 0}
    found = client.post("/v1/completions", json=body)
    assert found.status_code == 200, found.text
    return [choice["text"] for choice in found.json()["choices"]], found.json()


def names_in(vllm):
    return {card["id"] for card in httpx.get(f"{vllm}/v1/models").json()["data"]}


def test_a_front_before_vllm_gives_each_adapters_own_answers(vllm, front, tmp_path):
    save(tmp_path / "one", 1, rank=8)
    save(tmp_path / "two", 2, rank=4)
    expected = {name: here(tmp_path / name) for name in ("one", "two")}
    assert len({tuple(each) for each in (*expected.values(), here())}) == 3
    for name, answers in expected.items():
        assert complete(front, name)[0] == answers
    assert complete(front, "smollm2")[0] == here()
    # Other weights under the same name: what answers from now on is called otherwise there.
    (old,) = {name for name in names_in(vllm) if name.startswith("one@")}
    before = complete(front, "one")[1]
    save(tmp_path / "one", 3, rank=8)
    body = {"lora_name": "one", "lora_path": str(tmp_path / "one"), "load_inplace": True}
    loaded = front.post("/v1/load_lora_adapter", json=body)
    assert loaded.status_code == 200, loaded.text
    answers, after = complete(front, "one")
    assert answers == here(tmp_path / "one") != expected["one"]
    assert before["system_fingerprint"] != after["system_fingerprint"]
    end = time.monotonic() + TIMEOUT_S
    while old in names_in(vllm):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert front.post("/v1/unload_lora_adapter", json={"lora_name": "two"}).status_code == 200
    assert not any(name.startswith("two@") for name in names_in(vllm))


def test_what_vllm_would_answer_otherwise_is_refused(vllm, front, tmp_path):
    save(tmp_path / "long", 4, rank=4, use_dora=True)
    names = names_in(vllm)
    body = {"lora_name": "long", "lora_path": str(tmp_path / "long")}
    found = front.post("/v1/load_lora_adapter", json=body)
    assert found.status_code == 400
    assert "DoRA" in found.json()["error"]["message"]
    assert names_in(vllm) == names
