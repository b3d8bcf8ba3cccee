"""An adapter by its hub id: its files are fetched into the hub's own cache, or sent to the hub.

An id may end with a branch, tag or commit: OWNER/NAME@REVISION.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lorakit.adapter.folder import READ
from lorakit.adapter.mlx import MLX_FILE
from lorakit.adapter.peft_config import CONFIG_FILE
from lorakit.adapter.tensor_files import WEIGHTS_FILE
from lorakit.errors import AdapterFileError, ConfigError, OutputError


def local_path(source: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder or file that stands for an adapter on this machine.

    Args:
        source: a path; or a hub id, OWNER/NAME or OWNER/NAME@REVISION, where there is no such path,
            nor a folder OWNER.
        revision: a branch, tag or commit of the hub; `source` is then a hub id without one.

    Raises:
        AdapterFileError: it is neither, or the hub's files are not here and cannot be fetched.
    """
    if not isinstance(source, str | os.PathLike):
        raise AdapterFileError(
            "an adapter is given by its folder, by a hub id or as an Adapter; "
            f"found {source!r:.60}, a {type(source).__name__}"
        )
    path = Path(source).expanduser()
    name, _, named = os.fspath(source).partition("@")
    could_be_id = isinstance(source, str) and is_hub_id(name)
    if revision is not None:
        if not could_be_id or named:
            raise AdapterFileError(f"revision goes with a hub id, OWNER/NAME, not with {source}")
        return _fetched(name, revision)
    if path.exists() or not could_be_id or path.parent.is_dir():
        return path
    return _fetched(name, named or None)


def short_name(source: str | os.PathLike[str]) -> str:
    """The short name of an adapter: the last part of its folder's path, or NAME of its hub id."""
    last = Path(source).expanduser().absolute().name
    return last if Path(source).expanduser().exists() else last.partition("@")[0]


def short_names(sources: Sequence[str | os.PathLike[str]]) -> list[str]:
    """The short name of each of several adapters.

    Raises:
        ConfigError: two have the same.
    """
    names = [short_name(each) for each in sources]
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise ConfigError(f"two adapters are called {', '.join(twice)}: rename one's folder")
    return names


def is_hub_id(name: str) -> bool:
    """Whether a name could be OWNER/NAME on the hub."""
    if name.count("/") != 1:
        return False
    try:
        huggingface_hub.try_to_load_from_cache(name, CONFIG_FILE)
    except HFValidationError:
        return False
    return True


def _fetched(name: str, revision: str | None) -> Path:
    """The folder of a repository's files in the cache, fetched where they are not there yet.

    Raises:
        AdapterFileError: they cannot be fetched, or are not those of an adapter in safetensors.
    """
    which = name if revision is None else f"{name} --revision {revision}"
    way = f"run `hf download {which}` where there is a network, or give a folder"
    try:
        found = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            allow_patterns=list(READ),
            # huggingface_hub 1.33 asks the hub for a commit's files even when it is offline.
            local_files_only=huggingface_hub.is_offline_mode(),
        )
    except RevisionNotFoundError:
        raise AdapterFileError(f"{name} has no revision {revision!r} on the hub") from None
    # A kind of the next error: the repository is there.
    except GatedRepoError:
        page = f"{huggingface_hub.constants.ENDPOINT}/{name}"
        raise AdapterFileError(
            f"{name} is gated: ask for access on its page, {page}, then log in here by `hf auth "
            "login`"
        ) from None
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
    if not (folder / CONFIG_FILE).is_file():
        raise AdapterFileError(
            f"{name} is no adapter: it has no {CONFIG_FILE} on the hub. A base is named by "
            "`model`; another tool's single file is fetched by `hf download` and named by its path"
        )
    if not any((folder / each).is_file() for each in (WEIGHTS_FILE, MLX_FILE)):
        raise AdapterFileError(
            f"{name} has no {WEIGHTS_FILE} on the hub, and of tensors nothing but safetensors is "
            "fetched: save it in that format with the tool that made it"
        )
    return folder


def _not_fetched(which: str, error: Exception, way: str) -> AdapterFileError:
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return AdapterFileError(f"{which} cannot be fetched from the hub: {reason}; {way}")


def send(
    folder: Path, repository: str, *, private: bool, revision: str | None, message: str
) -> str:
    """Send the files of an adapter's folder to a repository of the hub, which is made if need be.

    Args:
        folder: has the files.
        repository: OWNER/NAME.
        private: whether a new repository can be seen by its owners alone.
        revision: the branch. None: main.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        OutputError: it is no id of the hub, the hub is out of reach, or does not take the files.
    """
    if not is_hub_id(repository):
        raise OutputError(f"a repository of the hub is OWNER/NAME; found {repository!r}")
    if huggingface_hub.is_offline_mode():
        raise OutputError(
            f"HF_HUB_OFFLINE keeps the hub away: unset it to send the adapter to {repository}"
        )
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository, folder_path=folder, revision=revision, commit_message=message
        )
    # A connection can fail in as many ways as there are proxies.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise OutputError(
            f"the adapter was not sent to {repository}: {reason}; `hf auth login` opens "
            "repositories of yours"
        ) from error
    return str(commit.commit_url)
