"""Settings: one frozen class is the Python argument, the YAML file and the CLI flags at once."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from lorakit.errors import ConfigError, did_you_mean

Format = Literal["auto", "prompt", "messages", "text", "classification"]
RowField = Literal["prompt", "completion", "references", "messages", "text", "text_pair", "label"]
DType = Literal["float32", "bfloat16", "float16"]


def _comma_list(value: Any) -> Any:
    """Split "q, v" into its names, so that a flag or a YAML line needs no brackets."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


Names = Annotated[tuple[str, ...], BeforeValidator(_comma_list)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(ge=1)]


class Settings(BaseModel):
    """Base of all settings: frozen, unknown keys refused, every problem reported at once."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        coerce_numbers_to_str=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        validate_default=True,
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise config_error(type(self), error) from None

    # Pydantic then builds nested settings without this constructor, so that the outermost
    # one collects the problems of all of them.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


def config_error(settings: type[BaseModel], error: ValidationError) -> ConfigError:
    """Return one ConfigError with a line for each of pydantic's problems."""
    return ConfigError.listing(
        f"{settings.__name__} has settings that cannot be used", problem_lines(settings, error)
    )


def problem_lines(settings: type[BaseModel], error: ValidationError) -> list[str]:
    """Return a line for each of pydantic's problems: the setting, and what is wrong with it."""
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"]) or "(the whole)"
        if problem["type"] == "extra_forbidden":
            lines.append(f"{key}: unknown setting{_nearest(settings, problem['loc'])}")
        elif problem["type"] == "missing":
            lines.append(f"{key}: must be given")
        elif problem["type"] == "value_error":
            lines.append(f"{key}: {problem['ctx']['error']}")
        else:
            found = repr(problem["input"])
            lines.append(f"{key}: {problem['msg'][:1].lower()}{problem['msg'][1:]}, found {found}")
    return lines


def _nearest(settings: type[BaseModel], location: tuple[int | str, ...]) -> str:
    """Return "; did you mean 'x'?" for the nearest known key beside an unknown one."""
    for part in location[:-1]:
        field = settings.model_fields.get(str(part))
        inner = field.annotation if field else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return ""
        settings = inner
    known = settings.model_fields
    hint = did_you_mean(str(location[-1]), known)
    return hint or f"; the known ones are {', '.join(known)}"


class LoRAConfig(Settings):
    """How to adapt a model with LoRA (Hu et al. 2021, section 4.1)."""

    rank: PositiveInt = 8
    """Inner width r of the update B·A. The paper tries 1 to 64 (Table 6)."""

    alpha: PositiveFloat | None = None
    """Numerator of the scale α/r (section 4.1). None: equal to the rank, so the scale is 1."""

    targets: Names = ("q", "v")
    """Layers to adapt: roles (q k v o gate up down embed head attention mlp all-linear), the end of
    a module's dotted path, a glob such as model.layers.*.mlp.*, or re:REGEX over the whole path."""

    exclude: Names = ()
    """Layers to leave alone, in the same words as targets."""

    layers: str | None = None
    """Blocks to adapt, counted from 0, such as "0-5,11". None: every block."""

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Chance that an input element of A·x is dropped in training."""

    bias: Literal["none", "lora", "all"] = "none"
    """Bias vectors to train as well: none, those of the adapted layers, or all in the model."""

    rank_pattern: dict[str, PositiveInt] = {}
    """Other ranks for some layers, in the words of targets; the last match counts."""

    alpha_pattern: dict[str, PositiveFloat] = {}
    """Other alphas for some layers, in the words of targets; the last match counts."""

    use_rslora: bool = False
    """Scale by α/√r in place of α/r (Kalajdzievski 2023)."""

    init: Literal["kaiming", "gaussian"] = "kaiming"
    """How A starts; B starts at zero. kaiming: uniform, as the authors' code and PEFT do, so that
    learning rates carry over; gaussian: normal with variance 1/d_in, as the paper's text says."""

    modules_to_save: Names = ("auto",)
    """Modules trained as full copies, by the end of their path. auto: a freshly made task head (a
    classifier), nothing else."""

    dtype: DType = "float32"
    """Precision of A and B, whatever the base's. float32 keeps small steps from being lost."""

    @model_validator(mode="after")
    def _check(self) -> "LoRAConfig":
        if not self.targets and self.bias == "none" and not self.modules_to_save:
            raise ValueError("targets is empty, so nothing would be trained")
        if self.layers is not None:
            layer_numbers(self.layers)
        return self


def layer_numbers(text: str) -> frozenset[int]:
    """Return the block numbers that a range such as "0-5,11" names.

    Raises:
        ValueError: the text is not a list of numbers and ranges.
    """
    numbers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f"layers {text!r} is not a list of blocks such as '0-5,11'")
        stop = int(last) if dash else int(first)
        if stop < int(first):
            raise ValueError(f"layers {text!r} has a range that ends before it starts")
        numbers.update(range(int(first), stop + 1))
    return frozenset(numbers)


