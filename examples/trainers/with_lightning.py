"""An adapter trained by Lightning, whose checkpoints hold the adapter alone.

pip install lightning
python examples/trainers/with_lightning.py      # some minutes on two cores
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling

import lorakit as lk

TEXTS = [f"{a} and {b} is {a + b}." for a in range(8) for b in range(8)]


class AdapterModule(lightning.LightningModule):
    """A model of which Lightning trains, saves and loads what requires a gradient."""

    # A checkpoint lacks the base, which is there already.
    strict_loading = False

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.losses: list[float] = []

    def training_step(self, batch: Any, number: int) -> torch.Tensor:
        """The loss of a batch."""
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer of what is trained."""
        trained = [each for each in self.parameters() if each.requires_grad]
        return torch.optim.AdamW(trained, lr=1e-3, weight_decay=0)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the base out of a checkpoint."""
        trained = {name for name, each in self.named_parameters() if each.requires_grad}
        weights = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: weights[name] for name in trained}


def train(
    model: Any, tokenizer: Any, out: Path, *, texts: Sequence[str] = TEXTS, save: bool = True
) -> list[float]:
    """Train what requires a gradient, and save the adapter; returns the losses of the steps."""
    lightning.seed_everything(42)
    rows: Any = [tokenizer(text) for text in texts]
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    loader = DataLoader(rows, batch_size=8, shuffle=True, collate_fn=collate)
    module = AdapterModule(model)
    # Lightning leaves the mode of a model as it is.
    model.train()
    trainer = lightning.Trainer(
        default_root_dir=out, max_steps=20, gradient_clip_val=1.0, logger=False
    )
    trainer.fit(module, loader)
    if save and trainer.is_global_zero:
        lk.extract(model).save(out, overwrite=True)
    return module.losses


if __name__ == "__main__":
    model, tokenizer = lk.load_model("smollm2")
    print(lk.attach(model, lk.LoRAConfig(rank=8, alpha=16, targets=["q", "v"])))
    losses = train(model, tokenizer, Path("out/lightning"))
    print(f"loss {losses[0]:.2f} → {losses[-1]:.2f}; the adapter is in out/lightning")
