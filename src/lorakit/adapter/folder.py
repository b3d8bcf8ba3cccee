"""Reading an adapter from its files, checked: folders of lorakit, PEFT and mlx-lm, loralib's .pt.

What is in a file is read where its format is: record.py, peft_config.py, tensor_files.py. The
adapter is then made by recorded.py if the folder has lorakit's record, else by peft_read.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from lorakit.adapter.atomic_write import read_file, read_files
from lorakit.adapter.changed_base import STARTS, of_whole_base
from lorakit.adapter.content import AdapterContent
from lorakit.adapter.file_sizes import header_of, size_problems
from lorakit.adapter.image_tools import read_for
from lorakit.adapter.json_files import read_object
from lorakit.adapter.loralib import read_loralib
from lorakit.adapter.mlx import MLX_FILE, read_mlx
from lorakit.adapter.other_tools import DIFFUSERS_FILE, check_not_safetensors, named_files
from lorakit.adapter.own_template import TEMPLATE_FILE, TOKENIZER_FILE, own_template
from lorakit.adapter.peft_config import (
    CONFIG_FILE,
    CORDA_FILE,
    is_repeatable,
    read_config,
    unknown_values,
)
from lorakit.adapter.peft_read import read_peft
from lorakit.adapter.record import RECORD_FILE, AdapterRecord, read_record
from lorakit.adapter.recorded import check_content, recorded_adapter
from lorakit.adapter.tensor_files import (
    PICKLE_FILE,
    WEIGHTS_FILE,
    read_pickle,
    read_safetensors,
    read_tensors,
    value_problems,
)
from lorakit.config.methods import LoRAConfig
from lorakit.errors import AdapterFileError, did_you_mean

READ = (CONFIG_FILE, RECORD_FILE, WEIGHTS_FILE, MLX_FILE, TEMPLATE_FILE, TOKENIZER_FILE)
"""The files of a folder that are read: JSON, safetensors, and a template for Jinja's sandbox."""


def load_path(
    path: Path,
    *,
    config: LoRAConfig | None = None,
    kernel_sizes: Mapping[str, int] | None = None,
    base: nn.Module | None = None,
) -> AdapterContent:
    """The adapter in a folder of lorakit, PEFT or mlx-lm, or in a file of another tool.

    Args:
        path: the folder, or the file.
        config: rank, alpha and targets, which a loralib file does not hold and a folder does.
        kernel_sizes: the convolutions in a loralib file, see `read_loralib`.
        base: the model that a file of kohya's or diffusers' is for (`read_for`), or PEFT's PiSSA,
            OLoRA or CorDA (`of_whole_base`).

    Raises:
        AdapterFileError: every problem of the files in one message.
    """
    if base is not None and (file := _of_image_tool(path)) is not None:
        return read_for(file, base)
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
    adapter, record = _read_folder(path, base)
    check_content(adapter, record, path)
    return adapter


def needs_base(path: Path) -> bool:
    """Whether an adapter can be read with its base alone.

    It is one of PEFT's whose start has changed its base, as PiSSA does, or of kohya or diffusers.
    """
    if _of_image_tool(path) is not None:
        return True
    file = path / CONFIG_FILE
    raw = read_object(file.read_bytes(), CONFIG_FILE, []) if file.is_file() else None
    has_cache = (path / CORDA_FILE).is_file()
    return raw is not None and is_repeatable(raw.get("init_lora_weights"), has_cache)


@contextmanager
def reading(folder: Path) -> Iterator[AdapterContent]:
    """The adapter of a folder, for a block of work while another thread computes its hash.

    The hash is checked at the end of the block: until then nothing may count that the block makes.

    Raises:
        AdapterFileError: every problem of the files in one message; of the hash after the block,
            also if that ended with an error.
    """
    if not folder.is_dir():
        load_path(folder)  # raises the error that says what it is instead
    adapter, record = _read_folder(folder)
    with ThreadPoolExecutor(1) as pool:
        hashing = pool.submit(adapter.content_hash)
        try:
            yield adapter
        finally:
            hashing.result()
            check_content(adapter, record, folder)


def _read_folder(
    folder: Path, base: nn.Module | None = None
) -> tuple[AdapterContent, AdapterRecord | None]:
    """The adapter of a folder, with the record of what was saved, if there is one."""
    try:
        problems = size_problems(folder, READ)
        if problems:
            raise AdapterFileError.listing(f"{folder} cannot be used", problems)
        files = read_files(folder, (*READ, CORDA_FILE))
        if WEIGHTS_FILE not in files:
            files |= read_files(folder, (PICKLE_FILE,))
    except OSError as error:
        raise AdapterFileError(f"{folder} cannot be read: {error}") from error
    return content_from(files, folder, base)


