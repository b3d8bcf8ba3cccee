"""The public class of an adapter: its content, with `save` and `load`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorakit.adapter.card import TrainedUse
from lorakit.adapter.content import AdapterContent
from lorakit.adapter.folder import load_path, reading
from lorakit.adapter.folder_write import save_folder, write_card
from lorakit.adapter.hub import local_path, send
from lorakit.config.methods import LoRAConfig
from lorakit.errors import AdapterFileError
from lorakit.models.base import unwrapped
from lorakit.models.load import load_model, own_classes, own_task
from lorakit.models.loftq import put_loftq
from lorakit.models.quantized import quantization_on
from lorakit.models.tasks import has_classes


class Adapter(AdapterContent):
    """An adapter: what was trained, independent of any model and any file format.

    Tensors are named `<site>.lora_a` (rank, d_in) and `<site>.lora_b` (d_out, rank), and with DoRA
    `<site>.lora_magnitude` (d_out,). A tensor under one of the base's own parameter names replaces
    that parameter (docs/design/adapter.md has all shapes).

    Examples:
        >>> adapter = lk.Adapter.load("out/places")
        >>> adapter.method, len(adapter.sites)
        ('lora', 60)
        >>> adapter.tensors["model.layers.0.self_attn.q_proj.lora_a"].shape
        torch.Size([8, 576])
    """

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the adapter as a folder (docs/adapter-format.md) and return the folder.

        The folder appears whole or not at all; it is read back before it gets its name.

        Raises:
            OutputError: the folder exists and `overwrite` is false, or cannot be written.
            AdapterFileError: a tensor is not finite.
        """
        return save_folder(self, Path(folder), overwrite=overwrite)

    def push_to_hub(
        self,
        repository: str,
        *,
        private: bool = False,
        revision: str | None = None,
        message: str = "An adapter by lorakit",
    ) -> str:
        """Send the adapter to a repository of the Hugging Face hub, with a model card.

        `hf auth login`, or HF_TOKEN, says who you are. A README.md that the repository has is
        replaced.

        Args:
            repository: OWNER/NAME; it is made if there is none.
            private: whether a new repository can be seen by its owners alone.
            revision: a branch, made if there is none. None: main.
            message: of the commit.

        Returns:
            The address of the commit.

        Raises:
            OutputError: the hub is out of reach, or does not take it.
            AdapterFileError: a tensor is not finite.
        """
        with tempfile.TemporaryDirectory() as folder:
            place = self.save(Path(folder) / repository.rpartition("/")[2])
            write_card(self, place, name=repository)
            return send(place, repository, private=private, revision=revision, message=message)

    @staticmethod
    def load(
        source: str | os.PathLike[str],
        *,
        revision: str | None = None,
        config: LoRAConfig | None = None,
        kernel_sizes: Mapping[str, int] | None = None,
        base: nn.Module | None = None,
    ) -> Adapter:
        """Read an adapter folder of lorakit, PEFT or mlx-lm, by its path or hub id, or a file.

        Of a repository of the hub, only an adapter's JSON and safetensors files and its chat
        template are fetched, into the hub's cache on this machine.

        Args:
            source: the folder, loralib's .pt file, the safetensors file of kohya's sd-scripts or of
                diffusers, or OWNER/NAME or OWNER/NAME@REVISION on the hub,
                where there is no such path.
            revision: a branch, tag or commit of the hub's repository.
            config: rank, alpha and targets, for a loralib file, which does not hold them.
            kernel_sizes: the convolutions in a loralib file, by path or the end of it, and the size
                of their square kernels; the file does not tell them from other layers.
            base: the model that a file of kohya's or diffusers' is for, such as the U-Net: it may
                be for several, and layers are found by the model's own names. Or the one that
                PEFT's PiSSA or OLoRA started from, whose start is computed again.

        Raises:
            AdapterFileError: every problem of the files in one message; or there are none.
        """
        path = local_path(source, revision)
        return _with_files(load_path(path, config=config, kernel_sizes=kernel_sizes, base=base))

    def load_base(
        self,
        name: str | None = None,
        *,
        dtype: str | torch.dtype = "float32",
        task: str | None = None,
        labels: Sequence[str] | None = None,
        quantize: str = "as-trained",
        device: str | None = None,
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The base that it was trained on, loaded for its task, and its tokenizer.

        Args:
            name: another one. None: the one that it names.
            dtype: precision of the base, as in `lk.load_model`.
            task: what the base does. None: what the adapter was trained for, else generation.
            labels: names of the classes. None: those of its training.
            quantize: how the base holds its weights: as-trained, none (in `dtype`), 4bit or 8bit.
            device: what it computes on, as in `lk.load_model`; None: the CPU.

        Raises:
            AdapterFileError: it names no base, or has a card that training does not write.
            ConfigError: the device is none of these words, or cuda where torch sees no GPU.
            ModelError: the base cannot be found or loaded.
            MissingExtraError: the base is quantised, or was by LoftQ, and the library for it is not
                installed.
        """
        name = name or self.base_name
        if not name:
            raise AdapterFileError(
                "the adapter does not say which base it was trained on: name the model"
            )
        use = TrainedUse.on(self.card)
        task = task or use.task or "generation"
        labels = (labels or use.labels or None) if has_classes(task) else None
        way = None if quantize == "none" else quantize
        how = quantization_on(self.card) if quantize == "as-trained" else way
        model, tokenizer = load_model(
            name,
            dtype=dtype,
            task=task,
            labels=labels,
            quantize=how,
            fresh_head=bool(self.copied_modules) and _has_other_head(name, task, labels),
            layer_replication=self.lora.layer_replication if self.lora else None,
            device=device,
        )
        self.prepare_base(model)
        return model, tokenizer

    def prepare_base(self, model: nn.Module) -> None:
        """Change a loaded base, in place, to the one that the adapter was trained on.

        For an adapter that PEFT trained with LoftQ: what quantising leaves of the weights of its
        layers takes their place, as in PEFT, and the base takes no other adapter from then on but
        one that was trained on the same. To all others, and a second time, it does nothing.
        `load_base` does it too.

        Args:
            model: the base in floats, without adapters.

        Raises:
            ModelError: adapters are attached, the base is quantised or was changed for another
                adapter, or it lacks a layer; all are listed.
            MissingExtraError: bitsandbytes is not installed.

        Examples:
            >>> adapter = lk.Adapter.load("out/places")
            >>> adapter.prepare_base(model)
            >>> plan = lk.attach(model, adapter)
        """
        if self.loftq is not None:
            put_loftq(unwrapped(model), self.loftq, {site.path: site.rank for site in self.sites})

    @staticmethod
    def of(source: str | os.PathLike[str] | Adapter) -> Adapter:
        """The adapter that is given by its folder, its hub id, or as it is."""
        return source if isinstance(source, Adapter) else Adapter.load(source)

    @staticmethod
    @contextmanager
    def reading(folder: str | os.PathLike[str]) -> Iterator[Adapter]:
        """The adapter of a folder, for a block of work while another thread computes its hash.

        The hash is checked at the end of the block: until then nothing may count that the block
        makes.

        Raises:
            AdapterFileError: every problem of the files in one message; of the hash after the
                block, also if that ended with an error.
        """
        with reading(Path(folder)) as content:
            adapter = _with_files(content)
            yield adapter
        adapter.keep_hash_of(content)


def _has_other_head(name: str, task: str, labels: Sequence[str] | None) -> bool:
    """Whether a base has a head for another number of classes than an adapter's copy of it."""
    own, classes = own_task(name), own_classes(name) or ()
    if "generation" in (task, own):
        return False
    return task != own or len(labels or classes) != len(classes)


def _with_files(content: AdapterContent) -> Adapter:
    """The adapter with some content, and with the hash that is already computed of it."""
    adapter = Adapter(**{each.name: getattr(content, each.name) for each in fields(content)})
    adapter.keep_hash_of(content)
    return adapter


AdapterSource = str | os.PathLike[str] | Adapter
"""Whatever stands for an adapter: its folder, its hub id, or the adapter itself."""
