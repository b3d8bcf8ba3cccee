"""What a training run needs, and a server of its adapter, before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from lorakit.attachment.attach import detach
from lorakit.config.base import dtype_name
from lorakit.config.estimate import EstimateConfig
from lorakit.config.train import TrainConfig
from lorakit.data.objectives import task_of_base
from lorakit.errors import ConfigError, ModelError
from lorakit.estimating.counter import KINDS
from lorakit.estimating.serving import serving_bytes
from lorakit.estimating.sizes import adapter_bytes, moments_bytes, of_process
from lorakit.estimating.speed import DeviceSpeed, measured_speed
from lorakit.estimating.training_step import CountedStep, count_step
from lorakit.estimating.workload import Workload, workload_of
from lorakit.kernels.stand_in import DeviceKind
from lorakit.models.quantized import Quantization, quantize_without_weights
from lorakit.models.replication import replicate_layers
from lorakit.models.shape import context_length
from lorakit.models.tasks import check_does
from lorakit.models.without_weights import load_without_weights
from lorakit.training.loaded_base import settled

MOST_TOKENS = 4096
"""Tokens of the matmul that is timed, at most."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a training run needs in each process, and a server of its adapter. Sizes in bytes."""

    parameters: int
    """Of the base."""
    trained: int
    """Values that are trained."""
    adapter_bytes: int
    """Size of the adapter's folder."""
    checkpoint_bytes: int
    """Size of one checkpoint: the adapter, and the optimizer's moments."""
    training: Mapping[str, int]
    """Memory at the peak of a step by what it is for, as in `counter.KINDS`."""
    training_bytes: int
    """All of it, on top of what the libraries take by themselves."""
    serving: Mapping[str, int]
    """Memory of a server by what it is for; empty where the model cannot be served."""
    serving_bytes: int
    """All of it."""
    tokens: int
    """Of the largest step, all processes together."""
    flops: int
    """Of that step in one process."""
    seconds: float | None
    """Of a step of usual rows; None: the speed of the device is not known."""
    device: str
    processes: int
    notes: tuple[str, ...]
    """What was assumed, and what is not counted."""

    def to_json(self) -> dict[str, Any]:
        """The figures as plain values."""
        return dict(vars(self))


def estimate(config: TrainConfig, *, model: PreTrainedModel | None = None) -> Estimate:
    """What a run of these settings needs: nothing is loaded, and nothing is written.

    The code of a training step runs on the meta device, where tensors have shapes and no values;
    what it would hold at once is the memory of the run.

    Args:
        config: the settings of the run, or an `EstimateConfig`, which has more of them: the device,
            the number of processes, the server.
        model: a base on the meta device, in place of the one that the settings name.

    Raises:
        LorakitError: transformers cannot build the model, or the settings cannot be used.

    Examples:
        >>> data = lk.DataConfig(max_length=16)
        >>> run = {"task": "classification", "out": "out/new", "data": data, "dtype": "float32"}
        >>> found = lk.estimate(lk.TrainConfig(model="minilm", **run))
        >>> found.trained, sorted(found.training)[:2]
        (74498, ['activations', 'adapter'])
    """
    return Estimator()(as_estimate_config(config), model=model)


def as_estimate_config(config: TrainConfig) -> EstimateConfig:
    """The settings of a run with those of estimate at their defaults.

    Raises:
        ConfigError: they are something else.
    """
    if isinstance(config, EstimateConfig):
        return config
    if not isinstance(config, TrainConfig):
        raise ConfigError(
            f"a run is described by lk.TrainConfig(out=…, …); found {config!r:.60}, "
            f"a {type(config).__name__}"
        )
    return EstimateConfig(**{name: getattr(config, name) for name in config.model_fields_set})


