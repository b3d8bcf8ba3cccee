"""Where a base is, by its packaged name, folder, file or hub id, and why it cannot be read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, HFValidationError
from huggingface_hub.utils.tqdm import enable_progress_bars
from transformers.utils import logging

from lorakit.errors import ModelError, did_you_mean
from lorakit.models.gguf_file import SUFFIX, converted, file_within
from lorakit.models.packaged import PACKAGES, packaged_folder
from lorakit.upstream.quiet_library import without_bars


def source_of(name: str) -> str:
    """The folder or hub id that transformers is to load.

    Raises:
        ModelError: the name is neither packaged, nor a model's folder, nor a hub id within reach.
    """
    if name in PACKAGES:
        return str(packaged_folder(name))
    folder = Path(name).expanduser()
    gguf = gguf_file(folder)
    if gguf is not None:
        return str(converted(name, gguf, prefix="file"))
    if folder.is_dir():
        _check_folder(folder)
        return str(folder)
    try:
        cached = huggingface_hub.try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        raise ModelError(f"there is no folder {name!r}. {_packaged_names(name)}") from None
    if not isinstance(cached, str) and huggingface_hub.is_offline_mode():
        raise ModelError(
            f"{name!r} is not a folder, nor a hub id in the local cache, and HF_HUB_OFFLINE keeps"
            f" the hub away. {_way_to_get(name)}"
        )
    return name


def _way_to_get(name: str) -> str:
    """The advice for a model of the hub that is not here."""
    return (
        f"Run `hf download {name}` where there is a network, or give a folder."
        f" {_packaged_names(name)}"
    )


def _packaged_names(name: str) -> str:
    """The packaged names, which need neither hub nor folder, and the one that was perhaps meant."""
    return f"Packaged are {' and '.join(PACKAGES)}{did_you_mean(name, PACKAGES) or '.'}"


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that a path is, or that is in a folder without a model in another form."""
    if path.is_dir() and not (path / "config.json").is_file():
        return file_within(path)
    is_gguf = path.suffix.lower() == SUFFIX and path.is_file()
    return path if is_gguf else None


def _check_folder(folder: Path) -> None:
    if (folder / "config.json").is_file():
        return
    problem = f"{folder} holds no model: it has no config.json"
    if (folder / "adapter_config.json").is_file():
        problem += ", but an adapter: load the base that it names, then attach the adapter"
    raise ModelError(f"{problem}.")


@contextlib.contextmanager
def explained(name: str, source: str, task: str) -> Iterator[None]:
    """Turn any error that transformers raises about a model into a ModelError."""
    try:
        yield
    except ModelError:
        raise
    # A damaged config or checkpoint can fail anywhere in transformers, with any type of error.
    except Exception as error:
        lines = (line.strip() for line in str(error).splitlines())
        reason = next(filter(None, lines), type(error).__name__)
        where = "" if source == name else f" from {source}"
        advice = "" if Path(source).is_dir() else f" {_way_to_get(name)}"
        if _is_gated(error):
            page = f"{huggingface_hub.constants.ENDPOINT}/{name}"
            advice = f" Ask for access on its page, {page}, then log in here by `hf auth login`."
        if "trust_remote_code=True" in str(error):
            advice = " lorakit runs no code that comes with a model: use one that transformers has."
        raise ModelError(
            f"{name!r} cannot be loaded{where} for {task}: {reason.rstrip('.')}.{advice}"
        ) from error


def _is_gated(error: BaseException | None) -> bool:
    """Whether an error comes from a repository whose owner gives access to it."""
    while error is not None and not isinstance(error, GatedRepoError):
        error = error.__cause__ or error.__context__
    return error is not None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' load report and bars; what the report says is raised as an error."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    try:
        with without_bars():
            if bars:
                # A download takes long enough to show.
                enable_progress_bars()
            yield
    finally:
        logging.set_verbosity(verbosity)
