"""Settings of the benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lorakit.config.base import DType, Names, PositiveFloat, PositiveInt, Settings
from lorakit.config.rows import TaskName
from lorakit.config.train import DataConfig

WIDTH, HEAD_WIDTH = 1024, 64
"""The sizes of GPT-2 medium: width of the model, and of an attention head."""
WARM_UPS = 1
"""Rounds of training that do not count: the first steps compile, allocate and fill caches."""


class Measured(Settings):
    """The settings of every benchmark."""

    model: str = "smollm2"
    """Base model: a packaged name (smollm2, minilm), a folder, or a hub id."""

    dtype: DType = "bfloat16"
    """Precision of the base."""

    threads: PositiveInt | None = None
    """Threads of torch. None: as many as torch takes by itself."""

    out: Path | None = None
    """JSON file for the result, which is replaced. None: none."""


class BenchConfig(Measured):
    """The settings of benchmarks that measure in rounds."""

    rank: PositiveInt = 8
    """Rank of the adapters, which sit on all linear layers."""

    adapter_dtype: DType = "float32"
    """Precision of A and B."""

    repeats: PositiveInt = 7
    """Rounds, in each of which every participant is measured once; medians are compared."""

    peer: bool = True
    """Measure PEFT too, which the extra `bench` installs."""


class LatencyConfig(Measured):
    """The paper's Table 1, on random weights; the output head, the same for all, is left out."""

    model: Literal["gpt2-medium"] = "gpt2-medium"
    """Shape of the model, whose weights are random."""

    dtype: DType = "float32"
    """Precision of the base."""

    rank: PositiveInt = 4
    """Rank of LoRA on q and v, the paper's for GPT-2."""

    adapter_dtype: DType = "float32"
    """Precision of A, B and the bottlenecks."""

    repeats: PositiveInt = 20
    """Rounds, in each of which every participant is measured once; the paper's figures are means
    of 100."""

    full: bool = False
    """The paper's 24 blocks and rows (32x512, 16x256 and 1x128 tokens), for a GPU or a large
    machine."""

    blocks: PositiveInt = 4
    """Blocks, where not `full`: all of them are alike, so overheads in per cent stay as they
    are."""

    shrink: PositiveInt = 8
    """Divisor of the paper's numbers of rows, where not `full`; one row is left."""

    width: PositiveInt = WIDTH
    """Width of the model, a multiple of 64; the bottlenecks' sizes are in proportion."""

    @model_validator(mode="after")
    def _check(self) -> LatencyConfig:
        if self.width % HEAD_WIDTH:
            raise ValueError(f"width {self.width} is not a multiple of {HEAD_WIDTH}")
        return self


class EstimateBenchConfig(Measured):
    """The runs whose estimates are compared with what they take; each has a base of its own."""

    steps: PositiveInt = 2
    """Optimizer steps of each run that has no number of its own; from the second on memory is the
    same."""

    holes: bool = False
    """Measure each run once more as it is by itself, with the holes of glibc's heap."""

    only: Names = ()
    """Runs that have one of these words in their names. Empty: all."""


class LoadConfig(BenchConfig):
    """The numbers of adapters that are already loaded."""

    resident: PositiveInt = 500
    """Adapters in the bank after the last load (10 MB each for smollm2)."""

    peer_resident: Annotated[int, Field(ge=2)] = 16
    """The same in PEFT, where each load takes longer than the one before."""


class MethodsConfig(Measured):
    """The methods that are compared, and their rows."""

    methods: dict[str, dict[str, Any]] = {}
    """What is trained: a name, and what `lorakit train` is told beside what all share. A name that
    is no method says the method too: {dora: {method: lora, lora: {use_dora: true}}}. Empty: every
    method with its defaults, bitfit with added biases where there are none."""

    rates: dict[str, tuple[PositiveFloat, ...]] = {}
    """Peak learning rates to try, by the name in `methods`; the others run at their own rate."""

    data: DataConfig = DataConfig()
    """Rows to train on, and in `data.validation` those to score afterwards; both must be given."""

    task: Literal["auto", TaskName] = "auto"
    """What the model does. auto: what rows of this type are for."""

    steps: PositiveInt = 300
    """Optimizer steps of each run."""

    batch_size: PositiveInt = 8
    """Rows per step."""

    answers: Annotated[int, Field(ge=0)] = 100
    """Held-out rows that are answered in words and scored with BLEU; 0: none."""

    max_new_tokens: PositiveInt = 96
    """Longest answer, in tokens."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the start, the order of rows, and dropout."""

    parallel: PositiveInt = 1
    """Runs at the same time, each in a process of its own with as many `threads`."""


class MixedConfig(BenchConfig):
    """The sizes of the batches, and the numbers of adapters."""

    rows: PositiveInt = 16
    """Rows of the batch that is compared with the plain model and with PEFT."""

    adapters: PositiveInt = 16
    """Distinct adapters in it."""

    prompt_tokens: PositiveInt = 8
    """Tokens of each prompt before the decoding."""

    new_tokens: PositiveInt = 32
    """Tokens that are decoded greedily."""

    prefill_tokens: PositiveInt = 64
    """Tokens of each row of the prefill."""

    many_rows: PositiveInt = 64
    """Rows of the batch whose number of distinct adapters varies."""

    many_prefill_tokens: PositiveInt = 16
    """Tokens of each of its rows in the prefill."""

    distinct: tuple[PositiveInt, ...] = (1, 4, 16, 64)
    """Numbers of distinct adapters in that batch."""