class Estimator:
    """Estimates runs that differ in a few settings; rows are read and speeds measured once."""

    def __init__(self) -> None:
        self._rows: dict[str, Workload] = {}
        self._speeds: dict[tuple[Any, ...], DeviceSpeed] = {}

    def __call__(self, config: EstimateConfig, *, model: PreTrainedModel | None = None) -> Estimate:
        """The estimate of a run, as `estimate`.

        Raises:
            LorakitError: see there.
        """
        device = _device_of(config)
        config = _settled(config, device)
        work = self._work(config)
        base = _base(config, work) if model is None else model
        if base.config.is_encoder_decoder:
            raise ConfigError(f"a {type(base).__name__} has two stacks, which are not estimated")
        check_does(config.model, base.config, task_of_base(work.task))
        parameters = base.num_parameters()
        longest = context_length(base)
        size = config.batch_size // config.processes
        if longest is not None and len(work.rows[0].input_ids) > longest:
            raise ConfigError(
                f"rows have up to {len(work.rows[0].input_ids)} tokens, and the model's context "
                f"{longest}: give data.max_length or row_tokens"
            )
        if config.quantize is not None:
            how = Quantization.of(
                config.quantize, dtype_name(config.dtype), double=config.double_quantization
            )
            quantize_without_weights(base, how)
        # A base that is given is as it will be.
        if model is None and "lora" in config.method and config.lora.layer_replication is not None:
            replicate_layers(base, config.lora.layer_replication)
        step = count_step(base, config, work.largest(size), task=work.task, device=device)
        detach(base)
        size_bytes = adapter_bytes(step.plan, base_tensors=sum(1 for _ in base.parameters()))
        training, notes = dict.fromkeys(KINDS, 0) | dict(step.peak_bytes), [work.source]
        if config.processes > 1:
            training, divided = of_process(config, training, step)
            notes.append(divided)
        seconds, known_from = self._seconds(config, base, step, work.usual_share(size), device)
        served, why_not = _served(config, base, step, device)
        return Estimate(
            parameters=parameters,
            trained=step.plan.parameters,
            adapter_bytes=size_bytes,
            checkpoint_bytes=size_bytes + moments_bytes(step.plan),
            training=training,
            training_bytes=sum(training.values()),
            serving=served,
            serving_bytes=sum(served.values()),
            tokens=step.tokens * config.processes,
            flops=step.flops,
            seconds=seconds,
            device=device,
            processes=config.processes,
            notes=(*notes, *_not_counted(config, device), *why_not, known_from),
        )

    def _work(self, config: EstimateConfig) -> Workload:
        key = f"{config.model} {config.task} {config.row_tokens} {config.data.model_dump_json()}"
        if key not in self._rows:
            self._rows[key] = workload_of(config)
        return self._rows[key]

    def _seconds(
        self,
        config: EstimateConfig,
        base: PreTrainedModel,
        step: CountedStep,
        share: float,
        device: DeviceKind,
    ) -> tuple[float | None, str]:
        """The time of a usual step, and what it is known from."""
        if config.tflops is not None:
            speed = DeviceSpeed(flops=config.tflops * 1e12)
            told = f"time: of FLOPs alone, at {config.tflops:g}·10¹² a second as given"
        elif not config.calibrate:
            return None, "time: not estimated, as calibrate is off"
        elif device == "cuda" and not torch.cuda.is_available():
            return None, "time: there is no GPU here to measure; tflops says what one reaches"
        else:
            speed = self._measured(config, base, step.tokens // config.accumulate, device)
            told = f"time: {speed.flops / 1e9:,.0f}·10⁹ FLOPs a second, measured here now"
        seconds = speed.seconds_of(
            flops=step.flops * share,
            moved_bytes=step.moved_bytes * share,
            operations=step.operations,
        )
        return seconds, told

    def _measured(
        self, config: EstimateConfig, base: PreTrainedModel, tokens: int, device: DeviceKind
    ) -> DeviceSpeed:
        shapes = [tuple(each.shape) for each in base.parameters() if each.dim() == 2]
        if not shapes:
            raise ModelError(f"{type(base).__name__} has no matrices whose matmuls could be timed")
        columns, width = sorted(shapes, key=math.prod)[len(shapes) // 2]
        key = (config.dtype, device, min(MOST_TOKENS, tokens), width, columns)
        if key not in self._speeds:
            self._speeds[key] = measured_speed(
                getattr(torch, dtype_name(config.dtype)),
                device=device,
                rows=key[2],
                width=width,
                columns=columns,
            )
        return self._speeds[key]


def _device_of(config: EstimateConfig) -> DeviceKind:
    if config.device != "auto":
        return config.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _settled(config: EstimateConfig, device: DeviceKind) -> EstimateConfig:
    """The settings with the precision that the run would have.

    Raises:
        ConfigError: they cannot be estimated together.
    """
    problems = []
    if config.sweep is not None:
        problems.append("sweep: give the settings of one trial")
    if config.batch_size % config.processes:
        problems.append(
            f"batch_size {config.batch_size} is the rows of all processes: give a multiple of "
            f"{config.processes}"
        )
    if problems:
        raise ConfigError.listing("these settings cannot be estimated", problems)
    if config.dtype == "auto" and device == "cuda" and not torch.cuda.is_available():
        return config.model_copy(update={"dtype": "bfloat16"})
    made = settled(config, None)
    assert isinstance(made, EstimateConfig)
    return made


def _base(config: EstimateConfig, work: Workload) -> PreTrainedModel:
    return load_without_weights(
        config.model, dtype=dtype_name(config.dtype), task=work.task, labels=work.labels
    )


def _served(
    config: EstimateConfig, base: PreTrainedModel, step: CountedStep, device: DeviceKind
) -> tuple[Mapping[str, int], list[str]]:
    """The memory of a server, or why there is none."""
    try:
        return serving_bytes(base, step.plan, config.serve, device=device), []
    except ConfigError as error:
        return {}, [str(error)]


def _not_counted(config: EstimateConfig, device: DeviceKind) -> list[str]:
    """What the figures leave out, in words."""
    notes = []
    if device == "cpu":
        notes.append("on Linux holes of the C library's heap come on top: see docs/estimate.md")
    if config.compile:
        notes.append("compile is not counted: memory and time are of blocks that are not compiled")
    if config.offload:
        notes.append("offload is not counted: what it moves away is in the figure")
    return notes
