"""Two processes that train one adapter: as one does, written once, and stopped with one message."""

import json
import shutil
import signal
import socket
import subprocess
import sys

import pytest
import torch
import transformers

import lorakit as lk
from lorakit.config.methods import METHODS
from lorakit.errors import ConfigError
from lorakit.training import processes
from lorakit.training.checks import Interruption
from lorakit.training.processes import check_alone, together
from lorakit.training.sharded_base import idle_shard
from tiny_models import build

# What the processes have imported, they have from the one that they are forked from.
MANY = """
import json, os, signal, sys, time
from pathlib import Path
from torch.distributed import TCPStore
from lorakit.cli.main import main
from lorakit.models.base import base_parameters
from lorakit.training import run
port, folder, kill, *words = json.loads(sys.argv[1])
# As torchrun does, it holds the store by which they find each other.
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
start = run.execute
def execute(prepared_run, *args, **kwargs):
    weights = base_parameters(prepared_run.prepared.model)
    print("weights:", *{type(each).__name__ for _, each in weights}, flush=True)
    return start(prepared_run, *args, **kwargs)
run.execute = execute
children = []
for number, own in enumerate(words):
    child = os.fork()
    if child == 0:
        os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(len(words)))
        for stream in (1, 2):
            os.dup2(os.open(f"{folder}/said", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        # As on a machine of its own, where it has one.
        machine = Path(folder, f"machine-{number}")
        os.chdir(machine if machine.is_dir() else ".")
        code = main(own)
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    children.append(child)
if kill:
    log = Path(words[0][words[0].index("--out") + 1], "log.jsonl")
    while not (log.exists() and log.read_text()):
        time.sleep(0.05)
    os.kill(children[kill[0]], kill[1])
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
print(json.dumps([codes, Path(folder, "said").read_text()]))
"""


@pytest.fixture
def words(tiny_llama, prompt_rows, tmp_path):
    """A maker of the words of a run: 64 rows in 11 batches, of which the last has 4."""

    def make(out, *more):
        data = ["--data.train", prompt_rows, "--data.validation", prompt_rows]
        run = ["--model", tiny_llama, "--out", tmp_path / out, "--dtype", "float32", *data]
        sizes = ["--batch-size", 6, "--steps", 14, "--save-every", 7, "--learning-rate", 1e-2]
        return ["train", *map(str, [*run, *sizes, *more])]

    return make


@pytest.fixture
def many(forks, tmp_path):
    """A function that runs command lines in processes that are to train together."""

    def run(*lines, kill=()):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        (tmp_path / "said").unlink(missing_ok=True)
        return json.loads(forks.run(MANY, json.dumps([port, str(tmp_path), kill, *lines])))

    return run


