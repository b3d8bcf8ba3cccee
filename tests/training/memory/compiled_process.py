"""Trains tiny models with and without `compile`, and tells what the compiler was given.

A process of its own, because the compiler cannot trace the shape checks that tests run with.
Arguments: the compiler's backend, and a JSON object of settings for each run.
"""

import json
import sys
from functools import partial

import torch
from torch._dynamo.utils import counters
from transformers import TrainerCallback

from lorakit.config.train import TrainConfig
from lorakit.training.prepare import prepare
from lorakit.training.run import Run, execute, while_training


def losses(config):
    """The losses of a run, and the words for how its rows were laid out."""
    prepared = prepare(config)
    run = Run(config=config, prepared=prepared, checkpoint=None)
    with while_training(prepared.model, config) as interruption:
        execute(run, interruption, bar=TrainerCallback())
    assert all(module._compiled_call_impl is None for module in prepared.model.modules())
    lines = map(json.loads, (config.out / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line], str(prepared.packing)


def told(settings):
    """The losses of a run and of the same run compiled, and the packing and graphs of that."""
    plain, _ = losses(TrainConfig(**settings, overwrite=True))
    counters.clear()
    compiled, packing = losses(TrainConfig(**settings, overwrite=True, compile=True))
    return {
        "plain": plain,
        "compiled": compiled,
        "packing": packing,
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": dict(counters["graph_break"]),
    }


if __name__ == "__main__":
    torch.compile = partial(torch.compile, backend=sys.argv[1])
    print(json.dumps([told(json.loads(settings)) for settings in sys.argv[2:]]))
