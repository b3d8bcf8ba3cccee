"""What an adapter is for, one function a use: each tries it on a base, and raises where it fails.

A `LorakitError` is a refusal, whose first line is the reason; `Differs` says that a number is not
what it must be.
"""

from __future__ import annotations

import copy
import json
import random
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.answering.generate import generate
from lorakit.attachment.attach import adapter_parameters, attach, detach, extract
from lorakit.bench.families.recipes import CLASSES, WORDS, TriedBase
from lorakit.bench.peers import require_peft
from lorakit.config.methods import LoRAConfig
from lorakit.config.train import DataConfig, TrainConfig
from lorakit.data.collate import PACKED, Collator
from lorakit.data.encode import encode_rows
from lorakit.data.packing import PLAIN, Packing, choose_packing
from lorakit.data.rows import read_rows
from lorakit.errors import ConfigError
from lorakit.merging.merge import merge, unmerge
from lorakit.models.attention import attention_within
from lorakit.models.identity import weights_hash
from lorakit.models.quantized import Quantization, quantize
from lorakit.models.shape import decoder_start
from lorakit.routing.route import route
from lorakit.training.lm_loss import text_losses
from lorakit.training.loss import Loss
from lorakit.training.memory.activation_checkpointing import (
    has_blocks,
    narrow_matmuls,
    recomputing,
)
from lorakit.training.run import train
from lorakit.upstream.quiet_library import quiet_library

TAKEN_FOR_EXPERTS = ("deepseek_v3",)
"""Families whose dense layers PEFT 0.21 takes for their experts."""
RANK, SPREAD, ROWS = 2, 0.2, 6
STEPS = 12
"""Steps of a run. When a token changes its experts, the loss jumps (OLMoE's by 0.05 in one step, in
PEFT too): a few steps gain less than that."""
LORA = LoRAConfig(rank=RANK, targets=("all-linear",))
CLOSE = {"rtol": 1e-3, "atol": 1e-3}
"""Rounding of logits in float32, which sums in another order leave."""


class Differs(AssertionError):
    """A number that is not what it must be."""


def attached(base: TriedBase) -> None:
    """A fresh adapter changes nothing, a trained one does, and detached the base has its bits."""
    model, inputs = _copy(base), base.inputs(2)
    before, bits = _logits(model, inputs), weights_hash(model)
    attach(model, LORA)
    _check(torch.equal(_logits(model, inputs), before), "a fresh adapter changes the outputs")
    _randomise(model)
    _check(not torch.equal(_logits(model, inputs), before), "a random adapter changes nothing")
    detach(model)
    _check(weights_hash(model) == bits, "detached, the base has other bits")
    _check(torch.equal(_logits(model, inputs), before), "detached, the base answers otherwise")


def trained(base: TriedBase) -> None:
    """`lorakit train` lowers the loss, and leaves the base as it was."""
    bits = weights_hash(base.model)
    losses = _losses(base)
    _check(losses[-1] < losses[0], f"the loss goes from {losses[0]:.3g} to {losses[-1]:.3g}")
    _check(weights_hash(base.model) == bits, "training changes the base")


def merged(base: TriedBase) -> None:
    """Merged weights answer as the adapter does; unmerged they have the base's bits."""
    model, inputs = _copy(base), base.inputs(2)
    bits = weights_hash(model)
    _attach_random(model)
    before = _logits(model, inputs)
    merge(model)
    _equal(_logits(model, inputs), before, "merged")
    unmerge(model)
    detach(model)
    _check(weights_hash(model) == bits, "unmerged, the base has other bits")


def routed(base: TriedBase) -> None:
    """Each row of a batch has the answer of its own adapter, or of the base."""
    model, inputs = _copy(base), base.inputs(3)
    _attach_random(model)
    adapted = _logits(model, inputs)
    with route(model, None):
        plain = _logits(model, inputs)
    choices: list[Any] = ["default", None, {"default": 1.0}]
    with route(model, choices):
        mixed = _logits(model, inputs)
    _equal(mixed, torch.stack([adapted[0], plain[1], adapted[2]]), "a routed row")


