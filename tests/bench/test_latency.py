"""The paper's Table 1 on a tiny shape: who takes part, and what is made of their seconds."""

import json
import statistics

import pytest
import torch
from transformers import GPT2Config, GPT2Model

import lorakit as lk
from lorakit.bench import latency
from lorakit.bench.latency import SETTINGS, overhead_percent
from lorakit.bench.rounds import Seconds
from lorakit.bench.tables import table
from lorakit.cli.main import main
from lorakit.config.bench import LatencyConfig
from lorakit.errors import ConfigError
from lorakit.layers.adapted_layer import AdaptedLayer

WHO = ["plain", "ours", "unmerged", "adapter_l", "adapter_h"]
TINY = ["--width", "64", "--blocks", "2", "--shrink", "32", "--repeats", "2"]


@pytest.mark.thorough
def test_a_result_has_every_participant_in_each_column_beside_the_papers(capsys):
    assert main(["bench", "latency", *TINY, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {name: list(each) for name, each in result["seconds"].items()} == dict.fromkeys(
        ["1x512", "1x256", "1x128"], WHO
    )
    assert result["ratios"].keys() == {*WHO} - {"ours"}
    assert result["checks"]["merged_differs_from_unmerged_by"] < 1e-4
    rows = result["tables"]["latency"]
    assert [row["overhead in the paper_percent"] for row in rows] == [
        *(None, 0.0, None, 2.2, 3.0),
        *(None, 0.0, None, 5.0, 8.4),
        *(None, 0.0, None, 20.7, 30.3),
    ]
    for row, (name, who) in zip(
        rows, [(name, who) for name in result["seconds"] for who in WHO], strict=True
    ):
        times, plain = (result["seconds"][name][each]["turns"] for each in (who, "plain"))
        assert row["mean_s"] == pytest.approx(sum(times) / 2)
        assert row["deviation_s"] == pytest.approx(abs(times[0] - times[1]) / 2)
        overhead = statistics.median(a / b for a, b in zip(times, plain, strict=True)) - 1
        assert (row["overhead_percent"] or 0.0) == pytest.approx(100 * overhead)
    for goal, row in zip(result["goals"], rows[1::5], strict=True):
        assert goal["at_most"] == 1.0
        assert goal["got"] == abs(row["overhead_percent"])
    assert "| 1x128         | Adapter^H " in table(result)


def test_the_adapters_have_the_papers_numbers_of_parameters():
    settings = LatencyConfig(full=True)
    with torch.device("meta"):
        base = GPT2Model(GPT2Config(n_embd=1024, n_layer=24, n_head=16))
    found = [
        {who: lk.plan(base, config).parameters for who, config in each.methods(settings).items()}
        for each in SETTINGS
    ]
    assert [each.shape(settings) for each in SETTINGS] == [(32, 512), (16, 256), (1, 128)]
    for column, millions in zip(found, (0.5, 11.1, 11.1), strict=True):
        for who in ("adapter_l", "adapter_h"):
            assert round(column[who] / 1e6, 1) == millions
        assert column["ours"] == column["unmerged"] == 393_216


def test_participants_differ_in_their_adapters_alone():
    settings = LatencyConfig(width=64, blocks=2)
    base = latency._base(settings)
    ids = torch.arange(8)[None]
    expected = latency._forward(base, ids)()
    again = latency._base(settings)
    assert torch.equal(latency._forward(again, ids)(), expected)
    for config in SETTINGS[1].methods(settings).values():
        model, parameters = latency._adapted(base, config)
        assert parameters > 0
        assert not torch.allclose(latency._forward(model, ids)(), expected, atol=1e-4)
    assert torch.equal(latency._forward(base, ids)(), expected)
    assert not any(isinstance(module, AdaptedLayer) for module in base.modules())


def test_an_overhead_compares_times_of_the_same_round():
    plain = Seconds(rounds=(1.0, 10.0, 2.0))
    own = Seconds(rounds=(1.1, 11.0, 9.0))
    assert overhead_percent(own, plain) == pytest.approx(10)
    assert overhead_percent(plain, plain) == 0


def test_a_width_that_heads_cannot_share_is_refused():
    with pytest.raises(ConfigError, match="width 100 is not a multiple of 64"):
        LatencyConfig(width=100)
