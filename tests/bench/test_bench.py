"""The four benchmarks end to end, on a tiny model, beside PEFT."""

import builtins
import json

import pytest
import torch

from covering import sampled
from lorakit.bench import mixed, sweep
from lorakit.bench.load import read_tensors
from lorakit.bench.memory import peak_bytes
from lorakit.bench.peers import save_random_adapters
from lorakit.bench.result import Findings, Goal
from lorakit.bench.rounds import Seconds
from lorakit.bench.tables import table
from lorakit.cli.main import main
from lorakit.config.bench import SweepConfig
from lorakit.models.identity import weights_hash
from tiny_models import build

pytestmark = [
    # PEFT asks transformers in words that it is giving up.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]
SMALL = {
    "load": ["--resident", 3, "--peer-resident", 2],
    "mixed": [
        *("--rows", 4, "--adapters", 3, "--prompt-tokens", 3, "--new-tokens", 3),
        *("--prefill-tokens", 5, "--many-rows", 4, "--many-prefill-tokens", 3),
        *("--distinct", "1,4"),
    ],
    "switch": ["--tokens", 8, "--unmerged-repeats", 3],
    "sweep": ["--adapters", 2, "--rows", 2, "--no-memory"],
}
MEASURED = {
    "load": {"load_first": {"ours", "read", "peft"}, "load_last": {"ours", "read", "peft"}},
    "mixed": {
        f"{work}{what}": {"ours", "plain", *peers}
        for work in ("decode", "prefill")
        for what, peers in {
            "": {"peft"},
            "_one_adapter": set(),
            "_no_route": {"peft"},
            "_4_rows_1_adapters": set(),
            "_4_rows_4_adapters": set(),
        }.items()
    },
    "switch": {"unmerged_switch": {"ours", "peft"}, "merged_switch": {"ours", "forward", "peft"}},
    "sweep": {"step": {"ours", "separate", "peft"}},
}


@pytest.fixture
def bench(tiny_llama, capsys):
    """A function that runs a benchmark on the tiny model and gives back code and JSON."""

    def run(name, *words):
        given = ["--model", tiny_llama, "--repeats", 2, *SMALL[name], *words, "--json"]
        code = main(["bench", name, *map(str, given)])
        return code, json.loads(capsys.readouterr().out)

    return run


@sampled("name", sorted(SMALL))
def test_a_result_has_all_measurements_and_ratios_of_their_seconds(bench, name, tmp_path):
    code, result = bench(name, "--out", tmp_path / "result.json")
    assert code == 0, result
    assert {what: set(each) for what, each in result["seconds"].items()} == MEASURED[name]
    for what, each in result["seconds"].items():
        for who, seconds in each.items():
            assert 0 < seconds["minimum"] <= seconds["median"]
            if who != "ours":
                ratio = seconds["median"] / each["ours"]["median"]
                assert result["ratios"][who][what] == pytest.approx(ratio)
    assert result["settings"]["repeats"] == 2
    assert result["hardware"]["threads"] == torch.get_num_threads()
    assert all(isinstance(goal["met"], bool) for goal in result["goals"])
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert all(goal["what"] in table(result) for goal in result["goals"])


def test_without_the_peer_nothing_is_said_of_it(bench):
    code, result = bench("switch", "--no-peer")
    assert code == 0
    assert set(result["ratios"]) == {"forward"}
    assert not any("peft" in check for check in result["checks"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_switch_checks_that_the_bits_come_back(bench, dtype):
    _, result = bench("switch", "--no-peer", "--dtype", dtype)
    assert result["checks"] == {"base_restored": True, "switch_is_fresh_merge": True}


def test_the_install_line_is_given_where_peft_is_missing(bench, monkeypatch):
    real = builtins.__import__

    def without_peft(name, *args, **keywords):
        if name == "peft":
            raise ImportError(name)
        return real(name, *args, **keywords)

    monkeypatch.setattr(builtins, "__import__", without_peft)
    code, result = bench("load")
    assert code == 2
    assert result["error"] == {
        "type": "MissingExtraError",
        "message": "measuring PEFT (--no-peer leaves it out) needs an optional library: "
        "pip install 'lorakit[bench]'",
    }
    assert bench("load", "--no-peer")[0] == 0


def test_a_file_that_cannot_be_written_is_refused_before_the_work(bench, tmp_path):
    code, result = bench("switch", "--model", "no-such-model", "--out", tmp_path)
    assert (code, result["error"]["type"]) == (2, "OutputError")
    code, result = bench("switch", "--model", "no-such-model", "--out", tmp_path / "no" / "x.json")
    assert (code, result["error"]["type"]) == (2, "OutputError")


def test_wrong_settings_are_one_message(bench):
    code, result = bench("mixed", "--rows", "0", "--adaptors", "4", "--distinct", "1,x")
    assert code == 2
    message = result["error"]["message"]
    assert "(3 problems)" in message
    assert "--adaptors: unknown setting; did you mean --adapters?" in message


def test_too_few_rows_for_a_sweep_are_told(bench, prompt_rows):
    code, result = bench("sweep", "--no-peer", "--task", prompt_rows, "--adapters", 50)
    assert code == 2
    assert "50 adapters with 2 rows each need 100 rows" in result["error"]["message"]


@pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.thorough), 3])
def test_joint_and_separate_training_and_peft_start_at_the_same_losses(tiny_llama, rows):
    settings = SweepConfig(model=str(tiny_llama), dtype="float32", adapters=3, rows=rows)
    # B is zero at the start, so the first loss of each adapter is the base's on its rows; later
    # ones differ, as the separate way trains one adapter on all rows.
    joint, separate, peft = (sweep.WAYS[way](settings)() for way in ("ours", "separate", "peft"))
    assert len(joint) == 3
    assert joint[0] == pytest.approx(separate[0], rel=1e-5)
    assert separate == pytest.approx(peft, rel=0.02)


