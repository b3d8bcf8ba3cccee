"""The loss of preferences as TRL computes it, by the trainer that TRL has for a form.

lorakit's own trainer runs the steps, so that rows, checkpoints, resuming and scores are those of
every other run; TRL's is only asked for the loss of each batch.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from importlib import import_module
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback

from lorakit.config.train import PreferenceSettings
from lorakit.data.chat import IGNORED
from lorakit.data.objectives.preference import TARGETS
from lorakit.errors import ConfigError, MissingExtraError, did_you_mean
from lorakit.layers.adapted_layer import AdaptedLayer
from lorakit.models.base import in_eval_mode
from lorakit.models.roles import output_head
from lorakit.routing.route import route

ROW = {"prompt": "a", "chosen": "b", "rejected": "c"}
"""A row, since TRL's trainers are not made without one; they are never asked for it."""
OF_NO_LOSS = ("loss", "epoch", "num_tokens")
"""Figures that TRL logs, and that lorakit's own trainer has."""

CHECKPOINTING = ("is_activation_checkpointing", "is_gradient_checkpointing")
"""The properties by which a model tells that blocks are checkpointed; the second is the older."""


@dataclass(frozen=True, kw_only=True)
class _Form:
    """What TRL has for a form."""

    module: str
    """The module with its trainer."""
    name: str
    """What the names of its trainer and its settings begin with."""
    named: Mapping[str, str] = field(default_factory=dict)
    """TRL's names of lorakit's settings, beside beta."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """What makes it this form."""
    more: tuple[str, ...] = ()
    """The settings of its loss that `preference.trl` may have."""

    @property
    def compares(self) -> bool:
        """Whether it has a reference."""
        return self.name == "DPO"


_OF_DPO = (
    *("loss_type", "loss_weights", "label_smoothing", "ld_alpha", "use_weighting", "discopop_tau"),
    *("f_divergence_type", "f_alpha_divergence_coef", "router_aux_loss_coef"),
)
FORMS = {
    "dpo": _Form(module="trl", name="DPO", fixed={"loss_type": ["sigmoid"]}, more=_OF_DPO),
    "ipo": _Form(module="trl", name="DPO", fixed={"loss_type": ["ipo"]}, more=_OF_DPO[1:]),
    "cpo": _Form(
        module="trl.experimental.cpo",
        name="CPO",
        named={"nll": "cpo_alpha"},
        more=("loss_type", "label_smoothing", "alpha"),
    ),
    "simpo": _Form(
        module="trl.experimental.cpo",
        name="CPO",
        named={"margin": "simpo_gamma"},
        fixed={"loss_type": "simpo", "cpo_alpha": 0.0},
        more=("cpo_alpha", "label_smoothing", "alpha"),
    ),
    "orpo": _Form(module="trl.experimental.orpo", name="ORPO"),
}
"""What TRL has for each form."""


def check_through_trl(settings: PreferenceSettings) -> list[str]:
    """What is wrong with settings of a loss that TRL is to compute.

    Raises:
        MissingExtraError: TRL is not installed.
    """
    _library("trl")
    form = FORMS[settings.form]
    known = ", ".join(form.more) or "there are none"
    problems = [
        f"preference.trl: {name} is no setting of its loss for {settings.form} ({known})"
        + did_you_mean(name, form.more)
        for name in settings.trl
        if name not in form.more
    ]
    if settings.form == "orpo" and settings.nll != 1:
        problems.append(f"preference.nll: TRL's ORPO has a weight of 1, and it is {settings.nll}")
    return problems


class TrlLoss:
    """The loss of a batch of preferences by TRL's trainer of a form."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: PreferenceSettings,
    ) -> None:
        """Have TRL make its trainer.

        Args:
            model: with the adapter; it is left as it is.
            tokenizer: that of the model; left as it is.
            settings: of the form and its loss.

        Raises:
            MissingExtraError: TRL is not installed.
            ConfigError: TRL refuses the settings, or cannot see all of the adapter.
        """
        self._form = FORMS[settings.form]
        if self._form.compares:
            _check_head(model)
        self._view = _view_of(model)
        try:
            with _quiet(), route(model, None), tempfile.TemporaryDirectory() as folder:
                self._trainer = self._made(copy.deepcopy(tokenizer), settings, folder)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise ConfigError(f"preference.trl: TRL refuses these settings: {error}") from error

    def _made(
        self, tokenizer: PreTrainedTokenizerBase, settings: PreferenceSettings, folder: str
    ) -> Any:
        form = self._form
        library, rows = _library(form.module), _library("datasets").Dataset.from_list([ROW])
        arguments = {
            **form.fixed,
            **{name: getattr(settings, ours) for ours, name in form.named.items()},
            **settings.trl,
            "beta": settings.beta,
            "output_dir": folder,
            "report_to": [],
            "disable_tqdm": True,
            # What the run itself decides: precision, memory, and the dropout of its adapter.
            "bf16": False,
            "activation_checkpointing": False,
            "disable_dropout": False,
            "use_cpu": not torch.cuda.is_available(),
        }
        if form.compares:
            # Else TRL loads a second base, as it knows of no adapter but PEFT's.
            arguments["precompute_ref_log_probs"] = True
            # Of a text it would take each letter for a loss.
            loss_type = arguments["loss_type"]
            arguments["loss_type"] = [loss_type] if isinstance(loss_type, str) else loss_type
        made = getattr(library, f"{form.name}Trainer")(
            model=self._view,
            args=getattr(library, f"{form.name}Config")(**arguments),
            train_dataset=rows,
            processing_class=tokenizer,
        )
        made.remove_callback(PrinterCallback)
        return made

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """The mean loss of the rows of a batch, as `preference_batch` has them.

        Args:
            model: the model that it was made of.
            inputs: the batch, without labels.

        Raises:
            ConfigError: TRL refuses the settings in its first loss.
        """
        # A view of a model shares all that is in it, but for its own attributes.
        self._view.training = model.training
        given = {name: value for name, value in inputs.items() if name != TARGETS}
        if self._form.compares:
            batch = {**given, "completion_mask": inputs[TARGETS]}
            with route(model, None), in_eval_mode(model):
                chosen, rejected = self._trainer.compute_ref_log_probs(self._view, batch)
            batch |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        else:
            labels = inputs["input_ids"].masked_fill(inputs[TARGETS] == 0, IGNORED)
            batch = _halves({**given, "labels": labels})
        try:
            with _quiet():
                return self._trainer.compute_loss(self._view, batch)
        except (ValueError, NotImplementedError) as error:
            raise ConfigError(f"preference.trl: TRL refuses these settings: {error}") from error

    def figures(self) -> dict[str, float]:
        """What TRL logs of the batches since the last call, such as rewards/margins."""
        logged = {"loss": 0.0}
        self._trainer.log(logged)
        self._trainer.state.log_history.clear()
        return {name: value for name, value in logged.items() if name not in OF_NO_LOSS}


