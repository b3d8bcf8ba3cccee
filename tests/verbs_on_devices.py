"""What the verbs give that load a base, each with adapters of many kinds: a program.

    python -c "from verbs_on_devices import main; main()" LLAMA BERT ROWS FOLDER pretended|cuda

It asks them on the CPU and on a GPU, a pretended one or the one that is there, and prints as JSON
what both give.
"""

import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from starlette.testclient import TestClient

import lorakit as lk
from lorakit.cli.main import main as command
from lorakit.config.serve import ServeConfig
from lorakit.models.device import move
from lorakit.models.load import load_model
from lorakit.serving.api.app import build_app
from lorakit.serving.api.own_engine import OwnEngine
from lorakit.serving.serve import prepared
from pretended_gpu import MISTAKES, pretended_gpu
from references import randomise

PROMPTS = ["red cat dog", "big fish", "old old bird new"]
WRITERS: dict[str, Any] = {
    "plain": lk.LoRAConfig(rank=2, targets=("all-linear", "embed"), lora_bias=False),
    "rescaled": lk.LoRAConfig(rank=3, targets=("q", "down"), use_dora=True),
    "rows": lk.LoRAConfig(rank=2, trainable_token_indices={"embed": [5, 6]}),
    "biased": lk.BitFitConfig(add_missing=True),
    "small": lk.BottleneckConfig(variant="l", size=4),
    "copied": lk.FullConfig(only_top=True, top=1),
    "prefix": lk.PrefixConfig(prefix=2, infix=1, every_layer=True),
}
SERVED = ("plain", "rescaled", "rows", "small")
HEADS = {
    "cats": ("classification", ("no", "yes")),
    "sizes": ("classification", ("big", "old", "small")),
    "colours": ("multi-label", ("blue", "red", "none")),
    "ages": ("regression", None),
}
OTHERS = {"tags": ("token-classification", ("B", "O")), "near": ("embedding", None)}


def save(base: str, place: Path, config: Any, **how: Any) -> None:
    """Save an adapter with random weights."""
    torch.manual_seed(len(place.name))
    model, _ = load_model(base, **how)
    lk.attach(model, config)
    randomise(model, seed=len(place.name))
    replace(lk.extract(model), card=how).save(place)


def shown(*words: Any) -> Any:
    """The JSON that a verb prints."""
    out, notes = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(notes):
        code = command([*map(str, words), "--json"])
    assert code == 0, notes.getvalue()
    return json.loads(out.getvalue())


def written(llama: str, rows: str, root: Path, device: str) -> Iterator[Any]:
    """Yield what generate, evaluate and chat give."""
    how: dict[str, Any] = {"max_new_tokens": 4, "device": device}
    for name in WRITERS:
        yield lk.generate(PROMPTS, adapter=root / name, **how)
    beams = {"adapter": root / "plain", "num_beams": 3, "no_repeat_ngram": 2}
    yield lk.generate(PROMPTS, **beams, **how)
    yield shown("generate", root / "prefix", "--prompt", "red cat", "--device", device)
    for name in ("rescaled", "prefix"):
        words = ("--data.validation", rows, "--data.validation-rows", 6, "--device", device)
        yield shown("evaluate", root / name, *words, "--max-new-tokens", 4)
    lines = ("red cat", f"/load {root / 'small'}", "big fish", "/base", "red cat")
    with patch("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines))):
        yield shown("chat", root / "plain", "--max-new-tokens", 4, "--device", device)


def predicted(root: Path, rows: str, device: str) -> Iterator[Any]:
    """Yield what predict gives."""
    for names in (tuple(HEADS), *((name,) for name in OTHERS)):
        places = [root / "heads" / name for name in names]
        yield lk.predict(*places, input=rows, device=device)


def served(llama: str, bert: str, root: Path, device: str) -> Iterator[Any]:
    """Yield what a server's engines answer."""
    how: dict[str, Any] = {"name": "tiny", "device": device}
    with Asking(ServeConfig(model=llama, adapters=root / "served", **how)) as post:
        asked: dict[str, Any] = {"max_tokens": 6, "temperature": 0, "ignore_eos": True}
        weighted = [{"name": "plain", "weight": 0.7}, {"name": "rescaled", "weight": 0.4}]
        prompts = ["red cat dog fish bird new old big red cat", "big fish"]
        for own in ({}, {"adapters": weighted}, *({"model": name} for name in SERVED)):
            yield post("/v1/completions", prompt=prompts, **asked, **own)
        drawn = {"seed": 3, "top_p": 0.9, "top_k": 9, "min_p": 0.01, "logit_bias": {"5": 1}}
        penalties = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2}
        more = drawn | penalties | {"temperature": 0.8, "logprobs": 2, "echo": True}
        yield post("/v1/completions", prompt=prompts, **asked | more, model="plain")
    with Asking(ServeConfig(model=bert, adapters=root / "sorted", **how)) as post:
        for name in ("cats", "sizes"):
            yield post("/v1/classify", model=name, input=PROMPTS)
            yield post("/v1/embeddings", model="tiny", input=PROMPTS)