class ModelsConfig(Measured):
    """The families of models that adapters are tried on."""

    model: Literal["tiny"] = "tiny"
    """Random models of two blocks; a packaged model is itself."""

    dtype: Literal["float32"] = "float32"
    """Precision of the bases."""

    families: Names = ()
    """Names of families in transformers' words (llama, gpt2, bert), of packaged models, or folders
    and GGUF files of decoders. Empty: all for which there is a tiny model, and no other."""


class ServeBenchConfig(BenchConfig):
    """The clients of a server, and what each asks."""

    clients: PositiveInt = 16
    """Clients that ask at once, and slots of the server."""

    adapters: PositiveInt = 16
    """Distinct adapters that they ask."""

    prompt_tokens: PositiveInt = 64
    """Tokens of each prompt."""

    new_tokens: PositiveInt = 32
    """Tokens of each answer."""

    prefill_tokens: PositiveInt = 512
    """Tokens of prompts that the server reads at most between two tokens of the answers."""

    first_tokens: PositiveInt = 50
    """Answers of one token, whose time is measured on the idle server."""

    long_prompt: PositiveInt = 768
    """Tokens of the prompt for which other streams have to wait."""

    longest: Annotated[int, Field(ge=8)] = 128
    """The most tokens of answers of unlike lengths; the fewest are 8."""

    vllm: Path | None = None
    """The python of an environment with vLLM, whose server is asked the same. None: it is not."""

    llama_cpp: Path | None = None
    """llama.cpp's program llama-server, which is asked the same with a base of 4 bits. None: it is
    not."""

    starts: PositiveInt = 3
    """Servers that are started in processes of their own."""

    repeats: PositiveInt = 3
    """Rounds, in each of which every participant is measured once; medians are compared."""

    peer: Literal[False] = False
    """PEFT has no server."""


class SoakConfig(Measured):
    """What clients do to a server, how often and how long."""

    dtype: DType = "float32"
    """Precision of the base. In float32 no answer among others may differ from the one alone."""

    rank: PositiveInt = 8
    """Rank of the adapters, which sit on all linear layers."""

    adapter_dtype: DType = "float32"
    """Precision of A and B, in their files and in the server's batch."""

    batch_invariant: bool = False
    """As in serve."""

    adapters: PositiveInt = 12
    """Adapters that are asked."""

    budget: PositiveInt = 8
    """Adapters that the server's memory has room for."""

    pool: PositiveInt = 64
    """Different requests: adapter, prompt and seed."""

    requests: PositiveInt = 10_000
    """Requests from the pool."""

    connections: Annotated[int, Field(ge=2)] = 16
    """Clients that ask at once, and slots of the server."""

    prompt_tokens: PositiveInt = 16
    """Tokens of each prompt."""

    new_tokens: PositiveInt = 8
    """Tokens of each answer."""

    reloads: PositiveInt = 200
    """How often an adapter is replaced while it is asked."""

    closed: PositiveInt = 1000
    """Streams that are closed after their first token."""

    seeds: PositiveInt = 200
    """Requests at temperature 1, each with its own seed, that are asked alone and among others."""

    probes: PositiveInt = 20
    """Answers that are timed beside slow clients."""

    overload_s: PositiveFloat = 60
    """Seconds that the server is asked five times what it can answer."""


class SweepConfig(BenchConfig):
    """The number of adapters that are trained, and their rows."""

    adapters: PositiveInt = 8
    """Adapters that are trained."""

    rows: PositiveInt = 2
    """Rows of each in one step."""

    task: str = "builtin:places"
    """Source of the rows, as in data.train."""

    memory: bool = True
    """Measure the largest resident set of each participant too, in a process of its own (Linux)."""


class SwitchConfig(BenchConfig):
    """The settings of the switches, and of the forward pass that a merged one is compared with."""

    tokens: PositiveInt = 128
    """Tokens of the one row of that forward pass."""

    unmerged_repeats: PositiveInt = 100
    """Rounds of the unmerged switch, which is short."""


class TrainBenchConfig(BenchConfig):
    """What is trained, on what, and who takes part."""

    rank: PositiveInt = 8
    """Rank of the adapters."""

    targets: Names = ("q", "v")
    """Layers to adapt, in the words of lora.targets of `lorakit train`."""

    data: DataConfig = DataConfig(train="builtin:places", max_length=256)
    """Where the rows come from; they must have a prompt and a completion."""

    batch_size: PositiveInt = 8
    """Rows per step."""

    learning_rate: PositiveFloat = 2e-3
    """Peak learning rate of AdamW for the adapters."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the choice of rows, of their order and of A."""

    ours: dict[str, Any] | None = None
    """Other settings of `lorakit train` for ours, such as {memory: low}."""

    steps: PositiveInt = 4
    """Steps of each participant in a round."""

    held_out: PositiveInt = 64
    """Rows that are not trained on, and scored after the last step."""

    full: bool = True
    """Measure full fine-tuning too."""

    compiled: bool = False
    """Measure ours and PEFT with torch.compile too, which takes minutes to compile on a CPU."""

    starts: Annotated[int, Field(ge=0)] = 3
    """Starts of `lorakit train` on all rows that are timed until the first step; 0: none."""

    plot: Path | None = None
    """PNG file for a bar chart, which is replaced. None: none."""

    @property
    def all_steps(self) -> int:
        """The steps of each participant, those of the warm-up included."""
        return self.steps * (WARM_UPS + self.repeats)
