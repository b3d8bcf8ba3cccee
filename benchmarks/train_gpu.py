"""Training on a GPU: ours beside PEFT, eager and compiled, on random Llamas of 1B and 8B.

    python benchmarks/train_gpu.py [--out FILE] [--tiny]

Rows of 2,048 target tokens; rank 16 on all linear layers, float32, on a bfloat16 base. Ours
is the code of `lorakit train`; PEFT is in transformers' Trainer, compiled block by block. They
train one after the other on one base: a GPU's times do not drift as a shared processor's do.
Medians of steps. The operations of a step are those that it cannot do without (`operations`), and
their rate is shown beside that of a matmul of large matrices on the same card. Where bitsandbytes
is installed, the 1B is trained in 4 bits (NF4) too. Takes three minutes or four;
what would begin after BUDGET_S is left out. --tiny checks the program on a CPU.
"""

import argparse
import gc
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import peft
import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    Trainer,
    TrainerCallback,
)
from transformers.trainer_callback import PrinterCallback

import lorakit as lk
from lorakit.bench.memory import forget_peak, most_bytes
from lorakit.data.batches import training_batch
from lorakit.data.packing import choose_packing
from lorakit.data.samples import Encoded, Example
from lorakit.training.prepare import NAME, Prepared
from lorakit.training.rates import rates_by_method
from lorakit.training.run import Run, execute, while_training
from lorakit.training.trainer import make_arguments
from measured import begin, write_result

RANK = 16
WARM_UPS, STEPS = 3, 8
BUDGET_S = 170
SIDE = 8192


@dataclass(frozen=True, kw_only=True)
class Work:
    """A model's shape, and the rows of a step."""

    config: LlamaConfig
    rows: int
    tokens: int
    in_4_bits: bool = False
    """Whether its linear layers are quantised."""


def llama(width: int, inner: int, layers: int, heads: int, keys: int, **more: Any) -> LlamaConfig:
    """The shape of a Llama."""
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        use_cache=False,
        **{"vocab_size": 128_256, "max_position_embeddings": 4096, **more},
    )


SMALL = Work(config=llama(2048, 8192, 16, 32, 8, tie_word_embeddings=True), rows=4, tokens=2048)
WORK = {
    "1B": SMALL,
    "8B": Work(config=llama(4096, 14336, 32, 32, 8), rows=1, tokens=2048),
    "1B in 4 bits": replace(SMALL, in_4_bits=True),
}
TINIEST = Work(config=llama(64, 96, 2, 4, 2, vocab_size=256), rows=2, tokens=32)
TINY = {"tiny": TINIEST, "tiny in 4 bits": replace(TINIEST, in_4_bits=True)}


def operations(work: Work, adapter: int) -> int:
    """Multiplications plus additions that a training step cannot do without, padding left out.

    The base is frozen: its weights get no gradient, and nothing below the first block's q, k and v
    needs the gradient of their input.

    Args:
        work: the model's shape, and the rows, all of whose tokens but the first are target tokens.
        adapter: values of all A and B.
    """
    config, tokens = work.config, work.rows * work.tokens
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    assert config.num_key_value_heads is not None
    keys = width * config.num_key_value_heads // config.num_attention_heads
    qkv = width * (width + 2 * keys)
    block = qkv + width * width + 3 * width * inner
    pairs = work.rows * work.tokens * (work.tokens + 1) // 2
    forward_and_backward = 2 * tokens * (2 * layers * block - qkv)
    # Two matmuls forward, four backward, over the pairs of a token and one that it sees.
    attention = layers * 6 * 2 * pairs * width
    head = 2 * 2 * work.rows * (work.tokens - 1) * width * config.vocab_size
    return forward_and_backward + attention + head + 6 * tokens * adapter


def in_4_bits(model: Any, folder: Path, device: str) -> Any:
    """A model whose linear layers are in 4 bits, as QLoRA has them."""
    model.save_pretrained(folder)
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=how, dtype=torch.bfloat16, device_map={"": device}
    )


