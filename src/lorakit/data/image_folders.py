"""A folder of images, in a folder for each class that is named after it."""

from __future__ import annotations

from pathlib import Path

from lorakit.data.file_formats import RawRow
from lorakit.data.problems import Problems
from lorakit.errors import DataError

IMAGES = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff")
"""The ends of names of images that can be read."""


def is_image_folder(source: str) -> bool:
    """Whether a source is a folder with folders of images."""
    folder = Path(source).expanduser()
    return folder.is_dir() and any(map(_images, _classes(folder)))


def image_rows(source: str) -> list[RawRow]:
    """A raw row for each image: its file, and its folder's name as its label.

    Raises:
        DataError: an image is in no folder of a class, or a class has a file that is no image, or
            none that is one.
    """
    folder = Path(source).expanduser()
    loose = _images(folder)
    if loose:
        raise DataError(
            f"{folder} has {len(loose)} images beside the folders of its classes, such as"
            f" {loose[0].name}: an image's class is the folder that it is in"
        )
    problems = Problems(str(folder))
    for each in _classes(folder):
        if not _images(each):
            problems.add(each.name, f"no image is in this folder (they end in {', '.join(IMAGES)})")
        for file in sorted(each.iterdir()):
            if file.is_file() and file.name[0] != "." and file.suffix.lower() not in IMAGES:
                problems.add(f"{each.name}/{file.name}", "is no image: move it out of the folder")
    problems.raise_if_any()
    return [
        RawRow(f"{each.name}/{file.name}", {"image": str(file), "label": each.name})
        for each in _classes(folder)
        for file in _images(each)
    ]


def _classes(folder: Path) -> list[Path]:
    return sorted(each for each in folder.iterdir() if each.is_dir() and each.name[0] != ".")


def _images(folder: Path) -> list[Path]:
    return sorted(each for each in folder.iterdir() if each.suffix.lower() in IMAGES)
