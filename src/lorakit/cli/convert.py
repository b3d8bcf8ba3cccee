"""The verb convert: an adapter of one format, read, checked and written in another."""

from dataclasses import replace

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.card import TrainedUse
from lorakit.adapter.folder_write import save_peft
from lorakit.adapter.output_place import check_place
from lorakit.attachment.attach import attach, extract
from lorakit.attachment.state import require_attachment
from lorakit.cli.verbs import Result
from lorakit.config.verbs import ConvertConfig
from lorakit.models.load import load_model


def run(settings: ConvertConfig) -> Result:
    """Convert the adapter; the result lists what its files could not prove."""
    check_place(settings.out, "an adapter is a folder")
    adapter = Adapter.load(
        settings.source, config=settings.lora, kernel_sizes=settings.kernel_sizes
    )
    if settings.model is not None:
        use = TrainedUse.on(adapter.card)
        task, labels = use.task or "generation", use.labels
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
