"""PEFT's adapter_config.json: its fields, its matching rules, and what of it lorakit can't do."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lorakit.adapter.json_files import file_problems
from lorakit.adapter.site import scale_of
from lorakit.models.loftq import BITS, LoftQ
from lorakit.models.paths import matches

CONFIG_FILE = "adapter_config.json"
CORDA_FILE = "corda_cache.pt"
"""What PEFT's `preprocess_corda` wrote to `corda_config.cache_file`, copied beside the adapter."""

# Fields of PEFT's LoraConfig that change what the adapter computes, and that lorakit can't do.
UNSUPPORTED = {
    "alora_invocation_tokens": "aLoRA switches the update on in the middle of the text",
    "arrow_config": "Arrow mixes several adapters by the input",
    "kasa_config": "KaSA changes the base's weights and puts a diagonal between B and A",
    "megatron_config": "the base is a Megatron model",
    "monteclora_config": "A and B are sampled at random",
    "use_bdlora": "A and B are block-diagonal",
    "use_qalora": "QALoRA pools the inputs of A",
}
# Ways to start training that leave the base as it was; the others move part of it into A and B.
NEUTRAL_INITS = (True, False, "gaussian", "eva", "mica", "orthogonal")
# Starts that can be computed again: from the base's weights alone, CorDA's with `CORDA_FILE`.
REPEATABLE_INITS = ("pissa", "olora", "corda")
WHY_NOT_REPEATABLE = {
    "pissa_niter": "its start is drawn at random, by a seed that no file has",
    "corda": "its start depends on the texts that it was made with",
    "lora_ga": "its start depends on the gradients that it was made with, which no file has",
}
"""Why the start cannot be computed again, by what PEFT's word for it begins with."""
# Fields of no effect on a trained adapter.
WITHOUT_EFFECT = {
    "auto_mapping",
    "corda_config",
    "eva_config",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "runtime_config",
    "velora_config",
}

V = TypeVar("V")
ModuleWord = Annotated[str, Field(min_length=1)]
BlockNumber = Annotated[int, Field(ge=0)]
BlockRange = Annotated[list[BlockNumber], Field(min_length=2, max_length=2)]
"""First block, and the one behind the last."""
TokenId = Annotated[int, Field(ge=0)]
Rank = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class PeftConfig(BaseModel):
    """The fields of PEFT's LoraConfig that lorakit understands; defaults are PEFT's."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    peft_type: Literal["LORA"]
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    r: Rank = 8
    lora_alpha: PositiveFloat = 8.0
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: list[ModuleWord] | ModuleWord | None = None
    target_parameters: list[ModuleWord] | None = None
    exclude_modules: list[ModuleWord] | ModuleWord | None = None
    layers_to_transform: list[BlockNumber] | BlockNumber | None = None
    layer_replication: list[BlockRange] | None = None
    layers_pattern: list[ModuleWord] | ModuleWord | None = None
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, PositiveFloat] | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    fan_in_fan_out: bool = False
    use_rslora: bool = False
    ensure_weight_tying: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    modules_to_save: list[ModuleWord] | None = None
    trainable_token_indices: list[TokenId] | dict[str, list[TokenId]] | None = None
    init_lora_weights: bool | str = True
    loftq_config: Any = None
    """Of effect with init_lora_weights "loftq" alone."""

    @property
    def adds_twice(self) -> bool:
        """Whether its PEFT added the update of nn.MultiheadAttention's output projection twice.

        Every version up to 0.21 does; of what wrote no version, none is newer.
        """
        found = re.match(
            r"(\d+)\.(\d+)", str((self.model_extra or {}).get("peft_version") or "0.0")
        )
        return found is None or (int(found[1]), int(found[2])) <= (0, 21)

    @property
    def block_order(self) -> str | None:
        """The order of the base's blocks in lorakit's words; None: each once."""
        ranges = [(first, stop - 1) for first, stop in self.layer_replication or ()]
        return ",".join(f"{first}-{last}" for first, last in ranges) or None

    @property
    def loftq(self) -> LoftQ | None:
        """How LoftQ changed the layers of the base; None: it did not."""
        if self.init_lora_weights != "loftq":
            return None
        given = self.loftq_config
        return LoftQ(bits=given["loftq_bits"], iterations=given["loftq_iter"])

    def rank_of(self, path: str) -> int:
        """The rank of the update of a layer."""
        return first_match(self.rank_pattern or {}, path, self.r)

    def alpha_of(self, path: str) -> float:
        """The numerator of a layer's scale."""
        return first_match(self.alpha_pattern or {}, path, self.lora_alpha)

    def scale_of(self, path: str) -> float:
        """The factor on B·A·x in a layer."""
        return scale_of(self.rank_of(path), self.alpha_of(path), use_rslora=self.use_rslora)


def first_match(pattern: Mapping[str, V], path: str, default: V) -> V:
    """A pattern's value for a path by PEFT's rule: the first key that ends the path.

    Raises:
        re.error: a key is not a regular expression, or takes too long.
    """
    for key, value in pattern.items():
        if matches(rf"(.*\.)?({key})", path):
            return value
    return default


