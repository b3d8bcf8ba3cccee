"""Runs of `lorakit train` whose loss TRL computes, beside the same runs with lorakit's own.

python tests/tools/through_trl.py MODEL MIXTURE FOLDER
"""

import json
import sys
from pathlib import Path
from typing import Any

import lorakit as lk
from lorakit.errors import LorakitError

ROWS = [
    {"prompt": "red cat", "chosen": "big dog", "rejected": "old bird"},
    {"prompt": "blue fish", "chosen": "new dog", "rejected": "old bird"},
    {"prompt": "green bird", "chosen": "big dog", "rejected": "small fish fish"},
    {"prompt": "red dog", "chosen": "new cat", "rejected": "old fish"},
    {"prompt": "small", "chosen": "new cat red", "rejected": "fish"},
]


def settings(model: str, folder: Path, name: str, form: str, through: str, **more: Any) -> Any:
    """A run of eight steps, whose batches are of unlike numbers of rows."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    trl = more.pop("trl", {})
    given = {
        "model": model,
        "data": lk.DataConfig(train=str(file), validation=str(file)),
        "dtype": "float32",
        "lora": lk.LoRAConfig(rank=4, targets="q, v, up"),
        "steps": 8,
        "warmup_steps": 0,
        "learning_rate": 2e-2,
        "batch_size": 2,
        "accumulate": 2,
        "preference": {"form": form, "through": through, "trl": trl},
    }
    return lk.TrainConfig(out=folder / name, **{**given, **more})


def logged(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's log that have a loss."""
    lines = [json.loads(each) for each in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def both(model: str, folder: Path, form: str, **more: Any) -> dict[str, Any]:
    """The losses and scores of two runs that differ in `through`, and how far A and B differ."""
    found: dict[str, Any] = {"loss": [], "scores": []}
    made = []
    for through in ("lorakit", "trl"):
        name = f"{form}-{through}-{len(found['loss'])}-{'-'.join(more)}"
        result = lk.train(settings(model, folder, name, form, through, **more))
        found["loss"].append([line["loss"] for line in logged(result.out)])
        found["scores"].append(dict(result.scores))
        made.append(result.adapter.tensors)
    found["apart"] = max(float((made[0][key] - made[1][key]).abs().max()) for key in made[0])
    found["figures"] = sorted(logged(result.out)[-1])
    return found


def resumed(model: str, folder: Path) -> bool:
    """Whether a run that goes on from its fourth step ends in the bytes of one in one go."""
    files = []
    for name, steps in (("whole", (8,)), ("parts", (4, 8))):
        for number, last in enumerate(steps):
            more = {"save_every": 4, "schedule": "constant", "resume": bool(number)}
            result = lk.train(settings(model, folder, name, "dpo", "trl", steps=last, **more))
        files.append((result.out / "adapter_model.safetensors").read_bytes())
    return files[0] == files[1]


def refused(model: str, folder: Path, name: str, *, form: str = "dpo", **more: Any) -> str:
    """The message of a run that is refused."""
    try:
        lk.train(settings(model, folder, name, form, "trl", **more))
    except LorakitError as error:
        return str(error)
    return "nothing"


def main(model: str, mixture: str, folder: Path) -> dict[str, Any]:
    """All that is found out."""
    forms = {form: both(model, folder, form) for form in ("cpo", "dpo", "ipo", "orpo", "simpo")}
    own = lk.train(settings(model, folder, "apo", "dpo", "trl", trl={"loss_type": "apo_zero"}))
    heads = {
        "head": lk.LoRAConfig(rank=4, targets="q, head"),
        "copied": lk.LoRAConfig(rank=4, targets="q", modules_to_save="lm_head"),
    }
    return {
        "forms": forms,
        "memory": both(model, folder, "dpo", memory="low"),
        "half": both(model, folder, "orpo", dtype="bfloat16"),
        "experts": both(
            mixture, folder, "dpo", lora=lk.LoRAConfig(rank=4, targets="q, experts.up")
        ),
        "apo": [line["loss"] for line in logged(own.out)],
        "resumed": resumed(model, folder),
        "heads": {name: refused(model, folder, name, lora=lora) for name, lora in heads.items()},
        "loss_type": refused(model, folder, "apo", overwrite=True, trl={"loss_type": ["apo"]}),
        "kept": (folder / "apo" / "last").is_dir(),
        "infinite": refused(model, folder, "apo", overwrite=True, form="simpo", trl={"alpha": 50}),
        "still": (folder / "apo" / "last").is_dir(),
        "divergence": refused(model, folder, "new", trl={"f_divergence_type": "chi"}),
        "name": refused(model, folder, "name", trl={"loss_tipe": "apo_zero", "beta": 3}),
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:3], Path(sys.argv[3]))))