def generated(base: TriedBase) -> None:
    """Prompts of several lengths in one batch are answered as alone, by their adapters."""
    if base.task != "generation":
        raise ConfigError("a classifier gives labels, and writes no text")
    model, prompts = _copy(base), _texts()[:3]
    _attach_random(model)
    asked: dict[str, Any] = {"model": model, "tokenizer": base.tokenizer, "max_new_tokens": 5}
    names = ["default", None, "default"]
    with route(model, names):
        together = generate(prompts, **asked)
    alone: list[str] = []
    for name, prompt in zip(names, prompts, strict=True):
        with route(model, name):
            alone += generate(prompt, **asked)
    _check(together == alone, f"together {together}, alone {alone}")


def exchanged(base: TriedBase) -> None:
    """An adapter of lorakit answers the same in PEFT, and one of PEFT the same in lorakit."""
    if base.name in TAKEN_FOR_EXPERTS:
        raise ConfigError(
            "PEFT takes gate_proj, up_proj and down_proj, wherever they are, for those that experts"
            " had in transformers 4"
        )
    peft, inputs = require_peft(), base.inputs(2)
    with tempfile.TemporaryDirectory() as folder, quiet_library():
        ours = _copy(base)
        _attach_random(ours)
        extract(ours).save(Path(folder, "ours"))
        theirs = peft.PeftModel.from_pretrained(_copy(base), str(Path(folder, "ours"))).eval()
        _equal(_logits(theirs, inputs), _logits(ours, inputs), "lorakit's adapter in PEFT")
        # By path: PEFT's all-linear would adapt routers too.
        paths = [site.path for site in extract(ours).sites]
        config = peft.LoraConfig(r=RANK, target_modules=paths, init_lora_weights=False)
        theirs = peft.get_peft_model(_copy(base), config).eval()
        theirs.save_pretrained(str(Path(folder, "theirs")))
        ours = _copy(base)
        attach(ours, Path(folder, "theirs"))
        _equal(_logits(ours, inputs), _logits(theirs, inputs), "PEFT's adapter in lorakit")


def packed(base: TriedBase) -> None:
    """Without padding between rows, or with attention row by row, gradients are the same."""
    if base.kind == "images":
        raise ConfigError("images have one size, so that none is padded")
    packing = choose_packing(base.model, task=base.task, packing="auto")
    if not (packing.joined or packing.segmented):
        raise ConfigError(packing.reason)
    model = _copy(base)
    _attach_random(model)
    plain = _gradients(base, model, _batch(base))
    found = _gradients(base, model, _batch(base, packing))
    _same(found, plain)


def checkpointed(base: TriedBase) -> None:
    """With activations that are computed again, gradients are the same."""
    if not has_blocks(base.model):
        raise ConfigError("transformers checkpoints no blocks of it")
    model, batch = _copy(base), _batch(base)
    _attach_random(model)
    plain = _gradients(base, model, batch)
    with recomputing(model, narrow_matmuls) as blocks:
        found = _gradients(base, model, batch)
    _check(len(blocks) > 0, "no block is checkpointed")
    _same(found, plain)


def in_four_bits(base: TriedBase) -> None:
    """On 4-bit weights a fresh adapter changes nothing, and gradients reach every update."""
    model, inputs = _copy(base), base.inputs(2)
    quantize(model, Quantization.of("4bit", "float32"))
    before = _logits(model, inputs)
    attach(model, LORA)
    _check(torch.equal(_logits(model, inputs), before), "a fresh adapter changes the outputs")
    _randomise(model)
    model(**inputs).logits.square().sum().backward()
    still = [name for name, each in adapter_parameters(model, "default") if each.grad is None]
    _check(not still, f"no gradient for {still[:1]}")
    detach(model)
    _check(torch.equal(_logits(model, inputs), before), "detached, the base answers otherwise")


USES: Mapping[str, Callable[[TriedBase], None]] = {
    "attach": attached,
    "train": trained,
    "merge": merged,
    "route": routed,
    "generate": generated,
    "PEFT": exchanged,
    "packed": packed,
    "checkpointed": checkpointed,
    "4-bit": in_four_bits,
}
"""Each use by the head of its column."""


def _copy(base: TriedBase) -> Any:
    return copy.deepcopy(base.model)


