"""Settings of the verbs inspect, compare, push, merge, convert, score, chat, completion, demo."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, FiniteFloat, model_validator

from lorakit.config.base import (
    AdapterPlace,
    Device,
    DType,
    HeldIn,
    Names,
    PositiveInt,
    Settings,
    comma_list,
)
from lorakit.config.idle import changed
from lorakit.config.methods import LoRAConfig
from lorakit.config.seed import Seed
from lorakit.config.train import DataConfig


class ReportSettings(Settings):
    """Where a report of an analysis is written."""

    html: Path | None = None
    """File for a report with figures, which needs nothing but a browser; an earlier one is
    replaced."""

    figures: Path | None = None
    """Folder for every figure of the report as PNG and SVG; earlier ones are replaced."""

    @property
    def asks_report(self) -> bool:
        """Whether there is to be one."""
        return self.html is not None or self.figures is not None


class InspectConfig(ReportSettings):
    """Settings of inspect: the adapter, its base if that is looked at, and advice on its ranks."""

    positional: ClassVar[tuple[str, ...]] = ("adapter",)

    adapter: AdapterPlace
    """Adapter folder, or OWNER/NAME[@REVISION] on the hub."""

    model: str | None = None
    """Base model, to show ‖ΔW‖/‖W‖ and what ΔW amplifies of W. None: the files alone are read."""

    advise: bool = False
    """Say which rank each layer needs."""

    energy: Annotated[float, Field(gt=0, le=1)] = 0.95
    """With advise: the share of each ΔW's energy Σσ² that a smaller rank must keep."""

    out: Path | None = None
    """With advise: new folder for the smaller adapter."""

    data: DataConfig = DataConfig()
    """With advise: `data.validation` names rows on which both adapters are scored."""

    metrics: Names | None = None
    """With advise: as in evaluate."""

    batch_size: PositiveInt = 16
    """With advise: rows at once."""

    allow_other_base: bool = False
    """Accept a base with other weights than the adapter was trained on."""

    @model_validator(mode="after")
    def _check(self) -> "InspectConfig":
        given = {"out": self.out is not None, "metrics": self.metrics is not None}
        given |= {"energy": "energy" in self.model_fields_set, "data": bool(changed(self.data))}
        idle = [name for name, is_given in given.items() if is_given]
        if idle and not self.advise:
            raise ValueError(f"{' and '.join(idle)}: of advice on ranks; give advise too")
        return self


class CompareConfig(ReportSettings):
    """Settings of compare: the two adapters."""

    positional: ClassVar[tuple[str, ...]] = ("adapter", "other")

    adapter: AdapterPlace
    """Adapter folder, or OWNER/NAME[@REVISION] on the hub."""

    other: AdapterPlace
    """The adapter beside it, likewise; the ranks may differ."""

    allow_other_base: bool = False
    """Accept adapters of different bases, if their layers have the same shapes."""


class PushConfig(Settings):
    """Settings of push: the adapter, and the repository that gets it."""

    positional: ClassVar[tuple[str, ...]] = ("adapter", "repository")

    adapter: AdapterPlace
    """Adapter folder, or OWNER/NAME[@REVISION] on the hub; it is verified first."""

    repository: str
    """OWNER/NAME on the Hugging Face hub; it is made if there is none."""

    private: bool = False
    """Let a new repository be seen by its owners alone."""

    revision: str | None = None
    """Branch, made if there is none. None: main."""

    message: str = "An adapter by lorakit"
    """Message of the commit."""


