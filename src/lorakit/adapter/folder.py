"""The adapter folder: PEFT's two files and lorakit.json, written whole, read with every check."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
from pydantic import ValidationError
from torch import Tensor

from lorakit.adapter.atomic_write import read_file, write_files
from lorakit.adapter.content import AdapterContent
from lorakit.adapter.loralib import read_loralib
from lorakit.adapter.peft import (
    decode,
    disagreements,
    encode,
    layers_of,
    misfits,
    peft_config,
    reasons_against,
)
from lorakit.adapter.peft_config import (
    CONFIG_FILE,
    PeftConfig,
    file_problems,
    parse_config,
    unknown_values,
    unsupported,
)
from lorakit.adapter.peft_read import read_peft
from lorakit.adapter.record import RECORD_FILE, VERSION, AdapterRecord, checksum, to_json
from lorakit.adapter.tensor_files import read_pickle, read_safetensors, value_problems
from lorakit.config.methods import LoRAConfig, combination_problems
from lorakit.errors import AdapterFileError, ConfigError, OutputError, did_you_mean

WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"


def save_folder(adapter: AdapterContent, folder: Path, *, overwrite: bool = False) -> Path:
    """Write an adapter as a folder (docs/adapter-format.md) and return the folder.

    It is written whole or not at all, and read back before it counts. Files of other names that are
    in the folder stay.

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
    files = _files(adapter)
    again, _ = _adapter_from(files, folder)
    assert again.content_hash() == adapter.content_hash(), "the folder would hold another adapter"
    write_files(folder, files, overwrite=overwrite)
    return folder


def _files(adapter: AdapterContent) -> dict[str, bytes]:
    """The content of the folder's files by name."""
    reasons = reasons_against(adapter)
    if reasons:
        config, tensors = _own_form(adapter, reasons), dict(adapter.tensors)
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


def save_peft(adapter: AdapterContent, folder: Path) -> Path:
    """Write PEFT's two files alone, as a new folder, and return the folder.

    Raises:
        OutputError: the folder is not empty, or cannot be written.
        AdapterFileError: PEFT has no exact form for the adapter.
    """
    reasons = reasons_against(adapter)
    if reasons:
        raise AdapterFileError.listing("PEFT has no exact form for this adapter", reasons)
    files = _files(adapter)
    del files[RECORD_FILE]
    write_files(folder, files, overwrite=False)
    return folder


def _own_form(adapter: AdapterContent, reasons: list[str]) -> dict[str, Any]:
    """Return adapter_config.json of an adapter that PEFT can't express, and so must refuse."""
    return {
        "method": adapter.method,
        "lorakit": "an adapter in lorakit's own form: PEFT has no exact form for it",
        "reasons": reasons,
    }


@contextmanager
def reading(folder: Path) -> Iterator[AdapterContent]:
    """Give the adapter of a folder for a block of work, while another thread computes its hash.

    The hash is checked at the end of the block: until then nothing may count that the block makes.

    Raises:
        AdapterFileError: every problem of the files in one message; of the hash after the block,
            also if that ended with an error.
    """
    if not folder.is_dir():
        load_path(folder)  # says what is wrong with it
    adapter, content_hash = _adapter_from(_read(folder), folder)
    with ThreadPoolExecutor(1) as pool:
        hashing = pool.submit(adapter.content_hash)
        try:
            yield adapter
        finally:
            hashing.result()
            _check_content(adapter, content_hash, folder)


def load_path(
    path: Path,
    *,
    config: LoRAConfig | None = None,
    kernel_sizes: Mapping[str, int] | None = None,
) -> AdapterContent:
    """Read an adapter folder of lorakit or PEFT, or a loralib .pt file.

    Args:
        path: the folder, or the file.
        config: rank, alpha and targets, which a loralib file does not hold and a folder does.
        kernel_sizes: the convolutions in a loralib file, see `read_loralib`.

    Raises:
        AdapterFileError: every problem of the files in one message.
    """
    if path.is_file():
        return _load_file(path, config, kernel_sizes)
    if not path.is_dir():
        raise AdapterFileError(f"there is no adapter folder {path}{_neighbours(path)}")
    if config is not None:
        raise AdapterFileError(f"{path} is a folder, which has its own settings: leave config out")
    if kernel_sizes:
        raise AdapterFileError(
            f"{path} is a folder, which holds its kernels' shapes: leave kernel_sizes out"
        )
    adapter, content_hash = _adapter_from(_read(path), path)
    _check_content(adapter, content_hash, path)
    return adapter


