"""Write the golden files: adapters, other tools' files, interrupted runs, and what they must give.

    PYTHONPATH=src:tests python -m golden.write FOLDER

The folder must be new. The files that are committed were written once, before the code that reads
them was restructured, and prove that it still reads them: write others only for a new file format,
and beside the old ones.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import safetensors.torch
import torch
import yaml
from torch import Tensor

import lorakit as lk
from golden import bases
from lorakit.cli.main import main
from lorakit.errors import MergeError

LORA = lk.LoRAConfig(rank=2, alpha=3)
ADAPTERS: dict[str, Any] = {
    "llama-lora": [LORA],
    "llama-dora": [lk.LoRAConfig(rank=2, targets=("q", "down"), use_dora=True)],
    "llama-pissa": [lk.LoRAConfig(rank=2, alpha=3, init="pissa")],
    "llama-rslora": [
        lk.LoRAConfig(
            rank=2,
            alpha=3,
            targets="all-linear",
            use_rslora=True,
            rank_pattern={"v": 3, "model.layers.1.*": 1},
            alpha_pattern={"down": 5},
        )
    ],
    "llama-freeze_a": [lk.LoRAConfig(rank=2, freeze_a=True)],
    "llama-embed": [lk.LoRAConfig(rank=2, targets=("embed", "head"), dropout=0.1)],
    "gpt2-slices": [LORA],
    "gpt2-slices_of_other_scales": [lk.LoRAConfig(rank=2, alpha=3, alpha_pattern={"v": 7})],
    "gpt2-bias": [lk.LoRAConfig(rank=2, targets=("q", "up"), bias="all")],
    "bert-head": [lk.LoRAConfig(rank=2, modules_to_save=("classifier",))],
    "gpt2-full": [lk.FullConfig()],
    "llama-top-k": [lk.FullConfig(only_top=True, top=1)],
    "bert-bitfit": [lk.BitFitConfig()],
    "llama-bitfit_added": [lk.BitFitConfig(add_missing=True)],
    "llama-prefix-embedding": [lk.PrefixConfig(prefix=2, infix=1)],
    "llama-prefix-layer": [lk.PrefixConfig(prefix=2, infix=1, every_layer=True)],
    "llama-adapter-h": [lk.BottleneckConfig(variant="h", size=3)],
    "bert-adapter-l": [lk.BottleneckConfig(variant="l", size=3)],
    "gpt2-adapter-p": [lk.BottleneckConfig(variant="p", size=3, train_norms=True)],
    "llama-adapter-d": [lk.BottleneckConfig(variant="d", size=3, dropped=1)],
    "llama-lora+prefix-layer": [LORA, lk.PrefixConfig(prefix=2, infix=0, every_layer=True)],
    "llama-lora+adapter-p": [LORA, lk.BottleneckConfig(variant="p", size=3)],
}
"""Settings of each adapter; its name begins with that of its base."""

RUN: dict[str, Any] = {
    "model": "base",
    "out": "out",
    "data": {"train": "prompts.jsonl", "validation": "prompts.jsonl"},
    "dtype": "float32",
    "steps": 6,
    "batch_size": 4,
    "warmup_steps": 1,
    "learning_rate": 0.01,
    "eval_every": 2,
}
RUNS: dict[str, dict[str, Any]] = {
    "llama-lora": {"lora": {"rank": 2, "targets": "all-linear", "dropout": 0.1}},
    "llama-lora+prefix-layer": {
        "method": "lora,prefix-layer",
        "lora": {"rank": 2, "init": "pissa"},
        "prefix": {"prefix": 2, "infix": 1},
    },
    "bert-adapter-l": {
        "method": "adapter-l",
        "bottleneck": {"size": 3},
        "data": {"train": "labels.jsonl", "validation": "labels.jsonl"},
    },
    "llama-sweep": {
        "lora": {"rank": 2},
        "sweep": [
            {"name": "short", "steps": 2},
            {"name": "long", "lora.rank": 1, "seed": 1},
            {"name": "prefix", "method": "prefix-embedding", "prefix.prefix": 2},
        ],
    },
}
"""What each run changes in `RUN`; its name begins with that of its base."""
INTERRUPTED_AT = 3
"""The step in which Ctrl-C comes."""


def write(folder: Path) -> None:
    """Write all golden files into a new folder."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    found = {}
    for family in ("llama", "gpt2", "bert"):
        found[f"{family}.base"] = bases.logits(bases.build(family))
    for name, configs in ADAPTERS.items():
        model = bases.build(name.partition("-")[0])
        lk.attach(model, configs)
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        bases.fill(trained, seed=name, std=0.15, add=True)
        lk.extract(model).save(folder / "adapters" / name)
    write_peft(folder)
    write_loralib(folder)
    for adapter in sorted((folder / "adapters").iterdir()):
        found |= logits_of(adapter)
    safetensors.torch.save_file(found, folder / "logits.safetensors")
    for name, changes in RUNS.items():
        write_run(folder.resolve() / "runs" / name, {**RUN, **changes})
    (folder / "runs" / "arithmetic.txt").write_text(bases.arithmetic() + "\n")