class DataConfig(Settings):
    """Which rows to read, and what each column means."""

    train: str | None = None
    """Rows to train on: a .jsonl, .json, .csv or .parquet file, builtin:NAME[:SPLIT] (places, sql),
    or hub:OWNER/NAME[/SUBSET][:SPLIT]."""

    validation: str | None = None
    """Rows to score during training; None: no evaluation."""

    format: Format = "auto"
    """What a row is: prompt (prompt, completion, optional references), messages (a chat), text, or
    classification (text, optional text_pair, label). auto: judged by the fields that are there."""

    fields: dict[RowField, str] = {}
    """Our field name: the file's column, or a template such as "{subject}: {body}"."""

    separator: str = "\n"
    """Written between prompt and completion."""

    max_length: PositiveInt = 512
    """Longest row in tokens; a longer one is cut, counted and reported."""

    train_rows: PositiveInt | None = None
    """Use only the first so many training rows."""

    validation_rows: PositiveInt | None = None
    """Use only the first so many validation rows."""

    labels: Annotated[Names, Field(min_length=2)] | None = None
    """Names of the classes, in order. None: the distinct labels of the training rows, sorted."""

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if self.labels is not None and len(set(self.labels)) < len(self.labels):
            raise ValueError("labels names a class twice")
        return self


class TrainConfig(Settings):
    """One training run: the model, the data, the adapter and the schedule."""

    model: str = "smollm2"
    """Base model: a packaged name (smollm2, minilm), a folder, or a hub id."""

    out: Path
    """Folder for the adapter (best by validation, else last), last/, checkpoints/ and the log."""

    lora: LoRAConfig = LoRAConfig()
    """What is adapted, and how."""

    data: DataConfig = DataConfig()
    """What it is trained on."""

    task: Literal["auto", "generation", "classification", "regression"] = "auto"
    """What the model does. auto: classification where rows have labels, else generation."""

    dtype: DType = "bfloat16"
    """Precision of the frozen base in training."""

    steps: PositiveInt | None = None
    """Optimizer steps. None: as many as `epochs` asks for."""

    epochs: PositiveFloat = 1.0
    """Passes over the training rows, where `steps` is not given."""

    batch_size: PositiveInt = 8
    """Rows per forward pass."""

    accumulate: PositiveInt = 1
    """Forward passes per optimizer step."""

    learning_rate: PositiveFloat = 2e-3
    """Peak learning rate of AdamW."""

    warmup_steps: Annotated[int, Field(ge=0)] = 20
    """Steps over which the learning rate rises from zero."""

    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls after the warm-up."""

    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decay of A and B, which pulls towards the pre-trained weights."""

    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this norm."""

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target probability spread over all classes or tokens."""

    z_loss: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Factor on (log Σ exp(logits))², added to each loss to keep logits small (PaLM has 1e-4)."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the adapter's start, the row order and dropout."""

    eval_every: PositiveInt | None = None
    """Steps between two evaluations. None: once, at the end of each epoch."""

    save_every: PositiveInt = 100
    """Steps between two checkpoints from which a run can resume."""

    patience: PositiveInt | None = None
    """Stop after so many evaluations without a better score. None: never."""

    packing: Literal["auto", "on", "off"] = "auto"
    """Join the rows of a batch without padding. auto: where the model can do that, exactly; else
    batches are of rows of like length. off: padded rows in random order. on: an error where the
    model cannot."""

    memory: Literal["low", "balanced", "fast"] = "fast"
    """What is kept for the backward pass. fast: all that it needs; balanced: the results of
    products, and the rest is computed again; low: the input of each block and A·x, and all else is
    computed again."""

    offload: bool = False
    """Keep in the CPU's memory what low or balanced keep of a GPU's."""

    kernels: Literal["auto", "plain"] = "auto"
    """What computes. auto: the fast paths wherever they can; plain: plain torch, their oracle, with
    padded rows."""

    compile: bool = False
    """Train the model's blocks through torch.compile. One is compiled for all, which takes half a
    minute on a CPU (docs/benchmarks.md says when that pays)."""

    check_after: Annotated[int, Field(ge=3)] = 5
    """Steps after which every adapted layer must have moved."""

    allow_untrained: bool = False
    """Go on although an adapted layer gets no gradient."""

    allow_other_base: bool = False
    """Start from `init_from` although it was trained on another base."""

    init_from: Path | None = None
    """Adapter folder to go on from, in place of a fresh start."""

    sweep: dict[str, Any] | list[Any] | None = None
    """Train several adapters on one base in one batch, each as if alone, in folders of their own in
    `out`. A mapping from settings to lists of values makes all combinations: {lora.rank: [1, 8],
    seed: [0, 1]}. A list of mappings has one adapter each: [{lora.rank: 1}, {lora.rank: 8, seed: 1,
    name: second}]."""

    resume: bool = False
    """Go on from the last checkpoint in `out`."""

    overwrite: bool = False
    """Replace what is in `out`."""

    dry_run: bool = False
    """Print what would be adapted and read, and stop before training."""

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        if self.offload and self.memory == "fast":
            raise ValueError("offload goes with memory: low or balanced, and memory is fast")
        return self
