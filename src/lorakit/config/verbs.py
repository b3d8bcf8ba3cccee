"""Settings of the verbs merge, convert, score and demo."""

from pathlib import Path
from typing import ClassVar, Literal

from lorakit.config.base import AdapterPlace, DType, PositiveInt, Settings
from lorakit.config.methods import LoRAConfig


class MergeConfig(Settings):
    """Settings of merge: the adapter, its base, and where to write the model."""

    positional: ClassVar[tuple[str, ...]] = ("adapter", "out")

    adapter: AdapterPlace
    """Adapter folder, or OWNER/NAME on the hub."""

    out: Path
    """New folder for the model, in transformers' format."""

    model: str | None = None
    """Base model. None: the one that the adapter was trained on."""

    into: Literal["dequantised", "original"] = "dequantised"
    """Which base to merge into, where the adapter was trained on a quantised one: what its weights
    stand for, dequantised, which gives the model that was trained; or the original."""

    dtype: DType = "float32"
    """Precision of the written weights; the sum is rounded to it once."""

    allow_other_base: bool = False
    """Accept a base with other weights than the adapter was trained on."""


class ConvertConfig(Settings):
    """Settings of convert: the adapter to read, and the format and folder to write."""

    positional: ClassVar[tuple[str, ...]] = ("source", "out")

    source: AdapterPlace
    """Adapter folder of lorakit or PEFT, OWNER/NAME on the hub, or a loralib .pt file."""

    out: Path
    """New folder for the result."""

    to: Literal["lorakit", "peft"] = "lorakit"
    """lorakit: PEFT's two files and lorakit.json. peft: PEFT's two files alone."""

    model: str | None = None
    """Base model to check the adapter against, and to record. None: files are checked alone."""

    lora: LoRAConfig | None = None
    """Rank, alpha and targets, which a loralib file does not hold."""

    kernel_sizes: dict[str, PositiveInt] | None = None
    """Convolutions of a loralib file, by path or the end of it, and the size of their square
    kernels, such as '{conv1: 3}'."""


class ScoreConfig(Settings):
    """Settings of score: the task, its outputs and references, and what scores them."""

    positional: ClassVar[tuple[str, ...]] = ("outputs", "references")

    task: str
    """e2e, webnlg, dart, samsum, wikisql, or a task of GLUE: cola, sst2, mrpc, qqp, stsb, mnli,
    qnli, rte."""

    outputs: Path
    """File of the outputs, one a line: texts, classes or scores; for wikisql JSON objects."""

    references: Path
    """File of the references, a JSON list: for each output a list of texts, or the right query,
    class or score."""

    variant: str | None = None
    """Of the scorer: python (as the paper's code; the default) or perl for e2e; official (the
    default) or paper for webnlg and dart."""

    tables: Path | None = None
    """For wikisql: a JSON list with the table of each query. None: no execution."""

    scorer: Literal["python", "java"] = "python"
    """java: CoreNLP and METEOR's own program do their part of e2e, as a check of ours."""


class DemoConfig(Settings):
    """Settings of demo: how long to train and how much to score."""

    positional: ClassVar[tuple[str, ...]] = ("out",)

    out: Path | None = None
    """New folder for the adapters. None: a temporary one, which stays for you to look at."""

    steps: PositiveInt | None = None
    """Optimizer steps per task. None: as many as each task needs."""

    rows: PositiveInt = 32
    """Held-out rows scored per task."""

    batch_size: PositiveInt = 8
    """Rows per step."""
