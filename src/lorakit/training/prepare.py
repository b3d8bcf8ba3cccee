"""Prepare runs: read rows, load the base, attach an adapter for each; all checks come first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from lorakit.adapter.adapter import Adapter
from lorakit.attachment.attach import attach, detach, extract
from lorakit.attachment.attached import free_name
from lorakit.attachment.plan import Plan
from lorakit.attachment.state import identity_of
from lorakit.config.idle import idle_settings
from lorakit.config.seed import generator_seed
from lorakit.config.train import TrainConfig
from lorakit.data.collate import Collator
from lorakit.data.encode import encode_rows
from lorakit.data.objectives import OBJECTIVES, task_of_base
from lorakit.data.objectives.preference import check_reads_in_one_piece
from lorakit.data.packing import PLAIN, Packing, choose_packing
from lorakit.data.row_types import Rows
from lorakit.data.samples import Encoded
from lorakit.errors import AdapterFileError, ConfigError
from lorakit.models.load import load_model, redraw_fresh_head
from lorakit.models.quantized import Quantization
from lorakit.models.shape import context_length, decoder_start, hidden_size
from lorakit.models.tasks import check_does
from lorakit.training.loaded_base import LoadedBase, settled
from lorakit.training.memory.compiled_blocks import LENGTHS, check_compile
from lorakit.training.memory.memory_setting import check_memory
from lorakit.training.processes import check_same, count
from lorakit.training.rates import Rate, rates_by_method
from lorakit.training.several import for_each
from lorakit.training.sharded_base import check_shard, idle_shard, is_sharded
from lorakit.training.task_rows import (
    TaskRows,
    best_score,
    read_task_rows,
    shared_task,
    with_same_rows,
)
from lorakit.training.trl_loss import check_through_trl
from lorakit.training.virtual_tokens import check_infix, longest_row, with_tokens

NAME = "default"
"""The name of the adapter inside the model, where one run trains alone."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run that was prepared and checked: model, adapter, rows and steps."""

    name: str
    """The name of the adapter inside the model."""
    task: str
    kind: str
    """The row type, as the setting `data.format`."""
    labels: tuple[str, ...] | None
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    plan: Plan
    rates: Mapping[str, Rate]
    """Peak learning rate of each method."""
    training: Encoded
    validation: Encoded | None
    steps: int
    """Optimizer steps of the whole run."""
    best_by: str = "loss"
    """The validation score that decides which adapter is the best."""
    packing: Packing = PLAIN
    idle: tuple[str, ...] = ()
    """Settings that were given and have no effect, with the reasons."""
    sharded: bool = False
    """Whether the base is divided over the processes before the first step."""

    def describe(self, table: str = "grouped") -> str:
        """The match table, the reports of the rows, and the packing, as text.

        Args:
            table: grouped, or full, as the setting of that name.
        """
        parts = [self.plan.table(full=table == "full")]
        parts += [f"learning rate: {rate}" for rate in self.rates.values()]
        parts.append(f"training rows: {self.training.report}")
        if self.validation is not None:
            parts.append(f"validation rows: {self.validation.report}")
        parts.append(f"batches: {self.packing}")
        if self.sharded:
            parts.append(f"base: divided over {count()} processes, gathered block by block (FSDP2)")
        if self.idle:
            parts.append(f"without effect: {', '.join(self.idle)}")
        return "\n".join(parts)


def prepare(config: TrainConfig, base: LoadedBase | None = None) -> Prepared:
    """Read the rows, load the base and attach the adapter; nothing is written.

    Args:
        config: the settings of the run.
        base: the base, if it is loaded already.

    Raises:
        LorakitError: the run cannot start.
    """
    name = NAME if base is None else free_name(base.model, NAME)
    return prepare_all({name: config}, base)[name]


def check_same_work(prepared: Prepared) -> None:
    """Make sure that all processes of a run have found the same rows and the same base.

    What has one name may differ from machine to machine. Rows would then be trained twice or never,
    and each process would compute the gradients of another model.

    Raises:
        ConfigError: they have not, with each difference.
    """
    validation, base = prepared.validation, identity_of(prepared.model)
    hashes = {
        "training rows": prepared.training.content_hash,
        "validation rows": None if validation is None else validation.content_hash,
        "base": None if base is None else base.content_hash,
    }
    check_same({f"the hash of the {name}": value for name, value in hashes.items()})


