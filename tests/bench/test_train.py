"""The benchmark of training: participants in rounds, on the same rows, with the same losses."""

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path
from threading import Thread

import pytest

from lorakit.bench import train, train_participants, train_processes
from lorakit.bench.tables import table
from lorakit.bench.train import FULL_LEARNING_RATE
from lorakit.bench.train_processes import Record, Rounds, run_rounds
from lorakit.bench.train_rounds import (
    PARTS,
    Clock,
    ClockedBatchTrainer,
    ClockedLengthTrainer,
    Ended,
    Gate,
    Ready,
    Round,
)
from lorakit.cli.main import main
from lorakit.config.bench import TrainBenchConfig
from lorakit.config.train import DataConfig
from lorakit.data.encode import encode_rows
from lorakit.data.rows import read_rows
from lorakit.errors import TrainingError
from lorakit.models.load import load_model

pytestmark = [
    # PEFT asks transformers in words that it is giving up.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]
SMALL = [
    *("--repeats", 2, "--steps", 2, "--batch-size", 3, "--held-out", 4),
    *("--starts", 0, "--data.max-length", 16),
]


def start_thread(name, task, rounds, connection):
    """Start a participant as a thread: a process takes seconds to start."""
    thread = Thread(target=train_processes.serve, args=(name, task, rounds, connection))
    thread.start()
    return thread


@pytest.fixture(scope="module")
def uneven_rows(tmp_path_factory):
    """A file of rows of two to nine words."""
    words = ["red", "cat", "old", "dog", "new", "bird", "big"]
    rows = [
        {"prompt": " ".join(words[: 1 + number % 7]), "completion": words[number % 5]}
        for number in range(40)
    ]
    file = tmp_path_factory.mktemp("rows") / "uneven.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture
def bench(tiny_llama, prompt_rows, capsys, monkeypatch):
    """A function that runs the benchmark on the tiny model and gives back code and JSON."""
    monkeypatch.setattr(train_processes, "_start", start_thread)

    def run(*words):
        given = ["--model", tiny_llama, "--data.train", prompt_rows, *SMALL, *words, "--json"]
        code = main(["bench", "train", *map(str, given)])
        return code, json.loads(capsys.readouterr().out)

    return run


@pytest.fixture(scope="module")
def settings(tiny_llama, uneven_rows):
    """Settings for a tiny model in float32."""
    return TrainBenchConfig(
        model=str(tiny_llama),
        dtype="float32",
        data=DataConfig(train=str(uneven_rows), max_length=16),
        repeats=2,
        steps=2,
        batch_size=3,
        held_out=4,
    )


@pytest.fixture(scope="module")
def tasks(settings, tmp_path_factory):
    return train._tasks(settings, tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def records(tasks):
    """The records of three participants: a warm-up and two rounds of two steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_processes, "_start", start_thread)
        return run_rounds(tasks, Rounds(warm_ups=1, counted=2, steps=2, threads=None))


@pytest.mark.thorough
def test_participants_see_the_same_rows_in_the_same_order(records):
    assert list(records) == ["ours", "peft", "peft_by_length", "full"]
    ours = records["ours"].batch_hashes
    assert len(ours) == 6
    assert len(set(ours)) == 6
    assert all(records[name].batch_hashes == ours for name in ("peft", "full"))


@pytest.mark.thorough
def test_peft_at_its_best_has_the_same_rows_those_of_similar_length_together(
    tasks, records, tmp_path
):
    seen: list[int] = []
    lengths: list[int] = []

    class Spy(ClockedLengthTrainer):
        def train(self):
            seen.extend(self._get_train_sampler())
            lengths.extend(len(example.input_ids) for example in self.train_dataset)

    task = tasks["peft_by_length"]
    task = replace(task, config=task.config.model_copy(update={"out": tmp_path}))
    own, _ = multiprocessing.Pipe()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_participants, "ClockedLengthTrainer", Spy)
        patch.setattr(train_participants, "_held_out_loss", lambda *given: 0.0)
        train_participants.PARTICIPANTS["peft_by_length"](task, Gate(own, steps=1))
    assert sorted(seen) == list(range(18))
    batches = [sorted(lengths[row] for row in seen[at : at + 3]) for at in range(0, 18, 3)]
    assert [length for batch in sorted(batches) for length in batch] == sorted(lengths)
    by_length, ours = records["peft_by_length"], records["ours"]
    assert by_length.batch_hashes != ours.batch_hashes
    assert by_length.tokens == ours.tokens
    other_order = records["peft"].ended.evaluation_loss
    assert by_length.ended.evaluation_loss == pytest.approx(other_order, rel=0.01)


@pytest.mark.thorough
def test_losses_equal_those_of_peft_and_start_where_full_fine_tuning_does(records):
    ours, peft, full = (records[name].losses for name in ("ours", "peft", "full"))
    assert ours == pytest.approx(peft, rel=1e-4)
    assert ours[0] == pytest.approx(full[0], rel=1e-5)
    assert ours[-1] < ours[0]
    assert records["ours"].ended.evaluation_loss == pytest.approx(
        records["peft"].ended.evaluation_loss, rel=1e-4
    )


def test_useful_tokens_are_those_of_the_rows_and_each_counts_once(records, tasks, settings):
    model_rows = read_rows(tasks["ours"].config.data.train, tasks["ours"].config.data)
    _, tokenizer = load_model(settings.model)
    examples = encode_rows(model_rows, tokenizer, settings.data).examples
    tokens = sum(len(example.input_ids) for example in examples)
    for record in records.values():
        assert sum(each.tokens for each in (*record.warm_ups, *record.rounds)) == tokens


def test_every_part_of_a_step_takes_time(records):
    for record in records.values():
        for each in record.rounds:
            assert set(each.parts) == set(PARTS)
            assert all(seconds > 0 for seconds in each.parts.values())
            assert each.seconds == pytest.approx(sum(each.parts.values()))


def test_full_fine_tuning_trains_every_weight_of_the_bare_base(tasks, monkeypatch):
    seen = []
    monkeypatch.setattr(ClockedBatchTrainer, "train", lambda self: seen.append(self))
    monkeypatch.setattr(train_participants, "_held_out_loss", lambda *given: 0.0)
    own, _ = multiprocessing.Pipe()
    train_participants.full(tasks["full"], Gate(own, steps=1))
    (trainer,) = seen
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())
    assert not any("lora" in name for name, _ in trainer.model.named_parameters())
    assert trainer.args.learning_rate == FULL_LEARNING_RATE
    assert trainer.args.seed == tasks["ours"].config.seed


def test_a_clock_charges_all_time_to_one_part_each():
    ticks = iter([0.0, 1.0, 3.0, 7.0, 15.0, 31.0, 63.0])
    clock = Clock(lambda: next(ticks))
    with clock.part("backward"), clock.part("forward"):
        pass
    clock.switch("optimizer")
    clock.switch("rest")
    assert clock.seconds == {
        "data": 0.0,
        "forward": 4.0,
        "backward": 2.0 + 8.0,
        "optimizer": 32.0,
        "rest": 1.0 + 16.0,
    }
    assert sum(clock.seconds.values()) == 63.0


def test_the_result_has_speed_memory_losses_and_goals(bench, tmp_path):
    code, result = bench("--out", tmp_path / "train.json", "--no-full")
    assert code == 0, result
    assert set(result["seconds"]) == {"step", *PARTS}
    who = {"ours", "peft", "peft_by_length"}
    assert all(set(each) == who for each in result["seconds"].values())
    assert set(result["ratios"]["peft"]) >= {"step", "forward", "backward", "memory"}
    assert {name: len(losses) for name, losses in result["curves"].items()} == {
        "ours": 6,
        "peft": 6,
        "peft_by_length": 6,
    }
    assert result["checks"]["same_rows_in_each_step"] is True
    assert result["checks"]["same_tokens_by_length"] is True
    assert 0 <= result["checks"]["largest_loss_difference_from_peft"] < 0.1
    assert [goal["what"] for goal in result["goals"]] == [
        "useful tokens per second against peft",
        "memory against peft",
        "held-out loss, difference from peft",
    ]
    ours, peft, _ = result["tables"]["contestants"]
    assert ours["who"] == "ours"
    speed = ours["useful tokens per second"] / peft["useful tokens per second"]
    assert result["goals"][0]["got"] == pytest.approx(speed)
    assert json.loads((tmp_path / "train.json").read_text()) == result
    assert "| useful tokens per second |" in table(result)


def test_compiled_adds_ours_and_peft_compiled_unless_ours_is_so_already(settings, tmp_path):
    asked = settings.model_copy(update={"compiled": True, "ours": {"z_loss": 0.1}})
    tasks = train._tasks(asked, tmp_path)
    assert list(tasks) == [*("ours", "compiled", "peft", "peft_by_length", "peft_compiled", "full")]
    assert {name for name, task in tasks.items() if task.config.compile} == {"compiled"}
    assert {name for name, task in tasks.items() if task.config.z_loss} == {"ours", "compiled"}
    asked = settings.model_copy(update={"compiled": True, "ours": {"compile": True}})
    tasks = train._tasks(asked, tmp_path)
    assert list(tasks) == ["ours", "peft", "peft_by_length", "peft_compiled", "full"]
    assert tasks["ours"].config.compile


@pytest.mark.thorough
def test_participants_can_be_left_out_and_ours_can_have_settings_of_its_own(bench):
    code, result = bench("--no-peer", "--no-full", "--ours", "{memory: low}")
    assert code == 0, result
    assert set(result["curves"]) == {"ours"}
    assert (result["goals"], result["ratios"]) == ([], {})


def record(*, tokens_per_s=100.0, used=1000, most=2000, loss=2.0):
    """The record of a participant that took one round of a second."""
    parts = dict.fromkeys(PARTS, 0.2)
    each = Round(
        parts=parts, losses=(3.0,), tokens=int(tokens_per_s), batch_hashes=(1,), most_bytes=most
    )
    return Record(
        ready=Ready(used_bytes=used), warm_ups=(), rounds=(each,), ended=Ended(evaluation_loss=loss)
    )


@pytest.mark.parametrize(
    ("given", "limit"),
    [
        ({}, 2.0),
        ({"dtype": "float32"}, 1.6),
        ({"targets": "all-linear"}, 1.6),
        ({"targets": "v, q"}, 2.0),
    ],
)
def test_the_goal_beside_peft_depends_on_precision_and_targets(given, limit):
    records = {"ours": record(), "peft": record()}
    first, *_ = train._goals(records, TrainBenchConfig(**given))
    assert (first.limit, first.at_least) == (limit, True)


def test_goals_are_ratios_of_the_records():
    records = {
        "ours": record(tokens_per_s=300, used=1000, most=1600, loss=2.01),
        "peft": record(tokens_per_s=100, used=1100, most=2000, loss=2.0),
        "full": record(tokens_per_s=200, used=1000, most=4000),
    }
    goals = {goal.what: goal for goal in train._goals(records, TrainBenchConfig())}
    assert {what: goal.got for what, goal in goals.items()} == pytest.approx(
        {
            "useful tokens per second against peft": 3.0,
            "memory against peft": 0.8,
            "held-out loss, difference from peft": 0.5,
            "useful tokens per second against full": 1.5,
            "memory above the weights against full": 0.2,
        }
    )
    assert [goal.met for goal in goals.values()] == [True, False, True, True, True]


def test_a_system_that_does_not_tell_memory_has_no_goals_of_it():
    records = {name: record(used=None, most=None) for name in ("ours", "peft", "full")}
    goals = train._goals(records, TrainBenchConfig())
    assert not any("memory" in goal.what for goal in goals)


def test_different_rows_do_not_go_unseen():
    other = record()
    other = replace(other, rounds=(replace(other.rounds[0], batch_hashes=(2,)),))
    assert train._checks({"ours": record(), "full": other})["same_rows_in_each_step"] is False
    fewer = {"ours": record(), "peft_by_length": record(tokens_per_s=99)}
    assert train._checks(fewer)["same_tokens_by_length"] is False


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        (["--held-out", 60], "DataError", "need 78 rows, but"),
        (["--data.train", "no/such.jsonl"], "DataError", "does not exist"),
        (["--ours", "{batch_size: 2}"], "ConfigError", "all participants share batch_size"),
        (["--ours", "{learning_rat: 2}"], "ConfigError", "did you mean 'learning_rate'?"),
        (["--targets", "elbow"], "TrainingError", "ours could not be measured"),
    ],
)
def test_wrong_input_is_told_in_one_message(bench, words, kind, message):
    code, result = bench(*words)
    assert (code, result["error"]["type"]) == (2, kind)
    assert message in result["error"]["message"]


def test_rows_without_prompts_are_refused(bench, label_rows):
    code, result = bench("--data.train", label_rows)
    assert (code, result["error"]["type"]) == (2, "DataError")
    assert "a prompt and a completion are needed" in result["error"]["message"]


def test_a_participant_whose_process_ends_is_told(tasks, monkeypatch):
    def start(name, task, rounds, connection):
        connection.close()
        return Thread()

    monkeypatch.setattr(train_processes, "_start", start)
    monkeypatch.setattr(Thread, "join", lambda self: None)
    with pytest.raises(TrainingError, match="ours could not be measured: its process has ended"):
        run_rounds(tasks, Rounds(warm_ups=0, counted=1, steps=1, threads=None))


def test_those_who_have_begun_are_ended_where_another_cannot_begin(tasks, monkeypatch):
    started = []

    def start(*args):
        started.append(start_thread(*args))
        return started[-1]

    monkeypatch.setattr(train_processes, "_start", start)
    lost = replace(tasks["full"], config=tasks["full"].config.model_copy(update={"model": "./no"}))
    with pytest.raises(TrainingError, match=r"full could not be measured: there is no folder"):
        run_rounds(
            {"ours": tasks["ours"], "full": lost}, Rounds(warm_ups=0, counted=1, steps=1, threads=1)
        )
    assert len(started) == 2
    assert not any(thread.is_alive() for thread in started)


def test_a_participant_ends_when_the_other_end_of_its_pipe_has_gone(tasks):
    own, others = multiprocessing.Pipe()
    rounds = Rounds(warm_ups=0, counted=1, steps=1, threads=None)
    thread = start_thread("full", tasks["full"], rounds, others)
    assert isinstance(own.recv(), Ready)
    own.close()
    thread.join(timeout=30)
    assert not thread.is_alive()


def test_the_settings_of_the_page_are_valid(capsys):
    file = Path(__file__).parents[2] / "benchmarks" / "train_e2e.yaml"
    assert main(["bench", "train", str(file), "--print-config"]) == 0, capsys.readouterr().err
