"""Settings of what a trained model is asked: answers to prompts, and scores on held-out rows."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, FiniteFloat, model_validator

from lorakit.config.base import AdapterPlace, Device, DType, HeldIn, Names, PositiveInt, Settings
from lorakit.config.idle import changed
from lorakit.config.marks import Escapes
from lorakit.config.rows import TaskName
from lorakit.config.seed import Seed
from lorakit.config.train import DataConfig

BEAM_SETTINGS = ("length_penalty", "no_repeat_ngram")
"""The settings of a search with beams alone."""


class GenerateConfig(Settings):
    """Settings of generate: the model and adapter, the prompts, and the search."""

    positional: ClassVar[tuple[str, ...]] = ("adapter",)

    adapter: AdapterPlace | None = None
    """Adapter folder, or OWNER/NAME[@REVISION] on the hub; None: the model alone."""

    model: str | None = None
    """Base model. None: the one that the adapter was trained on."""

    prompt: str | None = None
    """One prompt, whose answer appears as it is written."""

    input: str | None = None
    """File with one prompt a line; - for standard input. Each line has its line of output: the
    answer, its line breaks written as \\n, or nothing for a blank one. --json has the answers as
    they are."""

    chat: bool | None = None
    """Send prompts as a user's message through the chat template. None: as in training."""

    max_new_tokens: PositiveInt = 128
    """Longest answer, in tokens; less where the model's context ends."""

    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 takes the likeliest token each time; more draws at random."""

    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the likeliest tokens that have this probability together."""

    num_beams: PositiveInt = 1
    """Beams of the search, which is that of the paper's code, with 10 there; 1 is greedy."""

    length_penalty: FiniteFloat = 0.9
    """Of a search with beams: an answer's log-probability is divided by its length to this power.
    The paper has 0.9 for E2E, 0.8 for WebNLG and DART; its repository 0.8 for E2E."""

    no_repeat_ngram: Annotated[int, Field(ge=0)] = 4
    """Of a search with beams: no answer has so many tokens in a row twice; 0: it may."""

    stop: Annotated[str | None, Escapes(), Field(min_length=1)] = None
    """Text of one token that ends an answer, beside the end tokens: \\n\\n in the paper's code."""

    seed: Seed = 0
    """Seed of what is drawn."""

    batch_size: PositiveInt = 16
    """Sequences at once: prompts of a file, or beams of several prompts."""

    dtype: DType = "float32"
    """Precision of the base."""

    quantize: HeldIn = "as-trained"
    """How the base's linear layers are held: as-trained (as in the adapter's training), none (in
    `dtype`), 4bit or 8bit."""

    device: Device = "auto"
    """What the model computes on: cpu, cuda, or auto (a GPU where torch sees one, else the CPU)."""

    allow_other_base: bool = False
    """Accept a base with other weights than the adapter was trained on."""

    @model_validator(mode="after")
    def _check(self) -> "GenerateConfig":
        if self.top_p < 1 and self.temperature == 0:
            raise ValueError("top_p is of drawing at random, and temperature is 0: raise it")
        if self.temperature > 0 and self.num_beams > 1:
            raise ValueError("num_beams is of a search, and temperature draws at random: give one")
        _check_beams(self)
        return self


