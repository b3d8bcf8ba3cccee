"""Model cards, and adapters sent to a stand-in of the hub's API on this machine."""

import base64
import json
import re
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

import lorakit as lk
from lorakit.adapter.folder import load_path
from lorakit.cli.main import main
from lorakit.errors import OutputError
from references import attach_random
from tiny_models import build

COMMIT = f"/someone/e2e/commit/{'1' * 40}"


@pytest.fixture
def adapter():
    model = build("llama")
    attach_random(model, rank=4)
    card = {
        "task_type": "CAUSAL_LM",
        "base_model": "someone/tiny",
        "data": {"train": "hub:someone/rows"},
        "rows": {"training": 12, "validation": 4},
        "settings": {},
        "step": 7,
        "scores": {"loss": 0.25},
    }
    made = lk.extract(model)
    return replace(made, card=card, base=None)


class Server(ThreadingHTTPServer):
    """Knows its address, which the hub's answers have."""

    address = ""


class StandIn(BaseHTTPRequestHandler):
    """As much of the hub's API as sending a folder asks for."""

    repositories: dict[str, dict[str, bytes]]
    asked: list[tuple[str, dict[str, object]]]
    refuses = False
    server: Server

    def do_GET(self):
        self.answer({"id": "someone/e2e", "siblings": [], "sha": "0" * 40})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        where = self.path.partition("?")[0]
        if where.endswith(("/commit/main", "/commit/v2")):
            lines = [json.loads(line) for line in body.splitlines()]
            files = {
                each["value"]["path"]: base64.b64decode(each["value"]["content"])
                for each in lines
                if each["key"] == "file"
            }
            self.repositories[where.split("/commit/")[1]] = files
            return self.answer({"commitUrl": self.server.address + COMMIT, "commitOid": "1" * 40})
        given = json.loads(body or b"{}")
        self.asked.append((where, given))
        if self.refuses:
            return self.answer({"error": "no"}, status=403)
        if where.endswith("/create"):
            return self.answer(
                {"url": f"{self.server.address}/{given['organization']}/{given['name']}"}
            )
        if "/preupload/" in where:
            modes = [{"path": f["path"], "uploadMode": "regular"} for f in given["files"]]
            return self.answer({"files": [{**each, "shouldIgnore": False} for each in modes]})
        return self.answer({})

    def answer(self, content, status=200):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    handler = type("Hub", (StandIn,), {"repositories": {}, "asked": []})
    server = Server(("127.0.0.1", 0), handler)
    server.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    Thread(target=server.serve_forever, daemon=True).start()
    yield handler
    server.shutdown()
    server.server_close()


def test_a_folder_has_a_card_with_the_hubs_metadata(adapter, tmp_path):
    card = ModelCard.load(adapter.save(tmp_path / "e2e") / "README.md")
    assert card.data.base_model == "someone/tiny"
    assert card.data.library_name == "peft"
    assert card.data.datasets == "someone/rows"
    assert card.data.pipeline_tag == "text-generation"
    assert {"lorakit", "lora"} <= set(card.data.tags)
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("loss", 0.25)
    assert "12 rows of `hub:someone/rows`, 7 steps" in card.text
    assert 'lk.Adapter.load("e2e")' in card.text
    assert "vllm serve someone/tiny --enable-lora --max-lora-rank 8" in card.text


def test_a_path_of_ones_own_is_on_no_card(adapter, tmp_path):
    private = {**adapter.card, "data": {"train": "/home/me/secret.jsonl"}}
    folder = replace(adapter, card=private).save(tmp_path / "e2e")
    assert "secret" not in (folder / "README.md").read_text()


def test_a_card_that_somebody_changed_stays(adapter, tmp_path):
    folder = adapter.save(tmp_path / "e2e")
    first = (folder / "README.md").read_text()
    other = replace(adapter, card={**adapter.card, "step": 8})
    other.save(folder, overwrite=True)
    second = (folder / "README.md").read_text()
    assert "7 steps" in first
    assert "8 steps" in second
    (folder / "README.md").write_text(second.replace("8 steps", "eight steps"))
    adapter.save(folder, overwrite=True)
    assert "eight steps" in (folder / "README.md").read_text()


def test_what_was_sent_is_the_adapter(adapter, hub, tmp_path):
    address = adapter.push_to_hub("someone/e2e", private=True)
    assert address.endswith(COMMIT)
    created = next(given for where, given in hub.asked if where.endswith("/create"))
    assert (created["name"], created["organization"]) == ("e2e", "someone")
    assert created.get("private") is True or created.get("visibility") == "private"
    files = hub.repositories["main"]
    assert set(files) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "lorakit.json",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert load_path(tmp_path).content_hash() == adapter.content_hash()
    assert 'PeftModel.from_pretrained(model, "someone/e2e")' in files["README.md"].decode()


def test_the_verb_sends_a_verified_folder_to_a_branch(adapter, hub, tmp_path, capsys):
    folder = adapter.save(tmp_path / "e2e")
    assert main(["push", str(folder), "someone/e2e", "--revision", "v2"]) == 0
    assert re.search(rf"sent to someone/e2e: http.*{COMMIT}", capsys.readouterr().out)
    assert set(hub.repositories) == {"v2"}


@pytest.mark.parametrize("name", ["e2e", "a/b/c", "some one/e2e"])
def test_a_name_that_is_no_repository_is_refused(adapter, hub, name):
    with pytest.raises(OutputError, match=re.escape(f"OWNER/NAME; found {name!r}")):
        adapter.push_to_hub(name)
    assert not hub.asked


def test_a_refusal_is_one_line_without_the_token(adapter, hub):
    hub.refuses = True
    with pytest.raises(OutputError, match=r"was not sent to someone/e2e: .*hf auth login") as told:
        adapter.push_to_hub("someone/e2e")
    assert "hf_secret" not in str(told.value)


def test_offline_nothing_is_sent(adapter):
    with pytest.raises(OutputError, match="HF_HUB_OFFLINE keeps the hub away"):
        adapter.push_to_hub("someone/e2e")
