"""Folders that lorakit wrote: the adapter that lorakit.json records, checked against the files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from lorakit.adapter.content import AdapterContent
from lorakit.adapter.peft import decode, disagreements, encode, layers_of, misfits
from lorakit.adapter.peft_config import PeftConfig
from lorakit.adapter.record import RECORD_FILE, AdapterRecord
from lorakit.errors import AdapterFileError


def recorded_adapter(
    record: AdapterRecord, config: PeftConfig | None, found: Mapping[str, Tensor], folder: Path
) -> AdapterContent:
    """The adapter that lorakit.json records; its hash is not computed yet.

    Args:
        record: what lorakit.json says.
        config: PEFT's configuration; None for an adapter in lorakit's own form.
        found: the tensors of the folder's weights file, under the names that they have there.
        folder: where they are from, for a message.

    Raises:
        AdapterFileError: the other two files are not those that were saved with it.
    """
    try:
        outline = record.adapter(record.empty_tensors())
        layers = layers_of(outline)
        expected = outline.tensors if config is None else encode(layers, outline.tensors)
        problems = [] if config is None else list(disagreements(config, outline, layers))
    # Only someone who also computed a new checksum gets here.
    except (IndexError, KeyError, RuntimeError, ValueError, ArithmeticError, re.error) as error:
        raise AdapterFileError(f"{folder}: {RECORD_FILE} contradicts itself: {error}") from error
    problems += misfits(expected, found)
    tensors = dict(found)
    if config is not None and not problems:
        tensors, problems = decode(layers, outline.tensors, found)
    if problems:
        raise _not_as_saved(folder, problems)
    return replace(outline, tensors=tensors)


def check_content(adapter: AdapterContent, record: AdapterRecord | None, folder: Path) -> None:
    """Compare an adapter's hash with the recorded one; a folder of PEFT's has no record.

    Raises:
        AdapterFileError: the weights are not those that were saved.
    """
    if record is not None and record.content_hash != adapter.content_hash():
        problem = "the content hash is another: weights were changed or damaged after saving"
        raise _not_as_saved(folder, [problem])


def _not_as_saved(folder: Path, problems: Sequence[str]) -> AdapterFileError:
    headline = (
        f"{folder} is not as lorakit saved it (if another tool changed it on purpose, delete "
        f"{RECORD_FILE} to load it without these checks)"
    )
    return AdapterFileError.listing(headline, problems)
