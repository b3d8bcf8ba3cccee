"""Settings of runs: one class is the Python argument, the YAML file and the flags at once."""

from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import BeforeValidator, Field, model_validator

from lorakit.config.base import (
    AdapterPlace,
    AnyPath,
    AutoDType,
    Names,
    PositiveFloat,
    PositiveInt,
    Settings,
    Topic,
)
from lorakit.config.marks import (
    Escapes,
    Extends,
    Handles,
    Invocation,
    Mark,
    Recorded,
    RowSource,
    Shared,
    Varies,
)
from lorakit.config.method_defaults import defaults_of
from lorakit.config.methods import (
    METHODS,
    BitFitConfig,
    BottleneckSettings,
    FullSettings,
    LoRAConfig,
    MethodConfig,
    PrefixSettings,
    combination_problems,
    config_of,
)
from lorakit.config.rows import Format, RowField, TaskName
from lorakit.config.seed import Seed

TRACKERS = ("wandb", "mlflow", "trackio", "tensorboard")
"""Trackers of runs, by the names of their packages."""


def _delimiter(value: Any) -> Any:
    """One character; a tab may be given as a word, since it is hard to type."""
    named = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";"}
    value = named.get(value, value) if isinstance(value, str) else value
    if not isinstance(value, str) or len(value) != 1 or value in '\r\n"':
        raise ValueError("must be one character, or tab")
    return value


Delimiter = Annotated[str, BeforeValidator(_delimiter)]


class DataConfig(Settings):
    """Which rows to read, and what each column means.

    Examples:
        >>> columns = {"prompt": "question", "completion": "answer"}
        >>> data = lk.DataConfig(train="mine.csv", fields=columns)
        >>> data.max_length
        512
    """

    train: RowSource[str | None] = None
    """Rows to train on: a file (.jsonl, .ndjson, .json, .csv, .tsv or .parquet, also as .gz, .bz2
    or .xz), several with commas between, a pattern such as data/*.jsonl, - for standard input,
    builtin:NAME (places, sql), hub:OWNER/NAME or hub:OWNER/NAME/SUBSET; :SPLIT after a name
    chooses a split. A folder that has a folder of images for each class. Or a task of the paper,
    `task:NAME[:SPLIT][@FOLDER]` (e2e, webnlg, dart, wikisql, samsum, cola, sst2, mrpc, stsb, qqp,
    mnli, qnli, rte), from the hub or a folder."""

    validation: RowSource[str | None] = None
    """Rows to score during training; None: no evaluation."""

    format: Format = "auto"
    """What a row is: prompt (prompt, completion, optional references), messages (a chat, optional
    tools), text, classification (text, optional text_pair, label), multi-label (text, optional
    text_pair, labels), token-classification (words, tags), question-answering (question, context,
    answers), embedding (text, text_pair, and negative or label), preference (prompt, chosen,
    rejected) or image-classification (image, label). auto: inferred from the fields of the rows."""

    fields: dict[RowField, str] = {}
    """Our field name: the file's column, or a template such as "{subject}: {body}". {body?} may be
    empty or missing, and is then left out with the white space before it. A name with dots is of a
    value within a column: answers.text.0."""

    delimiter: Delimiter | None = None
    """What separates the columns of a CSV file: one character, or tab. None: found in its first
    line."""

    separator: Annotated[str, Escapes()] = "\n"
    """Written between prompt and completion."""

    max_length: PositiveInt = 512
    """Longest row in tokens; a longer one is cut, counted and reported."""

    stride: PositiveInt = 128
    """Of a question's context that is longer than a row, neighbouring windows share so many tokens,
    or half of one where that is less."""

    train_rows: PositiveInt | None = None
    """Use only the first so many training rows."""

    validation_rows: RowSource[PositiveInt | None] = None
    """Use only the first so many validation rows."""

    validation_every: RowSource[PositiveInt | None] = None
    """Of the validation rows use only each so many-th: 10 takes a tenth, from all over the file."""

    labels: Annotated[Names, Field(min_length=2)] | None = None
    """Names of the classes or tags, in order. None: the distinct ones of the training rows,
    sorted."""

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if self.labels is not None and len(set(self.labels)) < len(self.labels):
            raise ValueError("labels names a class twice")
        if self.train == self.validation == "-":
            raise ValueError("train and validation can't both be standard input")
        return self


