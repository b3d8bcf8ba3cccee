"""Preferences: of two answers to a prompt, one is chosen; the model learns to prefer it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorakit.config.train import PreferenceSettings
from lorakit.data.fields import FieldMap
from lorakit.data.objectives.objective import LabelEncoding, Names, Objective, Values
from lorakit.data.preference_rows import preference_row
from lorakit.data.row_types import PreferenceRow, Row
from lorakit.data.samples import Draft, Example
from lorakit.errors import ConfigError
from lorakit.models.base import in_eval_mode

TARGETS = "target_tokens"
"""Key of a batch's mask of the tokens of answers: not for the model itself."""
CHOSEN, REJECTED, CHOSEN_COUNT, REJECTED_COUNT, CHOSEN_BASE, REJECTED_BASE = range(6)
"""The columns of what a model says of a batch: the log-probability of each answer, its tokens, and
its log-probability without the adapter."""
WHOLE, WHOLE_COUNT = 6, 7
"""Two more columns: the log-probability of the prompt and the chosen answer, and their tokens."""
WITH_REFERENCE = ("dpo", "ipo")
"""The forms that compare with the base."""
BY_TOKEN = ("ipo", "simpo", "orpo")
"""The forms that divide the log-probability of an answer by its tokens."""


def _without_nothing(_model: nn.Module) -> AbstractContextManager[Any]:
    return nullcontext()


@dataclass(frozen=True, kw_only=True)
class Preference(Objective):
    """Rows of a prompt and two answers. The base is the reference: the model without its adapter.

    With x = log π(chosen) − log π(rejected), and x₀ the same of the base, the loss of a row is

    - dpo (Rafailov et al. 2023, equation 7): −log σ(β·(x − x₀));
    - ipo (Azar et al. 2023, equation 17): (x − x₀ − 1/(2β))², each log π divided by its tokens;
    - cpo (Xu et al. 2024, equation 5): −log σ(β·x) − nll·(mean log π of a chosen token);
    - simpo (Meng et al. 2024, equation 6): −log σ(β·x − margin), each log π divided by its tokens;
    - orpo (Hong et al. 2024, equations 4, 6 and 7): −β·log σ(log odds(chosen) − log odds(rejected))
      − nll·(mean log π of a token of prompt and chosen answer), with odds = p/(1 − p) and log p the
      log π of an answer divided by its tokens. That the usual loss is of the prompt too is not in
      the paper, but in its authors' code, and in TRL's.
    """

    settings: PreferenceSettings = field(default_factory=PreferenceSettings)
    without_adapter: Callable[[nn.Module], AbstractContextManager[Any]] = _without_nothing
    """A block in which a model is the reference."""

    task = "preference"
    of_base = "generation"
    kind = "preference"
    needed = ("chosen", "rejected")
    optional = ("prompt", "tools")
    best_by = "accuracy"
    has_classes = False
    smooths = False
    unjoined = "compares two answers to each prompt"

    def row(self, fields: FieldMap, values: Values, known: Names) -> Row:
        return preference_row(fields, values)

    def unlike(self, rows: Sequence[PreferenceRow]) -> Iterable[tuple[int, str]]:
        kinds = ["lists of messages" if row.asked else "texts" for row in rows]
        for number, kind in enumerate(kinds):
            if kind != kinds[0]:
                yield number, f"its answers are {kind}, and those of the first row {kinds[0]}"

    def draft(self, row: PreferenceRow, encoding: LabelEncoding) -> Draft:
        chosen, rejected = (encoding.answered(each) for each in (row.chosen, row.rejected))
        if chosen.example is None or rejected.example is None:
            return chosen if chosen.example is None else rejected
        example = Example(
            input_ids=chosen.example.input_ids,
            labels=chosen.example.labels,
            rejected=rejected.example,
        )
        return Draft(
            example=example,
            cut_prompt=chosen.cut_prompt or rejected.cut_prompt,
            cut_completion=chosen.cut_completion or rejected.cut_completion,
            ends=chosen.ends | rejected.ends,
            unwritten=chosen.unwritten | rejected.unwritten,
        )

    def outputs(self, model: nn.Module, inputs: Mapping[str, Any]) -> Float[Tensor, "rows eight"]:
        """The columns `CHOSEN` to `WHOLE_COUNT` of each prompt; 0 where the form needs none.

        Of the batch, the second half has the rejected answers to the prompts of the first.
        """
        given = {name: value for name, value in inputs.items() if name != TARGETS}
        targets = inputs[TARGETS]
        of_prompt = self.settings.form == "orpo"
        written = inputs["attention_mask"] if of_prompt else torch.zeros_like(targets)
        found, whole = _log_probabilities(model, given, targets, written)
        base = torch.zeros_like(found)
        if self.settings.form in WITH_REFERENCE:
            # Dropout would make the base another reference in each step.
            with torch.no_grad(), self.without_adapter(model), in_eval_mode(model):
                (base,) = _log_probabilities(model, given, targets)
        counts, wholes = (mask[:, 1:].sum(1).to(found) for mask in (targets, written))
        halves = (*found.chunk(2), *counts.chunk(2), *base.chunk(2))
        return torch.stack([*halves, whole.chunk(2)[0], wholes.chunk(2)[0]], dim=1)

    def loss(
        self, outputs: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, z_loss: float = 0.0
    ) -> Tensor:
        beta, form = self.settings.beta, self.settings.form
        margins = self.margins(outputs)
        match form:
            case "ipo":
                return (margins - 1 / (2 * beta)).square().sum()
            case "orpo":
                losses = -beta * F.logsigmoid(margins).sum()
                return losses - self._usual(outputs, WHOLE, WHOLE_COUNT)
            case "cpo":
                losses = -F.logsigmoid(beta * margins).sum()
                return losses - self._usual(outputs, CHOSEN, CHOSEN_COUNT)
            case "simpo":
                return -F.logsigmoid(beta * margins - self.settings.margin).sum()
            case "dpo":
                return -F.logsigmoid(beta * margins).sum()

    def _usual(self, outputs: Tensor, summed: int, counted: int) -> Tensor:
        """The mean log π of a token of a batch, for each row, times its weight."""
        likelihood = outputs[:, summed].sum() / outputs[:, counted].sum()
        return self.settings.nll * len(outputs) * likelihood

    def margins(self, outputs: Float[Tensor, "rows eight"]) -> Float[Tensor, " rows"]:
        """By how much each chosen answer is likelier than the rejected one, and than for the base.

        In nats; of ipo and simpo, nats per token; of orpo the logarithm of the odds ratio.
        """
        chosen = outputs[:, CHOSEN] - outputs[:, CHOSEN_BASE]
        rejected = outputs[:, REJECTED] - outputs[:, REJECTED_BASE]
        if self.settings.form in BY_TOKEN:
            chosen = chosen / outputs[:, CHOSEN_COUNT]
            rejected = rejected / outputs[:, REJECTED_COUNT]
        if self.settings.form == "orpo":
            chosen, rejected = _log_odds(chosen), _log_odds(rejected)
        return chosen - rejected

    def answers(self, outputs: Tensor, labels: Tensor) -> list[Any]:
        return self.margins(outputs).tolist()

    def scores(
        self,
        answers: Sequence[Any],
        examples: Sequence[Example],
        *,
        names: Names,
        best_by: str | None = None,
    ) -> dict[str, float]:
        right = sum(margin > 0 for margin in answers) / len(answers)
        return {"accuracy": right, "margin": sum(answers) / len(answers)}

    def shown(self, answer: Any, names: Names) -> Any:
        return answer


