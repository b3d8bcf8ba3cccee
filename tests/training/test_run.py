"""A training run from settings to folder: what it learns, keeps, resumes and refuses."""

import json
import math
import os
import signal
import time
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import TrainerControl, TrainerState, TrainingArguments

import lorakit as lk
import lorakit.training.prepare as preparation
import lorakit.training.run as training
from lorakit.config.methods import LoRAConfig
from lorakit.config.train import DataConfig, TrainConfig
from lorakit.errors import AdapterFileError, ConfigError, DataError, OutputError, TrainingError
from lorakit.training import batch_trainer
from lorakit.training.evaluation import Scored
from lorakit.training.lm_loss import text_losses
from lorakit.training.run import train
from lorakit.training.trainer import KeepBest

FILES = ("adapter_config.json", "adapter_model.safetensors", "lorakit.json")


@pytest.fixture(scope="module")
def settings_into(tiny_llama, prompt_rows):
    """A maker of settings for a short run into a folder."""

    def make(out, **changes):
        values = {
            "model": str(tiny_llama),
            "out": out,
            "lora": LoRAConfig(rank=4, targets=("all-linear",), dropout=0.1),
            "data": DataConfig(train=str(prompt_rows), validation=str(prompt_rows)),
            "dtype": "float32",
            "steps": 12,
            "eval_every": 4,
            "save_every": 3,
            "warmup_steps": 2,
            "learning_rate": 1e-2,
        }
        return TrainConfig(**{**values, **changes})

    return make


@pytest.fixture
def settings(settings_into, tmp_path):
    """A maker of settings for a short run."""

    def make(*, out=tmp_path / "run", **changes):
        return settings_into(out, **changes)

    return make


def contents(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


def test_a_run_lowers_the_loss_and_leaves_a_usable_adapter(settings, tiny_llama):
    lora = LoRAConfig(rank=8, targets=("all-linear", "head"))
    result = train(settings(steps=60, eval_every=20, lora=lora, learning_rate=3e-2))
    assert result.last_loss < 0.6 * result.first_loss
    model, _ = lk.load_model(str(tiny_llama))
    plan = lk.attach(model, lk.Adapter.load(result.out))
    assert plan.parameters == result.parameters
    log = [json.loads(line) for line in (result.out / "log.jsonl").read_text().splitlines()]
    assert any("loss" in entry for entry in log)
    assert sum("eval_loss" in entry for entry in log) == 3


def test_the_first_loss_is_that_of_the_bare_model(settings, tiny_llama, prompt_rows):
    result = train(settings(steps=4, lora=LoRAConfig(), batch_size=64))
    model, tokenizer = lk.load_model(str(tiny_llama))
    total, count = 0.0, 0
    for line in prompt_rows.read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["prompt"] + "\n").input_ids
        answer = [*tokenizer(row["completion"], add_special_tokens=False).input_ids, 2]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        total += float(cross_entropy(logits, torch.tensor(answer), reduction="sum"))
        count += len(answer)
    assert result.first_loss == pytest.approx(total / count, rel=1e-4)


@pytest.mark.thorough
def test_identical_settings_give_identical_bytes(settings, tmp_path):
    first = train(settings(out=tmp_path / "first"))
    second = train(settings(out=tmp_path / "second"))
    assert contents(first.out) == contents(second.out)
    assert contents(first.out / "last") == contents(second.out / "last")


def losses_of_all_logits(model, inputs, labels, *, weights, label_smoothing, z_loss):
    """The loss of a batch as plain torch finds it, from all logits."""
    logits, targets = model(**inputs).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    summed = cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)
    summed = summed + z_loss * logits[targets != -100].logsumexp(-1).square().sum()
    return weights * summed, None


def test_every_step_has_the_loss_of_plain_torch(settings, tmp_path, monkeypatch):
    found: dict[str, Any] = {}
    for name in ("ours", "plain"):
        compute = {"ours": text_losses, "plain": losses_of_all_logits}[name]

        def noted(*args, compute=compute, name=name, **options):
            loss, losses = compute(*args, **options)
            found.setdefault(name, []).append(loss.item())
            return loss, losses

        monkeypatch.setattr(batch_trainer, "text_losses", noted)
        lora = LoRAConfig(rank=4, targets=("all-linear", "head"))
        train(settings(out=tmp_path / name, lora=lora, label_smoothing=0.1, z_loss=0.02))
    assert len(found["ours"]) == 12
    assert found["ours"] == pytest.approx(found["plain"], rel=1e-5)
    assert found["ours"][-1] < 0.9 * found["ours"][0]