def _halves(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch of chosen and then rejected answers as two, by the names of TRL's older trainers."""
    return {
        f"{half}_{name}": part
        for name, value in batch.items()
        for half, part in zip(("chosen", "rejected"), value.chunk(2), strict=True)
    }


def _view_of(model: PreTrainedModel) -> PreTrainedModel:
    """A model with the modules and hooks of another, whose attributes TRL may set."""
    view = copy.copy(model)
    for name in ("config", "generation_config", "model_tags"):
        setattr(view, name, copy.deepcopy(getattr(model, name, None)))
    # TRL would turn checkpointing of blocks off and on again, and lose how the run does it.
    kind, off = type(model), dict.fromkeys(CHECKPOINTING, False)
    view.__class__ = type(kind.__name__, (kind,), off)
    return view


def _check_head(model: PreTrainedModel) -> None:
    """Make sure that nothing of the adapter is in the output head.

    Raises:
        ConfigError: something is, and TRL would neither compute with it nor train it.
    """
    head = output_head(model)
    if head is not None and any(isinstance(module, AdaptedLayer) for module in head.modules()):
        raise ConfigError(
            "preference.through: TRL's DPOTrainer takes the weight of the output head, past what "
            "the adapter has there: leave the head out of it, or take through: lorakit"
        )


def _library(name: str) -> Any:
    """A module of TRL, or one that it needs.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        with _quiet():
            return import_module(name)
    except ImportError as error:
        raise MissingExtraError("preference.through: trl", "trl") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what TRL and datasets tell of the row, of experiments and of what will be renamed."""
    with warnings.catch_warnings(), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        yield
