"""The loss of preferences in TRL, with lorakit's adapter in PEFT, beside lorakit's own.

python tests/tools/preference.py MODEL FOLDER
"""

import json
import sys
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorakit as lk
from lorakit.config.train import DataConfig, PreferenceSettings
from lorakit.data.batches import preference_batch
from lorakit.data.encode import encode_rows
from lorakit.data.rows import read_rows
from lorakit.training.loss import Loss

FORMS: dict[str, dict[str, Any]] = {
    "dpo": {"loss_type": ["sigmoid"]},
    "ipo": {"loss_type": ["ipo"]},
    "cpo": {"loss_type": "sigmoid", "cpo_alpha": 0.7},
    "simpo": {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.5},
    "orpo": {},
}
"""TRL's settings of each form."""
ROWS = [
    {"prompt": "red cat", "chosen": "big", "rejected": "old dog bird"},
    {"prompt": "new", "chosen": "fish red red", "rejected": "cat"},
    {"prompt": "small blue bird", "chosen": "new dog", "rejected": "green"},
]
TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{{ '</s>' if m.role == 'assistant' else '\n' }}"
    "{% endfor %}"
)
"""Conversations in the same tokens as the texts, with lorakit's separator."""


def conversation(row: dict[str, str]) -> dict[str, Any]:
    """A row as lists of messages, whose prompt is in both answers."""
    asked = {"role": "user", "content": row["prompt"]}
    return {
        name: [asked, {"role": "assistant", "content": row[name]}]
        for name in ("chosen", "rejected")
    }


LAYOUTS: dict[str, Any] = {"texts": dict, "conversations": conversation}


def ours(model: Any, tokenizer: Any, form: str, layout: str, folder: Path) -> float:
    """The loss of all rows in one batch."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(LAYOUTS[layout](row)) + "\n" for row in ROWS))
    data = DataConfig(train=str(file))
    examples = encode_rows(read_rows(str(file), data), tokenizer, data).examples
    batch = preference_batch(examples, pad_id=0)
    labels = batch.pop("labels")
    nll = 1.0 if form == "orpo" else 0.7
    settings = PreferenceSettings(form=form, beta=0.3, nll=nll, margin=0.5)
    loss = Loss("preference", preference=settings)
    assert loss.objective is not None
    with torch.no_grad():
        return float(loss(loss.objective.outputs(model, batch), labels))


def theirs(model: Any, tokenizer: Any, form: str, layout: str, folder: Path, saved: Path) -> float:
    """The loss that TRL's trainer has of the same rows, with an adapter that is fresh to it."""
    if form in ("dpo", "ipo"):
        from trl import DPOConfig as Config
        from trl import DPOTrainer as Trainer
    elif form == "orpo":
        from trl.experimental.orpo import ORPOConfig as Config
        from trl.experimental.orpo import ORPOTrainer as Trainer
    else:
        from trl.experimental.cpo import CPOConfig as Config
        from trl.experimental.cpo import CPOTrainer as Trainer
    how = {"report_to": [], "use_cpu": True, "bf16": False, "per_device_train_batch_size": 3}
    arguments = Config(output_dir=str(folder / form), beta=0.3, **how, **FORMS[form])
    rows = [LAYOUTS[layout](row) for row in ROWS]
    if layout == "texts":
        rows = [{**row, "prompt": f"{row['prompt']}\n"} for row in rows]
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig.from_pretrained(str(saved)),
    )
    # To start from would make the adapter itself the reference.
    set_peft_model_state_dict(trainer.model, load_file(saved / "adapter_model.safetensors"))
    (batch,) = trainer.get_train_dataloader()
    trainer.model.eval()
    with torch.no_grad():
        return float(trainer.compute_loss(trainer.model, batch))


def compare(source: Path, folder: Path) -> dict[str, tuple[float, float]]:
    """The losses of each form and layout of the rows: lorakit's, and TRL's."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = TEMPLATE
    # CPO's trainer would begin each prompt with it, as this tokenizer does not.
    tokenizer.bos_token = None
    mine = AutoModelForCausalLM.from_pretrained(source)
    torch.manual_seed(0)
    lk.attach(mine, lk.LoRAConfig(rank=4, alpha=8, targets="all-linear"))
    for _, each in mine.named_parameters():
        if each.requires_grad:
            torch.nn.init.normal_(each, std=0.2)
    saved = lk.extract(mine).save(folder / "adapter")
    found = {}
    for form, layout in product(FORMS, LAYOUTS):
        base = AutoModelForCausalLM.from_pretrained(source)
        found[f"{form}, {layout}"] = (
            ours(mine.eval(), tokenizer, form, layout, folder),
            theirs(base, tokenizer, form, layout, folder, saved),
        )
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(compare(Path(sys.argv[1]), Path(sys.argv[2]))))
