"""Image classification: each image, a file of its own, is of one class."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.data.fields import FieldMap
from lorakit.data.labels import class_name
from lorakit.data.objectives.classification import Classification
from lorakit.data.objectives.objective import LabelEncoding, Names, Values
from lorakit.data.problems import UnusableRowError
from lorakit.data.row_types import ImageRow, Row
from lorakit.data.samples import Draft, Example, ImageFile


class ImageClassification(Classification):
    """Rows of an image's file and the name of its class; the loss is cross-entropy."""

    task = "image-classification"
    kind = "image-classification"
    needed = ("image", "label")
    optional = ()
    unjoined = "has images of one size"

    def row(self, fields: FieldMap, values: Values, known: Names) -> Row:
        label = fields.value("label", values)
        if label is None or label == "":
            raise UnusableRowError("the label is missing")
        file = Path(fields.text("image", values)).expanduser()
        if not file.is_file():
            raise UnusableRowError(f"there is no file {file}")
        return ImageRow(image=str(file), label=class_name(label, known=known))

    def names(self, row: Any) -> Iterable[str]:
        return (row.label,)

    def draft(self, row: Any, encoding: LabelEncoding) -> Draft:
        file = Path(row.image)
        opened_image(file).close()
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        image = ImageFile(path=file, digest=digest)
        number = encoding.numbers[row.label]
        return Draft(example=Example(input_ids=[], labels=number, image=image))


def opened_image(file: Path) -> Any:
    """An image of Pillow's, whose pixels are read when they are needed.

    Raises:
        UnusableRowError: the file is no image.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(file)
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise UnusableRowError(f"{file} is no image that can be read: {error}") from None


def image_batch(examples: Sequence[Example], processor: Any) -> dict[str, Tensor]:
    """A batch of images as the base's own processor makes them: resized, and normalised.

    Args:
        examples: samples of images.
        processor: transformers' image processor of the base.

    Returns:
        pixel_values (batch, channels, height, width), and labels (batch,).
    """
    images = []
    for each in examples:
        assert each.image is not None, "rows of one kind"
        with opened_image(each.image.path) as image:
            images.append(image.convert("RGB"))
    batch: dict[str, Tensor] = dict(processor(images, return_tensors="pt"))
    return batch | {"labels": torch.tensor([each.labels for each in examples])}
