"""The image processor of a base, where others have a tokenizer."""

from __future__ import annotations

from typing import Any, cast

from transformers import PreTrainedTokenizerBase


class ImageProcessor(PreTrainedTokenizerBase):
    """A tokenizer without tokens, which makes images ready for a model.

    Whatever loads, trains and scores a base passes its tokenizer on; a base for images has this.
    """

    def __init__(self, processor: Any) -> None:
        cast(Any, super()).__init__()
        self.processor = processor
        """transformers' processor, which resizes and normalises images."""

    @staticmethod
    def load(source: str, **how: Any) -> ImageProcessor:
        """The image processor of a folder or hub id, as transformers reads it."""
        # Older versions hide its short name without torchvision, though Pillow is enough.
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        return ImageProcessor(AutoImageProcessor.from_pretrained(source, **how))

    def made_ready(self, images: Any, **how: Any) -> Any:
        """What the model takes of images: `pixel_values`."""
        return self.processor(images, **how)

    # A tokenizer is called with texts.
    __call__: Any = made_ready