def _check_base(name: str, model: PreTrainedModel, task: str) -> None:
    """Make sure that a loaded base does what the rows need.

    Raises:
        LorakitError: it is an encoder that is to write, cannot compare answers, or was quantised
            by transformers.
    """
    trainable = getattr(getattr(model, "hf_quantizer", None), "is_qat_trainable", False)
    if getattr(model, "is_quantized", False) and not trainable:
        raise ConfigError(
            f"{name} was quantised as transformers loaded it, whose Trainer refuses such a base: "
            "load it with lk.load_model, which reads such checkpoints and quantises others "
            "(quantize='4bit')"
        )
    check_does(name, model.config, task_of_base(task))
    if task == "preference":
        check_reads_in_one_piece(model)


def prepare_all(
    configs: Mapping[str, TrainConfig], base: LoadedBase | None = None
) -> dict[str, Prepared]:
    """Read the rows of several runs, load their one base, and attach an adapter for each.

    Rows that runs share are read and encoded once. Each adapter starts as if its run were alone.

    Args:
        configs: the settings of each run, by the adapter's name; they share what loads the base.
        base: the base, if it is loaded already.

    Raises:
        LorakitError: the runs cannot start; the error lists the problems of each.
    """
    for config in configs.values():
        check_compile(config)
        check_shard(config, loaded=base is not None)
    source_of = with_same_rows(configs)
    sources = {name: configs[name] for name in source_of.values()}
    read = for_each(sources, lambda config, _: read_task_rows(config, base))
    task, labels = shared_task(read)
    if task == "preference":
        _check_preference(configs)
    first = settled(next(iter(configs.values())), base)
    model, tokenizer = _model_of(base, first, task, labels)
    _check_base(first.model, model, task)
    packing = packing_of(model, task, first)
    check_memory(model, first)
    plans = for_each(
        configs,
        lambda config, name: _attach(
            model,
            config,
            name,
            _eva_batches(config, read[source_of[name]].training, model, tokenizer),
        ),
    )
    encoded = for_each(configs, _Encodings(model, tokenizer, read, source_of))
    runs = {name: (config, encoded[name]) for name, config in configs.items()}
    steps = for_each(runs, lambda run, name: _steps(run[0], len(run[1][0])))
    return {
        name: Prepared(
            name=name,
            task=task,
            kind=read[source_of[name]].training.asked_as,
            labels=labels,
            model=model,
            tokenizer=tokenizer,
            plan=plans[name],
            rates=rates_by_method(config, plans[name], hidden_size(model), task=task),
            training=training,
            validation=validation,
            steps=steps[name],
            best_by=best_score(config, task, read[source_of[name]].validation),
            packing=packing,
            idle=(*idle_settings(config), *idle_shard(config), *_idle_in_loss(config, task)),
            sharded=is_sharded(config),
        )
        for name, (config, (training, validation)) in runs.items()
    }


