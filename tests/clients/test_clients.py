"""Clients that others wrote, each in an environment of its own, ask `lorakit serve`."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("fastapi")

import lorakit as lk
from clients.make import NPM, PACKAGES, place
from lorakit.bank import AdapterBank
from lorakit.models.load import load_model
from serving.calling import save_calling_model
from serving.engines import KINDS
from serving.servers import save

SESSIONS = Path(__file__).parent / "sessions"
KEY = "secret-key"
TIMEOUT_S = 600
SCHEMATHESIS_CASES = 2000
"""The fewest that have to be made of the schema."""
DRAWN_PER_PATH = 120
"""Of them, beside a thousand that cover each rule of the schema in turn."""

pytestmark = [pytest.mark.clients, pytest.mark.thorough]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The folder of a tiny model that calls tools, and of two adapters."""
    root = tmp_path_factory.mktemp("clients")
    save_calling_model(root / "tiny")
    for seed, name in enumerate(("small", "wide")):
        save(root / "tiny", root / "adapters" / name, seed, **KINDS[name])
    return root


@pytest.fixture(scope="module")
def url(root):
    """A server of them with a process of its own, and a key."""
    keys = root / "keys"
    keys.write_text(f"{KEY}\n")
    start = "import sys; from lorakit.cli.main import main; sys.exit(main())"
    words = ["serve", str(root / "adapters"), "--model", str(root / "tiny"), "--name", "tiny"]
    words += [
        "--dtype",
        "float32",
        "--prefix-bytes",
        "0",
        "--port",
        "0",
        "--api-key-file",
        str(keys),
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", start, *words], stderr=subprocess.PIPE, text=True
    )
    told = ""
    while "answers at" not in told:
        line = process.stderr.readline()
        assert line, told
        told += line
    yield re.search(r"answers at (http\S+)/v1", told)[1]
    process.terminate()
    assert process.wait(60) == 0
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()


def environment_of(name):
    folder = place() / name
    if not folder.is_dir():
        pytest.skip(f"needs the client: python tests/clients/make.py {name}")
    return folder


def run(*words, **more):
    """What a session printed; none may fail."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment = clean | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(more["cwd"]),
        "NO_COLOR": "1",
        "OPENAI_API_KEY": "",
        "no_proxy": "127.0.0.1",
    }
    done = subprocess.run(
        list(map(str, words)),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=environment,
        **more,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    return done.stdout


@pytest.mark.parametrize("name", sorted(PACKAGES.keys() - {"schemathesis", "lm_eval"}))
def test_a_client_is_answered(url, name, tmp_path):
    python = environment_of(name) / "bin" / "python"
    run(python, "-W", "ignore", SESSIONS / f"with_{name}.py", url, KEY, cwd=tmp_path)


def test_lm_eval_gets_the_scores_that_lorakit_computes(root, url, tmp_path):
    python = environment_of("lm_eval") / "bin" / "python"
    run(python, "-W", "ignore", SESSIONS / "with_lm_eval.py", url, KEY, cwd=tmp_path)
    scores = json.loads((tmp_path / "scores.json").read_text())
    model, tokenizer = load_model(root / "tiny", dtype="float32")
    bank = AdapterBank(model)
    bank.add("wide", lk.Adapter.load(root / "adapters" / "wide"))
    assert len(scores) == 5
    for each in scores:
        ids = tokenizer(each["context"] + each["continuation"])["input_ids"]
        start = len(tokenizer(each["context"])["input_ids"])
        with bank.route("wide"), torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        own = sum(float(logprobs[at - 1, ids[at]]) for at in range(start, len(ids)))
        assert each["score"] == pytest.approx(own, abs=1e-4)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node")
def test_openais_client_for_node_is_answered(url, tmp_path):
    run("node", SESSIONS / "with_npm.mjs", url, KEY, environment_of(NPM), cwd=tmp_path)


def test_no_case_of_schemathesis_fails_the_server(url, tmp_path):
    program = environment_of("schemathesis") / "bin" / "schemathesis"
    words = ["run", f"{url}/openapi.json", "--header", f"Authorization: Bearer {KEY}"]
    words += ["--phases", "examples,coverage,fuzzing", "--request-timeout", "60"]
    words += ["--max-examples", str(DRAWN_PER_PATH), "--seed", "1"]
    words += ["--generation-database", "none"]
    words += ["--checks", "not_a_server_error,content_type_conformance,response_schema_conformance"]
    told = run(program, *words, cwd=tmp_path)
    print(told)
    made = max(int(count) for count in re.findall(r"(\d+) generated", told))
    assert made >= SCHEMATHESIS_CASES
