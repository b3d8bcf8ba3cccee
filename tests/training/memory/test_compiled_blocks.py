"""Training through torch.compile: the same run, one graph for all blocks, a model as it was."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch._dynamo.exc import Unsupported
from torch.nn import Linear
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel

from lorakit.config.methods import LoRAConfig
from lorakit.config.train import DataConfig, TrainConfig
from lorakit.data.batches import training_batch
from lorakit.data.samples import Example
from lorakit.errors import ConfigError, TrainingError
from lorakit.layers.route import Frame, Route
from lorakit.training.memory.compiled_blocks import LENGTHS, _CompiledBlock
from lorakit.training.memory.memory_setting import check_memory
from lorakit.training.prepare import prepare
from mixtures import mixture
from tiny_models import build

PROGRAM = Path(__file__).with_name("compiled_process.py").read_text(encoding="utf-8")
BLOCKS = 10
"""More than the eight graphs that the compiler makes of one function before it gives up."""


def run_process(forks, backend, *runs):
    """The results of `compiled_process` for each run."""
    given = [run.model_dump_json(exclude={"compile", "overwrite"}) for run in runs]
    return json.loads(forks.run(PROGRAM, backend, *given).splitlines()[-1])


@pytest.fixture(scope="module")
def deep(tiny_llama, tmp_path_factory):
    """A function that gives the folder of a tiny model of many blocks."""

    def make(family, **settings):
        folder = tmp_path_factory.mktemp("deep") / family
        build(family, **settings).save_pretrained(folder)
        AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
        return folder

    return make


class Blockless(PreTrainedModel):
    """A model without blocks."""


def settings(model, rows, out, **others):
    given = {
        "model": str(model),
        "out": out,
        "lora": LoRAConfig(rank=2, targets=("all-linear",)),
        "data": DataConfig(train=str(rows), validation=str(rows), validation_rows=8),
        "dtype": "float32",
        "warmup_steps": 1,
        "batch_size": 6,
        "steps": 6,
        "eval_every": 3,
    }
    return TrainConfig(**{**given, **others})


@pytest.fixture(scope="module")
def runs(deep, prompt_rows, tmp_path_factory, forks):
    """The results of runs of several packings and families, in one process.

    Their backend runs the graphs as they are: what the compiler is given is the same for all.
    """
    out = tmp_path_factory.mktemp("runs")
    llama = deep("llama", num_hidden_layers=BLOCKS)
    gpt2 = deep("gpt2", n_layer=BLOCKS, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    asked = {
        "joined": settings(llama, prompt_rows, out / "joined"),
        "padded": settings(llama, prompt_rows, out / "padded", packing="off"),
        "slices": settings(gpt2, prompt_rows, out / "slices"),
    }
    return dict(zip(asked, run_process(forks, "eager", *asked.values()), strict=True))


NAMES = ("joined", "padded", "slices")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.thorough
def test_one_graph_serves_all_blocks_and_lengths(runs, name):
    assert runs[name]["graphs"] == 1
    assert runs[name]["breaks"] == {}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.thorough
def test_a_compiled_run_has_the_losses_of_the_same_run_without(runs, name):
    assert runs[name]["compiled"] == pytest.approx(runs[name]["plain"], rel=1e-4)


@pytest.mark.thorough
def test_compiled_rows_are_joined_where_others_are(runs):
    assert (
        runs["joined"]["packing"]
        == runs["slices"]["packing"]
        == "rows joined, without padding between them"
    )
    assert runs["padded"]["packing"] == "padded"


# Gemma's soft caps, gpt-oss's sinks and experts, and attention that cannot keep rows apart.
LIKE_SMOLLM2 = {
    "gemma2": ({}, "rows joined, without padding between them"),
    "gpt_oss": ({}, "rows joined, without padding between them"),
    "gptj": ({"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}, "padded"),
    "falcon": ({}, "padded"),
}


@pytest.mark.thorough
@pytest.mark.parametrize("family", LIKE_SMOLLM2)
def test_other_families_compile_and_are_joined_where_that_can_be(
    family, tiny_llama, prompt_rows, tmp_path, forks
):
    more, packing = LIKE_SMOLLM2[family]
    model = mixture(family) if family == "gpt_oss" else build(family, **more)
    model.save_pretrained(tmp_path / family)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / family)
    few = settings(tmp_path / family, prompt_rows, tmp_path / "run", steps=4, eval_every=2)
    (told,) = run_process(forks, "eager", few)
    # Blocks of Gemma and gpt-oss look back over a window by turns: one graph for each kind.
    assert told["graphs"] <= 2
    assert told["breaks"] == {}
    assert told["packing"].startswith(packing)
    assert told["compiled"] == pytest.approx(told["plain"], rel=1e-4)


@pytest.mark.thorough
def test_the_real_compiler_gives_the_same_losses(deep, prompt_rows, tmp_path, forks):
    backend = "inductor" if shutil.which("g++") else "aot_eager"
    folder = deep("llama", num_hidden_layers=3)
    few = settings(folder, prompt_rows, tmp_path / "run", steps=2, eval_every=2)
    (told,) = run_process(forks, backend, few)
    assert told["graphs"] == 1
    assert told["breaks"] == {}
    assert told["compiled"] == pytest.approx(told["plain"], rel=1e-3)


def test_settings_that_a_compiled_model_cannot_have_are_refused(tmp_path):
    config = TrainConfig(
        out=tmp_path / "run",
        data=DataConfig(train="builtin:places"),
        compile=True,
        memory="low",
        sweep={"seed": [0, 1]},
    )
    with pytest.raises(ConfigError, match=r"2 problems(.|\n)*memory: low(.|\n)*sweep"):
        prepare(config)
    assert not config.out.exists()


def test_what_the_compiler_refuses_is_told_in_one_message():
    def refuse(*args):
        raise Unsupported("it reads a file\nand a long explanation")

    block = Linear(2, 2)
    compiled = _CompiledBlock(block, refuse, Route(), None)
    x = torch.ones(1, 2, requires_grad=True)
    with pytest.raises(TrainingError, match="cannot compile Linear: it reads a file\nTrain with"):
        compiled(x)


def test_only_what_it_was_made_for_goes_through_compiled_code():
    block, route = Linear(2, 2), Route(Frame({}))
    compiled = _CompiledBlock(block, lambda block, x: "compiled", route, route.top.operations)
    x = torch.ones(1, 2, requires_grad=True)
    assert compiled(x) == "compiled"
    assert isinstance(compiled(x.detach()), torch.Tensor)
    with torch.no_grad():
        assert isinstance(compiled(x), torch.Tensor)
    block.eval()
    assert isinstance(compiled(x), torch.Tensor)
    block.train()
    route.frame = Frame({})
    assert isinstance(compiled(x), torch.Tensor)


def test_a_model_without_blocks_is_refused(tmp_path):
    config = TrainConfig(out=tmp_path, data=DataConfig(train="builtin:places"), compile=True)
    with pytest.raises(ConfigError, match="Blockless has none that transformers could checkpoint"):
        check_memory(Blockless(PreTrainedConfig()), config)


def test_padded_rows_of_a_compiled_model_have_few_lengths():
    rows = [Example(input_ids=[5] * n, labels=[5] * n) for n in (3, 18)]
    batch = training_batch(rows, pad_id=0, multiple=LENGTHS)
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 32)
    assert batch["attention_mask"].sum(1).tolist() == [3, 18]
    assert (batch["labels"][:, 18:] == -100).all()
