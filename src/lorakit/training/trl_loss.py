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
from dataclasses import dataclass, field, fields
from functools import wraps
from importlib import import_module
from io import StringIO
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback

from lorakit.config.base import Settings, problem_lines
from lorakit.config.train import PreferenceSettings
from lorakit.config.trl_losses import CpoLoss, DpoLoss
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

SWITCHES = ("activation_checkpointing", "gradient_checkpointing")
"""The arguments that have blocks checkpointed; the second is the older."""
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
    loss: type[Settings] = Settings
    """The settings of its loss."""
    settled: tuple[str, ...] = ()
    """Those among them that `preference.trl` may not have."""

    @property
    def more(self) -> tuple[str, ...]:
        """The settings of its loss that `preference.trl` may have."""
        return tuple(name for name in self.loss.model_fields if name not in self.settled)

    @property
    def compares(self) -> bool:
        """Whether it has a reference."""
        return self.name == "DPO"


# TRL adds the loss that balances experts wherever a base has some.
_NO_BALANCE = {"router_aux_loss_coef": 0.0}
FORMS = {
    "dpo": _Form(
        module="trl", name="DPO", loss=DpoLoss, fixed={"loss_type": ["sigmoid"], **_NO_BALANCE}
    ),
    "ipo": _Form(
        module="trl",
        name="DPO",
        loss=DpoLoss,
        fixed={"loss_type": ["ipo"], **_NO_BALANCE},
        settled=("loss_type",),
    ),
    "cpo": _Form(
        module="trl.experimental.cpo",
        name="CPO",
        loss=CpoLoss,
        named={"nll": "cpo_alpha"},
        settled=("cpo_alpha",),
    ),
    "simpo": _Form(
        module="trl.experimental.cpo",
        name="CPO",
        loss=CpoLoss,
        named={"margin": "simpo_gamma"},
        fixed={"loss_type": "simpo", "cpo_alpha": 0.0},
        settled=("loss_type",),
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
    names = ", ".join(form.more) or "there are none"
    problems = [
        f"preference.trl: {name} is no setting of its loss for {settings.form} ({names})"
        + did_you_mean(name, form.more)
        for name in settings.trl
        if name not in form.more
    ]
    known = {name: value for name, value in settings.trl.items() if name in form.more}
    try:
        form.loss.model_validate(known)
    except ValidationError as error:
        problems += [f"preference.trl.{line}" for line in problem_lines(form.loss, error)]
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
        self._asked = settings.trl
        self._view = _view_of(model)
        if not self._form.compares:
            _give_float32(self._view)
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
        make_settings = getattr(library, f"{form.name}Config")
        known = {each.name for each in fields(make_settings)}
        asked = form.loss.model_validate(settings.trl).model_dump(exclude_unset=True)
        arguments = {
            **form.fixed,
            **{name: getattr(settings, ours) for ours, name in form.named.items()},
            **asked,
            "beta": settings.beta,
            "output_dir": folder,
            "report_to": [],
            "disable_tqdm": True,
            # What the run itself decides: precision, memory, and the dropout of its adapter.
            "bf16": False,
            **{name: False for name in SWITCHES if name in known},
            "disable_dropout": False,
            "use_cpu": not torch.cuda.is_available(),
        }
        if form.compares:
            # Else TRL loads a second base, as it knows of no adapter but PEFT's.
            arguments["precompute_ref_log_probs"] = True
        made = getattr(library, f"{form.name}Trainer")(
            model=self._view,
            args=make_settings(**arguments),
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
            return self._trainer.compute_loss(self._view, batch)
        except (ValueError, NotImplementedError) as error:
            raise ConfigError(f"preference.trl: TRL refuses these settings: {error}") from error

    def try_on(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Compute the loss of a batch for nothing, to find out what TRL refuses only then.

        Raises:
            ConfigError: TRL refuses the settings, or they give no number.
        """
        with torch.no_grad():
            loss = self(model, inputs)
        self.figures()
        if not torch.isfinite(loss):
            raise ConfigError(
                f"preference.through: the loss of the first row is {loss.item()} with TRL before "
                f"any training: other settings than {self._asked or 'its own'} in preference.trl "
                "may give a number"
            )

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
    config = view.config.get_text_config()
    if hasattr(config, "output_router_logits"):
        config.output_router_logits = False
    # TRL would turn checkpointing of blocks off and on again, and lose how the run does it.
    kind, off = type(model), dict.fromkeys(CHECKPOINTING, False)
    view.__class__ = type(kind.__name__, (kind,), off)
    return view


def _give_float32(view: PreTrainedModel) -> None:
    """Have a view's logits in float32, as TRL has them from the autocast that it runs in."""
    forward = view.forward

    @wraps(forward)
    def in_float32(*args: Any, **kwargs: Any) -> Any:
        outputs = forward(*args, **kwargs)
        outputs.logits = outputs.logits.float()
        return outputs

    view.forward = in_float32


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
