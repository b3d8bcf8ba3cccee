"""Steps on a GPU: loss, norms and gates by liger-kernel and by plain torch, and a server's steps.

    python benchmarks/steps_gpu.py [--out FILE] [--tiny]

The loss is that of 8,192 tokens with a vocabulary of 128,256, the norm and the gated activation of
their 2,048 and 8,192 features, forward and backward, in bfloat16. The server is its engine without
HTTP: 32 prompts of 64 tokens with 16 adapters of rank 16 on all linear layers of a random Llama of
1B, beside transformers' `generate` of the base alone. Medians. --tiny checks it on a CPU.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tokenizers import Tokenizer, models
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from lorakit.bench.peers import save_random_adapters
from lorakit.bench.serving.ways import answered, generated
from lorakit.kernels import liger
from lorakit.kernels.cross_entropy import head_cross_entropy
from lorakit.kernels.norms_and_gates import gated, rms_norm
from lorakit.serving.catalog import Catalog
from lorakit.serving.engine import Engine
from lorakit.serving.worker import Limits
from measured import begin, write_result
from train_gpu import TINY, WORK

WARM_UPS, REPEATS = 2, 7
RANK, ADAPTERS, ROWS, PROMPT, NEW = 16, 16, 32, 64, 64

Rows = list[dict[str, Any]]


def seconds(call: Callable[[], object]) -> float:
    """The median time of a call."""
    times = []
    for _ in range(WARM_UPS + REPEATS):
        begun = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[WARM_UPS:])


def kernels(config: LlamaConfig, tokens: int, device: str) -> Rows:
    """The times of loss, norm and gated activation, with the library and with plain torch."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        made = torch.randn(size, generator=generator, device=device)
        return made.bfloat16().requires_grad_()

    width, inner, words = config.hidden_size, config.intermediate_size, config.vocab_size
    x, gate, up = random(tokens, width), random(tokens, inner), random(tokens, inner)
    head = nn.Linear(width, words, bias=False, device=device, dtype=torch.bfloat16)
    head.requires_grad_(False)
    targets = torch.randint(words, (tokens,), generator=generator, device=device)
    weights = torch.full((tokens,), 1 / tokens, device=device)
    scale = torch.ones(width, device=device, dtype=torch.bfloat16)
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "loss": lambda: head_cross_entropy(x, head, targets, weights)[0],
        "norm": lambda: rms_norm(x, scale, 1e-5).sum(),
        "gate": lambda: gated(gate, up, "silu").sum(),
    }
    return [
        {"what": name, "who": who, "ms": round(1000 * seconds(partial(_both_ways, call)), 3)}
        for who in _libraries()
        for name, call in calls.items()
    ]


def _both_ways(call: Callable[[], torch.Tensor]) -> None:
    """A forward and its backward pass."""
    call().backward()


def _libraries() -> Iterator[str]:
    """Yield the name of each library that can compute, while it does."""
    with patch.object(liger, "is_installed", lambda: False):
        yield "plain torch"
    if torch.cuda.is_available() and liger.is_installed():
        yield "liger-kernel"


def word_tokenizer(words: int) -> PreTrainedTokenizerFast:
    """A tokenizer with a word for each number."""
    vocabulary = {f"w{number}": number for number in range(words)}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="w0", eos_token="w1")


def serving(config: LlamaConfig, device: str, rows: int, new: int) -> Rows:
    """The tokens a second of the engine, eager and compiled, and of the base by `generate`."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    ids = torch.randint(2, config.vocab_size, (rows, PROMPT), device=device)
    found: Rows = []

    def note(who: str, time_s: float) -> None:
        found.append({"what": "serving", "who": who, "tokens/s": round(rows * new / time_s)})
        print(found[-1], flush=True)

    note("generate, base alone", seconds(lambda: generated(model, ids, new)))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        save_random_adapters(model, root, count=ADAPTERS, rank=RANK, dtype="float32")
        catalog = Catalog(model, word_tokenizer(config.vocab_size), "base", folder=root)
        catalog.load_all()
        names = [f"adapter-{row % ADAPTERS}" for row in range(rows)]
        for compiles in ("off", "wait") if device == "cuda" else ("off",):
            limits = Limits(slots=rows, prefix_bytes=0, compile=compiles)
            engine = Engine(model, limits, note=print)
            engine.warm_up([(catalog.held(name).updates, 1.0)] for name in catalog.adapters)
            engine.start()
            try:
                time_s = seconds(lambda: answered(engine, catalog, ids, names, new))  # noqa: B023
            finally:
                engine.close(drain=False)
            note("engine" if compiles == "off" else "engine, compiled steps", time_s)
    return found


def told(rows: Rows) -> list[str]:
    """The figures in words."""
    units = ("ms", "tokens/s")
    return [
        f"{row['what']}, {row['who']} {row[unit]} {unit}"
        for row in rows
        for unit in units
        if unit in row
    ]


def main() -> None:
    """Measure, print, and write the result, if --out names a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a file for the JSON")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, also without a GPU")
    arguments = parser.parse_args()
    if not (torch.cuda.is_available() or arguments.tiny):
        print("No CUDA device was found, so there is nothing to measure.")
        return
    conditions = begin(arguments.out)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = (TINY["tiny"] if arguments.tiny else WORK["1B"]).config
    tokens, rows, new = (32, 4, 4) if arguments.tiny else (8192, ROWS, NEW)
    found = kernels(config, tokens, device)
    print(*found, sep="\n", flush=True)
    found += serving(config, device, rows, new)
    write_result(arguments.out, {**conditions, "rows": found, "told": told(found)})


if __name__ == "__main__":
    main()
