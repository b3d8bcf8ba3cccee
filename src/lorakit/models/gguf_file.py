"""Bases in GGUF files, turned once into folders that transformers can load."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from safetensors import SafetensorError

from lorakit.errors import MissingExtraError, ModelError
from lorakit.models.quantized import drop_quantisation_mark

CONVERTER_VERSION = 1
"""Part of a converted model's folder name; raise it when the conversion changes."""
SUFFIX = ".gguf"
_SPECIAL_TOKENS = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
}
"""The special tokens of a tokenizer, and what a GGUF file calls them."""
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_DEFAULT_SPLITS = ("", "default", "gpt-2")
"""Files of byte-level tokenizers that split texts into words as GPT-2's does."""


def cache_folder() -> Path:
    """The folder of converted models: LORAKIT_CACHE, or lorakit in the user's cache."""
    if own := os.environ.get("LORAKIT_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorakit"


def file_within(folder: Path) -> Path | None:
    """The GGUF file of a folder that holds no model in another form; None: it has none.

    Raises:
        ModelError: it has several.
    """
    files = sorted(folder.glob(f"*{SUFFIX}"))
    if len(files) > 1 and not _SHARD.search(files[0].name):
        names = ", ".join(file.name for file in files)
        raise ModelError(f"{folder} holds {len(files)} GGUF files: name one of {names}")
    return files[0] if files else None


def converted(name: str, gguf: Path, *, prefix: str) -> Path:
    """The folder of a converted GGUF file, which is named after the file's content.

    Args:
        name: what the user called it, for messages.
        gguf: the file.
        prefix: the beginning of the folder's name.

    Raises:
        ModelError: the file cannot be read, or the cache cannot be written.
        MissingExtraError: it is to be converted without the `gguf` extra.
    """
    if _SHARD.search(gguf.name):
        raise ModelError(
            f"{gguf} is one part of a model that was split: join the parts with llama.cpp's "
            "`llama-gguf-split --merge` first"
        )
    with gguf.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    key = hashlib.sha256(f"{CONVERTER_VERSION} {content}".encode()).hexdigest()[:16]
    folder = cache_folder() / f"{prefix}-gguf-{key}"
    if not folder.is_dir():
        model, tokenizer = _read_gguf(name, gguf)
        try:
            _write_whole(model, tokenizer, folder)
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"{name!r} cannot be unpacked into {folder.parent}: {error}. It needs"
                f" {model.num_parameters() * 4 / 1e6:.0f} MB; set LORAKIT_CACHE to a folder that"
                " has them."
            ) from error
    return folder


def _read_gguf(
    name: str, gguf: Path
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """The model in float32, no longer marked as quantised, and its tokenizer."""
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError(f"unpacking {name!r}, which is a GGUF file,", "gguf")
    try:
        fields = _fields(gguf)
        split = _word_split(fields)
        how: dict[str, Any] = {"gguf_file": gguf.name, "trust_remote_code": False}
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, **how)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent, dtype=torch.float32, **how
        )
    # A damaged file can fail anywhere in the reader, with any type of error.
    except Exception as error:
        raise ModelError(f"{gguf} cannot be read as a GGUF file: {error}") from error
    if split == "smollm":
        _split_digits(tokenizer)
    elif split not in (*_DEFAULT_SPLITS, *known_splits()):
        raise ModelError(
            f"{gguf} divides texts into words as {split!r}, which transformers does not read, so "
            "that its tokens would be others: load the model from its original folder"
        )
    _set_special_tokens(tokenizer, fields)
    drop_quantisation_mark(model)
    return model, tokenizer


def _fields(gguf: Path) -> Mapping[str, Any]:
    """What a file says of its model and tokenizer, by name."""
    from gguf import GGUFReader

    return GGUFReader(gguf).fields


def _set_special_tokens(
    tokenizer: transformers.PreTrainedTokenizerBase, fields: Mapping[str, Any]
) -> None:
    """Take those that the file names: transformers 5.17 pads with another token."""
    for name, key in _SPECIAL_TOKENS.items():
        field = fields.get(f"tokenizer.ggml.{key}_token_id")
        if field is not None:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(int(field.contents())))


def _word_split(fields: Mapping[str, Any]) -> str:
    """The name of how a byte-level tokenizer splits texts into words; "" for other tokenizers."""
    kind, split = (fields.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    is_byte_level = kind is not None and kind.contents() == "gpt2"
    return str(split.contents()) if is_byte_level and split is not None else ""


def known_splits() -> Mapping[str, str]:
    """The regular expressions of the splits that transformers reads, by name."""
    with contextlib.suppress(ImportError):
        from transformers.integrations.gguf import gguf_tokenizer_mapping

        # transformers 5.17 has the module without the table.
        return dict(getattr(gguf_tokenizer_mapping, "GGUF_PRE_TOKENIZER_SPLITS", {}))
    return {}


def _split_digits(tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    """Make each digit a word of its own, as SmolLM2's vocabulary was made.

    The GGUF file says so (`tokenizer.ggml.pre` is `smollm`), but transformers does not read it.
    """
    split = tokenizers.pre_tokenizers
    tokenizer.backend_tokenizer.pre_tokenizer = split.Sequence(
        [split.Digits(individual_digits=True), split.ByteLevel(add_prefix_space=False)]
    )


def _write_whole(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    folder: Path,
) -> None:
    """Write the folder so that it appears complete or not at all; another process may be first."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unpacking-") as scratch:
        draft = Path(scratch, folder.name)
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        for path in (*draft.iterdir(), draft):
            _flush(path)
        try:
            draft.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
        _flush(folder.parent)


def _flush(path: Path) -> None:
    """Make sure that a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