class PreferenceSettings(Settings):
    """How `task: preference` compares the chosen answer with the rejected one."""

    form: Literal["dpo", "ipo", "cpo", "simpo", "orpo"] = "dpo"
    """The loss. dpo and ipo compare with the base, the model without the adapter; cpo, simpo and
    orpo need no reference, and half the time."""

    beta: PositiveFloat = 0.1
    """Factor on the difference of log-probabilities. For simpo its paper has 2 to 2.5. Of orpo the
    weight of the odds ratio, λ in its paper."""

    margin: Annotated[float, Field(ge=0)] = 0.5
    """Of simpo: how much likelier the chosen answer is to be, times beta."""

    nll: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the usual loss: of cpo that of the chosen answer, of orpo that of the prompt with
    the chosen answer."""

    through: Literal["lorakit", "trl"] = "lorakit"
    """What computes the loss: lorakit, or TRL's trainer of this form, which is given the same
    batches and the same reference."""

    trl: dict[str, Any] = {}
    """Through trl: further settings of its loss by TRL's names, such as loss_type apo_zero.
    Validation rows are scored in the form all the same."""


class TrainConfig(Settings):
    """One training run: the model, the data, the adapter and the schedule.

    Examples:
        >>> data = lk.DataConfig(train="builtin:places")
        >>> config = lk.TrainConfig(model="smollm2", out="out/mine", data=data, steps=70)
        >>> config.lora.rank, config.batch_size
        (8, 8)
    """

    topics: ClassVar[tuple[Topic, ...]] = (
        Topic(
            "first",
            "What most runs need.",
            (
                *("model", "data.train", "data.validation", "out", "method", "lora.rank"),
                *("lora.targets", "epochs", "batch_size", "learning_rate"),
            ),
        ),
        Topic(
            "run",
            "What is trained for how long, scored and saved.",
            (
                *("task", "steps", "accumulate", "seed", "eval_every", "save_every", "patience"),
                *("keep_checkpoints", "check_after", "allow_untrained", "report_to"),
            ),
        ),
        Topic(
            "optimizer",
            "How weights are changed.",
            (
                *("warmup_steps", "schedule", "weight_decay", "adam_epsilon", "max_grad_norm"),
                *("label_smoothing", "z_loss", "lora_plus_ratio", "eva_batches"),
            ),
        ),
        Topic(
            "speed",
            "What is held in memory, and what computes.",
            (
                *("dtype", "quantize", "double_quantization", "packing", "memory", "offload"),
                *("kernels", "compile", "shard"),
            ),
        ),
        Topic(
            "folder",
            "Runs that go on from others, replace them, or are several.",
            (
                *("init_from", "fresh_head", "allow_other_base", "resume", "keep_settings"),
                *("overwrite", "table", "dry_run", "sweep", "ray", "ray_cpus"),
            ),
        ),
    )

    model: Annotated[str, Mark(on_card=False, may_change=True)] = "smollm2"
    """Base model: a packaged name (smollm2, minilm), a folder, or a hub id."""

    out: Invocation[AnyPath]
    """Folder for the adapter (best by validation, of equal scores that with the lower loss, else
    last), last/, checkpoints/ and the log."""

    method: Recorded[Names] = ("lora",)
    """What is trained: lora full top-k bitfit prefix-embedding prefix-layer adapter-h adapter-l
    adapter-p adapter-d, or several of them, such as lora,prefix-layer."""

    lora: Recorded[LoRAConfig] = LoRAConfig()
    """What lora adapts, and how."""

    full: Recorded[FullSettings] = FullSettings()
    """What full and top-k train."""

    bitfit: Recorded[BitFitConfig] = BitFitConfig()
    """What bitfit trains."""

    prefix: Recorded[PrefixSettings] = PrefixSettings()
    """The virtual tokens of prefix-embedding and prefix-layer."""

    bottleneck: Recorded[BottleneckSettings] = BottleneckSettings()
    """The bottlenecks of adapter-h, adapter-l, adapter-p and adapter-d."""

    preference: Annotated[PreferenceSettings, Mark(on_card=False)] = PreferenceSettings()
    """How the task preference compares a chosen answer with a rejected one."""

    data: Recorded[DataConfig] = DataConfig()
    """What it is trained on."""

    task: Annotated[Literal["auto", "preference", TaskName], Mark(on_card=False)] = "auto"
    """What the model does. auto: what rows of this type are for, generation or a task with labels;
    regression must be asked for. preference: it learns to write what was chosen of two answers."""

    dtype: Shared[AutoDType] = cast(Any, "auto")
    """Precision of the frozen base in training. auto: bfloat16 where the processor multiplies it
    fast (a GPU that supports it, a CPU with AVX-512), else float32."""

    quantize: Shared[Literal["4bit", "8bit"] | None] = None
    """Hold the frozen base's linear layers in few bits (QLoRA): 4bit (NF4) or 8bit. What computes
    is still in `dtype`. None: hold them in `dtype` too."""

    double_quantization: Shared[bool] = True
    """Quantise the scales of 4bit too, which saves 0.37 bits a weight."""

    steps: Extends[PositiveInt | None] = None
    """Optimizer steps. None: as many as `epochs` asks for."""

    epochs: Extends[PositiveFloat] = 1.0
    """Passes over the training rows, where `steps` is not given."""

    batch_size: Varies[PositiveInt] = 8
    """Rows per forward pass, of all processes that train together."""

    accumulate: Varies[PositiveInt] = 1
    """Forward passes per optimizer step."""

    learning_rate: Varies[PositiveFloat | None] = None
    """Peak learning rate of AdamW. None: by a rule of the method and the width of the base
    (docs/methods.md), which the match table prints."""

    lora_plus_ratio: Varies[PositiveFloat] = 1.0
    """Learning rate of LoRA's B over that of A (LoRA+, Hayou 2024, has 16). 1: both are equal."""

    eva_batches: Varies[PositiveInt] = 8
    """Batches of training rows, drawn by the seed, that LoRA's init eva looks at."""

    warmup_steps: Varies[Annotated[int, Field(ge=0)] | None] = None
    """Steps over which the learning rate rises from zero. None: the method's own, 20, or half of a
    shorter run."""

    schedule: Varies[Literal["linear", "cosine", "constant"]] = "linear"
    """How the learning rate falls after the warm-up."""

    weight_decay: Varies[Annotated[float, Field(ge=0)]] = 0.0
    """AdamW's decay of what is trained, towards zero. For updates (A and B, but not of init pissa;
    bottlenecks) that is towards the pre-trained model; for weights, tokens and biases it is not."""

    adam_epsilon: Varies[PositiveFloat] = 1e-8
    """What AdamW adds to the root of the mean square of a gradient. The paper's code has 1e-6 for
    GPT-2."""

    max_grad_norm: Varies[PositiveFloat] = 1.0
    """Gradients are clipped to this norm."""

    label_smoothing: Varies[Annotated[float, Field(ge=0, lt=1)]] = 0.0
    """Share of the target probability spread over all classes or tokens."""

    z_loss: Varies[Annotated[float, Field(ge=0, allow_inf_nan=False)]] = 0.0
    """Factor on (log Σ exp(logits))², added to each loss to keep logits small (PaLM has 1e-4)."""

    seed: Varies[Seed] = 0
    """Seed of the adapter's start, the row order and dropout."""

    eval_every: Extends[PositiveInt | None] = None
    """Steps between two evaluations. None: once, at the end of each epoch."""

    save_every: Handles[PositiveInt] = 100
    """Steps between two checkpoints from which a run can resume."""

    keep_checkpoints: Handles[PositiveInt] = 2
    """Newest checkpoints that are kept; more show how the adapter grew (docs/analysis.md)."""

    patience: Extends[PositiveInt | None] = None
    """Stop after so many evaluations without a better score, or an equal one with a lower loss.
    None: never."""

    packing: Shared[Literal["auto", "on", "off"]] = "auto"
    """Join the rows of a batch without padding. auto: where the model can do that, exactly; else
    batches are of rows of like length. off: padded rows in random order. on: an error where the
    model cannot."""

    memory: Handles[Literal["low", "balanced", "fast"]] = "fast"
    """What is kept for the backward pass. fast: all that it needs; balanced: the results of
    products, and the rest is computed again; low: the input of each block and A·x, and all else is
    computed again."""

    offload: Handles[bool] = False
    """Keep in the CPU's memory what low or balanced keep of a GPU's."""

    kernels: Shared[Literal["auto", "plain"]] = "auto"
    """What computes. auto: the fast paths wherever they can; plain: plain torch, their reference
    implementation, with padded rows."""

    compile: Shared[bool] = False
    """Train the model's blocks through torch.compile. One is compiled for all, which takes half a
    minute on a CPU (docs/log.md says when that pays)."""

    shard: Handles[Literal["base"] | None] = None
    """What processes that train together divide (FSDP2). base: the frozen base, of which each holds
    a share and gathers a block at a time; what is trained is whole in each. None: nothing."""

    check_after: Handles[Annotated[int, Field(ge=3)]] = 5
    """Steps after which every adapted layer must have moved."""

    allow_untrained: Handles[bool] = False
    """Go on although an adapted layer gets no gradient."""

    allow_other_base: Handles[bool] = False
    """Start from `init_from` although it was trained on another base."""

    init_from: Shared[AdapterPlace | None] = None
    """Adapter folder, or OWNER/NAME[@REVISION] on the hub, to go on from, in place of a fresh
    start."""

    fresh_head: Shared[bool] = False
    """Leave the task's head of the base, or of `init_from`, out and start a fresh one, for other
    classes than its own. `method` and its settings must be those that `init_from` was trained
    with."""

    report_to: Invocation[Names] = ()
    """Trackers that get losses, rates, scores and settings: wandb, mlflow, trackio, tensorboard.
    Each takes its own environment variables, such as WANDB_MODE=offline (docs/scale.md)."""

    sweep: Invocation[dict[str, Any] | list[Any] | None] = None
    """Train several adapters on one base in one batch, each as if alone, in folders of their own in
    `out`. A mapping from settings to lists of values makes all combinations: {lora.rank: [1, 8],
    seed: [0, 1]}. A list of mappings has one adapter each: [{lora.rank: 1}, {lora.rank: 8, seed: 1,
    name: second}]."""

    ray: Invocation[str | None] = None
    """Train the trials of a sweep as tasks of a Ray cluster, each in a process of its own: local
    (started here), auto, or HOST:PORT. Its machines see the same folders (docs/scale.md)."""

    ray_cpus: Invocation[PositiveInt] = 1
    """Processors, and threads, of each trial on a cluster; it gets a GPU where there are any."""

    resume: Invocation[bool] = False
    """Go on from the last checkpoint in `out`. Rows and settings must be as they were, but for the
    number of steps, evaluation, saving and memory."""

    keep_settings: Invocation[bool] = False
    """With resume: take over the settings that the checkpoint was saved with, in place of refusing
    others. Of those that may change, the ones that are given count."""

    overwrite: Invocation[bool] = False
    """Replace what is in `out`."""

    table: Invocation[Literal["grouped", "full"]] = "grouped"
    """The table of what is adapted. grouped: one line for layers that are alike; full: for each."""

    dry_run: Invocation[bool] = False
    """Print what would be adapted and read, and stop before training."""

    def methods(self) -> tuple[MethodConfig, ...]:
        """The settings of each method that is trained."""
        sections = {"lora": self.lora, "full": self.full, "top-k": self.full, "bitfit": self.bitfit}
        by_family = {"prefix": self.prefix, "adapter": self.bottleneck}
        return tuple(
            config_of(name, (sections.get(name) or by_family[name.split("-")[0]]).model_dump())
            for name in self.method
        )

    def warmup_of(self, steps: int) -> int:
        """The steps of a run over which learning rates rise from zero."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        own = max(defaults_of(name, self.lora).warmup_steps for name in self.method)
        return min(own, steps // 2)

    @model_validator(mode="after")
    def _check_methods(self) -> "TrainConfig":
        unknown = [name for name in self.method if name not in METHODS]
        if unknown:
            raise ValueError(f"method: unknown {', '.join(unknown)}; known: {', '.join(METHODS)}")
        problems = combination_problems(self.method)
        if problems:
            raise ValueError(f"method: {'; '.join(problems)}")
        return self

    @model_validator(mode="after")
    def _check_trackers(self) -> "TrainConfig":
        unknown = [name for name in self.report_to if name not in TRACKERS]
        if unknown:
            raise ValueError(
                f"report_to: unknown {', '.join(unknown)}; known: {', '.join(TRACKERS)}"
            )
        return self

    @model_validator(mode="after")
    def _check_of_lora(self) -> "TrainConfig":
        if self.lora_plus_ratio != 1 and "lora" not in self.method:
            methods = ", ".join(self.method)
            raise ValueError(f"lora_plus_ratio is LoRA's, and the method is {methods}")
        return self

    @model_validator(mode="after")
    def _check_scored(self) -> "TrainConfig":
        asked = {
            "eval_every": self.eval_every,
            "patience": self.patience,
            "data.validation_rows": self.data.validation_rows,
            "data.validation_every": self.data.validation_every,
        }
        idle = [name for name, value in asked.items() if value is not None]
        if idle and self.data.validation is None:
            raise ValueError(f"data.validation names no rows to score, as {', '.join(idle)} asks")
        return self

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        if self.ray is not None and self.sweep is None:
            raise ValueError("ray trains the trials of a sweep, and there is no sweep")
        if self.offload and self.memory == "fast":
            raise ValueError("offload goes with memory: low or balanced, and memory is fast")
        if self.keep_settings and not self.resume:
            raise ValueError("keep_settings takes over what a checkpoint has, so it needs resume")
        if self.resume and self.overwrite:
            raise ValueError("resume goes on with a run and overwrite replaces it: give one")
        return self