class MergeConfig(Settings):
    """Settings of merge: the adapter, its base, and where to write the model."""

    positional: ClassVar[tuple[str, ...]] = ("adapter", "out")

    adapter: AdapterPlace
    """Adapter folder, or OWNER/NAME[@REVISION] on the hub."""

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
    """Settings of convert: what to read, what to make of it, and the format and folder to write."""

    positional: ClassVar[tuple[str, ...]] = ("source", "out")

    source: AdapterPlace
    """Adapter folder of lorakit or PEFT, OWNER/NAME[@REVISION] on the hub, or a loralib .pt
    file. With from_checkpoint: the fine-tuned model."""

    out: Path
    """New folder for the result; to gguf: a new file that ends in .gguf."""

    combine: Names = ()
    """Other adapters, to write the weighted sum of the source and these as one."""

    weights: Annotated[tuple[FiniteFloat, ...], BeforeValidator(comma_list)] | None = None
    """With combine, or of the source alone: a weight for each, the source's first. None: equal ones
    that sum to 1."""

    from_checkpoint: bool = False
    """The source is a model that was fine-tuned in full from `model`: write the nearest adapter of
    a rank."""

    rank: PositiveInt | None = None
    """Of from_checkpoint: the rank. Of a combination: the most that a layer may have."""

    energy: Annotated[float | None, Field(gt=0, le=1)] = None
    """Of from_checkpoint: in place of a rank, the share of each ΔW's energy to keep."""

    targets: Names = ("all-linear",)
    """Of from_checkpoint: the layers, in the words of training's lora.targets."""

    method: Literal["sum", "ties", "dare"] = "sum"
    """How adapters are combined: their weighted sum, exactly; or TIES (Yadav 2023) or DARE (Yu
    2024), which form each ΔW as a matrix."""

    density: Annotated[float, Field(gt=0, le=1)] = 0.5
    """The share of entries that ties keeps of each ΔW, or dare does not drop."""

    seed: Seed = 0
    """Seed of what dare drops."""

    allow_other_base: bool = False
    """Combine adapters of different bases, if their layers have the same shapes."""

    to: Literal["lorakit", "peft", "gguf"] = "lorakit"
    """lorakit: PEFT's two files and lorakit.json. peft: PEFT's two files alone. gguf: one file for
    llama.cpp, from LoRA on Llama, Mistral, SmolLM3, Qwen2, Qwen3, Gemma, Phi-3 and GPT-2."""

    model: str | None = None
    """Base model to check the adapter against, and to record. None: files are checked alone; to
    gguf, the config of the base that the adapter names is read. With from_checkpoint it must be
    given."""

    lora: LoRAConfig | None = None
    """Rank, alpha and targets, which a loralib file does not hold."""

    kernel_sizes: dict[str, PositiveInt] | None = None
    """Convolutions of a loralib file, by path or the end of it, and the size of their square
    kernels, such as '{conv1: 3}'."""

    @property
    def combines(self) -> bool:
        """Whether the result is a weighted sum."""
        return bool(self.combine) or self.weights is not None

    @model_validator(mode="after")
    def _check(self) -> "ConvertConfig":
        problems = []
        if self.combines and self.from_checkpoint:
            problems.append("combine and from_checkpoint are two ways to make an adapter: give one")
        if self.from_checkpoint and self.model is None:
            problems.append("from_checkpoint needs the base that was fine-tuned: give model")
        if self.from_checkpoint and (self.rank is None) == (self.energy is None):
            problems.append("from_checkpoint needs rank or energy: give one of the two")
        needs = {"energy": self.from_checkpoint, "targets": self.from_checkpoint}
        needs |= dict.fromkeys(("method", "density", "seed"), self.combines)
        needs["rank"] = self.combines or self.from_checkpoint
        idle = [n for n, used in needs.items() if n in self.model_fields_set and not used]
        if (self.out.suffix == ".gguf") != (self.to == "gguf"):
            problems.append(f"out {self.out}: a file that ends in .gguf goes with `to gguf`")
        if idle:
            problems.append(f"{', '.join(idle)}: of combine or from_checkpoint, which is not given")
        if problems:
            raise ValueError("; ".join(problems))
        return self


class ScoreConfig(Settings):
    """Settings of score: the task, its outputs and references, and what scores them."""

    positional: ClassVar[tuple[str, ...]] = ("outputs", "references")

    task: str
    """e2e, webnlg, dart, samsum, wikisql, or a task of GLUE: cola, sst2, mrpc, qqp, stsb, mnli,
    qnli, rte."""

    outputs: Path
    """File of the outputs, one a line: texts, classes or scores; for wikisql JSON objects. Or,
    without references, the file that `lorakit evaluate --outputs` wrote."""

    references: Path | None = None
    """File of the references, a JSON list: for each output a list of texts, or the right query,
    class or score. None: outputs has them."""

    variant: str | None = None
    """Of the scorer: python (as the paper's code; the default) or perl for e2e; official (the
    default) or paper for webnlg and dart."""

    tables: Path | None = None
    """For wikisql: a JSON list with the table of each query. None: no execution."""

    seen: Path | None = None
    """For webnlg: a JSON list that says of each output whether the category of its triples occurs
    in training, true or false. None: no scores of seen and unseen categories apart."""

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

    batch_size: PositiveInt = 4
    """Rows per step."""


class ChatConfig(Settings):
    """Settings of chat: the base, the adapters to switch between, and the search."""

    positional: ClassVar[tuple[str, ...]] = ("adapters",)

    adapters: tuple[AdapterPlace, ...] = ()
    """Adapters on one base: folders, or OWNER/NAME[@REVISION] on the hub; each is called as its
    folder or NAME is. The first one answers until another is chosen. None: the model alone."""

    model: str | None = None
    """Base model. None: the one that the first adapter was trained on."""

    system: str | None = None
    """Message of the system with which the conversation starts."""

    max_new_tokens: PositiveInt = 256
    """Longest answer, in tokens."""

    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 takes the likeliest token each time; more draws at random."""

    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the likeliest tokens that have this probability together."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of what is drawn."""

    dtype: DType = "float32"
    """Precision of the base."""

    quantize: HeldIn = "as-trained"
    """How the base's linear layers are held: as-trained (as in the first adapter's training), none
    (in `dtype`), 4bit or 8bit."""

    device: Device = "auto"
    """What the model computes on: cpu, cuda, or auto (a GPU where torch sees one, else the CPU)."""

    allow_other_base: bool = False
    """Accept a base with other weights than the adapters were trained on."""


class CompletionConfig(Settings):
    """Settings of completion."""

    positional: ClassVar[tuple[str, ...]] = ("shell",)

    shell: Literal["bash", "zsh", "fish"]
    """The shell whose script is printed: eval "$(lorakit completion bash)" in ~/.bashrc turns
    completion on; the same with zsh in ~/.zshrc, below compinit; in ~/.config/fish/config.fish
    lorakit completion fish | source."""
