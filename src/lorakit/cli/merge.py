"""The verb merge: a plain model, with the adapter in its weights, that loads without lorakit."""

from contextlib import nullcontext
from pathlib import Path

import torch
import transformers
from torch import Tensor

from lorakit.adapter.atomic_write import write_new_folder
from lorakit.adapter.card import TrainedUse
from lorakit.adapter.output_place import check_new
from lorakit.answering.ends import end_tokens
from lorakit.attachment.attach import attach, detach
from lorakit.attachment.open_model import Opened, open_model
from lorakit.cli.verbs import Result
from lorakit.config.verbs import MergeConfig
from lorakit.errors import ConfigError, ModelError, OutputError
from lorakit.merging.merge import finalize, merge
from lorakit.merging.quantized_base import TrainedModel
from lorakit.merging.report import MergeReport
from lorakit.models.load import load_model
from lorakit.models.quantized import dequantize, quantization_of
from lorakit.models.replication import part_copies
from lorakit.training.progress import is_terminal
from lorakit.upstream.quiet_library import without_bars


def run(settings: MergeConfig) -> Result:
    """Merge in float32, round once, write the checkpoint, and report the rounding error."""
    check_new(settings.out)
    # Loaded in float32, so that base and update are added before anything is rounded.
    opened = _open(settings, quantize="as-trained")
    dtype = getattr(torch, settings.dtype)
    if quantization_of(opened.model) is None:
        if "into" in settings.model_fields_set:
            raise ConfigError(f"into: {settings.adapter} was not trained on a quantised base")
        report = merge(opened.model, round_to=dtype)
    else:
        opened, report = _merge_as_trained(settings, opened)
    finalize(opened.model)
    opened.model.to(dtype)
    write_new_folder(
        settings.out,
        fill=lambda folder: _save(opened, folder),
        check=lambda folder: _check_saved(opened, folder, settings),
    )
    return Result(
        text=f"{report}\nmerged model ({settings.dtype}) in {settings.out}",
        data={"out": settings.out, "dtype": settings.dtype, **report.to_json()},
    )


def _open(settings: MergeConfig, quantize: str) -> Opened:
    return open_model(
        settings.adapter,
        model=settings.model,
        quantize=quantize,
        allow_other_base=settings.allow_other_base,
    )


def _merge_as_trained(settings: MergeConfig, opened: Opened) -> tuple[Opened, MergeReport]:
    """Merge into a float base; the report compares it with the quantised one of the training."""
    trained = TrainedModel.of(opened.model)
    detach(opened.model)
    if settings.into == "original":
        opened = _open(settings, quantize="none")
    else:
        dequantize(opened.model, torch.float32)
        assert opened.adapter is not None
        attach(opened.model, opened.adapter, allow_other_base=settings.allow_other_base)
    distances = trained.distances(opened.model)
    report = merge(opened.model, round_to=getattr(torch, settings.dtype))
    return opened, trained.compare(report, opened.model, distances)


def _save(opened: Opened, folder: Path) -> None:
    _record_ends(opened)
    part_copies(opened.model)
    with nullcontext() if is_terminal() else without_bars():
        opened.model.save_pretrained(folder)
    opened.tokenizer.save_pretrained(folder)


def _record_ends(opened: Opened) -> None:
    """Have a plain model's answers end with what ended the targets in training, too."""
    config = opened.model.generation_config if opened.model.can_generate() else None
    trained = TrainedUse.on(opened.adapter.card).end_tokens if opened.adapter else ()
    if config is not None and set(trained) - set(end_tokens(opened.model, opened.tokenizer)):
        config.eos_token_id = end_tokens(opened.model, opened.tokenizer, trained=trained)


def _check_saved(opened: Opened, folder: Path, settings: MergeConfig) -> None:
    """Load the checkpoint with `load_model`, and compare every bit with the merged model.

    Raises:
        OutputError: it cannot be loaded, or a tensor is not as it was in memory.
    """
    headline = f"{settings.out} was not written: its files read back differently"
    try:
        again, _ = load_model(folder.absolute(), dtype=settings.dtype, task=opened.task)
    except ModelError as error:
        raise OutputError(f"{headline}: {error}") from error
    changed = _changed(opened.model, again)
    if changed:
        raise OutputError.listing(headline, changed)


def _changed(model: transformers.PreTrainedModel, again: transformers.PreTrainedModel) -> list[str]:
    """The names of the tensors that are not bit for bit the same in two models."""
    ours, theirs = model.state_dict(), again.state_dict()
    return [
        name
        for name in sorted(ours.keys() | theirs.keys())
        if name not in ours or name not in theirs or not _same_bits(ours[name], theirs[name])
    ]


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    pair = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(*pair)