def content_from(
    files: Mapping[str, bytes], folder: Path, base: nn.Module | None = None
) -> tuple[AdapterContent, AdapterRecord | None]:
    """The adapter that a folder's files hold, and the record among them; no hash is computed.

    Args:
        files: content by name, of those of the adapter's files that are there.
        folder: where they are from, or will be, for messages.
        base: the model that it was trained on, which PEFT's PiSSA, OLoRA and CorDA need.

    Raises:
        AdapterFileError: every problem of the files in one message.
    """
    has_weights = not {WEIGHTS_FILE, PICKLE_FILE, MLX_FILE}.isdisjoint(files)
    if CONFIG_FILE not in files or not has_weights:
        raise AdapterFileError(_what_is_missing(files, has_weights, folder))
    problems: list[str] = []
    raw = read_object(files[CONFIG_FILE], CONFIG_FILE, problems)
    if WEIGHTS_FILE not in files and PICKLE_FILE not in files:
        return _of_mlx(raw, files, problems, folder), None
    record = read_record(files[RECORD_FILE], problems) if RECORD_FILE in files else None
    tensors = read_tensors(files, problems)
    config = None
    if raw is not None and not ("method" in raw and "peft_type" not in raw):
        has_cache = CORDA_FILE in files
        config = read_config(raw, problems, has_base=base is not None, has_cache=has_cache)
    elif raw is not None and RECORD_FILE not in files:
        problems.append(f"{RECORD_FILE}  missing; an adapter in lorakit's own form needs it")
    elif raw is not None and record is not None and raw["method"] != record.method:
        problems.append(f"{CONFIG_FILE}  has another method than {RECORD_FILE}")
    if not problems and record is not None:
        adapter: AdapterContent | None = recorded_adapter(record, config, tensors, folder)
    elif not problems:
        assert config is not None
        adapter, problems = read_peft(config, tensors)
        if adapter is not None and base is not None and config.init_lora_weights in STARTS:
            adapter, problems = _of_whole_base(adapter, str(config.init_lora_weights), base, files)
        template = own_template(files, problems)
        if adapter is not None and template is not None:
            adapter = replace(adapter, card={**adapter.card, "chat_template": template})
    if problems:
        raise AdapterFileError.listing(f"{folder} cannot be used", problems)
    assert adapter is not None
    notes = () if config is None else unknown_values(config)
    adapter = replace(adapter, unverified=(*adapter.unverified, *notes)) if notes else adapter
    return adapter, record


def _of_whole_base(
    adapter: AdapterContent, start: str, base: nn.Module, files: Mapping[str, bytes]
) -> tuple[AdapterContent | None, list[str]]:
    """The adapter for the base as it is, and what is wrong with it or CorDA's file."""
    try:
        cache = read_pickle(files[CORDA_FILE], CORDA_FILE) if start == "corda" else {}
    except AdapterFileError as error:
        return None, [str(error)]
    problems = [f"{CORDA_FILE}  {line}" for line in value_problems(cache)]
    return (None, problems) if problems else of_whole_base(adapter, start, base, cache)


def _of_mlx(
    raw: dict[str, Any] | None, files: Mapping[str, bytes], problems: list[str], folder: Path
) -> AdapterContent:
    """The adapter in mlx-lm's files.

    Raises:
        AdapterFileError: every problem of the files in one message.
    """
    adapter = None
    try:
        tensors = read_safetensors(files[MLX_FILE], MLX_FILE)
    except AdapterFileError as error:
        problems.append(str(error))
    else:
        problems += value_problems(tensors)
        if raw is not None and not problems:
            adapter, problems = read_mlx(raw, tensors)
    if adapter is None:
        raise AdapterFileError.listing(f"{folder} (of mlx-lm) cannot be used", problems)
    return adapter


def _what_is_missing(files: Mapping[str, bytes], has_weights: bool, folder: Path) -> str:
    """The message for a folder without an adapter's files, with the sub-folders that have them."""
    missing = [] if CONFIG_FILE in files else [CONFIG_FILE]
    missing += [] if has_weights else [WEIGHTS_FILE]
    text = f"{folder} is no adapter folder: {' and '.join(missing)} missing"
    text += named_files(folder)
    inner = sorted(path.parent for path in folder.glob(f"*/{CONFIG_FILE}"))
    if CONFIG_FILE in missing and len(inner) == 1:
        text += f"; its sub-folder has them: load {inner[0]}"
    elif CONFIG_FILE in missing and inner:
        text += f"; its sub-folders are adapters: {', '.join(path.name for path in inner)}"
    return text


def _of_image_tool(path: Path) -> Path | None:
    """The safetensors file of kohya's or diffusers' that a path is, or is the folder of; else None.

    Its layers are found by those of a model.
    """
    file = path / DIFFUSERS_FILE if path.is_dir() else path
    found = file.is_file() and not (path / CONFIG_FILE).is_file() and header_of(file) is not None
    return file if found else None


def _load_file(
    path: Path, config: LoRAConfig | None, kernel_sizes: Mapping[str, int] | None
) -> AdapterContent:
    if path.name in (CONFIG_FILE, RECORD_FILE, WEIGHTS_FILE, PICKLE_FILE, MLX_FILE):
        raise AdapterFileError(f"{path} is one file of an adapter: give its folder, {path.parent}")
    check_not_safetensors(path)
    if config is None:
        raise AdapterFileError(
            f"{path} is a file; lorakit reads it as loralib's, without rank, alpha or targets: "
            "give them as config=LoRAConfig(rank=…, alpha=…, targets=…)"
        )
    return read_loralib(path, config, kernel_sizes)


def _neighbours(path: Path) -> str:
    """The end of a message: the name that was perhaps meant, or the adapters beside a path."""
    if not path.parent.is_dir():
        return f"; nor is there a folder {path.parent}"
    folders = [entry for entry in path.parent.iterdir() if entry.is_dir()]
    near = did_you_mean(path.name, [folder.name for folder in folders])
    adapters = sorted(folder.name for folder in folders if read_file(folder, CONFIG_FILE))
    return near or (f"; beside it are {', '.join(adapters)}" if adapters else "")
