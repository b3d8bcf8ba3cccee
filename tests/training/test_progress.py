"""Progress: a bar in a terminal, plain lines anywhere else."""

import io
import sys

import pytest

from lorakit.training.progress import PlainProgress, progress_bar, steps


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_without_a_terminal_progress_is_lines_at_intervals(monkeypatch, capsys):
    seconds = iter(range(0, 1000, 4))
    monkeypatch.setattr("time.monotonic", lambda: next(seconds))
    bar = progress_bar(total=7, title="training", unit="step", show=True, initial=2)
    assert isinstance(bar, PlainProgress)
    for _ in range(3):
        bar.update()
    bar.set_postfix({"loss": "0.5"})
    bar.update(2)
    bar.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "training: 5 of 7 steps, 16 s, 11 s left",
        "training: 7 of 7 steps, 24 s, loss 0.5",
    ]


def test_steps_are_shown_as_batches(capsys):
    assert list(steps(5, 2, title="answering", show=True)) == [0, 2, 4]
    err = capsys.readouterr().err
    assert err.startswith("answering: 3 of 3 batches, ")
    assert "\r" not in err
    assert list(steps(5, 2, title="answering", show=False)) == [0, 2, 4]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("term", "is_bar"), [("xterm", True), ("dumb", False)])
def test_a_terminal_that_knows_carriage_returns_has_a_bar(monkeypatch, term, is_bar):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", term)
    bar = progress_bar(total=3, title="training", unit="step", show=True)
    bar.update()
    bar.close()
    assert ("\r" in sys.stderr.getvalue()) == is_bar