def logged(folder, shown=("loss", "eval_loss", "grad_norm")):
    """The losses and scores of a run, by step."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [{key: line[key] for key in shown if key in line} for line in lines]


def assert_close(one, other):
    assert [line.keys() for line in one] == [line.keys() for line in other]
    for ours, theirs in zip(one, other, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)


def assert_same_run(folder, other):
    """Losses and scores differ by 1e-5 at most, tensors by 1e-4."""
    assert_close(logged(folder), logged(other))
    ours, theirs = (lk.Adapter.load(each) for each in (folder, other))
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name, tensor in theirs.tensors.items():
        assert (ours.tensors[name] - tensor).abs().max() < 1e-4, name


@pytest.mark.thorough
@pytest.mark.parametrize("more", [(), ("--packing", "off", "--accumulate", "2")])
def test_losses_and_adapter_are_those_of_one_process(more, words, many, tmp_path):
    assert many(words("one", *more))[0] == [0]
    codes, said = many(*2 * [words("two", *more)])
    assert codes == [0, 0]
    assert said.count("adapter in ") == said.count("learning rate:") == 1
    assert_same_run(tmp_path / "two", tmp_path / "one")
    one, two = (lk.Adapter.load(tmp_path / name) for name in ("one", "two"))
    assert two.card["settings"] == one.card["settings"]


@pytest.mark.thorough
def test_a_divided_base_trains_the_adapter_of_one_process(words, many, tmp_path, tiny_llama):
    # Of 49 rows one process scores a batch more than the other.
    rows = ("--data.validation-rows", 49)
    assert many(words("one", *rows))[0] == [0]
    codes, said = many(*2 * [words("two", *rows, "--shard", "base")])
    assert (codes, said.count("weights: DTensor\n")) == ([0, 0], 2)
    assert said.count("base: divided over 2 processes, gathered block by block (FSDP2)") == 1
    assert_close(logged(tmp_path / "two"), logged(tmp_path / "one"))
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "checkpoint-14")
    codes, said = many(*3 * [words("two", *rows, "--shard", "base", "--resume")])
    assert (codes, said.count("weights: DTensor\n")) == (3 * [0], 3)
    # The first loss after resuming is the mean since then.
    shown = ("eval_loss", "grad_norm")
    assert_close(logged(tmp_path / "two", shown), logged(tmp_path / "one", shown))
    one, two = (lk.Adapter.load(tmp_path / name) for name in ("one", "two"))
    assert two.tensors.keys() == one.tensors.keys()
    for name, tensor in one.tensors.items():
        assert (two.tensors[name] - tensor).abs().max() < 1e-4, name
    model, _ = lk.load_model(tiny_llama, dtype="float32")
    lk.attach(model, two)
    ids = torch.arange(3, 11)[None]
    answer = model(ids).logits
    lk.merge(model)
    assert torch.allclose(model(ids).logits, answer, atol=1e-5)


KINDS = {name: ("--method", name) for name in METHODS} | {
    "dora": ("--lora.use-dora",),
    "pissa": ("--lora.init", "pissa"),
    "eva": ("--lora.init", "eva"),
    "embeddings and head": ("--lora.targets", "embed,head"),
    "trained tokens": ("--lora.trainable-token-indices", "[5, 6]"),
    "lora and virtual tokens": ("--method", "lora,prefix-layer"),
}
"""All that can be trained, as flags."""


@pytest.fixture
def tiny_gpt2(tiny_llama, tmp_path):
    """A base with biases and LayerNorms, which some methods need, and without dropout."""
    folder = tmp_path / "gpt2"
    build("gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    return folder


@pytest.mark.thorough
@pytest.mark.parametrize("kind", KINDS)
def test_all_that_can_be_trained_is_trained_by_two_processes(
    kind, words, many, tiny_gpt2, tmp_path
):
    own = ("--model", tiny_gpt2, *KINDS[kind])
    assert many(words("one", *own))[0] == [0]
    for more in ((), ("--shard", "base")):
        folder = "-".join(("two", *more))
        codes, said = many(*2 * [words(folder, *own, *more)])
        assert codes == [0, 0], said
        assert_same_run(tmp_path / folder, tmp_path / "one")


@pytest.mark.thorough
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantised_base_is_whole_in_each_process(bits, words, many, tmp_path):
    pytest.importorskip("bitsandbytes")
    own = ("--quantize", bits)
    assert many(words("one", *own))[0] == [0]
    codes, said = many(*2 * [words("two", *own)])
    assert codes == [0, 0], said
    assert_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.thorough
def test_a_run_goes_on_with_another_number_of_processes(words, many, tmp_path):
    many(words("one"))
    many(*2 * [words("two")])
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "checkpoint-14")
    assert many(words("two", "--resume"))[0] == [0]
    # The first loss after resuming is the mean since then.
    shown = ("eval_loss", "grad_norm")
    assert_close(logged(tmp_path / "two", shown), logged(tmp_path / "one", shown))


@pytest.mark.thorough
def test_what_cannot_train_together_is_refused_once(words, many, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("")
    cases = {
        "batch_size 6 is the rows of all processes, and 4 cannot": 4 * [words("four")],
        "seed is 1 in process 1, and 0 in process 0": [words("a", "--seed", n) for n in (0, 1)],
        "run exists and is not empty": 2 * [words("run")],
        "a sweep runs in one process": 2 * [words("b", "--sweep", "{lora.rank: [1, 2]}")],
        "shard: base cannot be used with these settings (1 problem)": 2
        * [words("c", "--shard", "base", "--quantize", "4bit")],
    }
    for message, lines in cases.items():
        codes, said = many(*lines)
        assert (codes, said.count("error:")) == (len(lines) * [2], 1)
        assert message in said
    assert sorted(each.name for each in tmp_path.iterdir()) == ["run", "said"]


@pytest.mark.thorough
@pytest.mark.parametrize("what", ["training rows", "validation rows", "base"])
def test_what_differs_under_one_name_is_refused_once(
    what, words, many, tmp_path, tiny_llama, prompt_rows
):
    names = {"training rows": "train.jsonl", "validation rows": "held.jsonl", "base": "base"}
    for number in (0, 1):
        machine = tmp_path / f"machine-{number}"
        machine.mkdir()
        for rows in ("train.jsonl", "held.jsonl"):
            shutil.copy(prompt_rows, machine / rows)
        shutil.copytree(tiny_llama, machine / "base")
    other = tmp_path / "machine-1" / names[what]
    if what == "base":
        model, _ = lk.load_model(tiny_llama, dtype="float32")
        with torch.no_grad():
            model.lm_head.weight.add_(0.1)
        model.save_pretrained(other)
    else:
        # Their number is the same, so that only their content tells.
        first, *rest = other.read_text().splitlines()
        other.write_text("\n".join([*rest, first]))
    own = ("--model", "./base", "--data.train", "train.jsonl", "--data.validation", "held.jsonl")
    codes, said = many(*2 * [words("run", *own)])
    assert (codes, said.count("error:")) == ([2, 2], 1)
    assert "the processes of a run differ: give each the same versions, settings, rows" in said
    assert said.count("process 1") == said.count(f"the hash of the {what} is ") == 1
    assert not list((tmp_path / "run").glob("*.safetensors"))


@pytest.mark.thorough
def test_only_to_resume_all_machines_must_see_the_folder(words, many, tmp_path):
    for number in (0, 1):
        (tmp_path / f"machine-{number}").mkdir()
    assert many(*2 * [words("run", "--out", "run")])[0] == [0, 0]
    assert not [each for each in (tmp_path / "machine-1").rglob("*") if each.is_file()]
    codes, said = many(*2 * [words("run", "--out", "run", "--resume")])
    assert (codes, said.count("error:")) == ([2, 2], 1)
    assert "run/checkpoints/checkpoint-14 is not on this machine" in said


@pytest.mark.thorough
@pytest.mark.parametrize(("number", "more"), [(0, ()), (1, ()), (1, ("--shard", "base"))])
def test_a_killed_process_ends_all_with_one_message(number, more, words, many, tmp_path):
    codes, said = many(*2 * [words("run", "--steps", 5000, *more)], kill=[number, 9])
    assert sorted(codes) == [-9, 2]
    assert said.count("error:") == 1
    assert "one of the 2 processes that train together has ended" in said


@pytest.mark.thorough
def test_a_signal_to_one_process_stops_all_after_a_checkpoint(words, many, tmp_path):
    codes, said = many(*2 * [words("run", "--steps", 5000)], kill=[1, 15])
    assert codes == [130, 130]
    assert said.count("give --resume to go on") == 1
    assert list((tmp_path / "run" / "checkpoints").iterdir())


def test_sigterm_comes_twice_where_slurm_ends_what_torchrun_started():
    with Interruption() as stopped:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stopped.happened
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.thorough
def test_torchrun_starts_it(words, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    line = [*launcher, "--nproc-per-node", "2", "-m", "lorakit", *words("run", "--steps", 3)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("adapter in ") == 1
    lk.Adapter.load(tmp_path / "run")


def test_engines_that_divide_the_model_and_lone_work_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="a sweep runs in one process: start it without torchr"):
        check_alone("a sweep")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_USE_MEGATRON_LM", "true")
    message = "FSDP and DeepSpeed and Megatron-LM .*, and lorakit divides a model by shard: base"
    with pytest.raises(ConfigError, match=message), together():
        pass


def test_machines_with_other_versions_are_refused(monkeypatch):
    others = {"the version of torch": "1.0"}
    monkeypatch.setattr(processes, "gathered", lambda values: [values, values | others])
    with pytest.raises(ConfigError, match=r"the version of torch is '1\.0' in process 1, and '\d"):
        processes.check_settings(lk.TrainConfig(out="run"))


def test_processes_of_mpi_would_each_train_alone_and_are_refused(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")
    with together():
        pass
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"MPI has started 2 processes.* by torchrun"), together():
        pass


def test_one_process_has_the_whole_base():
    config = lk.TrainConfig(out="run", shard="base")
    assert idle_shard(config) == ("shard (there is one process)",)
