"""The verb merge: a plain model, with the adapter in its weights, that loads without lorakit."""

import os
import shutil
from pathlib import Path

import torch

from lorakit.adapted import open_model
from lorakit.cli.verbs import Result
from lorakit.config import DType, Settings
from lorakit.errors import OutputError
from lorakit.merge import finalize, merge


class MergeConfig(Settings):
    """Which adapter to merge, and where to write the model."""

    adapter: Path
    """Adapter folder."""

    out: Path
    """New folder for the model, in transformers' format."""

    model: str | None = None
    """Base model. None: the one that the adapter was trained on."""

    dtype: DType = "float32"
    """Precision of the written weights; the sum is rounded to it once."""

    allow_other_base: bool = False
    """Accept a base with other weights than the adapter was trained on."""


SETTINGS: type[Settings] = MergeConfig


def run(settings: MergeConfig) -> Result:
    """Merge in float32, round once, write the checkpoint and report what rounding cost."""
    if settings.out.exists():
        raise OutputError(f"{settings.out} exists: choose another folder")
    # Loaded in float32, so that base and update are added before anything is rounded.
    opened = open_model(
        settings.adapter, model=settings.model, allow_other_base=settings.allow_other_base
    )
    dtype = getattr(torch, settings.dtype)
    report = merge(opened.model, round_to=dtype)
    finalize(opened.model)
    model = opened.model.to(dtype)
    staging = settings.out.with_name(f".{settings.out.name}.unfinished-{os.getpid()}")
    try:
        model.save_pretrained(staging)
        opened.tokenizer.save_pretrained(staging)
        staging.rename(settings.out)
    except OSError as error:
        raise OutputError(f"{settings.out} cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Result(
        text=f"{report}\nmerged model ({settings.dtype}) in {settings.out}",
        data={"out": settings.out, "dtype": settings.dtype, **report.to_json()},
    )
