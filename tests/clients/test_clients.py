"""Clients that others wrote, each in an environment of its own, ask `lorakit serve`."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

from clients.make import NPM, PACKAGES, place
from serving.engines import KINDS, word_tokenizer
from serving.servers import TEMPLATE, save
from tiny_models import build

SESSIONS = Path(__file__).parent / "sessions"
KEY = "secret-key"
TIMEOUT_S = 600
SCHEMATHESIS_CASES = 20
"""Drawn for each path, beside a thousand that cover each rule of the schema in turn."""

pytestmark = [pytest.mark.clients, pytest.mark.thorough]


@pytest.fixture(scope="module")
def url(tiny_llama, tmp_path_factory):
    """A server with its own process, a tiny model with a chat template, two adapters and a key."""
    root = tmp_path_factory.mktemp("clients")
    tokenizer = word_tokenizer(tiny_llama)
    tokenizer.chat_template = TEMPLATE
    model = root / "tiny"
    build("llama", vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(model)
    tokenizer.save_pretrained(model)
    for seed, name in enumerate(("small", "wide")):
        save(model, root / "adapters" / name, seed, **KINDS[name])
    keys = root / "keys"
    keys.write_text(f"{KEY}\n")
    start = "import sys; from lorakit.cli.main import main; sys.exit(main())"
    words = ["serve", str(root / "adapters"), "--model", str(model), "--name", "tiny"]
    words += ["--port", "0", "--api-key-file", str(keys)]
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
    environment = clean | {"NO_COLOR": "1", "OPENAI_API_KEY": "", "no_proxy": "127.0.0.1"}
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


@pytest.mark.parametrize("name", [each for each in PACKAGES if each != "schemathesis"])
def test_a_client_is_answered(url, name, tmp_path):
    python = environment_of(name) / "bin" / "python"
    run(python, "-W", "ignore", SESSIONS / f"with_{name}.py", url, KEY, cwd=tmp_path)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node")
def test_openais_client_for_node_is_answered(url, tmp_path):
    run("node", SESSIONS / "with_npm.mjs", url, KEY, environment_of(NPM), cwd=tmp_path)


def test_no_case_of_schemathesis_fails_the_server(url, tmp_path):
    program = environment_of("schemathesis") / "bin" / "schemathesis"
    words = ["run", f"{url}/openapi.json", "--header", f"Authorization: Bearer {KEY}"]
    words += ["--phases", "examples,coverage,fuzzing", "--request-timeout", "60"]
    words += [
        "--max-examples",
        str(SCHEMATHESIS_CASES),
        "--seed",
        "1",
        "--generation-database",
        "none",
    ]
    words += ["--checks", "not_a_server_error,content_type_conformance,response_schema_conformance"]
    print(run(program, *words, cwd=tmp_path))
