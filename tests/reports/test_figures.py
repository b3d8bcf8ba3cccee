"""Figures that mean what they say: last losses, empty answers, rows without a reference."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import lorakit as lk
from lorakit.cli.main import main
from lorakit.config.train import DataConfig, TrainConfig
from lorakit.data.metrics.basic import bleu, exact_match
from lorakit.errors import DataError, MissingExtraError
from lorakit.training.run import train


def _written(path: Path, *rows: dict[str, Any]) -> DataConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(validation=str(path))


@pytest.fixture
def no_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where an answer is generated, or a row scored."""

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("rows were answered before the check")

    monkeypatch.setattr("lorakit.answering.evaluate.answer", fail)
    monkeypatch.setattr("lorakit.answering.evaluate.scored", fail)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"steps": 9}, [1, 9]),
        pytest.param({"steps": 12}, [1, 10, 12], marks=pytest.mark.thorough),
        pytest.param({"steps": 1}, [1], marks=pytest.mark.thorough),
    ],
)
def test_the_last_step_is_logged(
    tiny_llama: Path,
    prompt_rows: Path,
    tmp_path: Path,
    settings: dict[str, Any],
    steps: list[int],
) -> None:
    out = tmp_path / "out"
    found = train(
        TrainConfig(
            model=str(tiny_llama),
            out=out,
            data={"train": str(prompt_rows)},
            dtype="float32",
            learning_rate=0.01,
            warmup_steps=0,
            allow_untrained=True,
            **settings,
        )
    )
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert list(losses) == steps
    assert (found.first_loss, found.last_loss) == (losses[1], losses[steps[-1]])
    assert len(steps) == 1 or found.first_loss != found.last_loss


def test_a_loss_is_logged_wherever_rows_are_scored(
    tiny_llama: Path, prompt_rows: Path, tmp_path: Path
) -> None:
    data = {"train": str(prompt_rows), "validation": str(prompt_rows), "train_rows": 24}
    train(
        TrainConfig(
            model=str(tiny_llama), out=tmp_path / "out", data=data, dtype="float32", epochs=2
        )
    )
    log = (tmp_path / "out" / "log.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in log]
    scored = [line["step"] for line in lines if "eval_loss" in line]
    assert scored == [3, 6]
    assert set(scored) <= {line["step"] for line in lines if "loss" in line}


def test_an_empty_completion_is_an_answer() -> None:
    assert exact_match(["", "x"], [[""], [""]]) == 0.5
    assert bleu(["a b c d", ""], [["a b c d"], [""]]) == pytest.approx(100)


def test_an_empty_completion_is_the_reference_of_its_row(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "lorakit.answering.evaluate.answer", lambda *args, **kwargs: ["", "yes please do so"]
    )
    data = _written(
        tmp_path / "rows.jsonl",
        {"prompt": "red", "completion": ""},
        {"prompt": "big", "completion": "yes please do so"},
    )
    scores = lk.evaluate(model=str(tiny_llama), data=data)
    assert (scores["exact_match"], scores["bleu"]) == (1.0, pytest.approx(100))


def test_rows_without_a_reference_are_left_out_and_counted(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = _written(
        tmp_path / "rows.jsonl",
        {"prompt": "red", "completion": "cat"},
        {"prompt": "big", "completion": None},
        {"prompt": "old", "references": []},
    )
    words = ["evaluate", "--model", tiny_llama, "--data.validation", data.validation, "--json"]
    few = ["--max-new-tokens", 4]
    assert (
        main([str(word) for word in (*words, "--outputs", tmp_path / "answers.jsonl", *few)]) == 0
    )
    assert json.loads(capsys.readouterr().out)["notes"] == [
        "exact_match and bleu: left out 2 of 3 rows, without an answer to compare with",
        "loss: dropped 2 rows: no completion",
    ]
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 1


@pytest.mark.usefixtures("no_answers")
def test_rows_of_which_none_has_a_reference_are_refused_first(
    tiny_llama: Path, tmp_path: Path
) -> None:
    data = _written(tmp_path / "rows.jsonl", {"prompt": "red"}, {"prompt": "big"})
    with pytest.raises(DataError, match="none of its 2 prompt rows has an answer to compare with"):
        lk.evaluate(model=str(tiny_llama), data=data)


@pytest.mark.usefixtures("no_answers")
def test_a_score_that_is_asked_for_without_its_library_is_refused_first(
    tiny_llama: Path, prompt_rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    data = DataConfig(validation=str(prompt_rows))
    with pytest.raises(MissingExtraError, match="metrics"):
        lk.evaluate(model=str(tiny_llama), data=data, metrics="exact_match, bleu")


def test_texts_have_a_loss_and_no_answers(tiny_llama: Path, tmp_path: Path) -> None:
    data = _written(tmp_path / "rows.jsonl", {"text": "red cat"}, {"text": "big dog"})
    with pytest.warns(UserWarning, match="exact_match and bleu: left out 2 of 2 rows"):
        scores = lk.evaluate(model=str(tiny_llama), data=data)
    assert scores.keys() == {"loss", "perplexity"}
    with pytest.raises(DataError, match="none of its 2 text rows"):
        lk.evaluate(model=str(tiny_llama), data=data, metrics="bleu")