def read_config(
    raw: dict[str, Any], problems: list[str], *, has_base: bool = False, has_cache: bool = False
) -> PeftConfig | None:
    """The configuration in adapter_config.json; None where a field is wrong.

    Args:
        raw: the file's object.
        problems: gets a line for each wrong field, and for each thing that lorakit can't do.
        has_base: the base is there, for a start that depends on its weights.
        has_cache: `CORDA_FILE` is there, for CorDA's.
    """
    method = raw.get("peft_type", "LORA")
    if isinstance(method, str) and method != "LORA":
        problems.append(
            f"{CONFIG_FILE}  peft_type: {method!r} is another of PEFT's methods; lorakit reads "
            "'LORA' alone"
        )
        return None
    try:
        config = PeftConfig.model_validate(raw)
    except ValidationError as error:
        problems += file_problems(CONFIG_FILE, error)
        return None
    problems += _unsupported(config, has_base, has_cache)
    return config


def _unsupported(config: PeftConfig, has_base: bool, has_cache: bool) -> list[str]:
    """A line for each thing that the configuration needs and lorakit can't do."""
    extra = config.model_extra or {}
    lines = [
        f"{CONFIG_FILE}  {key}: {reason}, which lorakit does not do"
        for key, reason in UNSUPPORTED.items()
        if extra.get(key)
    ]
    can_repeat = is_repeatable(config.init_lora_weights, has_cache)
    if config.init_lora_weights not in (*NEUTRAL_INITS, "loftq") and not (has_base and can_repeat):
        lines.append(f"{CONFIG_FILE}  init_lora_weights: {_of_changed_base(config, can_repeat)}")
    lines += [
        f"{CONFIG_FILE}  {key}: unknown to lorakit, and it may change the output; "
        "remove it if you know that it does not"
        for key, value in _unknown(extra)
        if value is True or isinstance(value, list | dict)
    ]
    return [*lines, *_bad_loftq(config), *_bad_ranges(config), *_bad_patterns(config)]


def is_repeatable(init: Any, has_cache: bool) -> bool:
    """Whether a start that has changed the base can be computed again with it.

    Args:
        init: PEFT's word for the start, as its file has it.
        has_cache: `CORDA_FILE` is there.
    """
    return init in REPEATABLE_INITS and (init != "corda" or has_cache)


def _of_changed_base(config: PeftConfig, can_repeat: bool) -> str:
    """Why A and B are of another base than the one that was loaded, and how to mend that."""
    init = str(config.init_lora_weights)
    if can_repeat:
        return (
            f"{init!r} changes the base's weights, from which its start can be computed again: "
            "read it with them, as Adapter.load(…, base=MODEL) or lorakit convert --model does"
        )
    reasons = (why for start, why in WHY_NOT_REPEATABLE.items() if init.startswith(start))
    why = "".join(f" ({reason})" for reason in reasons)
    cache = (
        f"copy the file that PEFT's preprocess_corda wrote as corda_config.cache_file into the "
        f"folder, as {CORDA_FILE}, and read it with the base; or "
    )
    return (
        f"{init!r} changes the base's weights{why}; {cache if init == 'corda' else ''}save it from "
        "PEFT with "
        "path_initial_model_for_weight_conversion, the folder of the adapter as it was before "
        "training: A and B of twice the rank then belong to the base as it is"
    )


def unknown_values(config: PeftConfig) -> list[str]:
    """A line for each unknown number or word, which cannot switch anything on by itself."""
    return [
        f"what {key}={value!r} in {CONFIG_FILE} means: lorakit does not know it"
        for key, value in _unknown(config.model_extra or {})
        if isinstance(value, str | int | float) and value is not True
    ]


def _unknown(extra: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Name and value of each field that lorakit does not know and that has a value."""
    for key, value in sorted(extra.items()):
        if key not in UNSUPPORTED and key not in WITHOUT_EFFECT and value:
            yield key, value


def _bad_loftq(config: PeftConfig) -> Iterator[str]:
    """A line for each thing that is wrong with how LoftQ changed the base."""
    if config.init_lora_weights != "loftq":
        return
    given = config.loftq_config
    if not isinstance(given, dict) or not given:
        yield (
            f"{CONFIG_FILE}  loftq_config: found {given!r}, and init_lora_weights 'loftq' needs "
            'its bits and iterations, as in {"loftq_bits": 4, "loftq_iter": 1}'
        )
        return
    bits, iterations = given.get("loftq_bits"), given.get("loftq_iter")
    if type(bits) is not int or bits not in BITS:
        yield f"{CONFIG_FILE}  loftq_config: loftq_bits is 4 or 8, found {bits!r}"
    if type(iterations) is not int or iterations < 1:
        yield f"{CONFIG_FILE}  loftq_config: loftq_iter is 1 at least, found {iterations!r}"
    for key in sorted(given.keys() - {"loftq_bits", "loftq_iter"}):
        yield f"{CONFIG_FILE}  loftq_config: {key} is unknown to lorakit, and may change the base"


def _bad_ranges(config: PeftConfig) -> Iterator[str]:
    """A line for each range of blocks that has none."""
    for first, stop in config.layer_replication or ():
        if stop <= first:
            yield f"{CONFIG_FILE}  layer_replication: [{first}, {stop}] has no block"


def _bad_patterns(config: PeftConfig) -> Iterator[str]:
    """A line for each pattern that is no regular expression."""
    patterns = [("rank_pattern", f"({key})", key) for key in config.rank_pattern or {}]
    patterns += [("alpha_pattern", f"({key})", key) for key in config.alpha_pattern or {}]
    for field in ("target_modules", "exclude_modules"):
        word = getattr(config, field)
        patterns += [(field, word, word)] if isinstance(word, str) else []
    for field, pattern, shown in patterns:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            yield f"{CONFIG_FILE}  {field}: {shown!r} is not a regular expression: {error}"
