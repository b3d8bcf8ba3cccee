"""Training through torch.compile: the same run, compiled once, and a model that is as it was."""

import os
import subprocess
import sys

import pytest

from lorakit.config import DataConfig, TrainConfig
from lorakit.errors import ConfigError
from lorakit.method_config import LoRAConfig
from lorakit.tasks.batches import training_batch
from lorakit.tasks.encode import Example
from lorakit.train.compiling import LENGTHS
from lorakit.train.run import train

PROGRAM = """
import json, sys
from functools import partialmethod
import torch
import torch._dynamo as dynamo
from torch import nn
# The compiler itself takes minutes; what it is given, and how often, is the same.
graphs = []
def backend(graph, inputs):
    graphs.append(graph)
    return graph.forward
nn.Module.compile = partialmethod(nn.Module.compile, backend=backend)
from lorakit.config import TrainConfig
from lorakit.train.prepare import prepare
from lorakit.train.run import Run, run_alone
from transformers import TrainerCallback

def losses(**changes):
    config = TrainConfig(**json.loads(sys.argv[1]), **changes)
    prepared = prepare(config)
    run = Run(config=config, prepared=prepared, checkpoint=None)
    run_alone(run, bar=TrainerCallback())
    assert prepared.model.base_model._compiled_call_impl is None
    lines = (config.out / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines if '"loss"' in line]

plain = losses(out=sys.argv[2] + "/plain", kernels="plain")
assert not graphs
compiled = losses(out=sys.argv[2] + "/compiled", compile=True)
assert graphs
made = len(graphs)
assert all(abs(a - b) < 1e-3 * a for a, b in zip(plain, compiled, strict=True)), (plain, compiled)
dynamo.reset()
graphs.clear()
losses(out=sys.argv[2] + "/longer", compile=True, steps=12)
assert len(graphs) == made, (made, len(graphs))
"""


def test_a_compiled_run_has_the_losses_of_plain_torch_and_compiles_once(
    tiny_llama, prompt_rows, tmp_path
):
    config = TrainConfig(
        model=str(tiny_llama),
        out=tmp_path,
        lora=LoRAConfig(rank=2, targets=("all-linear",)),
        data=DataConfig(train=str(prompt_rows)),
        dtype="float32",
        warmup_steps=1,
    )
    settings = config.model_dump_json(exclude={"out", "kernels", "compile", "steps"})
    # Apart, because the compiler can't trace through the shape checks that tests run with.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, settings, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_settings_that_a_compiled_model_cannot_have_are_refused_together(tmp_path):
    config = TrainConfig(
        out=tmp_path / "run",
        data=DataConfig(train="builtin:places"),
        compile=True,
        memory="low",
        packing="on",
    )
    with pytest.raises(ConfigError, match=r"2 problems(.|\n)*memory: low(.|\n)*packing: on"):
        train(config)
    assert not config.out.exists()


def test_rows_are_padded_to_few_lengths():
    rows = [Example(input_ids=[5] * n, labels=[5] * n) for n in (3, 18)]
    batch = training_batch(rows, pad_id=0, multiple=LENGTHS)
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 32)
    assert batch["attention_mask"].sum(1).tolist() == [3, 18]
    assert (batch["labels"][:, 18:] == -100).all()
