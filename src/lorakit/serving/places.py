"""Where a server's adapters may come from: a folder, and where it is told so a name of the hub."""

from __future__ import annotations

import re
from pathlib import Path

from lorakit.adapter.hub import local_path
from lorakit.adapter.peft_config import CONFIG_FILE
from lorakit.errors import AdapterFileError
from lorakit.serving.refusals import RefusalError

PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
"""A name that can be a folder right in the allowed one, or the end of a hub id."""


class Places:
    """The places from which adapters may be loaded.

    Args:
        folder: within which they are; None: nowhere.
        resolve: whether a name that is asked for means the folder of that name.
        hub: a namespace of the hub, where such a name is looked for next; None: not there.
    """

    def __init__(
        self, folder: Path | None = None, *, resolve: bool = False, hub: str | None = None
    ) -> None:
        self.folder = None if folder is None else folder.resolve()
        self.resolve = resolve or hub is not None
        self._hub = hub

    def found(self) -> list[Path]:
        """The folders of adapters that may be loaded: the allowed folder, or those right in it."""
        if self.folder is None or not self.folder.is_dir():
            return []
        if (self.folder / CONFIG_FILE).is_file():
            return [self.folder]
        return sorted(path.parent for path in self.folder.glob(f"*/{CONFIG_FILE}"))

    def may_resolve(self, name: str) -> bool:
        """Whether a name that nobody loaded may be looked for; of the hub, before it is asked."""
        if not (self.resolve and PLAIN.fullmatch(name)):
            return False
        return self._hub is not None or self._is_here(name)

    def resolved(self, name: str) -> Path:
        """The folder that a name means, fetched from the hub where it is not here.

        Raises:
            RefusalError: there is none, or a link in it leaves the allowed folder.
        """
        if self._is_here(name):
            return self.allowed(name)
        try:
            return local_path(f"{self._hub}/{name}")
        except AdapterFileError as error:
            raise RefusalError(
                f"The model `{name}` does not exist: {error}", 404, param="model"
            ) from None

    def _is_here(self, name: str) -> bool:
        return self.folder is not None and (self.folder / name / CONFIG_FILE).is_file()

    def allowed(self, path: str) -> Path:
        """The folder that a path means.

        Raises:
            RefusalError: it, or a file that a link in it points to, is not in the allowed folder.
        """
        if self.folder is None:
            raise RefusalError(
                "this server loads no adapters: start it with --adapters FOLDER", 403
            )
        try:
            # A path from the root takes the place of the folder.
            real = (self.folder / path).resolve()
            is_folder = real.is_dir()
            targets = [real, *(each.resolve() for each in _files(real))]
        except (OSError, ValueError) as error:
            # Too long, or with a character that no path has.
            raise RefusalError(f"lora_path is no path: {error}", param="lora_path") from None
        if not all(each.is_relative_to(self.folder) for each in targets):
            raise RefusalError(
                f"{path} is not within the folder of this server's adapters, or a link in it "
                "leaves that folder",
                403,
                param="lora_path",
            )
        if not is_folder:
            raise RefusalError(f"there is no adapter folder {path}", 404, param="lora_path")
        return real


def _files(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []
