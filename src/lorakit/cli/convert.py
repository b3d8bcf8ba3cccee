"""The verb convert: an adapter read, combined or made from a checkpoint, checked, and written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.folder import needs_base
from lorakit.adapter.folder_write import save_peft
from lorakit.adapter.llama_cpp import check_family, check_library, save_gguf
from lorakit.adapter.output_place import check_new, check_place
from lorakit.analysis.combining import combine
from lorakit.analysis.from_full import from_checkpoint
from lorakit.attachment.attach import attach, extract
from lorakit.attachment.state import require_attachment
from lorakit.cli.verbs import Result
from lorakit.config.verbs import ConvertConfig
from lorakit.errors import AdapterFileError
from lorakit.models.load import config_of, labels_of, load_model, own_task
from lorakit.models.tasks import has_classes


def run(settings: ConvertConfig) -> Result:
    """Make and write the adapter; the result lists what its files could not prove."""
    if settings.to == "gguf":
        check_library()
        check_new(settings.out)
        if settings.model is not None:
            check_family(config_of(settings.model))
    else:
        check_place(settings.out, "an adapter is a folder")
    adapter = _from_checkpoint(settings) if settings.from_checkpoint else _from_adapters(settings)
    if settings.to == "gguf":
        save_gguf(adapter, settings.out, _base_config(adapter, settings))
    elif settings.to == "peft":
        save_peft(adapter, settings.out)
    else:
        adapter.save(settings.out)
    summary = f"{len(adapter.sites)} updates, {adapter.parameters:,} parameters in {settings.out}"
    made = _made(adapter, settings)
    notes = [f"not verified: {note}" for note in adapter.unverified]
    if settings.to == "gguf":
        notes.append(f"for llama.cpp: -m BASE.gguf --lora {settings.out}")
        if adapter.card.get("chat_template"):
            notes.append("its chat template is not in the file: give it by --chat-template-file")
    return Result(
        text="\n".join([summary, *_told(made), *notes]),
        data={
            "out": settings.out,
            "format": settings.to,
            "sites": len(adapter.sites),
            "parameters": adapter.parameters,
            "content_hash": adapter.content_hash(),
            "unverified": list(adapter.unverified),
            **made,
        },
    )


def _from_adapters(settings: ConvertConfig) -> Adapter:
    """The adapter of the source, or the sum of it and others, checked against a base if named."""
    adapter = Adapter.load(
        settings.source,
        config=settings.lora,
        kernel_sizes=settings.kernel_sizes,
        base=_needed_base(settings),
    )
    if settings.to == "gguf":
        check_family(_base_config(adapter, settings))
    if settings.combines:
        adapter = combine(
            [adapter, *settings.combine],
            settings.weights,
            rank=settings.rank,
            method=settings.method,
            density=settings.density,
            seed=settings.seed,
            allow_other_base=settings.allow_other_base,
        )
    if settings.model is None:
        return adapter
    model, _ = adapter.load_base(settings.model, quantize="none")
    attach(model, adapter)
    # Whoever names the base answers for it; that it was not proven stays in `unverified`.
    found = require_attachment(model).base.identity
    return replace(extract(model), base=adapter.base or found)


def _needed_base(settings: ConvertConfig) -> PreTrainedModel | None:
    """The named base, where the source can be read with it alone."""
    if settings.model is None or not needs_base(Path(settings.source)):
        return None
    return load_model(settings.model, task=own_task(settings.model))[0]


def _base_config(adapter: Adapter, settings: ConvertConfig) -> PreTrainedConfig:
    """The config of the base that is named, else of that which the adapter names."""
    name = settings.model or adapter.base_name
    if not name:
        raise AdapterFileError(
            "the adapter does not say which base it was trained on: name it with `model`"
        )
    return config_of(name)


def _from_checkpoint(settings: ConvertConfig) -> Adapter:
    """The nearest adapter to what a fine-tuned model changed."""
    assert settings.model is not None
    task = own_task(settings.source)
    tuned, _ = load_model(settings.source, task=task)
    labels = labels_of(tuned) if has_classes(task) else None
    base, _ = load_model(settings.model, task=task, labels=labels)
    return from_checkpoint(
        base, tuned, rank=settings.rank, energy=settings.energy, targets=settings.targets
    )


def _made(adapter: Adapter, settings: ConvertConfig) -> dict[str, Any]:
    """What the card says of how the adapter was made, where it was not just read."""
    key = "from_checkpoint" if settings.from_checkpoint else "combined"
    asked = settings.from_checkpoint or settings.combines
    return {key: adapter.card[key]} if asked else {}


def _told(made: dict[str, Any]) -> list[str]:
    lines = []
    for key, told in made.items():
        lines.append(f"relative error {told['relative_error']:.3g}")
        if key == "from_checkpoint":
            lines[-1] += f": {told['energy_lost']:.2%} of the energy of the difference is lost"
            if told["left_out"]:
                first = ", ".join(told["left_out"][:3])
                lines.append(
                    f"left out: {len(told['left_out'])} other parameters that were fine-tuned "
                    f"({first}, …), with {told['share_left_out']:.2%} of all that changed"
                )
    return lines
