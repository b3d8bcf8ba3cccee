"""Files of prompts: byte order marks, line ends, blank lines, and one line of output for each."""

import io
import json
from pathlib import Path

import pytest

from lorakit.cli import generate
from lorakit.cli.generate import _lines, _one_a_line
from lorakit.cli.main import main
from lorakit.errors import DataError


def test_a_prompt_is_all_between_two_line_feeds(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    text = "\ufeffred\r\ngreen\u2028leaf\x85\x0bend\n\n  \nblue"
    file.write_bytes(text.encode())
    assert _lines(str(file)) == ["red", "green\u2028leaf\x85\x0bend", "", "  ", "blue"]


def test_standard_input_is_read_as_a_file_is(monkeypatch: pytest.MonkeyPatch) -> None:
    data = io.BytesIO("\ufeffcafé\u2028x\nbig\n".encode())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(data, encoding="cp1252"))
    assert _lines("-") == ["café\u2028x", "big"]


def test_each_line_has_its_line_of_output() -> None:
    assert _one_a_line(["a", "", "b"], ["one\ntwo", "x\\n\r"]) == "one\\ntwo\n\nx\\n\\r"


def test_a_file_without_a_prompt_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    for content in ("", "\n \n", "\ufeff"):
        file.write_text(content, encoding="utf-8")
        with pytest.raises(DataError, match="has no prompts"):
            _lines(str(file))


def test_answers_are_for_the_lines_they_stand_in(
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(generate, "answers", lambda _, __, asked, **___: [f"{p}\n!" for p in asked])
    file = tmp_path / "prompts.txt"
    file.write_text("red\n\nbig dog\n")
    words = ["generate", "--model", str(tiny_llama), "--input", str(file)]
    assert main(words) == 0
    assert capsys.readouterr().out == "red\\n!\n\nbig dog\\n!\n"
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answers"] == [
        {"prompt": "red", "answer": "red\n!"},
        {"prompt": "big dog", "answer": "big dog\n!"},
    ]
