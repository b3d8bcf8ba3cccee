"""Settings of estimate: those of a run, and the machine and the server that it is estimated for."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, cast

from pydantic import BeforeValidator, Field

from lorakit.config.base import AnyPath, Device, PositiveFloat, PositiveInt, Settings, Topic
from lorakit.config.marks import Invocation
from lorakit.config.train import TrainConfig

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
"""Bytes of a unit of memory, in capitals."""


def size_in_bytes(value: object) -> object:
    """The bytes of a size such as 24GB or 80 GiB; a number is one of bytes.

    Raises:
        ValueError: it is no size.
    """
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", value)
    if found is None or found[2].upper() not in UNITS:
        raise ValueError(f"{value!r} is no size: write 24GB, 80GiB or 500MB")
    return round(float(found[1]) * UNITS[found[2].upper()])


SizeInBytes = Annotated[int, BeforeValidator(size_in_bytes), Field(ge=1)]
"""Bytes, which may be given with a unit."""


class ServedSettings(Settings):
    """The server whose memory is estimated; its settings are those of `lorakit serve`."""

    slots: PositiveInt = 16
    """Requests that are answered at once."""

    max_length: PositiveInt | None = None
    """Longest prompt and answer together, in tokens. None: the model's context."""

    adapters: Annotated[int, Field(ge=0)] = 1
    """Adapters in memory, each like the one that is trained."""

    prefix_bytes: Annotated[int, BeforeValidator(size_in_bytes), Field(ge=0)] = 256_000_000
    """Memory of keys and values of prompts that were read, once it is full."""


FIRST = (
    *("model", "data.train", "row_tokens", "method", "lora.rank", "lora.targets", "batch_size"),
    *("memory", "dtype", "quantize", "device", "processes", "fit"),
)
"""The settings that most estimates need."""


def _without_first(topic: Topic) -> Topic:
    settings = tuple(each for each in topic.settings if each not in FIRST)
    return Topic(topic.name, topic.meaning, settings)


class EstimateConfig(TrainConfig):
    """Settings of estimate: a run as `lorakit train` takes it, and the machine that it is for."""

    topics: ClassVar[tuple[Topic, ...]] = (
        Topic("first", "What is estimated; all settings of `lorakit train` count too.", FIRST),
        Topic("machine", "How fast it is.", ("calibrate", "tflops")),
        Topic(
            "training",
            "What a run has besides.",
            ("data.validation", "out", "epochs", "learning_rate"),
        ),
        *map(_without_first, TrainConfig.topics[1:]),
    )

    out: Invocation[AnyPath] = cast(Any, "out")
    """Folder of the run, which is not touched."""

    row_tokens: Invocation[PositiveInt | None] = None
    """Tokens of each row, all of them targets, in place of rows that are read. None: the longest
    rows of data.train; without these, data.max_length."""

    device: Invocation[Device] = "auto"
    """What it would run on: cpu, cuda, or auto (a GPU where torch sees one, else the CPU)."""

    processes: Invocation[PositiveInt] = 1
    """Processes that train together, each with its share of every batch; figures are of one."""

    serve: Invocation[ServedSettings] = ServedSettings()
    """The server that would answer with the adapter."""

    fit: Invocation[SizeInBytes | None] = None
    """Memory of one device, such as 24GB: find settings whose run needs no more."""

    calibrate: Invocation[bool] = True
    """Measure for two seconds how fast this machine is, to say how long a step takes."""

    tflops: Invocation[PositiveFloat | None] = None
    """10¹² FLOPs a second that a device reaches in matmuls, where it is not this one."""
