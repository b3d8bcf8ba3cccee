"""An adapter by its hub id: its files are fetched into the hub's own cache on this machine."""

from __future__ import annotations

import os
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lorakit.adapter.peft_config import CONFIG_FILE
from lorakit.adapter.record import RECORD_FILE
from lorakit.adapter.tensor_files import WEIGHTS_FILE
from lorakit.errors import AdapterFileError

FETCHED = (CONFIG_FILE, RECORD_FILE, WEIGHTS_FILE)
"""The files that are fetched: JSON and safetensors, which run no code when they are read."""


def local_path(source: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder or file that stands for an adapter on this machine.

    Args:
        source: a path; or a hub id, OWNER/NAME, where there is no such path, nor a folder OWNER.
        revision: a branch, tag or commit of the hub; `source` is then a hub id.

    Raises:
        AdapterFileError: it is neither, or the hub's files are not here and cannot be fetched.
    """
    if not isinstance(source, str | os.PathLike):
        raise AdapterFileError(
            "an adapter is given by its folder, by a hub id or as an Adapter; "
            f"found {source!r:.60}, a {type(source).__name__}"
        )
    path = Path(source).expanduser()
    if revision is not None:
        if not _is_hub_id(source):
            raise AdapterFileError(f"revision goes with a hub id, OWNER/NAME, not with {source}")
        return _fetched(os.fspath(source), revision)
    if path.exists() or not _is_hub_id(source) or path.parent.is_dir():
        return path
    return _fetched(os.fspath(source), None)


def _is_hub_id(source: str | os.PathLike[str]) -> bool:
    if not isinstance(source, str) or source.count("/") != 1:
        return False
    try:
        huggingface_hub.try_to_load_from_cache(source, CONFIG_FILE)
    except HFValidationError:
        return False
    return True


def _fetched(name: str, revision: str | None) -> Path:
    """The folder of a repository's files in the cache, fetched where they are not there yet.

    Raises:
        AdapterFileError: they cannot be fetched, or there is no safetensors file among them.
    """
    which = name if revision is None else f"{name} --revision {revision}"
    way = f"run `hf download {which}` where there is a network, or give a folder"
    try:
        found = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=list(FETCHED)
        )
    except RevisionNotFoundError:
        raise AdapterFileError(f"{name} has no revision {revision!r} on the hub") from None
    except RepositoryNotFoundError:
        raise AdapterFileError(
            f"there is no adapter folder {name}, and on the hub no repository of this name that "
            "you may read: `hf auth login` opens private ones"
        ) from None
    except LocalEntryNotFoundError as error:
        if not huggingface_hub.is_offline_mode():
            raise _not_fetched(which, error, way) from error
        raise AdapterFileError(
            f"there is no adapter folder {name}, nor {which} in the local cache of the hub, and "
            f"HF_HUB_OFFLINE keeps the hub away: {way}"
        ) from None
    # A connection can fail in as many ways as there are proxies.
    except Exception as error:
        raise _not_fetched(which, error, way) from error
    folder = Path(found)
    if (folder / CONFIG_FILE).is_file() and not (folder / WEIGHTS_FILE).is_file():
        raise AdapterFileError(
            f"{name} has no {WEIGHTS_FILE} on the hub, and nothing but safetensors and JSON is "
            "fetched: save it in that format with the tool that made it"
        )
    return folder


def _not_fetched(which: str, error: Exception, way: str) -> AdapterFileError:
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return AdapterFileError(f"{which} cannot be fetched from the hub: {reason}; {way}")
