"""The entry point: what is printed on stdout and stderr, and the exit codes."""

import gc
import io
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import lorakit
from lorakit.cli.main import main
from lorakit.cli.verbs import VERBS, Entry, Result
from lorakit.config.base import Settings
from lorakit.errors import DataError

PROJECT = Path(__file__).parents[2] / "pyproject.toml"


class EchoSettings(Settings):
    """What the verb of these tests is told."""

    word: str
    """The word to say."""
    times: int = 1
    """How often to say it."""


Run = Callable[[EchoSettings], Result]


def say(settings: EchoSettings) -> Result:
    text = " ".join([settings.word] * settings.times)
    return Result(text=text, data={"said": text, "folder": Path("a/b"), "loss": float("nan")})


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Callable[[Run], None]:
    """Make `lorakit echo` a verb that does what the test says."""

    def install(run: Run) -> None:
        module = ModuleType("lorakit.cli.echo")
        module.__dict__.update(EchoSettings=EchoSettings, run=run)
        monkeypatch.setitem(sys.modules, "lorakit.cli.echo", module)
        entry = Entry(meaning="Say a word.", settings="cli.echo:EchoSettings")
        monkeypatch.setitem(VERBS, "echo", entry)

    return install


def failing_with(error: BaseException) -> Run:
    def run(settings: EchoSettings) -> Result:
        raise error

    return run


def test_result_is_printed_for_people(verb, capsys):
    verb(say)
    assert main(["echo", "--word", "hi", "--times", "2"]) == 0
    assert capsys.readouterr() == ("hi hi\n", "")


def test_empty_text_prints_nothing(verb, capsys):
    verb(lambda settings: Result(text="", data={}))
    assert main(["echo", "--word", "hi"]) == 0
    assert capsys.readouterr().out == ""


