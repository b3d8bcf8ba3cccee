"""An adapter trained by TRL's SFTTrainer, whose checkpoints hold the adapter alone.

pip install trl
python examples/trainers/with_trl_sft.py      # some minutes on two cores
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import lorakit as lk

TEXTS = [f"{a} and {b} is {a + b}." for a in range(8) for b in range(8)]


def train(
    model: Any, tokenizer: Any, out: Path, *, texts: Sequence[str] = TEXTS, callbacks: Any = ()
) -> list[float]:
    """Train what requires a gradient, as any model; returns the losses of the steps."""
    settings = SFTConfig(
        output_dir=str(out),
        max_steps=20,
        save_steps=10,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        # TRL's own is bfloat16, which takes a recent processor.
        bf16=False,
    )
    trainer = SFTTrainer(
        model,
        settings,
        train_dataset=Dataset.from_dict({"text": list(texts)}),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    model, tokenizer = lk.load_model("smollm2")
    print(lk.attach(model, lk.LoRAConfig(rank=8, alpha=16, targets=["q", "v"])))
    losses = train(model, tokenizer, Path("out/trl_sft"), callbacks=[lk.SaveAdapter()])
    print(f"loss {losses[0]:.2f} → {losses[-1]:.2f}; the adapter is in out/trl_sft")