class EvaluateConfig(Settings):
    """Settings of evaluate: the model and adapter, the rows, and the scores."""

    positional: ClassVar[tuple[str, ...]] = ("adapter",)

    adapter: AdapterPlace | None = None
    """Adapter folder, or OWNER/NAME[@REVISION] on the hub; None: the model alone."""

    model: str | None = None
    """Base model. None: the one that the adapter was trained on."""

    data: DataConfig = DataConfig()
    """Rows: `data.validation` names them; what else is unset is as it was in training."""

    task: Literal["preference", TaskName] | None = None
    """What the model does. None: what the adapter was trained for, else what the base is.
    preference: whether it prefers the chosen answer of two to the rejected one."""

    metrics: Names | None = None
    """For generation: loss (with perplexity), exact_match, bleu; task: all scores of the official
    scorer of a task of the paper. None: loss and task, or loss, exact_match and, where its library
    is installed, bleu. Rows with labels have loss and the scores of their task."""

    variant: str | None = None
    """Of the task's scorer: python (as the paper's code; the default) or perl for e2e; official
    (the default) or paper for webnlg and dart."""

    dtype: DType = "float32"
    """Precision of the base."""

    quantize: HeldIn = "as-trained"
    """How the base's linear layers are held: as-trained (as in the adapter's training), none (in
    `dtype`), 4bit or 8bit."""

    device: Device = "auto"
    """What the model computes on: cpu, cuda, or auto (a GPU where torch sees one, else the CPU)."""

    batch_size: PositiveInt = 16
    """Sequences at once: rows, or beams of several rows."""

    max_new_tokens: PositiveInt = 128
    """Longest answer, in tokens; less where the model's context ends."""

    num_beams: PositiveInt = 1
    """Beams of the search, which is that of the paper's code, with 10 there; 1 is greedy."""

    length_penalty: FiniteFloat = 0.9
    """Of a search with beams: an answer's log-probability is divided by its length to this power.
    The paper has 0.9 for E2E, 0.8 for WebNLG and DART; its repository 0.8 for E2E."""

    no_repeat_ngram: Annotated[int, Field(ge=0)] = 4
    """Of a search with beams: no answer has so many tokens in a row twice; 0: it may."""

    stop: Annotated[str | None, Escapes(), Field(min_length=1)] = None
    """Text of one token that ends an answer, beside the end tokens: \\n\\n in the paper's code."""

    outputs: Path | None = None
    """File for the answers, or predicted classes or numbers: JSON lines of prompt, answer and
    references, which `lorakit score` reads."""

    allow_other_base: bool = False
    """Accept a base with other weights than the adapter was trained on."""

    @model_validator(mode="after")
    def _check(self) -> "EvaluateConfig":
        _check_beams(self)
        return self


class PredictConfig(Settings):
    """Settings of predict: the adapters, the rows, and what is written of each."""

    positional: ClassVar[tuple[str, ...]] = ("adapters",)

    adapters: tuple[AdapterPlace, ...] = ()
    """Adapters on one base: folders, or OWNER/NAME[@REVISION] on the hub; each is called as its
    folder or NAME is. None: the model alone, which then has a head of its own."""

    model: str | None = None
    """Base model. None: the one that the first adapter was trained on."""

    input: str
    """Rows to answer, from whatever `data.train` of training may name. A row that names one of the
    adapters in a column `adapter` is answered by that one, else by each of them. What a row says is
    right is not read."""

    data: DataConfig = DataConfig()
    """How rows are read; what is unset is as in the training of the adapter that answers."""

    task: TaskName | None = None
    """What the adapters do. None: what each was trained for, else what the base is."""

    may_answer_nothing: bool | None = None
    """Of questions about a text: the answer may be that the text has none, which is then empty.
    None: as some rows that the adapter was trained on had none; for a base alone, no."""

    outputs: Path | None = None
    """File for the answers, a JSON line for each. None: they are printed."""

    batch_size: PositiveInt = 16
    """Rows at once, whichever adapters they are for."""

    dtype: DType = "float32"
    """Precision of the base."""

    quantize: HeldIn = "as-trained"
    """How the base's linear layers are held: as-trained (as in the first adapter's training), none
    (in `dtype`), 4bit or 8bit."""

    device: Device = "auto"
    """What the model computes on: cpu, cuda, or auto (a GPU where torch sees one, else the CPU)."""

    allow_other_base: bool = False
    """Accept a base with other weights than the adapters were trained on."""

    @model_validator(mode="after")
    def _check(self) -> "PredictConfig":
        given = [f"data.{name}" for name in ("train", "validation") if getattr(self.data, name)]
        if given:
            raise ValueError(f"{' and '.join(given)}: the rows to answer are named by input")
        return self


def _check_beams(settings: GenerateConfig | EvaluateConfig) -> None:
    """Refuse settings of beams where there is one.

    Raises:
        ValueError: with their names.
    """
    idle = [name for name in changed(settings) if name in BEAM_SETTINGS]
    if settings.num_beams == 1 and idle:
        raise ValueError(f"{' and '.join(idle)}: of a search with beams, and num_beams is 1")