def _check_content(adapter: AdapterContent, content_hash: str | None, folder: Path) -> None:
    """Compare an adapter with the hash that its folder holds, if it holds one."""
    if content_hash not in (None, adapter.content_hash()):
        problem = "the content hash is another: weights were changed or damaged after saving"
        raise _not_as_saved(folder, [problem])


def _not_as_saved(folder: Path, problems: Sequence[str]) -> AdapterFileError:
    headline = (
        f"{folder} is not as lorakit saved it (if another tool changed it on purpose, delete "
        f"{RECORD_FILE} to load it without these checks)"
    )
    return AdapterFileError.listing(headline, problems)


def _read(folder: Path) -> dict[str, bytes]:
    """The content of those of the adapter's files that are in the folder."""
    names = (CONFIG_FILE, RECORD_FILE, WEIGHTS_FILE)
    try:
        files = {name: read_file(folder, name) for name in names}
        if files[WEIGHTS_FILE] is None:
            files[PICKLE_FILE] = read_file(folder, PICKLE_FILE)
    except OSError as error:
        raise AdapterFileError(f"{folder} cannot be read: {error}") from error
    return {name: data for name, data in files.items() if data is not None}


def _load_file(
    path: Path, config: LoRAConfig | None, kernel_sizes: Mapping[str, int] | None
) -> AdapterContent:
    if path.name in (CONFIG_FILE, RECORD_FILE, WEIGHTS_FILE, PICKLE_FILE):
        raise AdapterFileError(f"{path} is one file of an adapter: give its folder, {path.parent}")
    if config is None:
        raise AdapterFileError(
            f"{path} is a file; lorakit reads it as loralib's, without rank, alpha or targets: "
            "give them as config=LoRAConfig(rank=…, alpha=…, targets=…)"
        )
    return read_loralib(path, config, kernel_sizes)


def _neighbours(path: Path) -> str:
    """The name that was perhaps meant, or the adapters that lie beside a path."""
    if not path.parent.is_dir():
        return f"; nor is there a folder {path.parent}"
    folders = [entry for entry in path.parent.iterdir() if entry.is_dir()]
    near = did_you_mean(path.name, [folder.name for folder in folders])
    adapters = sorted(folder.name for folder in folders if read_file(folder, CONFIG_FILE))
    return near or (f"; beside it are {', '.join(adapters)}" if adapters else "")


def _adapter_from(files: Mapping[str, bytes], folder: Path) -> tuple[AdapterContent, str | None]:
    """The adapter that a folder's files hold, and the hash of what was saved, if known."""
    _check_present(files, folder)
    problems: list[str] = []
    raw = _json(files, CONFIG_FILE, problems)
    record = _record(files, problems) if RECORD_FILE in files else None
    tensors = _tensors(files, problems)
    config = None
    if raw is not None and "method" in raw and "peft_type" not in raw:
        problems += _own_form_problems(raw, record, files)
    elif raw is not None:
        config = _config(raw, problems)
    if problems:
        raise AdapterFileError.listing(f"{folder} cannot be used", problems)
    if record is not None:
        adapter = _recorded(record, config, tensors, folder)
    else:
        assert config is not None
        adapter = _foreign(config, tensors, folder)
    notes = () if config is None else unknown_values(config)
    adapter = replace(adapter, unverified=(*adapter.unverified, *notes)) if notes else adapter
    return adapter, None if record is None else record.content_hash


def _own_form_problems(
    raw: dict[str, Any], record: AdapterRecord | None, files: Mapping[str, bytes]
) -> list[str]:
    if RECORD_FILE not in files:
        return [f"{RECORD_FILE}  missing; an adapter in lorakit's own form needs it"]
    if record is not None and raw["method"] != record.method:
        return [f"{CONFIG_FILE}  has another method than {RECORD_FILE}"]
    return []


