"""The loss of a batch of texts, for which the output head computes logits of target tokens alone.

Prompts and padding are most of a batch, and the head is most of a small model's work. So a forward
pre-hook on the head keeps the hidden states and gives the head none of them; the loss is then
computed from the hidden states that predict a target token, in chunks
(`lorakit.kernels.cross_entropy`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lorakit.attachment.state import attachment_of, is_compiled
from lorakit.data.chat import IGNORED
from lorakit.kernels.choice import fast
from lorakit.kernels.cross_entropy import head_cross_entropy
from lorakit.kernels.logit_transform import IDENTITY, LogitTransform
from lorakit.kernels.packed_sequences import FEW_SIZES
from lorakit.layers.adapted_layer import AdaptedLayer
from lorakit.layers.route import Frame
from lorakit.models.base import unwrapped
from lorakit.models.logits import logit_transform
from lorakit.models.roles import output_head

PerRow = float | Float[Tensor, " rows"]
"""One value for all rows, or one for each."""


def item_weight(labels: Int[Tensor, "rows length"], items: Tensor | int | None) -> float:
    """The weight of one token's loss in the mean over `items`; None: over this batch's targets."""
    count = is_target(labels).sum() if items is None else items
    return 1 / max(float(count), 1.0)


def is_target(labels: Int[Tensor, "rows length"]) -> Tensor:
    """The mask of target tokens, (rows, length - 1): nothing predicts the first one of a row."""
    return labels[:, 1:] != IGNORED


def text_losses(
    model: nn.Module,
    inputs: Mapping[str, Any],
    labels: Int[Tensor, "rows length"],
    *,
    weights: PerRow = 1.0,
    label_smoothing: PerRow = 0.0,
    z_loss: PerRow = 0.0,
) -> tuple[Float[Tensor, ""], Float[Tensor, "rows length"]]:
    """The weighted sum of the losses, and the loss at each position, without a gradient.

    Position t predicts the token at t+1; where that is no target token, the loss is 0. The sum can
    be differentiated, once.

    Args:
        model: a language model, also in a wrapper.
        inputs: what it is called with.
        labels: the target tokens, IGNORED elsewhere.
        weights: the factor on each row's losses.
        label_smoothing: each row's label smoothing; see `head_cross_entropy`.
        z_loss: each row's factor of the z-loss; see `head_cross_entropy`.
    """
    if not fast():
        logits = model(**inputs, use_cache=False).logits
        losses = plain_losses(logits, labels, _per_row(label_smoothing), _per_row(z_loss))
        return (losses * _per_row(weights).to(losses)).sum(), losses.detach()
    head = _hooked_head(model)
    chosen = _Chosen.of(labels, keep_rows=_tells_rows_apart(model, head))
    states, head, change = _run(model, inputs, chosen, head)
    total, losses = head_cross_entropy(
        states,
        head,
        chosen.targets.to(states.device),
        chosen.spread(weights).to(states.device),
        label_smoothing=_for_tokens(label_smoothing, chosen),
        z_loss=_for_tokens(z_loss, chosen),
        change=change,
    )
    return total, chosen.put_back(losses)


def _per_row(value: PerRow) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64).reshape(-1, 1)


def plain_losses(
    logits: Float[Tensor, "rows length vocabulary"],
    labels: Int[Tensor, "rows length"],
    label_smoothing: Float[Tensor, "#rows 1"],
    z_loss: Float[Tensor, "#rows 1"],
) -> Float[Tensor, "rows length"]:
    """The loss at each position, computed from all logits; 0 where no target token follows."""
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORED).to(logits.device)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    likely = logits.log_softmax(-1)
    targets = following.clamp(min=0)[..., None]
    smoothing = label_smoothing.to(likely)
    losses = -(1 - smoothing) * likely.gather(-1, targets)[..., 0] - smoothing * likely.mean(-1)
    losses = losses + z_loss.to(likely) * logits.logsumexp(-1).square()
    return losses.masked_fill(following == IGNORED, 0.0)


def _for_tokens(value: PerRow, chosen: _Chosen) -> float | Tensor:
    return chosen.spread(value) if isinstance(value, Tensor) else value


@dataclass(frozen=True)
class _Chosen:
    """The positions that predict a target token, (groups, tokens).

    They are one group, or one group for each row. Groups are of one size, so that some hold
    positions without a target token, whose target is IGNORED.
    """

    index: Int[Tensor, "groups tokens"]
    """The positions, as indices into the flattened batch."""
    targets: Int[Tensor, "groups tokens"]
    shape: torch.Size
    """The shape of the batch: rows, length."""

    @staticmethod
    def of(labels: Int[Tensor, "rows length"], *, keep_rows: bool) -> _Chosen:
        """The positions before the target tokens among the labels."""
        rows, length = labels.shape
        following = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        is_followed = following != IGNORED
        if keep_rows:
            most = int(is_followed.sum(1).max())
            columns = is_followed.int().argsort(dim=1, descending=True, stable=True)[:, :most]
            index = columns + torch.arange(rows, device=labels.device)[:, None] * length
            return _Chosen(index, following.flatten()[index], labels.shape)
        index = is_followed.flatten().nonzero().T
        # Rounded up, with positions without a target token, so that few sizes occur.
        missing = -index.shape[1] % FEW_SIZES
        targets = F.pad(following.flatten()[index], (0, missing), value=IGNORED)
        return _Chosen(F.pad(index, (0, missing)), targets, labels.shape)

    def take(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "groups tokens d"]:
        """The vectors at the chosen positions of a batch."""
        flat = x.reshape(-1, x.shape[-1])
        taken = flat.index_select(0, self.index.flatten().to(x.device))
        return taken.view(*self.index.shape, x.shape[-1])

    def spread(self, value: PerRow) -> Float[Tensor, "groups tokens"]:
        """The value of a position's row, for each chosen position, in float64."""
        if not isinstance(value, Tensor):
            return torch.full(self.index.shape, value, dtype=torch.float64)
        return value.double()[(self.index // self.shape[1]).to(value.device)]

    def put_back(self, values: Float[Tensor, "groups tokens"]) -> Float[Tensor, "rows length"]:
        """A batch with the values at their positions, and 0 elsewhere."""
        found = values.new_zeros(self.shape.numel())
        # Positions without a target token have loss 0, so they may occur twice.
        found.index_add_(0, self.index.flatten().to(values.device), values.flatten())
        return found.view(self.shape)


def _hooked_head(model: nn.Module) -> nn.Module | None:
    """The output head of a language model, or None where hooks on it are not reliable.

    DataParallel runs copies of the head in several threads, and a compiled model ignores hooks that
    are registered after it was compiled. There the model computes all logits.
    """
    if isinstance(model, nn.DataParallel) or is_compiled(model):
        return None
    return output_head(unwrapped(model))


def _tells_rows_apart(model: nn.Module, head: nn.Module | None) -> bool:
    """Whether rows use adapters of their own in the output head."""
    state = attachment_of(model)
    if head is None or state is None or state.route.top.rows is None:
        return False
    return any(isinstance(module, AdaptedLayer) for module in head.modules())


def _run(
    model: nn.Module, inputs: Mapping[str, Any], chosen: _Chosen, head: nn.Module | None
) -> tuple[Tensor, nn.Module, LogitTransform]:
    """The hidden states at the chosen positions, the output head, and the logit transform after it.

    Where only the model itself can compute its logits, they take the place of the hidden states,
    and the head is Identity.
    """
    if head is None:
        logits = chosen.take(model(**inputs, use_cache=False).logits)
        return logits, nn.Identity(), IDENTITY
    base, state = unwrapped(model), attachment_of(model)
    # The logit transform is found by a probe, whose rows take no virtual tokens.
    with nullcontext() if state is None else state.route.block(Frame()):
        change = logit_transform(base, head, rows=chosen.shape[0])
    if change is not None:
        with _replaced_input(head, lambda states: states[..., :0, :]) as states:
            model(**inputs, use_cache=False)
        return chosen.take(states[0]), head, change
    with _replaced_input(head, chosen.take) as states:
        logits = model(**inputs, use_cache=False).logits
    return (logits if states else chosen.take(logits)), nn.Identity(), IDENTITY


@contextmanager
def _replaced_input(
    head: nn.Module, replacement: Callable[[Tensor], Tensor]
) -> Iterator[list[Tensor]]:
    """Replace the input of a head inside a `with` block, and yield a list of its own inputs."""
    inputs: list[Tensor] = []

    def replace(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        inputs.append(args[0])
        return (replacement(args[0]), *args[1:])

    hook = head.register_forward_pre_hook(replace)
    try:
        yield inputs
    finally:
        hook.remove()
