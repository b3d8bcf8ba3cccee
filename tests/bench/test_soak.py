"""`lorakit bench soak`: a server under clients that hurry, leave, and load bad adapters."""

import json

import pytest

from lorakit.bench.serving.asking import streamed_tokens
from lorakit.bench.soak.crossing import Crossing
from lorakit.cli.main import main

pytest.importorskip("uvicorn")


def test_a_tiny_server_goes_through_all_of_it(tiny_llama, capsys):
    words = ["--model", tiny_llama, "--adapters", 3, "--budget", 2, "--pool", 6, "--requests", 40]
    words += ["--connections", 4, "--new-tokens", 3, "--reloads", 6, "--closed", 3]
    words += ["--seeds", 8, "--probes", 2, "--overload-s", 1, "--threads", 1]
    assert main(["bench", "soak", *map(str, words), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    refused = result["tables"]["refused"]
    assert len(refused) >= 30
    assert {
        row["kind"]: row["status"] for row in refused if row["status"] not in range(400, 500)
    } == {}
    timed = ("memory", "steps until", "slow readers", "5 times", "429 (of")
    for goal in result["goals"]:
        if not any(word in goal["what"] for word in timed) or "5xx" in goal["what"]:
            assert goal["met"], goal


def test_what_goes_wrong_is_a_goal_missed():
    good = Crossing(crossed=0, failed=0, different=0, count=200, loads=2, growth=1.0)
    assert all(goal.met for goal in good.goals(exact=True))
    for wrong in ({"crossed": 1}, {"failed": 1}, {"different": 1}, {"growth": 1.03}):
        missed = Crossing(**(vars(good) | wrong)).goals(exact=True)
        assert sum(not goal.met for goal in missed) == 1
    nearly = Crossing(**(vars(good) | {"different": 1}))
    assert all(goal.met for goal in nearly.goals(exact=False))


def test_a_stream_that_breaks_off_is_no_answer():
    def event(token):
        choice = {"logprobs": {"tokens": [token]}}
        return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n"

    assert streamed_tokens([event("a"), b"\n", event("b"), b"data: [DONE]\n"]) == ("a", "b")
    with pytest.raises(ValueError, match="does not end"):
        streamed_tokens([event("a")])
    broken = b'data: {"error": {"message": "out of memory"}}\n'
    with pytest.raises(ValueError, match="out of memory"):
        streamed_tokens([event("a"), broken, b"data: [DONE]\n"])
