"""Settings from YAML and flags: what overrides what, and what each mistake is told."""

from pathlib import Path
from typing import Literal

import pytest
import yaml

from lorakit.cli.parsing.flags import flags_of
from lorakit.cli.parsing.settings import parse, to_yaml
from lorakit.config.base import Settings
from lorakit.config.methods import LoRAConfig
from lorakit.config.train import TrainConfig
from lorakit.errors import ConfigError

FILE = """\
out: runs/e2e
steps: 300
learning_rate: 2e-3
lora:
  rank: 16
  targets: q, v
  rank_pattern: {q: 4, v: 2}
data:
  train: rows.jsonl
  fields: {prompt: mr, completion: ref}
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    file = tmp_path / "run.yaml"
    file.write_text(FILE)
    return str(file)


def write(tmp_path: Path, text: str | bytes) -> str:
    file = tmp_path / "bad.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(file)


def complaint(*argv: str, settings: type[Settings] = TrainConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(settings, argv)
    return str(caught.value)


def test_file_gives_settings_and_the_rest_are_defaults(config):
    settings = parse(TrainConfig, [config])
    assert settings.out == Path("runs/e2e")
    assert (settings.steps, settings.learning_rate, settings.lora.rank) == (300, 2e-3, 16)
    assert settings.seed == TrainConfig(out=".").seed


def test_bare_word_and_config_flag_name_the_same_file(config):
    expected = parse(TrainConfig, [config])
    assert parse(TrainConfig, ["--config", config]) == expected
    assert parse(TrainConfig, [f"--config={config}"]) == expected


def test_flag_overrides_one_setting_of_a_section_and_keeps_the_others(config):
    settings = parse(TrainConfig, [config, "--lora.rank", "4", "--data.train", "other.jsonl"])
    assert settings.lora.rank == 4
    assert settings.lora.targets == ("q", "v")
    assert settings.data.train == "other.jsonl"
    assert settings.data.fields == {"prompt": "mr", "completion": "ref"}


def test_flags_before_the_file_override_it_too(config):
    assert parse(TrainConfig, ["--steps", "7", config]).steps == 7


def test_mapping_flag_replaces_the_files_mapping(config):
    settings = parse(TrainConfig, [config, "--lora.rank-pattern", "{k: 8}"])
    assert settings.lora.rank_pattern == {"k": 8}


def test_last_of_two_equal_flags_counts():
    assert parse(TrainConfig, ["--out=x", "--steps=1", "--steps=2"]).steps == 2


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--steps", "3"], "steps: 3"),
        (["--steps=3"], "steps: 3"),
        (["--batch-size", "2"], "batch_size: 2"),
        (["--batch_size", "2"], "batch_size: 2"),
        (["--learning-rate", "1e-4"], "learning_rate: 1e-4"),
        (["--overwrite"], "overwrite: true"),
        (["--no-overwrite"], "overwrite: false"),
        (["--overwrite=yes"], "overwrite: yes"),
        (["--packing", "off"], "packing: off"),
        (["--data.labels", "no,yes"], "data: {labels: [no, yes]}"),
        (["--lora.use-rslora"], "lora: {use_rslora: true}"),
        (["--no-lora.use-rslora"], "lora: {use_rslora: false}"),
        (["--lora.targets", "q, k,v"], "lora: {targets: [q, k, v]}"),
        (["--lora.exclude", ""], "lora: {exclude: []}"),
        (["--lora.modules-to-save", "classifier"], "lora: {modules_to_save: [classifier]}"),
        (["--lora.bias", "none"], "lora: {bias: none}"),
        (["--lora.alpha", "none"], "lora: {alpha: null}"),
        (["--lora.rank-pattern", "{k: 4}"], "lora: {rank_pattern: {k: 4}}"),
        (["--data.fields", "{prompt: '{a}: {b}'}"], "data: {fields: {prompt: '{a}: {b}'}}"),
        (["--data.separator", " -> "], "data: {separator: ' -> '}"),
        (["--data.separator=--"], "data: {separator: '--'}"),
        (["--data.separator", "-"], "data: {separator: '-'}"),
        (["--model", "a=b,c"], "model: a=b,c"),
        (["--init-from", "none"], "init_from: null"),
    ],
)
def test_flag_means_the_same_as_the_yaml_line(tmp_path, argv, line):
    file = write(tmp_path, line)
    assert parse(TrainConfig, ["--out", "x", *argv]) == parse(TrainConfig, ["--out", "x", file])


def test_every_setting_has_a_flag_that_takes_its_default():
    defaults = parse(TrainConfig, ["--out", "x"])
    names = {flag.name for flag in flags_of(TrainConfig)}
    assert {"--out", "--lora.rank-pattern", "--data.max-length", "--dry-run"} <= names
    for flag in flags_of(TrainConfig):
        value = defaults
        for name in flag.key:
            value = getattr(value, name)
        if value is not None:
            text = ",".join(value) if isinstance(value, tuple) else str(value)
            assert parse(TrainConfig, ["--out", "x", f"{flag.name}={text}"]) == defaults


def test_section_default_keeps_what_it_sets_when_a_flag_adds_to_it():
    class Demo(Settings):
        lora: LoRAConfig = LoRAConfig(rank=4, targets=("k",))

    settings = parse(Demo, ["--lora.alpha", "8"])
    assert settings.lora == LoRAConfig(rank=4, targets=("k",), alpha=8)


def test_section_without_a_default_is_made_by_its_first_flag():
    class Sparse(Settings):
        lora: LoRAConfig | None = None

    assert parse(Sparse, []).lora is None
    assert parse(Sparse, ["--lora.rank", "2"]).lora == LoRAConfig(rank=2)


def test_aliased_sections_of_a_file_stay_apart_when_a_flag_changes_one(tmp_path):
    class Pair(Settings):
        one: LoRAConfig | None = None
        two: LoRAConfig | None = None

    file = write(tmp_path, "one: &same {rank: 2}\ntwo: *same\n")
    settings = parse(Pair, [file, "--one.rank", "5"])
    assert settings.one == LoRAConfig(rank=5)
    assert settings.two == LoRAConfig(rank=2)


def test_printed_settings_load_as_the_same_settings(tmp_path, config):
    argv = [config, "--data.separator", "\n\n###", "--data.labels", "no,yes", "--lora.alpha=0.1"]
    settings = parse(TrainConfig, argv)
    printed = to_yaml(settings)
    assert parse(TrainConfig, [write(tmp_path, printed)]) == settings
    assert set(yaml.safe_load(printed)) == set(TrainConfig.model_fields)


def test_relative_paths_stay_relative_to_the_working_directory(config):
    settings = parse(TrainConfig, [config, "--init-from", "a/b"])
    assert (settings.out, settings.init_from) == (Path("runs/e2e"), "a/b")


def test_empty_file_sets_nothing(tmp_path):
    assert parse(TrainConfig, [write(tmp_path, "# nothing\n"), "--out", "x"]).steps is None


# Mistakes


def test_all_problems_of_file_and_flags_are_in_one_message(tmp_path):
    file = write(tmp_path, "stepz: 3\nlora: {dropout: 7}\nepochs: -1\n")
    message = complaint(
        file, "--ot", "x", "--lora.rnk", "4", "--batch-size", "few", "--ovewrite", "--seed"
    )
    assert message == (
        "TrainConfig has settings that cannot be used (9 problems):\n"
        "  out: must be given\n"
        "  lora.dropout: input should be less than 1, found 7\n"
        "  epochs: input should be greater than 0, found -1\n"
        "  batch_size: input should be a valid integer, unable to parse string as an integer, "
        "found 'few'\n"
        "  stepz: unknown setting; did you mean 'steps'?\n"
        "  --ot: unknown setting; did you mean --out?\n"
        "  --lora.rnk: unknown setting; did you mean --lora.rank?\n"
        "  --ovewrite: unknown setting; did you mean --overwrite?\n"
        "  --seed: needs a value (N)"
    )


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("--lra.rank=3", "--lra.rank: unknown setting; did you mean --lora.rank?"),
        ("--steps.x=3", "--steps.x: unknown setting; did you mean --steps?"),
        ("-steps=3", "-steps: unknown setting; did you mean --steps?"),
        ("--no-ovewrite", "--no-ovewrite: unknown setting; did you mean --overwrite?"),
        ("--no-steps", "--no-steps: unknown setting; did you mean --steps?"),
        ("--frobnicate=1", "--frobnicate: unknown setting; --help lists the known ones"),
        ("--lora=3", "--lora: unknown setting; did you mean"),
        ("--overwrite=maybe", "overwrite: input should be a valid boolean"),
        ("--lora.rank-pattern=[k]", "lora.rank_pattern: input should be a valid dictionary"),
        ("--lora.rank-pattern={k: ", "lora.rank_pattern: input should be a valid dictionary"),
        ("--lora.rank-pattern={k: 4, k: 8}", "found '{k: 4, k: 8}'"),
        ("--steps=1e3x", "steps: input should be a valid integer"),
        ("--schedule=linaer", "schedule: input should be 'linear', 'cosine' or 'constant'"),
    ],
)
def test_wrong_flag_is_refused_by_name(flag, told):
    message = complaint("--out", "x", flag)
    assert "(1 problem)" in message
    assert told in message


def test_mistyped_boolean_does_not_swallow_the_file(config):
    message = complaint("--ovewrite", config)
    assert message.splitlines()[1:] == ["  --ovewrite: unknown setting; did you mean --overwrite?"]


def test_flag_followed_by_a_flag_lacks_a_value_and_leaves_the_next_alone():
    message = complaint("--model", "--out", "x")
    assert message.splitlines()[1:] == ["  --model: needs a value (TEXT)"]


def test_wrong_section_of_a_file_is_not_hidden_by_a_flag_in_it(tmp_path):
    message = complaint(write(tmp_path, "out: x\nlora: 5"), "--lora.rank", "4")
    assert "lora: input should be a valid dictionary" in message


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("- 1\n- 2", "must be a list of settings such as 'steps: 300', but it is [1, 2]"),
        ("just words", "but it is 'just words'"),
        ("out: x\nsteps: [1\nseed: 2", "is not YAML, line 3, column 5: expected ',' or ']'"),
        ("out: x\n\tsteps: 3", "is not YAML, line 2, column 1: found character '\\t'"),
        ("steps: 3\nout: x\nsteps: 4", "line 3, column 1: the key 'steps' is given twice"),
        ("lora:\n  rank: 3\n  rank: 4", "line 3, column 3: the key 'rank' is given twice"),
        ("out: !!python/name:os.system x", "could not determine a constructor"),
        ("seed: 2026-13-45", "is not YAML: month must be in 1..12"),
        ("out: a\n---\nout: b", "line 2, column 1: but found another document"),
        (b"out: \xff", "is not UTF-8 text: invalid start byte at byte 5"),
        (b"out: \x00", "is not YAML: unacceptable character #x0000"),
        ("3: 4\nout: x", "keys should be strings, found 3"),
        ("self: 4\nout: x", "self: unknown setting"),
    ],
)
def test_unusable_file_is_told_in_one_message(tmp_path, text, told):
    assert told in complaint(write(tmp_path, text))


def test_merge_keys_of_yaml_are_not_taken_for_repeated_ones(tmp_path):
    class Pair(Settings):
        one: LoRAConfig
        two: LoRAConfig

    file = write(tmp_path, "one: &one {rank: 2, alpha: 3}\ntwo: {<<: *one, rank: 5}")
    assert parse(Pair, [file]).two == LoRAConfig(rank=5, alpha=3)


def test_missing_file_and_folder_are_told_by_name(tmp_path):
    assert "configuration file 'nope.yaml': No such file" in complaint("nope.yaml")
    assert f"configuration file {str(tmp_path)!r}: Is a directory" in complaint(str(tmp_path))


def test_second_settings_file_is_refused(config, tmp_path):
    more = write(tmp_path, "steps: 2")
    assert complaint(config, more).splitlines()[1:] == [
        f"  {config}, {more}: one settings file is read; a setting is given as --NAME VALUE"
    ]


def test_config_flag_without_a_file_is_refused():
    assert complaint("--out", "x", "--config").splitlines()[1:] == [
        "  --config: needs the name of a YAML file"
    ]


def test_file_that_cannot_be_read_is_told_beside_the_mistakes_of_flags(tmp_path):
    message = complaint("nope.yaml", "--lr", "1e-4")
    assert message.count("\n") == 2
    assert "cannot read the configuration file 'nope.yaml'" in message
    assert "--lr: unknown setting; did you mean --learning-rate?" in message


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--lora.targets q v", "v: a list is one word; did you mean --lora.targets q,v?"),
        ("--lora.targets q k,v", "k,v: a list is one word; did you mean --lora.targets q,k,v?"),
        ("--lora.targets=q v", "v: a list is one word; did you mean --lora.targets q,v?"),
        ("--lr 1e-4", "--lr: unknown setting; did you mean --learning-rate?"),
        ("--target_modules q_proj v_proj", "--target_modules: unknown setting; did you mean "
        "--lora.targets?"),
        ("--rank 4", "--rank: unknown setting; did you mean --lora.rank?"),
        ("--dropout 0.1", "did you mean --lora.dropout or --bottleneck.dropout?"),
        ("--lora-alpha 4", "--lora-alpha: unknown setting; did you mean --lora.alpha?"),
        ("--num-train-epochs 4", "did you mean --epochs?"),
    ],
)  # fmt: skip
def test_words_of_other_tools_and_lists_in_two_words_get_a_hint(words, told):
    message = complaint("--out", "x", *words.split())
    assert message.splitlines()[1:] == [f"  {told}"] or message.endswith(told)
    assert "(1 problem)" in message


def test_names_of_other_tools_get_a_hint_in_a_file_too(tmp_path):
    message = complaint(write(tmp_path, "out: x\nlr: 1\nlora: {target_modules: q}"))
    assert "lr: unknown setting; did you mean 'learning_rate'?" in message
    assert "lora.target_modules: unknown setting; did you mean 'lora.targets'?" in message


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("learning_rate: yes", "learning_rate: input should be a valid number"),
        ("learning_rate: true", "learning_rate: true and false are no numbers, found True"),
        ("steps: off", "steps: input should be a valid integer"),
        ("seed: false", "seed: true and false are no numbers, found False"),
        ("lora: {rank_pattern: {q: true}}", "true and false are no numbers, found {'q': True}"),
        ("packing: false", "packing: input should be 'auto', 'on' or 'off', found False"),
        ("data: {labels: [true, false]}", "data.labels.0: input should be a valid string"),
        ("lora: {targets: []}", "targets is empty"),
        ("init_from: ''", "init_from: is empty: give a path"),
    ],
)
def test_a_word_of_yaml_never_becomes_a_number(tmp_path, line, told):
    message = complaint(write(tmp_path, f"out: x\n{line}"))
    assert told in message


def test_an_empty_out_is_refused():
    for words in (["--out", ""], ["--out="], ["--out", " "]):
        assert "out: is empty: give a path" in complaint(*words, "--overwrite")


def test_a_separator_is_typed_with_escapes_on_the_command_line():
    def separator(text):
        return parse(TrainConfig, ["--out", "x", "--data.separator", text]).data.separator

    assert separator(r"\n") == separator("\n") == "\n"
    assert separator(r"\n\t###") == "\n\t###"
    assert separator(r"\\n \d") == r"\n \d"


class Folders(Settings):
    positional = ("source", "out")

    source: Path
    out: Path
    seeds: tuple[int, ...] = ()


def test_words_give_the_positional_settings(tmp_path, config):
    expected = Folders(source="a", out="b")
    assert parse(Folders, ["a", "b"]) == expected
    assert parse(Folders, ["a", "--out", "b"]) == expected
    assert parse(Folders, ["--source", "a", "--out=b"]) == expected
    file = write(tmp_path, "seeds: [1]\nout: c")
    assert parse(Folders, ["a", "b", file]) == Folders(source="a", out="b", seeds=(1,))
    assert parse(Folders, [file, "a"]) == Folders(source="a", out="c", seeds=(1,))
    folder = tmp_path / "folder.yaml"
    folder.mkdir()
    assert parse(Folders, [str(folder), "b"]) == Folders(source=folder, out="b")


def test_mistakes_of_words_are_told_with_the_others(tmp_path):
    words = ["a", "b", "c", "--seeds", "1", "2", "--sede", "3", "--out", "d"]
    assert complaint(*words, settings=Folders).splitlines()[1:] == [
        "  --sede: unknown setting; did you mean --seeds?",
        "  b: out is given by --out too",
        "  c: a word too many, words without a flag give source and out; a setting is given as "
        "--NAME VALUE",
        "  2: a list is one word; did you mean --seeds 1,2?",
    ]


def test_the_last_positional_setting_takes_all_words_if_it_is_a_list():
    class Several(Settings):
        positional = ("adapters",)

        adapters: tuple[Path, ...] = ()

    assert parse(Several, ["a", "b"]).adapters == (Path("a"), Path("b"))


def test_none_is_a_word_where_a_setting_cannot_be_empty():
    class Strict(Settings):
        name: str = "x"
        mode: Literal["none", "all"] = "all"

    settings = parse(Strict, ["--name", "none", "--mode", "none"])
    assert (settings.name, settings.mode) == ("none", "none")


def test_a_file_of_rows_without_its_flag_is_told_the_flag():
    with pytest.raises(ConfigError, match=r"mine\.csv: a file of rows is given as --data\.train m"):
        parse(TrainConfig, ["mine.csv", "--out", "x"])
