"""Preferences: of two answers to a prompt, one is chosen; the model learns to prefer it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lorakit.config.train import PreferenceSettings
from lorakit.data.fields import FieldMap
from lorakit.data.objectives.objective import LabelEncoding, Names, Objective, Values
from lorakit.data.problems import UnusableRowError
from lorakit.data.row_types import PreferenceRow, Row
from lorakit.data.samples import Draft, Example

TARGETS = "target_tokens"
"""Key of a batch's mask of the tokens of answers: not for the model itself."""
CHOSEN, REJECTED, CHOSEN_COUNT, REJECTED_COUNT, CHOSEN_BASE, REJECTED_BASE = range(6)
"""The columns of what a model says of a batch: the log-probability of each answer, its tokens, and
its log-probability without the adapter."""
WITH_REFERENCE = ("dpo", "ipo")
"""The forms that compare with the base."""


def _without_nothing(_model: nn.Module) -> AbstractContextManager[Any]:
    return nullcontext()


@dataclass(frozen=True, kw_only=True)
class Preference(Objective):
    """Rows of a prompt and two answers. The base is the reference: the model without its adapter.

    With x = log π(chosen) − log π(rejected), and x₀ the same of the base, the loss of a row is

    - dpo (Rafailov et al. 2023, equation 7): −log σ(β·(x − x₀));
    - ipo (Azar et al. 2023, equation 17): (x − x₀ − 1/(2β))², each log π divided by its tokens;
    - cpo (Xu et al. 2024, equation 5): −log σ(β·x) − nll·(mean log π of a chosen token);
    - simpo (Meng et al. 2024, equation 6): −log σ(β·x − margin), each log π divided by its tokens.
    """

    settings: PreferenceSettings = field(default_factory=PreferenceSettings)
    without_adapter: Callable[[nn.Module], AbstractContextManager[Any]] = _without_nothing
    """A block in which a model is the reference."""

    task = "preference"
    of_base = "generation"
    kind = "preference"
    needed = ("prompt", "chosen", "rejected")
    best_by = "accuracy"
    has_classes = False
    smooths = False
    unjoined = "compares two answers to each prompt"

    def row(self, fields: FieldMap, values: Values, known: Names) -> Row:
        prompt, chosen, rejected = (fields.text(name, values) for name in self.needed)
        if chosen == rejected:
            raise UnusableRowError("chosen and rejected are the same, so neither is preferred")
        return PreferenceRow(prompt=prompt, chosen=chosen, rejected=rejected)

    def draft(self, row: PreferenceRow, encoding: LabelEncoding) -> Draft:
        chosen, rejected = (encoding.prompt(each) for each in row.prompts)
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
        )

    def outputs(self, model: nn.Module, inputs: Mapping[str, Any]) -> Float[Tensor, "rows six"]:
        """The columns `CHOSEN` to `REJECTED_BASE` of each prompt.

        Of the batch, the second half has the rejected answers to the prompts of the first.
        """
        given = {name: value for name, value in inputs.items() if name != TARGETS}
        found = _log_probabilities(model, given, inputs[TARGETS])
        base = torch.zeros_like(found)
        if self.settings.form in WITH_REFERENCE:
            with torch.no_grad(), self.without_adapter(model):
                base = _log_probabilities(model, given, inputs[TARGETS])
        counts = inputs[TARGETS][:, 1:].sum(1).to(found)
        halves = (*found.chunk(2), *counts.chunk(2), *base.chunk(2))
        return torch.stack(halves, dim=1)

    def loss(
        self, outputs: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, z_loss: float = 0.0
    ) -> Tensor:
        beta, form = self.settings.beta, self.settings.form
        margins = self.margins(outputs)
        if form == "ipo":
            return (margins - 1 / (2 * beta)).square().sum()
        losses = -F.logsigmoid(
            beta * margins - (self.settings.margin if form == "simpo" else 0.0)
        ).sum()
        if form == "cpo":
            likelihood = outputs[:, CHOSEN].sum() / outputs[:, CHOSEN_COUNT].sum()
            losses = losses - self.settings.nll * len(outputs) * likelihood
        return losses

    def margins(self, outputs: Float[Tensor, "rows six"]) -> Float[Tensor, " rows"]:
        """By how much each chosen answer is likelier than the rejected one, and than for the base.

        In nats; of ipo and simpo, nats per token.
        """
        chosen = outputs[:, CHOSEN] - outputs[:, CHOSEN_BASE]
        rejected = outputs[:, REJECTED] - outputs[:, REJECTED_BASE]
        if self.settings.form in ("ipo", "simpo"):
            chosen = chosen / outputs[:, CHOSEN_COUNT]
            rejected = rejected / outputs[:, REJECTED_COUNT]
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


def _log_probabilities(
    model: nn.Module, inputs: Mapping[str, Any], targets: Tensor
) -> Float[Tensor, " rows"]:
    """log π of each row's target tokens, given those before them; softmax in float32.

    Args:
        model: a language model.
        inputs: a batch, padded on the right.
        targets: (rows, length), where the target tokens are.
    """
    at = targets[:, 1:].bool()
    logits = model(**inputs).logits[:, :-1][at].float()
    tokens = inputs["input_ids"][:, 1:][at]
    found = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(1)
    rows = at.nonzero()[:, 0]
    return found.new_zeros(len(at)).index_add(0, rows, found)