@torch.no_grad()
def _logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    logits: Tensor = model(**inputs).logits
    return logits


def _attach_random(model: nn.Module) -> None:
    attach(model, LORA)
    _randomise(model)


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    """Random A and B, as if they had been trained; smaller for a wide model."""
    generator = torch.Generator().manual_seed(1)
    for _, parameter in adapter_parameters(model, "default"):
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise * min(SPREAD, parameter.numel() ** -0.5))


def _check(right: bool, problem: str) -> None:
    if not right:
        raise Differs(problem)


def _equal(found: Tensor, wanted: Tensor, what: str) -> None:
    if not torch.allclose(found, wanted, rtol=CLOSE["rtol"], atol=CLOSE["atol"]):
        raise Differs(f"{what} differs by {float((found - wanted).abs().max()):.1e}")


def _same(found: list[Tensor], wanted: list[Tensor]) -> None:
    """Compare gradients, each by the largest of its kind."""
    for ours, plain in zip(found, wanted, strict=True):
        error = float((ours - plain).abs().max() / plain.abs().max().clamp(min=1e-12))
        _check(error < CLOSE["rtol"], f"gradients differ by {error:.1e} of their size")


def _gradients(base: TriedBase, model: Any, batch: dict[str, Any]) -> list[Tensor]:
    """The gradients of an adapter's weights, of the loss that training has of a batch."""
    inputs, loss = dict(batch), Loss(base.task)
    labels, apart = inputs.pop("labels"), inputs.pop(PACKED, None)
    model.train()
    model.zero_grad()
    with attention_within(model, apart):
        if loss.objective is None:
            summed, _ = text_losses(model, inputs, labels)
        else:
            summed = loss.summed(loss.objective.outputs(model, inputs), labels)
        summed.backward()
    parameters = [each for _, each in adapter_parameters(model, "default")]
    return [each.grad for each in parameters if each.grad is not None]


def _batch(base: TriedBase, packing: Packing = PLAIN) -> dict[str, Any]:
    """The rows to train on as one batch."""
    with tempfile.TemporaryDirectory() as folder:
        data = DataConfig(train=str(_written(base, Path(folder))), max_length=32)
        rows = read_rows(data.train or "", data, task=base.task)
        start = decoder_start(base.model)
        samples = encode_rows(rows, base.tokenizer, data, decoder_start=start).examples
        return Collator(base.tokenizer, packing)(samples)


def _losses(base: TriedBase) -> list[float]:
    """The loss of each step of a short run, whose batches have all rows."""
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            out=Path(folder, "out"),
            lora=LORA,
            data=DataConfig(train=str(_written(base, Path(folder))), max_length=32),
            batch_size=ROWS,
            steps=STEPS,
            warmup_steps=0,
            schedule="constant",
            allow_untrained=True,
        )
        with quiet_library():
            train(config, model=base.model, tokenizer=base.tokenizer)
        lines = (config.out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


def _texts() -> list[str]:
    """Texts of three to eight words."""
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=3 + number)) for number in range(ROWS)]


def _written(base: TriedBase, folder: Path) -> Path:
    """A file of the rows to train on."""
    file = folder / "rows.jsonl"
    lines = "\n".join(json.dumps(row) for row in _rows(base, folder))
    file.write_text(lines, encoding="utf-8")
    return file


def _rows(base: TriedBase, folder: Path) -> list[dict[str, str]]:
    """The rows to train on; images are written into a folder."""
    if base.kind == "images":
        from PIL import Image

        files = [folder / f"{number}.png" for number in range(ROWS)]
        for number, file in enumerate(files):
            Image.new("RGB", (12, 12), (40 * number, 90, 255 - 40 * number)).save(file)
        return [
            {"image": str(file), "label": CLASSES[number % len(CLASSES)]}
            for number, file in enumerate(files)
        ]
    if base.task == "classification":
        return [
            {"text": text, "label": CLASSES[number % len(CLASSES)]}
            for number, text in enumerate(_texts())
        ]
    backwards = (" ".join(reversed(text.split())) for text in _texts())
    return [
        {"prompt": text, "completion": answer}
        for text, answer in zip(_texts(), backwards, strict=True)
    ]