def test_each_adapter_of_a_joint_step_learns_its_own_rows(tiny_llama):
    settings = SweepConfig(model=str(tiny_llama), dtype="float32", adapters=2, rows=1)
    step = sweep.joint(settings)
    first = step()
    for _ in range(10):
        last = step()
    assert all(after < before for before, after in zip(first, last, strict=True))


def test_peak_memory_counts_what_this_process_held():
    before = peak_bytes()
    if before is None:
        pytest.skip("only Linux tells the largest resident set")
    held = torch.ones(before + 50_000_000, dtype=torch.uint8)
    after = peak_bytes()
    assert after is not None
    assert after > len(held)


@pytest.mark.thorough
def test_memory_is_that_of_a_process_for_each_way(tiny_llama):
    settings = SweepConfig(model=str(tiny_llama), adapters=2, threads=1)
    found = sweep._memory(settings, ["separate"])
    assert set(found) <= {"separate"}
    assert all(size > 50_000_000 for size in found.values())


def test_random_adapters_differ_and_leave_the_model_as_it_was(tmp_path):
    model = build("llama")
    before = weights_hash(model)
    folders = save_random_adapters(model, tmp_path, count=2, rank=2, dtype="bfloat16")
    one, other = (read_tensors(each / "adapter_model.safetensors") for each in folders)
    assert weights_hash(model) == before
    assert not any(torch.equal(one[name], other[name]) for name in one)
    assert all(t.abs().sum() > 0 and t.dtype == torch.bfloat16 for t in one.values())


def test_a_difference_from_peft_stops_the_measurement(bench, monkeypatch):
    honest = mixed.Work.do

    def wrong(self, model, **more):
        found = honest(self, model, **more)
        return found if more else found + 1

    monkeypatch.setattr(mixed.Work, "do", wrong)
    with pytest.raises(AssertionError, match="from PEFT's"):
        bench("mixed")


def test_more_than_one_is_in_our_favour_for_times_and_memory():
    timings = {"step": {"ours": Seconds(rounds=(1.0,)), "peft": Seconds(rounds=(4.0,))}}
    found = Findings(timings=timings, memory={"ours": 10, "peft": 5})
    assert found.ratios() == {"peft": {"step": 4.0, "memory": 0.5}}


@pytest.mark.parametrize(("at_least", "met"), [(False, False), (True, True)])
def test_a_goal_is_met_on_its_good_side(at_least, met):
    goal = Goal(what="speed", got=2.0, limit=1.5, at_least=at_least)
    assert goal.met is met
    assert goal.to_json()["at_least" if at_least else "at_most"] == 1.5
