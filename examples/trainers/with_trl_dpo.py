"""An adapter trained by TRL's DPOTrainer; the base without the adapter is the reference.

pip install trl
python examples/trainers/with_trl_dpo.py      # some minutes on two cores
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

import lorakit as lk

Row = Mapping[str, str]
ROWS: Sequence[Row] = [
    {"prompt": f"{a} and {b} is", "chosen": f" {a + b}.", "rejected": f" {a + b + 1}."}
    for a in range(8)
    for b in range(8)
]


def train(
    model: Any,
    tokenizer: Any,
    out: Path,
    *,
    texts: Sequence[Row] = ROWS,
    callbacks: Any = (),
    reference: Any = None,
) -> list[float]:
    """Train what requires a gradient, as any model; returns the losses of the steps.

    The reference is the base of lorakit's model, or another model that is given.
    """
    settings = DPOConfig(
        output_dir=str(out),
        max_steps=20,
        save_steps=10,
        per_device_train_batch_size=8,
        learning_rate=1e-4,
        logging_steps=1,
        report_to=[],
        # Else TRL loads a second base, as it knows of no adapter but PEFT's.
        precompute_ref_log_probs=True,
        # TRL's own is bfloat16, which takes a recent processor.
        bf16=False,
    )
    # The log-probabilities of the reference are computed when the trainer is made.
    with lk.route(model, None) if reference is None else nullcontext():
        trainer = DPOTrainer(
            model,
            reference,
            args=settings,
            train_dataset=Dataset.from_list([dict(row) for row in texts]),
            processing_class=tokenizer,
            callbacks=list(callbacks),
        )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    model, tokenizer = lk.load_model("smollm2")
    print(lk.attach(model, lk.LoRAConfig(rank=8, alpha=16, targets=["q", "v"])))
    losses = train(model, tokenizer, Path("out/trl_dpo"), callbacks=[lk.SaveAdapter()])
    print(f"loss {losses[0]:.2f} → {losses[-1]:.2f}; the adapter is in out/trl_dpo")