def _model_of(
    base: LoadedBase | None, config: TrainConfig, task: str, labels: tuple[str, ...] | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base that is loaded already, or else the one that the settings name."""
    task = task_of_base(task)
    if base is not None:
        base.check_task(task, labels)
        return base.model, base.tokenizer
    how = None
    if config.quantize is not None:
        how = Quantization.of(config.quantize, config.dtype, double=config.double_quantization)
    return load_model(
        config.model,
        dtype=config.dtype,
        task=task,
        labels=labels,
        quantize=how,
        fresh_head=config.fresh_head,
        layer_replication=config.lora.layer_replication if "lora" in config.method else None,
    )


def packing_of(model: PreTrainedModel, task: str, config: TrainConfig) -> Packing:
    """How the rows of a run become batches."""
    # Joined rows need attention within packed sequences, which plain torch does not have.
    setting = "off" if config.kernels == "plain" else config.packing
    if config.compile and torch.cuda.is_available() and setting == "auto":
        # Compiled attention within packed sequences is made of matmuls: for short rows on a CPU.
        return Packing(multiple=LENGTHS, by_length=True, reason="compile has the model's attention")
    packing = choose_packing(model, task=task, packing=setting)
    own_attention = not (packing.joined or packing.segmented)
    return replace(packing, multiple=LENGTHS) if config.compile and own_attention else packing


def _check_preference(configs: Mapping[str, TrainConfig]) -> None:
    """Make sure that answers can be compared with these settings.

    Raises:
        ConfigError: they cannot.
    """
    problems = []
    if len(configs) > 1:
        problems.append("sweep: each trial would need passes of its own through the base")
    methods = {method for config in configs.values() for method in config.method}
    if any(method.startswith("prefix-") for method in methods):
        problems.append("method: virtual tokens are put into rows of one answer each")
    for config in configs.values():
        if config.preference.through == "trl":
            problems += check_through_trl(config.preference)
            if config.shard is not None:
                problems.append("shard: TRL takes the weights of the head, which are in pieces")
    if problems:
        raise ConfigError.listing("the task preference cannot be trained in this way", problems)


class _Encodings:
    """Encodes the rows of each run; runs that share rows share the encoded ones."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        read: Mapping[str, TaskRows],
        source_of: Mapping[str, str],
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._read, self._source_of = read, source_of
        self._made: dict[tuple[str, int | None, bool], Encoded] = {}

    def __call__(self, config: TrainConfig, name: str) -> tuple[Encoded, Encoded | None]:
        """The encoded training and validation rows of a run, with its adapter's virtual tokens."""
        source = self._source_of[name]
        rows = self._read[source]
        for each in filter(None, (rows.training, rows.validation)):
            check_infix(self._model, name, each.kind)
        training = self._encoded(rows.training, config, (source, name, False))
        if rows.validation is None:
            return training, None
        return training, self._encoded(rows.validation, config, (source, name, True))

    def _encoded(self, rows: Rows, config: TrainConfig, what: tuple[str, str, bool]) -> Encoded:
        source, name, held_out = what
        longest = longest_row(self._model, name)
        key = (source, longest, held_out)
        if key not in self._made:
            self._made[key] = encode_rows(
                rows,
                self._tokenizer,
                config.data,
                longest=longest,
                decoder_start=decoder_start(self._model),
            )
        return with_tokens(self._made[key], self._model, name)


def _idle_in_loss(config: TrainConfig, task: str) -> tuple[str, ...]:
    """The settings of cross-entropy that were given, where the task's loss is another."""
    if task not in OBJECTIVES or OBJECTIVES[task].smooths:
        return ()
    given = {"label_smoothing": config.label_smoothing, "z_loss": config.z_loss}
    return tuple(f"{name} (the task is {task})" for name, value in given.items() if value)


def _steps(config: TrainConfig, rows: int) -> int:
    per_epoch = math.ceil(math.ceil(rows / config.batch_size) / config.accumulate)
    steps = config.steps or math.ceil(per_epoch * config.epochs)
    if config.warmup_of(steps) >= steps:
        raise ConfigError(
            f"warmup_steps {config.warmup_of(steps)} leaves nothing of the run's {steps} steps: "
            "lower it, or train for longer"
        )
    return steps


def _eva_batches(
    config: TrainConfig, rows: Rows, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]] | None:
    """The batches of training rows from which LoRA's init eva starts; None for other starts."""
    if config.init_from is not None or "lora" not in config.method or config.lora.init != "eva":
        return None
    generator = torch.Generator().manual_seed(generator_seed(config.seed))
    size = config.batch_size
    chosen = torch.randperm(len(rows), generator=generator)[: config.eva_batches * size].tolist()
    few = replace(rows, rows=tuple(rows.rows[row] for row in chosen))
    limits: Any = {"longest": context_length(model), "decoder_start": decoder_start(model)}
    collate = Collator(tokenizer)
    examples = encode_rows(few, tokenizer, config.data, **limits).examples
    return [collate(examples[at : at + size]) for at in range(0, len(examples), size)]


def _attach(
    model: PreTrainedModel, config: TrainConfig, name: str, data: list[dict[str, Any]] | None
) -> Plan:
    """Attach an adapter whose start depends on the seed alone, not on earlier random numbers."""
    set_seed(generator_seed(config.seed))
    redraw_fresh_head(model)
    set_seed(generator_seed(config.seed))
    if config.init_from is None:
        return attach(model, config.methods(), name=name, data=data)
    start = Adapter.load(config.init_from)
    if config.fresh_head:
        start = _with_fresh_head(model, start, config, name)
    return attach(model, start, name=name, trainable=True, allow_other_base=config.allow_other_base)


def _with_fresh_head(
    model: PreTrainedModel, start: Adapter, config: TrainConfig, name: str
) -> Adapter:
    """An adapter whose modules that are trained as copies are as those of a fresh one.

    Raises:
        AdapterFileError: it was trained with other settings of its method.
    """
    attach(model, config.methods(), name=name)
    fresh = extract(model, name)
    detach(model, name)
    wanted, kept = (_without_copies(each) for each in (fresh, start))
    shapes, found = ({key: each.shape for key, each in one.items()} for one in (wanted, kept))
    if shapes != found:
        other = sorted(key for key in shapes | found if shapes.get(key) != found.get(key))
        raise AdapterFileError(
            f"init_from: {config.init_from} is not of these settings of the method: {other[0]} and"
            f" {len(other) - 1} more of its tensors differ; give those that it was trained with"
        )
    return replace(fresh, tensors={**fresh.tensors, **kept})


def _without_copies(adapter: Adapter) -> dict[str, Tensor]:
    """The tensors of an adapter that are not of modules trained as copies."""
    heads = tuple(f"{path}." for path in adapter.copied_modules)
    return {key: each for key, each in adapter.tensors.items() if not key.startswith(heads)}
