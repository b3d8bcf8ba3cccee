"""The chart of a benchmark of training."""

import importlib.util

import pytest

from lorakit.bench.train_chart import check_chart, draw
from lorakit.errors import MissingExtraError, OutputError


def row(who, speed, loaded=500_000_000, above=100_000_000):
    return {
        "who": who,
        "useful tokens per second": speed,
        "loaded_bytes": loaded,
        "above that_bytes": above,
    }


WAYS = ("ours", "compiled", "peft", "peft_by_length", "peft_compiled", "full")
ROWS = [row(way, 900.0 - 100 * place) for place, way in enumerate(WAYS)]


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(ROWS, marks=pytest.mark.thorough),
        ROWS[:1],
        [row("ours", 1.0, None, None)],
    ],
)
def test_a_chart_of_any_participants_is_drawn_without_a_warning(rows, tmp_path):
    curves = {each["who"]: [3.0, 2.5, 2.0] for each in rows}
    draw(rows, curves, tmp_path / "chart.png", title="a model")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_the_install_line_is_given_where_matplotlib_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_chart(None)
    with pytest.raises(MissingExtraError, match=r"lorakit\[plots\]"):
        check_chart(tmp_path / "chart.png")


def test_a_chart_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    with pytest.raises(OutputError, match="is a folder"):
        check_chart(tmp_path)
    with pytest.raises(OutputError, match="there is no folder"):
        check_chart(tmp_path / "no" / "chart.png")