def _foreign(config: PeftConfig, tensors: Mapping[str, Tensor], folder: Path) -> AdapterContent:
    adapter, problems = read_peft(config, tensors)
    if adapter is None:
        raise AdapterFileError.listing(f"{folder} cannot be used", problems)
    return adapter


def _check_present(files: Mapping[str, bytes], folder: Path) -> None:
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if name not in files]
    if PICKLE_FILE in files and WEIGHTS_FILE in missing:
        missing.remove(WEIGHTS_FILE)
    if not missing:
        return
    text = f"{folder} is no adapter folder: {' and '.join(missing)} missing"
    inner = sorted(path.parent for path in folder.glob(f"*/{CONFIG_FILE}"))
    if CONFIG_FILE in missing and len(inner) == 1:
        text += f"; its sub-folder has them: load {inner[0]}"
    elif CONFIG_FILE in missing and inner:
        text += f"; its sub-folders are adapters: {', '.join(path.name for path in inner)}"
    raise AdapterFileError(text)


def _json(files: Mapping[str, bytes], name: str, problems: list[str]) -> dict[str, Any] | None:
    try:
        content = json.loads(files[name])
    except (ValueError, RecursionError) as error:
        problems.append(f"{name}  is not JSON: {error}")
        return None
    if not isinstance(content, dict):
        problems.append(f"{name}  is not a JSON object")
        return None
    return content


def _config(raw: dict[str, Any], problems: list[str]) -> PeftConfig | None:
    try:
        config = parse_config(raw)
    except ValidationError as error:
        problems += file_problems(CONFIG_FILE, error)
        return None
    problems += unsupported(config)
    return config


def _record(files: Mapping[str, bytes], problems: list[str]) -> AdapterRecord | None:
    raw = _json(files, RECORD_FILE, problems)
    if raw is None:
        return None
    version = raw.get("version")
    if version != VERSION:
        problems.append(
            f"{RECORD_FILE}  is of format version {version!r}; this lorakit reads {VERSION}"
        )
        return None
    if raw.pop("checksum", None) != checksum(raw):
        problems.append(f"{RECORD_FILE}  was changed or damaged after it was written")
        return None
    try:
        record = AdapterRecord.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        problems += file_problems(RECORD_FILE, error)
        return None
    problems += _method_problems(record)
    return record


def _method_problems(record: AdapterRecord) -> list[str]:
    """Return what is wrong with the settings of a record's methods."""
    try:
        configs = [each.settings() for each in record.configs]
    except ConfigError as error:
        return [f"{RECORD_FILE}  {error}"]
    methods = [config.method for config in configs]
    problems = combination_problems(methods)
    if not problems and record.method != "+".join(methods):
        problems = [f"it has method {record.method!r}, but the settings of {'+'.join(methods)}"]
    return [f"{RECORD_FILE}  {problem}" for problem in problems]


def _tensors(files: Mapping[str, bytes], problems: list[str]) -> dict[str, Tensor]:
    try:
        if WEIGHTS_FILE in files:
            tensors = read_safetensors(files[WEIGHTS_FILE], WEIGHTS_FILE)
        else:
            tensors = read_pickle(files[PICKLE_FILE], PICKLE_FILE)
    except AdapterFileError as error:
        problems.append(str(error))
        return {}
    problems += value_problems(tensors)
    return tensors


def _recorded(
    record: AdapterRecord, config: PeftConfig | None, found: Mapping[str, Tensor], folder: Path
) -> AdapterContent:
    """The adapter that lorakit.json describes; its hash is not computed yet.

    Raises:
        AdapterFileError: the other two files are not those that were saved with it.
    """
    try:
        outline = record.adapter(record.empty_tensors())
        layers = layers_of(outline)
        expected = outline.tensors if config is None else encode(layers, outline.tensors)
        problems = [] if config is None else list(disagreements(config, outline, layers))
    # Only a hand that also made a new checksum gets here.
    except (IndexError, KeyError, RuntimeError, ValueError, ZeroDivisionError) as error:
        raise AdapterFileError(f"{folder}: {RECORD_FILE} contradicts itself: {error}") from error
    problems += misfits(expected, found)
    tensors = dict(found)
    if config is not None and not problems:
        tensors, problems = decode(layers, outline.tensors, found)
    if problems:
        raise _not_as_saved(folder, problems)
    return replace(outline, tensors=tensors)
