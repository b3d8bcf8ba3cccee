"""`lorakit bench serve`: a server beside plain generation, and what a slot's change costs."""

import json

import pytest

from lorakit.cli.main import main

pytest.importorskip("uvicorn")


@pytest.mark.thorough
def test_clients_are_measured_beside_plain_generation(tiny_llama, capsys):
    words = ["--model", tiny_llama, "--dtype", "float32", "--clients", 3, "--adapters", 2]
    words += ["--prompt-tokens", 4, "--new-tokens", 3, "--repeats", 1, "--threads", 1]
    words += ["--first-tokens", 2, "--long-prompt", 20, "--longest", 10, "--starts", 1]
    assert main(["bench", "serve", *map(str, words), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    who = {"ours", "plain", "base", "route", "one", "compiled"}
    assert set(result["seconds"]["serve"]) == who
    assert set(result["ratios"]) == who - {"ours"} | {"prefill", "load_model"}
    unlike = {f"unlike lengths, {how}" for how in ("at once", "arriving", "static batches")}
    assert {row["who"] for row in result["tables"]["tokens"]} == who | unlike
    assert [row["what"] for row in result["tables"]["slots"]] == [
        "step",
        "join",
        "leave",
        "unchanged",
        "read",
        "eager step",
        "compiled step",
        "bytes",
    ]
    assert set(result["seconds"]["first token"]) == {"ours", "prefill"}
    assert set(result["seconds"]["start"]) == {"ours", "load_model"}
    assert len(result["goals"]) == 14