def check_reads_in_one_piece(model: PreTrainedModel) -> None:
    """Make sure that a base can compare answers.

    Raises:
        ConfigError: it is an encoder-decoder.
    """
    if model.config.is_encoder_decoder:
        raise ConfigError(
            "the task preference is for models that read prompt and answer in one piece, and the "
            "base is an encoder-decoder"
        )


def _log_odds(log_probability: Tensor) -> Tensor:
    """log(p/(1 − p)) from log p; where p is 1 to rounding, from the next smaller p."""
    surest = -torch.finfo(log_probability.dtype).eps
    found = log_probability.clamp(max=surest)
    return found - torch.log(-torch.expm1(found))


def _log_probabilities(
    model: nn.Module, inputs: Mapping[str, Any], *masks: Tensor
) -> list[Float[Tensor, " rows"]]:
    """log π of each row's tokens in each mask, given those before them; softmax in float32.

    Args:
        model: a language model.
        inputs: a batch, padded on the right.
        masks: (rows, length), where the tokens are; the first of a row, which follows none, is left
            out.
    """
    wanted = [mask[:, 1:].bool() for mask in masks]
    at = torch.stack(wanted).any(0)
    logits = model(**inputs).logits[:, :-1][at].float()
    tokens = inputs["input_ids"][:, 1:][at]
    found = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(1)
    by_token = found.new_zeros(at.shape).masked_scatter(at, found)
    return [(by_token * mask).sum(1) for mask in wanted]
