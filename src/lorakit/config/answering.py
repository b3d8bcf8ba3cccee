"""Settings of what a trained model is asked: answers to prompts, and scores on held-out rows."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from lorakit.config.base import AdapterPlace, DType, HeldIn, Names, PositiveInt, Settings
from lorakit.config.seed import Seed
from lorakit.config.train import DataConfig


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
    """Beams of the search; 1 is greedy."""

    seed: Seed = 0
    """Seed of what is drawn."""

    batch_size: PositiveInt = 16
    """Prompts of a file at once."""

    dtype: DType = "float32"
    """Precision of the base."""

    quantize: HeldIn = "as-trained"
    """How the base's linear layers are held: as-trained (as in the adapter's training), none (in
    `dtype`), 4bit or 8bit."""

    allow_other_base: bool = False
    """Accept a base with other weights than the adapter was trained on."""

    @model_validator(mode="after")
    def _check(self) -> "GenerateConfig":
        if self.top_p < 1 and self.temperature == 0:
            raise ValueError("top_p is of drawing at random, and temperature is 0: raise it")
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

    task: Literal["generation", "classification", "regression"] | None = None
    """What the model does. None: what the adapter was trained for, else what the base is."""

    metrics: Names = ("loss", "exact_match", "bleu")
    """For generation: loss (with perplexity), exact_match, bleu. Others have loss and one score."""

    dtype: DType = "float32"
    """Precision of the base."""

    quantize: HeldIn = "as-trained"
    """How the base's linear layers are held: as-trained (as in the adapter's training), none (in
    `dtype`), 4bit or 8bit."""

    batch_size: PositiveInt = 16
    """Rows at once."""

    max_new_tokens: PositiveInt = 128
    """Longest answer, in tokens; less where the model's context ends."""

    num_beams: PositiveInt = 1
    """Beams of the search for answers; 1 is greedy."""

    outputs: Path | None = None
    """File for the answers, as JSON lines of prompt, answer and references."""

    allow_other_base: bool = False
    """Accept a base with other weights than the adapter was trained on."""
