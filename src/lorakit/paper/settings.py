"""Settings of the verbs of `lorakit paper`; they know which cells and tasks there are."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from lorakit.config.base import Names, PositiveInt, Settings, comma_list
from lorakit.config.seed import Seed
from lorakit.data.tasks import TASKS
from lorakit.errors import did_you_mean
from lorakit.paper.cell import names_nothing

RESULTS = Path("paper/results")
"""The folder of results, from the working folder."""


class PaperConfig(Settings):
    """The settings of all of them."""

    results: Path = RESULTS
    """Folder of the results."""


class CellChoice(PaperConfig):
    """Which cells, and which of their runs."""

    positional: ClassVar[tuple[str, ...]] = ("cells",)

    cells: Names = ()
    """Cells such as table2.lora, whole tables such as table2, or patterns such as table?.lora.
    None: all."""

    scale: Literal["small", "full"] = "small"
    """small: the twin on a packaged model; full: the paper's model and settings."""

    tasks: Names = ()
    """Tasks of the cells, such as cola. None: all."""

    model: str | None = None
    """Of full: one of the cell's published models, such as roberta-base. None: all."""

    variant: Literal["paper", "repository"] = "paper"
    """Of full: the settings of the paper, or those of its repository where they differ."""

    seeds: tuple[Seed, ...] = ()
    """Seeds. None: those of the cell."""

    @field_validator("cells")
    @classmethod
    def _name_cells(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        # Each word of a command line may be several, as the value of a flag may.
        words = tuple(name for word in words for name in comma_list(word))
        unknown = [f"there is no cell {word!r}{hint}" for word, hint in names_nothing(words)]
        if unknown:
            raise ValueError(f"{', '.join(unknown)} (`lorakit paper list` shows all)")
        return words

    @field_validator("tasks")
    @classmethod
    def _name_tasks(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [word for word in words if word not in TASKS]
        if unknown:
            listed = ", ".join(
                f"there is no task {word!r}{did_you_mean(word, TASKS)}" for word in unknown
            )
            raise ValueError(f"{listed}; there are {', '.join(TASKS)}")
        return words


class PaperListConfig(CellChoice):
    """Settings of paper list: which cells are shown, and where their results are."""


class PaperRunConfig(CellChoice):
    """Settings of paper run: which cells, on which data, and where the results go."""

    cells: Annotated[Names, Field(min_length=1)]
    """Cells such as table2.lora, whole tables such as table2, or patterns such as table?.lora; or
    figure3, figure4 and table7, which look into adapters of Table 6."""

    data: Path | None = None
    """Folder with a folder for each task, named as the task. None: the data sets of the hub."""

    work: Path = Path("out/paper")
    """Folder for adapters and checkpoints while a run trains; a finished run's are removed."""

    threads: PositiveInt | None = None
    """Threads of torch. None: as many as torch takes by itself."""

    joint: PositiveInt = 1
    """Train up to so many LoRA runs of one model and task in one batch, each as if alone: faster
    where a base takes longer than its adapters."""

    ray: str | None = None
    """Run as tasks of a Ray cluster, each with `threads` processors (1, if None): local (started
    here), auto, or HOST:PORT. Its machines see the same folders."""

    redo: bool = False
    """Run also what has a current result, which is then replaced."""

    dry_run: bool = False
    """Check everything, print what would be run, and stop."""

    @model_validator(mode="after")
    def _check_alone(self) -> "PaperRunConfig":
        if self.ray is not None and self.joint > 1:
            raise ValueError("ray gives each run a process, and joint joins several in one")
        return self


class PaperVerifyConfig(CellChoice):
    """Settings of paper verify: which results are scored again, and with which data."""

    data: Path | None = None
    """Folder with a folder for each task, named as the task. None: the data sets of the hub."""


class PaperFigureConfig(PaperConfig):
    """Settings of paper figure: which figure, and where it is drawn."""

    positional: ClassVar[tuple[str, ...]] = ("figure",)

    figure: str
    """Its number: 2, 3 or 4."""

    out: Path | None = None
    """Folder for figure2.small.png and figure2.small.svg, which are replaced. None: its numbers
    are printed."""


class PaperTableConfig(PaperConfig):
    """Settings of paper table: which table, and where it is written."""

    positional: ClassVar[tuple[str, ...]] = ("table",)

    table: str
    """Its number, such as 2."""

    scale: Literal["small", "full"] = "small"
    """small: the twins on packaged models; full: the paper's models and settings."""

    out: Path | None = None
    """Folder for table2.small.md, which is replaced. None: the table is printed."""


class PaperPagesConfig(PaperConfig):
    """Settings of paper pages: whose pages are made again."""

    benchmarks: Path = Path("benchmarks/results")
    """Folder of the benchmarks' results."""

    root: Path = Path(".")
    """Folder of the repository. Replaced are docs/reproduction.md, paper/tables, paper/figures, and
    README.md's table."""


class PaperClaimsConfig(PaperConfig):
    """Settings of paper claims: where the page is written."""

    benchmarks: Path = Path("benchmarks/results")
    """Folder of the benchmarks' results."""

    part: Literal["page", "readme"] = "page"
    """page: each claim with our evidence; readme: the table of README alone."""

    out: Path | None = None
    """Folder for reproduction.md, which is replaced. None: it is printed."""
