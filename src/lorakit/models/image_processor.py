"""The image processor of a base, where others have a tokenizer."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase


class ImageProcessor(PreTrainedTokenizerBase):
    """A tokenizer without tokens, which makes images ready for a model.

    Whatever loads, trains and scores a base passes its tokenizer on; a base for images has this.
    """

    def __init__(self, processor: Any) -> None:
        super().__init__()
        self.processor = processor
        """transformers' processor, which resizes and normalises images."""

    def __call__(self, images: Any, **how: Any) -> Any:
        """What the model takes: `pixel_values`."""
        return self.processor(images, **how)
