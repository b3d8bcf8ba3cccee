"""Estimates beside what runs, processes that train together, and servers take."""

from dataclasses import replace

import pytest

import lorakit.bench.estimate as bench
from lorakit.bench.estimate_runs import MeasuredRun, ServedRun
from lorakit.bench.fresh_process import in_fresh_processes, settled_bytes
from lorakit.bench.memory import forget_peak, most_bytes
from lorakit.config.bench import EstimateBenchConfig
from lorakit.errors import ConfigError

MIB = 2**20


def test_what_is_not_there_is_named_with_what_is():
    with pytest.raises(ConfigError, match=r"4 slots of 256 tokens, 1 adapter"):
        bench.measure_estimates(EstimateBenchConfig(only="gpt5"))


def held(size_bytes):
    before = settled_bytes()
    forget_peak()
    text = bytearray(size_bytes)
    text.clear()
    return most_bytes() - before


@pytest.mark.thorough
def test_processes_are_measured_each_by_itself():
    small, large = in_fresh_processes(held, [(64 * MIB,), (128 * MIB,)], {})
    assert 63 < small / MIB < 70
    assert 127 < large / MIB < 134


@pytest.mark.thorough
def test_runs_processes_and_servers_are_rows_of_their_own_tables(tiny_llama, monkeypatch):
    run = MeasuredRun(base=str(tiny_llama), rows=2, tokens=16)
    divided = replace(run, processes=2, settings={"shard": "base"})
    server = ServedRun(base=str(tiny_llama), slots=2, tokens=24, adapters=2, kept_bytes=0)
    groups = {"runs": (run,), "runs of two processes": (divided,), "servers": (server,)}
    monkeypatch.setattr(bench, "GROUPS", groups)
    found = bench.measure_estimates(EstimateBenchConfig(threads=1))
    assert list(found.tables) == list(groups)
    (alone,), (together,), (served,) = found.tables.values()
    assert together["run"].endswith("shard base, 2 processes, 2×16 tokens")
    assert served["server"].endswith("float32, 2 slots of 24 tokens, 2 adapters")
    for row in (alone, together, served):
        assert row["estimated_bytes"] > 0
        assert row["measured_bytes"] > 0
        share = row["estimated_bytes"] / row["measured_bytes"]
        assert row["error_percent"] == pytest.approx(100 * (share - 1))
    assert [goal.what[-7:] for goal in found.goals] == [" 1 runs", "ocesses", "servers"]
