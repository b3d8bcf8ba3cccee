"""The verb convert: an adapter of one format, read, checked and written in another."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.folder_write import save_peft
from lorakit.adapter.output_place import check_place
from lorakit.attachment.attach import attach, extract
from lorakit.attachment.state import require_attachment
from lorakit.cli.verbs import Result
from lorakit.config.base import PositiveInt, Settings
from lorakit.config.methods import LoRAConfig
from lorakit.models.load import load_model


class ConvertConfig(Settings):
    """Settings of convert: the adapter to read, and the format and folder to write."""

    source: Path
    """Adapter folder of lorakit or PEFT, or a loralib .pt file."""

    out: Path
    """New folder for the result."""

    to: Literal["lorakit", "peft"] = "lorakit"
    """lorakit: PEFT's two files and lorakit.json. peft: PEFT's two files alone."""

    model: str | None = None
    """Base model to check the adapter against, and to record. None: files are checked alone."""

    lora: LoRAConfig | None = None
    """Rank, alpha and targets, which a loralib file does not hold."""

    kernel_sizes: dict[str, PositiveInt] | None = None
    """Convolutions of a loralib file, by path or the end of it, and the size of their square
    kernels, such as '{conv1: 3}'."""


SETTINGS: type[Settings] = ConvertConfig


def run(settings: ConvertConfig) -> Result:
    """Convert the adapter; the result lists what its files could not prove."""
    check_place(settings.out, "an adapter is a folder")
    adapter = Adapter.load(
        settings.source, config=settings.lora, kernel_sizes=settings.kernel_sizes
    )
    if settings.model is not None:
        task, labels = adapter.card.get("task", "generation"), adapter.card.get("labels")
        model, _ = load_model(settings.model, task=task, labels=labels)
        attach(model, adapter)
        # Whoever names the base answers for it; that it was not proven stays in `unverified`.
        found = require_attachment(model).base.identity
        adapter = replace(extract(model), base=adapter.base or found)
    if settings.to == "peft":
        save_peft(adapter, settings.out)
    else:
        adapter.save(settings.out)
    notes = [f"not verified: {note}" for note in adapter.unverified]
    summary = f"{len(adapter.sites)} updates, {adapter.parameters:,} parameters in {settings.out}"
    return Result(
        text="\n".join([summary, *notes]),
        data={
            "out": settings.out,
            "format": settings.to,
            "sites": len(adapter.sites),
            "parameters": adapter.parameters,
            "content_hash": adapter.content_hash(),
            "unverified": list(adapter.unverified),
        },
    )