class Stopwatch(TrainerCallback):
    """A callback that measures the time between the ends of steps."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Note the time at which the step is complete."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """The median time of a step."""
        counted = self.ends[WARM_UPS - 1 :]
        return statistics.median(b - a for a, b in itertools.pairwise(counted))


class Participants:
    """One base, and the ways to train an adapter on it."""

    def __init__(self, work: Work, folder: Path) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with torch.device(device):
            self.model = AutoModelForCausalLM.from_config(work.config, dtype=torch.bfloat16)
        if work.in_4_bits:
            self.model = in_4_bits(self.model, folder / "base", device)
        self.work = work
        self.steps = WARM_UPS + STEPS
        self.config = lk.TrainConfig(
            out=folder / "run",
            lora=lk.LoRAConfig(rank=RANK, targets=("all-linear",)),
            steps=self.steps,
            batch_size=work.rows,
            warmup_steps=1,
            learning_rate=1e-4,
        )
        generator = torch.Generator().manual_seed(0)
        size = (work.rows * self.steps, work.tokens)
        ids = torch.randint(work.config.vocab_size, size, generator=generator).tolist()
        self.examples = tuple(Example(input_ids=row, labels=list(row)) for row in ids)
        self.operations = 0

    def ours(self) -> Stopwatch:
        """Train as `lorakit train` does."""
        watch = Stopwatch()
        plan = lk.attach(self.model, self.config.lora, name=NAME)
        self.operations = operations(self.work, plan.parameters)
        prepared = Prepared(
            name=NAME,
            task="generation",
            kind="text",
            labels=None,
            rates=rates_by_method(self.config, plan, self.work.config.hidden_size),
            model=self.model,
            tokenizer=cast(Any, SimpleNamespace(pad_token_id=0, eos_token_id=0)),
            plan=plan,
            training=Encoded(examples=self.examples, report=cast(Any, None)),
            validation=None,
            steps=self.steps,
            packing=choose_packing(self.model, task="generation", packing="auto"),
        )
        forget_peak()
        run = Run(config=self.config, prepared=prepared, checkpoint=None)
        with while_training(self.model, self.config) as interruption:
            execute(run, interruption, bar=watch)
        lk.detach(self.model)
        return watch

    def peft(self, *, compiled: bool = False) -> Stopwatch:
        """Train with PEFT and transformers' Trainer."""
        watch = Stopwatch()
        lora = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
        model = peft.get_peft_model(self.model, lora)
        if compiled:
            for block in self.model.model.layers:
                block.compile()
        arguments = make_arguments(self.config, self.steps)
        arguments.save_strategy = "no"
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=self.examples,
            data_collator=lambda examples: training_batch(examples, pad_id=0),
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)
        forget_peak()
        trainer.train()
        self.model = model.unload()
        return watch

    def peft_compiled(self) -> Stopwatch:
        """Train with PEFT, each block compiled; the model is of no use afterwards."""
        return self.peft(compiled=True)


def ceiling(side: int) -> float:
    """The operations per second of a matmul of large matrices."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    matrix = torch.ones(side, side, device=device, dtype=torch.bfloat16)
    best = float("inf")
    for _ in range(10):
        begun = time.perf_counter()
        matrix @ matrix
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begun)
    return 2 * side**3 / best


def measure(name: str, work: Work, until: float, most: float) -> list[dict[str, Any]]:
    """The figures of each participant that there is time for."""
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        participants = Participants(work, Path(folder))
        ways: dict[str, Callable[[], Stopwatch]] = {
            "ours": participants.ours,
            "peft": participants.peft,
            "peft compiled": participants.peft_compiled,
        }
        for way, train in ways.items():
            if lines and time.perf_counter() > until:
                print(f"{name}, {way}: left out, no time is left")
                continue
            gc.collect()
            seconds = train().seconds
            rate = participants.operations / seconds
            lines.append(
                {
                    "model": name,
                    "who": way,
                    "tokens/s": round(work.rows * work.tokens / seconds),
                    "step ms": round(seconds * 1000, 1),
                    "memory GB": round((most_bytes() or 0) / 1e9, 2),
                    "TFLOP/s": round(rate / 1e12, 1),
                    "% of a large product": round(
                        100 * participants.operations / seconds / most, 1
                    ),
                }
            )
            print(lines[-1], flush=True)
    return lines


def table(rows: list[dict[str, Any]]) -> str:
    """The figures as a Markdown table."""
    heads = list(rows[0])
    lines = [heads, ["---"] * len(heads), *([str(row[head]) for head in heads] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Measure, print the table, and write the result, if --out names a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a file for the JSON")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, also without a GPU")
    arguments = parser.parse_args()
    if not (torch.cuda.is_available() or arguments.tiny):
        print("No CUDA device was found, so there is nothing to measure.")
        return
    conditions, until = begin(arguments.out), time.perf_counter() + BUDGET_S
    most = ceiling(256 if arguments.tiny else SIDE)
    rows: list[dict[str, Any]] = []
    for name, work in (TINY if arguments.tiny else WORK).items():
        if work.in_4_bits and find_spec("bitsandbytes") is None:
            print(f"{name}: left out, bitsandbytes is not installed")
            continue
        if rows and time.perf_counter() > until:
            print(f"{name}: left out, no time is left")
            continue
        rows += measure(name, work, until, most)
        gc.collect()
        torch.cuda.empty_cache()
    settings = {"rank": RANK, "targets": "all-linear", "base": "bfloat16", "weights": "float32"}
    result = {**conditions, "settings": settings, "large_product_per_s": most, "rows": rows}
    result["told"] = [f"{row['model']} {row['who']} {row['tokens/s']:,} tokens/s" for row in rows]
    print(f"a matmul of large matrices: {most / 1e12:.0f} TFLOP/s", table(rows), sep="\n\n")
    write_result(arguments.out, result)


if __name__ == "__main__":
    main()
