"""An adapter trained by TRL's GRPOTrainer: the model answers, and a function rewards it.

pip install trl
python examples/trainers/with_trl_grpo.py      # some minutes on two cores
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

import lorakit as lk

PROMPTS = [f"{a} and {b} is" for a in range(8) for b in range(8)]


def few_words(completions: list[str], **columns: Any) -> list[float]:
    """Reward each answer for the words that it repeats."""
    return [1 - len(set(words)) / max(len(words), 1) for words in map(str.split, completions)]


def train(
    model: Any, tokenizer: Any, out: Path, *, texts: Sequence[str] = PROMPTS, callbacks: Any = ()
) -> dict[str, list[float]]:
    """Train what requires a gradient, as any model; returns figures of the steps, by name."""
    settings = GRPOConfig(
        output_dir=str(out),
        max_steps=10,
        save_steps=5,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=8,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        # TRL's own is bfloat16, which takes a recent processor.
        bf16=False,
    )
    trainer = GRPOTrainer(
        model,
        few_words,
        args=settings,
        train_dataset=Dataset.from_dict({"prompt": list(texts)}),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {name: [step[name] for step in steps] for name in ("loss", "reward", "grad_norm")}


if __name__ == "__main__":
    model, tokenizer = lk.load_model("smollm2")
    print(lk.attach(model, lk.LoRAConfig(rank=8, alpha=16, targets=["q", "v"])))
    figures = train(model, tokenizer, Path("out/trl_grpo"), callbacks=[lk.SaveAdapter()])
    print(f"rewards {figures['reward']}; the adapter is in out/trl_grpo")