def write_peft(folder: Path) -> None:
    """Write a folder as PEFT does, and the same adapter as lorakit's."""
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 1}
    )
    theirs = peft.get_peft_model(bases.build("llama"), config)
    trained = [(n, p) for n, p in theirs.named_parameters() if p.requires_grad]
    bases.fill(trained, seed="peft", std=0.15, add=True)
    written, ours = folder / "foreign" / "llama-peft", folder / "adapters" / "llama-peft"
    theirs.eval().save_pretrained(str(written))
    (written / "README.md").unlink()
    on_its_base(lk.Adapter.load(written), "llama").save(ours)
    found = logits_of(ours)["llama-peft.attached"]
    torch.testing.assert_close(found, bases.logits(theirs), rtol=1e-5, atol=1e-5)


def write_loralib(folder: Path) -> None:
    """Write a file as loralib does, what it does not hold, and the same adapter as lorakit's."""
    tensors = {}
    for block in range(2):
        path = f"transformer.h.{block}.attn.c_attn"
        # Two of the three slices are enabled: A has a part for each, B the rows of both.
        tensors[f"{path}.lora_A"] = torch.nn.Parameter(torch.empty(2 * 2, 16))
        tensors[f"{path}.lora_B"] = torch.nn.Parameter(torch.empty(2 * 16, 2))
    bases.fill(tensors.items(), seed="loralib", std=0.15)
    file = folder / "foreign" / "gpt2-loralib.pt"
    torch.save({name: tensor.detach() for name, tensor in tensors.items()}, file)
    settings = {"rank": 2, "alpha": 3, "targets": ["q", "v"]}
    file.with_suffix(".json").write_text(json.dumps(settings) + "\n")
    adapter = lk.Adapter.load(file, config=lk.LoRAConfig(**settings))
    on_its_base(adapter, "gpt2").save(folder / "adapters" / "gpt2-loralib")


def on_its_base(adapter: lk.Adapter, family: str) -> lk.Adapter:
    """Another tool's adapter, with the facts about its layers that only a base can give."""
    model = bases.build(family)
    lk.attach(model, adapter)
    return lk.extract(model)


def logits_of(adapter: Path) -> dict[str, Tensor]:
    """The logits with an adapter attached and, where that can be done, merged."""
    model = bases.build(adapter.name.partition("-")[0])
    lk.attach(model, lk.Adapter.load(adapter))
    found = {f"{adapter.name}.attached": bases.logits(model)}
    with contextlib.suppress(MergeError):
        lk.merge(model)
        found[f"{adapter.name}.merged"] = bases.logits(model)
    return found


def write_run(folder: Path, settings: dict[str, Any]) -> None:
    """Train once to the end, for what is expected, and once until Ctrl-C, for what is resumed."""
    folder.mkdir(parents=True)
    with contextlib.chdir(folder):
        bases.save(folder.name.partition("-")[0], Path("base"))
        bases.write_rows(Path("."))
        Path("settings.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
        assert main(["train", "settings.yaml", "--out", "expected"]) == 0
        with ctrl_c_at(INTERRUPTED_AT):
            assert main(["train", "settings.yaml"]) == 130
        tidy()


def tidy() -> None:
    """Remove from a run's folder what the code beside this file can make, and what nobody reads."""
    for pattern in (
        "base",
        "*.jsonl",
        "**/tensorboard",
        "expected/**/checkpoints",
        "expected/**/log.jsonl",
        "expected/sweep.*",
        "out/short/checkpoints",
    ):
        for made in list(Path(".").glob(pattern)):
            shutil.rmtree(made) if made.is_dir() else made.unlink()


@contextlib.contextmanager
def ctrl_c_at(step: int) -> Iterator[None]:
    """Send this process Ctrl-C in one of the backward passes that run in this block."""
    passes, backward = iter(range(1, 1000)), torch.Tensor.backward

    def interrupted(*args, **options):
        if next(passes) == step:
            signal.raise_signal(signal.SIGINT)
        return backward(*args, **options)

    with mock.patch.object(torch.Tensor, "backward", interrupted):
        yield


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    write(Path(sys.argv[1]))
