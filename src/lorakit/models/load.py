"""Load a base model and its tokenizer by packaged name, folder or hub id."""

from __future__ import annotations

import importlib.util
import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from torch import nn

from lorakit.config.base import DTypeName, dtype_name
from lorakit.errors import MissingExtraError, ModelError
from lorakit.models.device import device_for, move
from lorakit.models.image_processor import ImageProcessor
from lorakit.models.packaged import PACKAGES, packaged_name
from lorakit.models.quantized import WAYS, Quantization, check_library, convert_quantized
from lorakit.models.quantized import quantize as quantize_model
from lorakit.models.replication import replicate_layers
from lorakit.models.roles import input_embedding, task_heads
from lorakit.models.source import explained, gguf_file, quiet, source_of
from lorakit.models.tasks import TASKS, check_does, has_classes, model_task, task_of_config
from lorakit.upstream.private_names import initialize, loaded_from

_SHOWN_TENSORS = 5


def load_model(
    name: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "float32",
    task: str = "generation",
    labels: Sequence[str] | None = None,
    quantize: str | Quantization | None = None,
    fresh_head: bool = False,
    layer_replication: str | None = None,
    device: str | None = None,
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """A base model in eval mode, and its tokenizer, which has a padding token.

    One for images comes with its image processor in the place of a tokenizer.
    A classifier's or regressor's head is made afresh, from torch's random state, where the
    checkpoint has none, or with `fresh_head`: call `torch.manual_seed` first to get the same one
    again.

    Args:
        name: A packaged name (smollm2, minilm), else a folder, else a GGUF file or a folder with
            one, else a hub id. Write ./smollm2 for a folder of that name.
        dtype: Precision of the weights: float32, bfloat16 or float16, or torch's own, such as
            torch.bfloat16.
        task: generation (a causal language model, or an encoder-decoder), classification,
            regression (one number), multi-label, token-classification, question-answering, or
            embedding (no head).
        labels: Names of the classes, in order; None keeps those of the checkpoint.
        quantize: Hold the weights of linear layers in few bits: 4bit (NF4, its scales quantised
            too), 8bit, or exactly as a `Quantization` says. Matmuls are in the precision of their
            inputs, `dtype`. None: hold them in `dtype`.
        fresh_head: leave out the head that the checkpoint has, which may be for other classes.
        layer_replication: blocks in the order in which they are run, as in `lk.replicate_layers`.
        device: What it computes on: cpu, cuda, or auto (a GPU where torch sees one, else the CPU).
            None: the CPU; `model.to` moves it, before adapters are attached or after.

    Raises:
        ConfigError: the device is another word, or cuda where torch sees no GPU.
        ModelError: the model cannot be found, read or used for the task, not be quantised, its
            blocks not be repeated, or the device has no room for it.
        MissingExtraError: smollm2 or a GGUF file is to be unpacked without the `gguf` extra, a
            model to be quantised without `quantized`, or images to be read without `images`.

    Examples:
        >>> model, tokenizer = lk.load_model("smollm2", dtype="bfloat16")
        >>> model.num_parameters()
        134515008
    """
    named = dtype_name(dtype)
    _check_arguments(named, task, labels, quantize)
    _check_libraries(task, quantize)
    where = None if device is None else device_for(device)
    asked = os.fspath(name)
    model, tokenizer, info = _read(asked, task, dtype=named, **TASKS[task].head_settings(labels))
    _check_and_mark_head(model, info, asked, task, fresh_head=fresh_head)
    if not TASKS[task].reads_images:
        _join_tokenizer(model, tokenizer, asked, task)
    way = Quantization.of(quantize, named) if isinstance(quantize, str) else quantize
    _take_form(model, way, layer_replication)
    if where is not None:
        move(model, where)
    return model.eval(), tokenizer


def _check_libraries(task: str, quantize: str | Quantization | None) -> None:
    if quantize is not None:
        check_library()
    if TASKS[task].reads_images and importlib.util.find_spec("PIL") is None:
        raise MissingExtraError("reading images", "images")


def _join_tokenizer(model: Any, tokenizer: Any, asked: str, task: str) -> None:
    """Have a tokenizer pad, and a model know with what.

    Raises:
        ModelError: they do not belong together.
    """
    give_padding_token(tokenizer, asked)
    _check_vocabulary(model, tokenizer, asked)
    if task != "generation":
        # A decoder scores the last token that is not padding, which it looks up by this id.
        model.config.pad_token_id = tokenizer.pad_token_id


def _take_form(
    model: transformers.PreTrainedModel, quantize: Quantization | None, replication: str | None
) -> None:
    """Hold the weights in few bits, those that the checkpoint has so, and all if that is asked; and
    repeat the blocks that are to be."""
    convert_quantized(model)
    if quantize is not None:
        quantize_model(model, quantize)
    if replication is not None:
        replicate_layers(model, replication)


def _check_and_mark_head(model: Any, info: Any, asked: str, task: str, *, fresh_head: bool) -> None:
    """Make sure that all weights were read, and note which modules begin afresh.

    Raises:
        ModelError: weights are missing that are not of the head.
    """
    own_heads = task_heads(model) if fresh_head else ()
    _check_complete(model, info, asked, task, left_out=own_heads)
    fresh = {key.rpartition(".")[0] for key in info["missing_keys"]}
    fresh |= set(_owners(model, own_heads))
    model._lorakit_fresh = [path for path, _ in model.named_modules() if path in fresh]
    if fresh_head:
        _forget_values(model, own_heads)
        redraw_fresh_head(model)


def _read(asked: str, task: str, *, dtype: str, **head: Any) -> tuple[Any, Any, Any]:
    """A model, its tokenizer, and what transformers says of the weights that it read.

    Args:
        asked: the name that was asked for.
        task: what the model is for.
        dtype: precision of the weights.
        head: settings of the model's config.

    Raises:
        ModelError: it cannot be found or read.
    """
    # Without a word about remote code transformers would ask at the terminal.
    safe: dict[str, Any] = {"trust_remote_code": False}
    with quiet():
        source = source_of(asked)
        with explained(asked, source, task):
            tokenizer: Any
            if TASKS[task].reads_images:
                tokenizer = ImageProcessor.load(source, **safe)
            else:
                tokenizer = transformers.AutoTokenizer.from_pretrained(source, **safe)
            config = transformers.AutoConfig.from_pretrained(source, **safe)
            if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
                check_does(asked, config, task)
            auto_class: Any = getattr(transformers, model_task(task, config).auto_class)
            # Mismatched sizes are reported by us, with the shapes.
            reported = {"output_loading_info": True, "ignore_mismatched_sizes": True}
            if task == "embedding":
                head |= _without_pooler(config)
            if task == "embedding" and config.is_encoder_decoder:
                raise ValueError("it has two stacks, and a text is embedded by one")
            model, info = auto_class.from_pretrained(
                source, dtype=getattr(torch, dtype), **safe, **reported, **head
            )
    if asked not in PACKAGES and gguf_file(Path(asked).expanduser()) is not None:
        # The file goes on; its conversion is only on this machine.
        model._lorakit_file = asked
    return model, tokenizer, info


def fresh_heads(model: nn.Module) -> Sequence[str]:
    """The paths of the modules that `load_model` made afresh, as the checkpoint has none."""
    return tuple(getattr(model, "_lorakit_fresh", ()))


def redraw_fresh_head(model: nn.Module) -> None:
    """Draw a task's head once more, from torch's random state, if `load_model` made it afresh.

    After the same `torch.manual_seed` it is the head that loading the model again would give.
    """
    for path in fresh_heads(model):
        initialize(model, model.get_submodule(path))


def task_of(model: transformers.PreTrainedModel) -> str:
    """The task that a loaded model does: all but generation have a head of their own."""
    if type(model) is _bare_class(model.config):
        return "embedding"
    return task_of_config(type(model).__name__, model.config)


def _bare_class(config: transformers.PreTrainedConfig) -> type | None:
    """transformers' class of a model without any head; None: it has none."""
    known = type(config) in transformers.MODEL_MAPPING
    found = transformers.MODEL_MAPPING[type(config)] if known else None
    return found if isinstance(found, type) else None


def _without_pooler(config: transformers.PreTrainedConfig) -> dict[str, Any]:
    """The argument that leaves a bare model's pooler out, which embeddings do not read."""
    made = _bare_class(config)
    takes = made is not None and "add_pooling_layer" in inspect.signature(made).parameters
    return {"add_pooling_layer": False} if takes else {}


def labels_of(model: transformers.PreTrainedModel) -> tuple[str, ...]:
    """The names of a classifier's classes, in order."""
    return _labels(model.config)


def own_task(name: str | os.PathLike[str]) -> str:
    """The task for which a base has a head, by its config alone; nothing is loaded.

    Raises:
        ModelError: the model cannot be found, or its config not be read.
    """
    config = config_of(name)
    return task_of_config(next(iter(config.architectures or ()), ""), config)


def own_classes(name: str | os.PathLike[str], task: str | None = None) -> tuple[str, ...] | None:
    """The names of the classes of a base that is a classifier, in the order of its head; or None.

    Args:
        name: the base.
        task: a task that needs another kind of head has none of them; None: it is the base's own.

    Raises:
        ModelError: the model cannot be found, or its config not be read.
    """
    own = own_task(name)
    is_fit = has_classes(own) and TASKS[own].ending == TASKS[task or own].ending
    return _labels(config_of(name)) if is_fit else None


def config_of(name: str | os.PathLike[str]) -> transformers.PreTrainedConfig:
    """The config of a base, by its packaged name, folder or hub id; no weights are loaded.

    Raises:
        ModelError: the model cannot be found, or its config not be read.
    """
    asked = os.fspath(name)
    with quiet():
        source = source_of(asked)
        with explained(asked, source, "any task"):
            config: transformers.PreTrainedConfig = transformers.AutoConfig.from_pretrained(
                source, trust_remote_code=False
            )
    return config


def _labels(config: transformers.PreTrainedConfig) -> tuple[str, ...]:
    names: dict[Any, str] = dict(config.id2label or {})
    return tuple(names[number] for number in sorted(names, key=int))


def model_name(model: nn.Module) -> str:
    """The packaged name, folder, file or hub id that a model was loaded by; "" if it was not."""
    source = loaded_from(model)
    if (name := getattr(model, "_lorakit_file", None)) is not None:
        return str(name)
    return packaged_name(source) or source


def _check_arguments(
    dtype: str, task: str, labels: Sequence[str] | None, quantize: str | Quantization | None
) -> None:
    problems = []
    if isinstance(quantize, str) and quantize not in WAYS:
        problems.append(f"quantize {quantize!r} is none of {', '.join(WAYS)}")
    if dtype not in get_args(DTypeName):
        problems.append(f"dtype {dtype!r} is none of {', '.join(get_args(DTypeName))}")
    if task not in TASKS:
        problems.append(f"task {task!r} is none of {', '.join(TASKS)}")
    if labels is not None and not (task in TASKS and has_classes(task)):
        problems.append(f"labels belong to tasks with classes, not to {task}")
    elif labels is not None and (len(set(labels)) < 2 or len(set(labels)) < len(labels)):
        problems.append(f"labels must be two or more different names, found {list(labels)}")
    if problems:
        raise ModelError.listing("the model cannot be loaded in this way", problems)


def _forget_values(model: nn.Module, heads: Sequence[str]) -> None:
    """Replace the parameters of some heads by others, which transformers does not take for read."""
    for head in heads:
        for module in model.get_submodule(head).modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(parameter.detach().clone()))