def test_json_prints_one_object_with_paths_and_nan_made_plain(verb, capsys):
    verb(say)
    assert main(["echo", "--word", "hi", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"said": "hi", "folder": "a/b", "loss": None}
    assert err == ""


def test_json_stands_before_or_after_the_verb(verb, capsys):
    verb(say)
    assert main(["--json", "echo", "--word", "hi"]) == 0
    assert json.loads(capsys.readouterr().out)["said"] == "hi"


def noisy(settings: EchoSettings) -> Result:
    print("from python")
    os.write(1, b"from C\n")
    subprocess.run([sys.executable, "-c", "print('from a child')"], check=True)
    return say(settings)


def test_nothing_that_a_library_prints_gets_into_the_json(verb, capfd):
    verb(noisy)
    assert main(["echo", "--word", "hi", "--json"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["said"] == "hi"
    assert sorted(err.splitlines()) == ["from C", "from a child", "from python"]


def test_without_json_a_verb_streams_to_stdout(verb, capfd):
    verb(noisy)
    assert main(["echo", "--word", "hi"]) == 0
    out, err = capfd.readouterr()
    assert {"from C", "from a child", "from python", "hi"} == set(out.splitlines())
    assert err == ""


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_what_an_encoding_lacks_is_escaped(verb, encoding, monkeypatch):
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding=encoding))
    verb(say)
    assert main(["echo", "--word", "q \u2192 \u65e5"]) == 0
    assert main(["train", "--help"]) == 0
    assert printed.getvalue().decode(encoding).startswith("q \\u2192 \\u65e5")


@pytest.fixture(params=["frozen", "not frozen"])
def frozen_before(request):
    """Whether the caller has had the collector pass by what it imported."""
    was = gc.get_freeze_count() > 0
    frozen = request.param == "frozen"
    (gc.freeze if frozen else gc.unfreeze)()
    yield frozen
    (gc.freeze if was else gc.unfreeze)()


@pytest.mark.parametrize("error", [None, DataError("no rows")])
def test_the_collector_passes_by_what_was_imported_until_the_verb_ends(verb, error, frozen_before):
    seen = []

    def run(settings: EchoSettings) -> Result:
        seen.append((gc.isenabled(), gc.get_freeze_count() > 0))
        if error:
            raise error
        return say(settings)

    verb(run)
    main(["echo", "--word", "hi"])
    assert seen == [(True, True)]
    assert (gc.isenabled(), gc.get_freeze_count() > 0) == (True, frozen_before)


def test_the_collector_goes_on_after_a_verb_that_cannot_be_imported(monkeypatch, frozen_before):
    entry = Entry(meaning="Do nothing.", settings="config.verbs:DemoConfig")
    monkeypatch.setitem(VERBS, "absent", entry)
    with pytest.raises(ModuleNotFoundError):
        main(["absent"])
    assert (gc.isenabled(), gc.get_freeze_count() > 0) == (True, frozen_before)


def test_stdout_is_whole_again_after_an_error_in_json_mode(verb, capfd):
    verb(failing_with(DataError("no rows")))
    main(["echo", "--word", "hi", "--json"])
    capfd.readouterr()
    os.write(1, b"still here\n")
    print("and here")
    assert capfd.readouterr().out == "still here\nand here\n"


def test_users_mistake_is_one_plain_message_and_exit_code_2(verb, capsys):
    verb(failing_with(DataError("rows.jsonl is empty")))
    assert main(["echo", "--word", "hi"]) == 2
    assert capsys.readouterr() == ("", "error: rows.jsonl is empty\n")


def test_json_error_is_an_object_too(verb, capsys):
    verb(failing_with(DataError("rows.jsonl is empty")))
    assert main(["echo", "--word", "hi", "--json"]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out) == {"error": {"type": "DataError", "message": "rows.jsonl is empty"}}
    assert err == "error: rows.jsonl is empty\n"


def test_debug_adds_the_trace(verb, capsys):
    verb(failing_with(DataError("rows.jsonl is empty")))
    assert main(["echo", "--word", "hi", "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "in run" in err
    assert err.endswith("error: rows.jsonl is empty\n")


def test_defect_keeps_its_trace_and_is_an_object_in_json(verb, capsys):
    verb(failing_with(ZeroDivisionError("ours")))
    with pytest.raises(ZeroDivisionError):
        main(["echo", "--word", "hi"])
    assert capsys.readouterr().out == ""
    with pytest.raises(ZeroDivisionError):
        main(["echo", "--word", "hi", "--json"])
    out = capsys.readouterr().out
    assert json.loads(out) == {"error": {"type": "ZeroDivisionError", "message": "ours"}}


def test_result_that_is_not_json_is_a_defect_with_one_object_on_stdout(verb, capsys):
    verb(lambda settings: Result(text="", data={"model": object()}))
    with pytest.raises(ValueError, match="serialize"):
        main(["echo", "--word", "hi", "--json"])
    assert set(json.loads(capsys.readouterr().out)) == {"error"}


def test_interrupt_is_a_plain_word_and_exit_code_130(verb, capsys):
    verb(failing_with(KeyboardInterrupt()))
    assert main(["echo", "--word", "hi"]) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


def test_interrupted_verb_says_how_to_go_on(verb, capsys):
    verb(failing_with(KeyboardInterrupt("stopped at step 40; go on with --resume")))
    assert main(["echo", "--word", "hi", "--json"]) == 130
    out, err = capsys.readouterr()
    assert err == "stopped at step 40; go on with --resume\n"
    assert json.loads(out)["error"]["type"] == "KeyboardInterrupt"


def test_wrong_settings_do_not_run_the_verb(verb, capsys):
    verb(failing_with(AssertionError("the verb ran")))
    assert main(["echo", "--wrod", "hi"]) == 2
    assert capsys.readouterr().err == (
        "error: EchoSettings has settings that cannot be used (2 problems):\n"
        "  word: must be given\n"
        "  --wrod: unknown setting; did you mean --word?\n"
    )


def test_print_config_prints_all_settings_and_does_not_run_the_verb(verb, capsys):
    verb(failing_with(AssertionError("the verb ran")))
    assert main(["echo", "--word", "hi", "--print-config"]) == 0
    assert capsys.readouterr().out == "word: hi\ntimes: 1\n"
    assert main(["echo", "--word", "hi", "--print-config", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"word": "hi", "times": 1}


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_lorakit_alone_lists_the_verbs(argv, capsys):
    assert main(argv) == 0
    out = capsys.readouterr().out
    column = max(map(len, VERBS)) + 4
    for name, entry in VERBS.items():
        assert f"  {name:<{column - 2}}{entry.meaning}\n" in out


@pytest.mark.parametrize(
    "argv", [["echo", "--help"], ["echo", "-h"], ["--help", "echo"], ["help", "echo"]]
)
def test_help_of_a_verb_does_not_need_its_required_settings(verb, capsys, argv):
    verb(failing_with(AssertionError("the verb ran")))
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "Say a word.\n" in out
    assert "  --word TEXT  (required)\n      The word to say.\n" in out
    assert "  --times N  (default: 1)\n      How often to say it.\n" in out


def test_help_of_a_topic_or_a_setting_shows_it_alone(capsys):
    assert main(["train", "--help", "optimizer"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("optimizer: ")
    assert "--warmup-steps" in out
    assert "--model" not in out
    assert main(["train", "--help", "lora.rank"]) == 0
    assert capsys.readouterr().out.startswith("  --lora.rank N  (default: 8)\n")
    assert main(["train", "--help", "--lora.use-dora"]) == 0
    assert capsys.readouterr().out.startswith("  --[no-]lora.use-dora  ")
    assert main(["train", "--help", "optimiser"]) == 2
    assert "no setting 'optimiser'; did you mean 'optimizer'?" in capsys.readouterr().err


def test_words_of_a_whole_command_are_no_topic_of_its_help(capsys):
    assert main(["train", "run.yaml", "--lora.rank", "4", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: lorakit train ")


def test_unknown_verb_names_the_nearest_or_all(capsys):
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == "error: lorakit has no verb 'trian'; did you mean 'train'?\n"
    assert main(["xyz"]) == 2
    assert "its verbs are demo, train, estimate" in capsys.readouterr().err


def test_version_is_that_of_the_package(capsys):
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "lorakit.__version__"}
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lorakit {lorakit.__version__}\n"


def test_words_come_from_the_process_when_none_are_given(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lorakit", "nonsense"])
    assert main() == 2
    assert "'nonsense'" in capsys.readouterr().err


def test_reader_that_went_away_is_no_error(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    stdout = os.fdopen(writer, "w")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert main(["--help"]) == 141
    stdout.close()  # The interpreter does so at its end; it raises if something is left to write.


def shell(command):
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, errors="replace")


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform == "win32", reason="needs bash")
def test_no_place_for_stdout_ends_in_a_trace():
    lorakit = f"{sys.executable} -m lorakit.cli"
    for command, code in (
        (f"{lorakit} --help | true; exit ${{PIPESTATUS[0]}}", {0, 141}),
        (f"{lorakit} --help >&-", {0}),
        (f"{lorakit} --nonsense 2>&-", {2}),
        (f"{lorakit} --help --json >/dev/full", {2}),
        (f"PYTHONIOENCODING=ascii {lorakit} train --help data", {0}),
    ):
        done = shell(command)
        assert done.returncode in code, (command, done.stderr)
        assert "Traceback" not in done.stderr, command
    assert "cannot be written to stdout: No space left" in shell(f"{lorakit} >/dev/full").stderr
    assert "\\u2026" in shell(f"PYTHONIOENCODING=cp437 {lorakit} train --help data").stdout


LIGHT = """
import sys
import lorakit
from lorakit.cli.main import main
from lorakit.cli.verbs import VERBS
heavy = {"pydantic", "yaml", "torch", "transformers", "numpy"}
for words in (["--version"], ["--help"], ["bench", "--help"]):
    assert main(words) == 0
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
for name in VERBS:
    assert main([*name.split(), "--help"]) == 0
    assert main([*name.split(), "--frobnicate"]) == 2
assert not {"torch", "transformers"} & sys.modules.keys()
"""


def test_help_and_mistakes_are_told_before_anything_heavy_is_imported():
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_project_file_names_this_entry_point():
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    assert project["scripts"] == {"lorakit": f"{main.__module__}:{main.__name__}"}


def test_the_verb_of_two_words_needs_both(capsys):
    asked = (
        "one of estimate, latency, load, methods, mixed, models, serve, soak, switch, sweep, train"
    )
    for words in (["bench"], ["bench", "--repeats", "3"]):
        assert main(words) == 2
        needs = f"error: lorakit bench needs a second word: {asked}\n"
        assert capsys.readouterr().err == needs
    assert main(["bench", "swich"]) == 2
    assert capsys.readouterr().err == (
        "error: lorakit bench has no verb 'swich'; it needs one of estimate, latency, load, "
        "methods, mixed, models, serve, soak, switch, sweep, train; did you mean 'switch'?\n"
    )


def test_the_verb_of_two_words_has_settings_and_help(capsys):
    assert main(["bench", "--help"]) == 0
    out = capsys.readouterr().out
    assert "  bench switch    Time switching" in out
    assert "  train" not in out
    assert main(["bench", "switch", "--help"]) == 0
    assert "usage: lorakit bench switch [CONFIG.yaml]" in capsys.readouterr().out
    assert main(["bench", "switch", "--rank", "4", "--print-config"]) == 0
    assert "rank: 4\n" in capsys.readouterr().out
