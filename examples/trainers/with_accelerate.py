"""An adapter trained by a loop of one's own, with accelerate.

accelerate launch examples/trainers/with_accelerate.py      # or python, for one process
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling

import lorakit as lk

TEXTS = [f"{a} and {b} is {a + b}." for a in range(8) for b in range(8)]


def train(
    model: Any, tokenizer: Any, out: Path, *, texts: Sequence[str] = TEXTS, save: bool = True
) -> list[float]:
    """Train what requires a gradient, and save the adapter; returns the losses of the steps."""
    set_seed(42)
    accelerator = Accelerator()
    rows: Any = [tokenizer(text) for text in texts]
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    loader = DataLoader(rows, batch_size=8, shuffle=True, collate_fn=collate)
    trained = [each for each in model.parameters() if each.requires_grad]
    # The adapter is attached before prepare, as DDP notes what it has to average.
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.AdamW(trained, lr=1e-3, weight_decay=0), loader
    )
    losses: list[float] = []
    model.train()
    while len(losses) < 20:
        for batch in loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    if save and accelerator.is_main_process:
        lk.extract(accelerator.unwrap_model(model)).save(out, overwrite=True)
    return losses


if __name__ == "__main__":
    model, tokenizer = lk.load_model("smollm2")
    print(lk.attach(model, lk.LoRAConfig(rank=8, alpha=16, targets=["q", "v"])))
    losses = train(model, tokenizer, Path("out/accelerate"))
    print(f"loss {losses[0]:.2f} → {losses[-1]:.2f}; the adapter is in out/accelerate")