class Asking:
    """A block in which a server is asked."""

    def __init__(self, settings: ServeConfig) -> None:
        self._engine, catalog = prepared(settings)
        self._client = TestClient(build_app(OwnEngine(self._engine, catalog)))

    def __enter__(self) -> Callable[..., Any]:
        self._engine.start()
        return self._post

    def __exit__(self, *_: object) -> None:
        self._engine.close(drain=False)

    def _post(self, path: str, **body: Any) -> Any:
        found = self._client.post(path, json=body).json()
        return found.get("choices") or found.get("data") or found


def quantised(llama: str, forms: Sequence[str], device: str) -> Iterator[Any]:
    """Yield what bases in few bits write."""
    for form in forms:
        yield lk.generate(PROMPTS, model=llama, quantize=form, device=device, max_new_tokens=4)


def everything(
    llama: str, bert: str, rows: str, root: Path, device: str, forms: Sequence[str]
) -> list[Any]:
    """What all verbs give on a device, with the base in these forms too."""
    file = root / "rows.jsonl"
    texts = ({"text": text, "text_pair": text[::-1], "words": text.split()} for text in PROMPTS)
    file.write_text("".join(json.dumps(each) + "\n" for each in texts))
    return [
        *written(llama, rows, root, device),
        *quantised(llama, forms, device),
        *predicted(root, str(file), device),
        *served(llama, bert, root, device),
    ]


def main() -> None:
    """Make the adapters, and ask on both devices."""
    llama, bert, rows, folder, device = sys.argv[1:]
    root, pretended = Path(folder), device == "pretended"
    for name, config in WRITERS.items():
        save(llama, root / name, config)
    for name in SERVED:
        shutil.copytree(root / name, root / "served" / name)
    for name, (task, labels) in (HEADS | OTHERS).items():
        config = lk.LoRAConfig(rank=2, targets=("all-linear",))
        save(bert, root / "heads" / name, config, task=task, labels=labels)
    for name in ("cats", "sizes"):
        shutil.copytree(root / "heads" / name, root / "sorted" / name)
    moved: list[str] = []

    def noted(model: Any, where: torch.device) -> None:
        move(model, where)
        moved.extend(each.device.type for each in model.parameters())

    asked = llama, bert, rows, root
    # bitsandbytes' classes of weights take no other class of tensors in.
    forms = () if pretended else ("4bit", "8bit")
    here = everything(*asked, "cpu", forms)
    with pretended_gpu() if pretended else nullcontext(), patch("lorakit.models.load.move", noted):
        there = everything(*asked, "auto", forms)
    found = {"cpu": here, "gpu": there, "devices": sorted(set(moved)), "mistakes": MISTAKES}
    print(json.dumps(found))