def _owners(model: nn.Module, heads: Sequence[str]) -> Iterator[str]:
    """The paths of the modules in some heads that have parameters of their own."""
    for head in heads:
        for name, _ in model.get_submodule(head).named_parameters():
            yield f"{head}.{name}".rpartition(".")[0]


def _check_complete(
    model: transformers.PreTrainedModel,
    info: Mapping[str, Any],
    name: str,
    task: str,
    *,
    left_out: Sequence[str],
) -> None:
    """Refuse a checkpoint without some of the model's weights, other than those of a task's head.

    Args:
        model: the model.
        info: what transformers says of the weights that it read.
        name: of the model.
        task: what it is for.
        left_out: heads that are made afresh, whose weights may have other shapes.

    Raises:
        ModelError: a tensor is missing from the checkpoint or has another shape there.
    """
    heads = () if task == "generation" else tuple(f"{head}." for head in task_heads(model))
    missing = sorted(key for key in info["missing_keys"] if not key.startswith(heads))
    problems = [f"{key}  not in the checkpoint" for key in missing[:_SHOWN_TENSORS]]
    if len(missing) > _SHOWN_TENSORS:
        problems.append(f"… and {len(missing) - _SHOWN_TENSORS} more that are missing")
    others = tuple(f"{head}." for head in left_out)
    mismatched = [
        each for each in sorted(info["mismatched_keys"]) if not each[0].startswith(others)
    ]
    problems += [
        f"{key}  {tuple(found)} in the checkpoint, {tuple(needed)} needed"
        for key, found, needed in mismatched
    ]
    if heads and any(key.startswith(heads) for key, *_ in mismatched):
        problems.append("fresh_head leaves the checkpoint's head out, and starts another")
    if problems:
        check_does(name, model.config, task)
        raise ModelError.listing(f"{name!r} does not fit {task} with these settings", problems)


def _check_vocabulary(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    name: str,
) -> None:
    """Refuse a tokenizer whose tokens the model has no embedding for.

    Of those that were added to it only the special ones count, which every text may get.

    Raises:
        ModelError: it has such tokens.
    """
    embedding = input_embedding(model)
    if not isinstance(embedding, nn.Embedding):
        return
    special = [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id]
    largest = max([tokenizer.vocab_size - 1, *(i for i in special if isinstance(i, int))])
    if largest >= embedding.num_embeddings:
        raise ModelError(
            f"the tokenizer of {name!r} writes tokens up to {largest}, and the model's embedding "
            f"has {embedding.num_embeddings} rows: they do not belong together"
        )


def give_padding_token(tokenizer: transformers.PreTrainedTokenizerBase, name: str) -> None:
    """Pad with the end-of-text token where the tokenizer has no padding token."""
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(
                f"the tokenizer of {name!r} has no token to pad with, nor an end token"
            )
        tokenizer.pad_token = tokenizer.eos_token
