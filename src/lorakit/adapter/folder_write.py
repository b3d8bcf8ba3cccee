"""Writing an adapter folder: PEFT's two files and lorakit.json, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch

from lorakit.adapter.atomic_write import read_file, write_files
from lorakit.adapter.content import AdapterContent
from lorakit.adapter.folder import content_from
from lorakit.adapter.json_files import to_json
from lorakit.adapter.model_card import CARD_FILE, is_unchanged, model_card
from lorakit.adapter.peft import encode, layers_of, peft_config, reasons_against
from lorakit.adapter.peft_config import CONFIG_FILE
from lorakit.adapter.record import RECORD_FILE, AdapterRecord
from lorakit.adapter.tensor_files import WEIGHTS_FILE, value_problems
from lorakit.errors import AdapterFileError, OutputError


def save_folder(adapter: AdapterContent, folder: Path, *, overwrite: bool = False) -> Path:
    """Write an adapter as a folder (docs/adapter-format.md) and return the folder.

    It is written whole or not at all, and read back before it counts. Files of other names that are
    in the folder stay, and so does a README.md that somebody has written or changed.

    Args:
        adapter: what to write.
        folder: where; its parents are made.
        overwrite: replace the adapter in a folder that is not empty.

    Raises:
        OutputError: the folder is not empty and `overwrite` is false, it cannot be written, or the
            training card has no form in JSON.
        AdapterFileError: a tensor is not finite.
    """
    problems = value_problems(adapter.tensors)
    if problems:
        raise AdapterFileError.listing(f"the adapter was not written to {folder}", problems)
    reasons = reasons_against(adapter)
    files = _files(adapter, reasons)
    again, _ = content_from(files, folder)
    assert again.content_hash() == adapter.content_hash(), "the folder would hold another adapter"
    if is_unchanged(read_file(folder, CARD_FILE)):
        files[CARD_FILE] = model_card(adapter, reasons, name=folder.absolute().name).encode()
    write_files(folder, files, overwrite=overwrite)
    return folder


def write_card(adapter: AdapterContent, folder: Path, *, name: str) -> None:
    """Write the model card of an adapter's folder, under another name than the folder's.

    Raises:
        OutputError: it cannot be written.
    """
    card = model_card(adapter, reasons_against(adapter), name=name)
    write_files(folder, {CARD_FILE: card.encode()}, overwrite=True)


def save_peft(adapter: AdapterContent, folder: Path) -> Path:
    """Write PEFT's two files alone, as a new folder, and return the folder.

    Raises:
        OutputError: the folder is not empty, or cannot be written.
        AdapterFileError: PEFT has no exact form for the adapter.
    """
    reasons = reasons_against(adapter)
    if reasons:
        raise AdapterFileError.listing("PEFT has no exact form for this adapter", reasons)
    files = _files(adapter, reasons)
    del files[RECORD_FILE]
    write_files(folder, files, overwrite=False)
    return folder


def _files(adapter: AdapterContent, reasons: list[str]) -> dict[str, bytes]:
    """The content of the folder's files by name.

    Args:
        adapter: what to write.
        reasons: why PEFT has no form for it. If there are any, adapter_config.json has no
            `peft_type`, so that PEFT refuses the folder, and the tensors keep lorakit's names.
    """
    if reasons:
        note = "an adapter in lorakit's own form: PEFT has no exact form for it"
        config = {"method": adapter.method, "lorakit": note, "reasons": reasons}
        tensors = dict(adapter.tensors)
    else:
        layers = layers_of(adapter)
        config, tensors = peft_config(adapter, layers), encode(layers, adapter.tensors)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    try:
        texts = {CONFIG_FILE: to_json(config), RECORD_FILE: AdapterRecord.of(adapter).text()}
    except (TypeError, ValueError) as error:
        raise OutputError(f"the training card cannot be written as JSON: {error}") from error
    weights = safetensors.torch.save(tensors, metadata={"format": "pt"})
    return {name: text.encode() for name, text in texts.items()} | {WEIGHTS_FILE: weights}