@pytest.mark.thorough
def test_another_seed_gives_another_adapter(settings, tmp_path):
    first = train(settings(out=tmp_path / "first"))
    second = train(settings(out=tmp_path / "second", seed=1))
    assert contents(first.out) != contents(second.out)


LORAKIT = """
import sys
from lorakit.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def ended_after_step(step, end, config, tmp_path, forks):
    """The exit code and messages of `lorakit train`, which gets a signal once it saved a step."""
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(config.model_dump(mode="json")))
    process = forks.start(LORAKIT, "train", str(file))
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.is_running():
        saved = [int(p.name.split("-")[1]) for p in config.out.glob("checkpoints/checkpoint-*")]
        if any(number >= step for number in saved):
            os.kill(process.pid, end)
            code, _, messages = process.finish()
            return code, messages
        time.sleep(0.005)
    raise AssertionError(f"no checkpoint of step {step}: {process.finish()[2][-2000:]}")


@pytest.fixture(scope="module")
def whole(settings_into, tmp_path_factory):
    """A run that nothing ended."""
    return train(settings_into(tmp_path_factory.mktemp("whole") / "run", steps=24))


@pytest.mark.parametrize("step", [3, pytest.param(15, marks=pytest.mark.thorough)])
@pytest.mark.thorough
def test_a_killed_run_resumes_to_the_same_bytes(settings, tmp_path, step, forks, whole):
    config = settings(out=tmp_path / "killed", steps=24)
    code, _ = ended_after_step(step, signal.SIGKILL, config, tmp_path, forks)
    assert code == -signal.SIGKILL
    resumed = train(config.model_copy(update={"resume": True}))
    assert resumed.steps == 24
    assert contents(resumed.out) == contents(whole.out)
    assert contents(resumed.out / "last") == contents(whole.out / "last")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"lora": {"rank": 1, "targets": "all-linear"}}, "lora.rank is 1, and was 4"),
        ({"method": "bitfit", "bitfit": {"add_missing": True}}, "bitfit.add_missing is yes"),
    ],
)
@pytest.mark.thorough
def test_a_run_is_not_resumed_as_another(settings, changes, problem):
    config = settings(steps=4, save_every=2, warmup_steps=1)
    train(config)
    before = contents(config.out)
    with pytest.raises(TrainingError, match="can't be resumed with other settings") as caught:
        train(settings(steps=4, save_every=2, warmup_steps=1, resume=True, **changes))
    assert problem in str(caught.value)
    assert contents(config.out) == before


@pytest.mark.thorough
def test_ctrl_c_saves_and_says_how_to_go_on(settings, tmp_path, forks, whole):
    config = settings(out=tmp_path / "stopped", steps=24)
    code, messages = ended_after_step(3, signal.SIGINT, config, tmp_path, forks)
    assert code == 130, messages[-2000:]
    assert "--resume" in messages
    resumed = train(config.model_copy(update={"resume": True}))
    assert contents(resumed.out) == contents(whole.out)


@pytest.fixture
def scores(monkeypatch):
    """A function that decides what the evaluations of a run will find."""

    def decide(*found):
        coming = iter(each if isinstance(each, dict) else {"loss": each} for each in found)
        monkeypatch.setattr(
            training, "scored", lambda *a, **k: Scored(scores=next(coming), predicted=[])
        )

    return decide


def test_the_best_adapter_is_kept_beside_the_last(settings, scores):
    scores(3.0, 1.0, 2.0)
    result = train(settings(steps=12, eval_every=4))
    assert result.best_step == 8
    assert result.scores == {"loss": 1.0}
    assert lk.Adapter.load(result.out).card["step"] == 8
    assert lk.Adapter.load(result.out / "last").card["step"] == 12


@pytest.fixture
def cola(settings, tiny_bert, tmp_path):
    """A maker of settings for a short run of a task with a score of its own."""
    rows = [{"sentence": "a b" * (n % 2 + 1), "label": n % 2} for n in range(8)]
    for split in ("train", "validation"):
        file = tmp_path / f"{split}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(train=f"task:cola@{tmp_path}", validation=f"task:cola@{tmp_path}")
    return partial(settings, model=str(tiny_bert), data=data)


@pytest.mark.thorough
def test_of_equal_scores_the_lower_loss_decides_also_after_resuming(cola, scores):
    def decide(*losses):
        scores(*({"matthews": 0.5, "loss": loss} for loss in losses))

    decide(0.9, 0.3)
    assert train(cola(steps=8, save_every=8)).best_step == 8
    decide(0.4, 0.3, 0.1)
    result = train(cola(steps=20, save_every=8, resume=True))
    assert result.best_step == 20
    assert result.scores == {"matthews": 0.5, "loss": 0.1}
    steps = [lk.Adapter.load(folder).card["step"] for folder in (result.out, result.out / "last")]
    assert steps == [20, 20]


def test_the_loss_decides_where_the_score_is_not_defined(cola, scores):
    scores(*({"matthews": math.nan, "loss": loss} for loss in (0.9, 0.3, 0.5)))
    result = train(cola())
    assert result.best_step == 8
    assert result.scores == {"matthews": 0.0, "loss": 0.3}
    assert "NaN" not in (result.out / "log.jsonl").read_text()


@pytest.mark.parametrize(
    ("found", "best"),
    [
        ([(0.5, 0.4), (0.5, 0.4)], 1),
        ([(0.5, 0.4), (0.5, 0.3), (0.5, 0.35)], 2),
        ([(0.5, 0.4), (0.4, 0.1)], 1),
        ([(0.5, 0.4), (0.6, 0.9), (0.5, 0.1)], 2),
        ([(0.5, None), (0.5, 0.1)], 1),
        ([(0.5, 0.4), (0.5, None)], 1),
        ([(0.5, math.nan), (0.5, 0.1)], 1),
    ],
)
def test_the_best_of_evaluations(found, best, tmp_path):
    saved, arguments = [], TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    state = TrainerState()
    keep = KeepBest(lambda: saved.append(state.global_step), metric="f1", greater=True, patience=2)
    for step, (score, loss) in enumerate(found, start=1):
        scores = {"eval_f1": score} | ({} if loss is None else {"eval_loss": loss})
        state.global_step = step
        state.log_history.append({**scores, "step": step})
        keep.on_evaluate(arguments, state, TrainerControl(), metrics=scores)
    assert saved[-1] == state.best_global_step == best
    assert state.best_metric == found[best - 1][0]


@pytest.mark.thorough
def test_the_best_adapter_is_by_the_score_of_the_task(cola, scores):
    coming = [(0.9, 0.0), (0.5, 0.5), (0.6, 0.2)]
    scores(*({"accuracy": accuracy, "matthews": own} for accuracy, own in coming))
    result = train(cola())
    assert result.best_step == 8
    assert result.scores == {"accuracy": 0.5, "matthews": 0.5}


@pytest.mark.thorough
def test_an_adapter_of_another_task_is_gone_on_from_with_a_fresh_head(
    settings, tiny_bert, label_rows, tmp_path
):
    rows = [json.loads(line) for line in label_rows.read_text().splitlines()]
    three = tmp_path / "three.jsonl"
    labels = ("a", "b", "c")
    three.write_text(
        "".join(json.dumps({**row, "label": labels[n % 3]}) + "\n" for n, row in enumerate(rows))
    )
    short = {"model": str(tiny_bert), "steps": 2, "warmup_steps": 0, "eval_every": None}
    first = train(settings(data=DataConfig(train=str(three)), out=tmp_path / "first", **short))
    how = short | {"data": DataConfig(train=str(label_rows)), "init_from": str(first.out)}
    still = {"learning_rate": 1e-12, "fresh_head": True}
    second = train(settings(out=tmp_path / "second", **{**how, **still})).adapter
    heads = {name for name in second.tensors if name.startswith("classifier.")}
    assert {second.tensors[name].shape[0] for name in heads} == {2}
    for name in second.tensors.keys() - heads:
        torch.testing.assert_close(second.tensors[name], first.adapter.tensors[name])
    other = {**how, **still, "lora": LoRAConfig(rank=2)}
    with pytest.raises(AdapterFileError, match="give those that it was trained with"):
        train(settings(out=tmp_path / "third", **other))


@pytest.mark.thorough
def test_a_base_with_another_head_gets_a_fresh_one(settings, tiny_bert, label_rows, tmp_path):
    labels = ("a", "b", "c")
    torch.manual_seed(0)
    three, tokenizer = lk.load_model(tiny_bert, task="classification", labels=labels)
    three.save_pretrained(tmp_path / "three")
    tokenizer.save_pretrained(tmp_path / "three")
    how = {
        "model": str(tmp_path / "three"),
        "data": DataConfig(train=str(label_rows), validation=str(label_rows)),
        "steps": 2,
        "warmup_steps": 0,
        "eval_every": None,
    }
    with pytest.raises(DataError, match="unknown label 'no'; the labels are a, b, c"):
        train(settings(out=tmp_path / "no", **how))
    result = train(settings(out=tmp_path / "two", fresh_head=True, **how))
    tensors = result.adapter.tensors
    assert {len(tensors[n]) for n in tensors if n.startswith("classifier.")} == {2}
    # By its name the base has three classes, and the adapter brings a head for two.
    scored = lk.evaluate(adapter=result.out, data=how["data"], dtype="float32")
    assert scored["accuracy"] == result.scores["accuracy"]


@pytest.mark.thorough
def test_patience_ends_a_run_that_no_longer_improves(settings, scores):
    scores(3.0, 1.0, 2.0, 1.5)
    assert train(settings(steps=200, eval_every=4, patience=2)).steps == 16


@pytest.mark.thorough
def test_accumulated_batches_equal_one_large_batch(settings, tmp_path):
    plain = LoRAConfig(rank=4, targets=("all-linear",))
    one = train(settings(out=tmp_path / "one", batch_size=8, lora=plain, steps=6))
    two = train(settings(out=tmp_path / "two", batch_size=4, accumulate=2, lora=plain, steps=6))
    first, second = (lk.Adapter.load(r.out / "last").tensors for r in (one, two))
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("memory", ["low", pytest.param("balanced", marks=pytest.mark.thorough)])
@pytest.mark.thorough
def test_recomputation_changes_nothing(settings, tmp_path, memory):
    without = train(settings(out=tmp_path / "one"))
    with_it = train(settings(out=tmp_path / "two", memory=memory))
    first, second = (lk.Adapter.load(r.out).tensors for r in (without, with_it))
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "task", ["classification", pytest.param("regression", marks=pytest.mark.thorough)]
)
@pytest.mark.thorough
def test_encoders_learn_labels(settings, tiny_bert, label_rows, tmp_path, task):
    file = label_rows
    if task == "regression":
        file = tmp_path / "numbers.jsonl"
        rows = [json.loads(line) for line in label_rows.read_text().splitlines()]
        file.write_text(
            "\n".join(json.dumps({**r, "label": float(r["label"] == "yes")}) for r in rows)
        )
    data = DataConfig(train=str(file), validation=str(file))
    config = settings(model=str(tiny_bert), data=data, task=task, steps=120, eval_every=40)
    result = train(config)
    metric = {"classification": "accuracy", "regression": "pearson"}[task]
    assert result.scores[metric] > 0.9
    assert lk.Adapter.load(result.out).copied_modules == ("classifier",)


@pytest.mark.thorough
def test_a_layer_without_gradient_is_named_and_stops_the_run(settings, monkeypatch):
    def load_with_idle_layer(*args, **kwargs):
        model, tokenizer = lk.load_model(*args, **kwargs)
        model.model.layers[1].idle = torch.nn.Linear(32, 32)
        return model, tokenizer

    monkeypatch.setattr(preparation, "load_model", load_with_idle_layer)
    config = settings(lora=LoRAConfig(targets=("q", "idle")))
    with pytest.raises(TrainingError, match=r"layers\.1\.idle\.lora_b  has had no gradient"):
        train(config)
    assert train(config.model_copy(update={"allow_untrained": True, "overwrite": True})).steps == 12


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_last_good_adapter(settings):
    config = settings(steps=50, learning_rate=1e30, max_grad_norm=1e30, eval_every=50)
    with pytest.raises(TrainingError, match=r"the loss became (nan|inf)"):
        train(config)
    kept = lk.Adapter.load(config.out / "last")
    assert all(tensor.isfinite().all() for tensor in kept.tensors.values())


def test_mistakes_are_told_before_anything_is_written(settings, tmp_path):
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists and is not empty"):
        train(settings(out=occupied))
    with pytest.raises(TrainingError, match="no checkpoint to resume"):
        train(settings(resume=True))
    with pytest.raises(ConfigError, match="warmup_steps 20 leaves nothing"):
        train(settings(warmup_steps=20))
    with pytest.raises(ConfigError, match=r"data\.train"):
        train(settings(data=DataConfig(), eval_every=None))
    none = DataConfig(train=str(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="does not exist"):
        train(settings(data=none, eval_every=None))
    assert (occupied / "mine.txt").read_text() == "mine"
    assert not (tmp_path / "run").exists()


@pytest.mark.thorough
def test_truncated_rows_are_reported_before_training(settings, capfd, prompt_rows):
    data = DataConfig(train=str(prompt_rows), max_length=6)
    train(settings(data=data, eval_every=None), table=True)
    assert "cut 64 prompts" in capfd.readouterr().err


@pytest.mark.thorough
def test_bfloat16_training_stays_finite(settings):
    result = train(settings(dtype="bfloat16"))
    assert math.isfinite(result.last_loss)
    assert os.listdir(result.out / "last")
