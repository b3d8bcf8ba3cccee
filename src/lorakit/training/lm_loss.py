"""The loss of a batch of texts, whose output head sees nothing but what predicts a labelled token.

Prompts and padding are most of a batch, and the head is most of a small model's work. So the model
runs with a hook that keeps what its head would read, and gives the head nothing; the loss is then
computed from what predicts a label, chunk by chunk (`lorakit.kernels.cross_entropy`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lorakit.attachment.state import attachment_of, is_compiled, unwrapped
from lorakit.data.chat import IGNORED
from lorakit.kernels.choice import fast
from lorakit.kernels.cross_entropy import head_cross_entropy
from lorakit.kernels.logit_transform import IDENTITY, LogitTransform
from lorakit.kernels.packed_sequences import FEW_SIZES
from lorakit.layers.adapted_layer import AdaptedLayer
from lorakit.layers.route import Frame
from lorakit.models.logits import logit_transform
from lorakit.models.roles import output_head
from lorakit.training.loss import Loss

PerRow = float | Float[Tensor, " rows"]
"""One value for all rows, or one for each."""


def text_loss(
    model: nn.Module,
    inputs: Mapping[str, Any],
    labels: Int[Tensor, "rows length"],
    *,
    loss: Loss,
    items: Tensor | int | None = None,
) -> Float[Tensor, ""]:
    """The summed loss of a batch over so many items; see `text_losses`.

    Args:
        model: a language model.
        inputs: what it is called with.
        labels: the tokens to learn, IGNORED elsewhere.
        loss: how to weigh a token's logits.
        items: labelled tokens of the whole optimizer step. None: those of this batch.
    """
    total, _ = text_losses(
        model,
        inputs,
        labels,
        weights=item_weight(labels, items),
        label_smoothing=loss.label_smoothing,
        z_loss=loss.z_loss,
    )
    return total


def item_weight(labels: Int[Tensor, "rows length"], items: Tensor | int | None) -> float:
    """The weight of one item in a mean over so many, or over those of this batch."""
    count = labelled(labels).sum() if items is None else items
    return 1 / max(float(count), 1.0)


def labelled(labels: Int[Tensor, "rows length"]) -> Tensor:
    """Return which tokens are learnt, (rows, length - 1): nothing predicts the first of a row."""
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
    """Σ weight·loss, and the loss of what each position predicts, without a gradient.

    Position t predicts the token at t+1; where that has no label, the loss is 0. The sum can be
    differentiated, once.

    Args:
        model: a language model, also in a wrapper.
        inputs: what it is called with.
        labels: the tokens to learn, IGNORED elsewhere.
        weights: factor on the losses of a row.
        label_smoothing: of a row; see `head_cross_entropy`.
        z_loss: of a row; see `head_cross_entropy`.
    """
    if not fast():
        logits = model(**inputs, use_cache=False).logits
        losses = plain_losses(logits, labels, _per_row(label_smoothing), _per_row(z_loss))
        return (losses * _per_row(weights).to(losses)).sum(), losses.detach()
    head = _hooked_head(model)
    chosen = _Chosen.of(labels, keep_rows=_tells_rows_apart(model, head))
    read, head, change = _run(model, inputs, chosen, head)
    total, losses = head_cross_entropy(
        read,
        head,
        chosen.targets.to(read.device),
        chosen.spread(weights).to(read.device),
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
    """The loss of what each position predicts, from all logits; 0 without a label."""
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
    """The positions that predict a labelled token, (groups, tokens).

    One group of all, or one of each row: these hold equally many, and some of them without a label.
    """

    index: Int[Tensor, "groups tokens"]
    """Of positions in the flattened batch."""
    targets: Int[Tensor, "groups tokens"]
    shape: torch.Size
    """Of the batch: rows, length."""

    @staticmethod
    def of(labels: Int[Tensor, "rows length"], *, keep_rows: bool) -> _Chosen:
        """Return what the labels ask for."""
        rows, length = labels.shape
        following = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        asked = following != IGNORED
        if keep_rows:
            most = int(asked.sum(1).max())
            columns = asked.int().argsort(dim=1, descending=True, stable=True)[:, :most]
            index = columns + torch.arange(rows, device=labels.device)[:, None] * length
        else:
            index = asked.flatten().nonzero().T
            return _Chosen(index, following.flatten()[index], labels.shape).rounded()
        return _Chosen(index, following.flatten()[index], labels.shape)

    def rounded(self) -> _Chosen:
        """The same and some positions without a label, so that few numbers of them occur."""
        missing = -self.index.shape[1] % FEW_SIZES
        return _Chosen(
            F.pad(self.index, (0, missing)),
            F.pad(self.targets, (0, missing), value=IGNORED),
            self.shape,
        )

    def take(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "groups tokens d"]:
        """Return what lies at the chosen positions of a batch."""
        flat = x.reshape(-1, x.shape[-1])
        taken = flat.index_select(0, self.index.flatten().to(x.device))
        return taken.view(*self.index.shape, x.shape[-1])

    def spread(self, value: PerRow) -> Float[Tensor, "groups tokens"]:
        """A row's value for each of its chosen positions, in float64."""
        if not isinstance(value, Tensor):
            return torch.full(self.index.shape, value, dtype=torch.float64)
        return value.double()[(self.index // self.shape[1]).to(value.device)]

    def put_back(self, values: Float[Tensor, "groups tokens"]) -> Float[Tensor, "rows length"]:
        """Return values at their positions in the batch, and 0 elsewhere."""
        found = values.new_zeros(self.shape.numel())
        # What has no label has no loss, so that positions may be here twice.
        found.index_add_(0, self.index.flatten().to(values.device), values.flatten())
        return found.view(self.shape)


def _hooked_head(model: nn.Module) -> nn.Module | None:
    """A language model's output head, or None where hooks on it cannot be relied on.

    DataParallel runs copies of it in several threads, and a compiled model has no regard for hooks
    that come later. There the model computes all logits.
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
    """Return what a head reads at the chosen positions, the head, and what follows it.

    Where the model must make its logits, they are returned, and Identity as their head.
    """
    if head is None:
        logits = chosen.take(model(**inputs, use_cache=False).logits)
        return logits, nn.Identity(), IDENTITY
    base = unwrapped(model)
    with _plain(base):
        change = logit_transform(base, head, rows=chosen.shape[0])
    if change is not None:
        with _given_to(head, lambda states: states[..., :0, :]) as read:
            model(**inputs, use_cache=False)
        return chosen.take(read[0]), head, change
    with _given_to(head, chosen.take) as read:
        logits = model(**inputs, use_cache=False).logits
    return (logits if read else chosen.take(logits)), nn.Identity(), IDENTITY


@contextmanager
def _given_to(head: nn.Module, given: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """Give a head something made from what it would read, inside a block; yield what that was."""
    read: list[Tensor] = []

    def replace(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        read.append(args[0])
        return (given(args[0]), *args[1:])

    hook = head.register_forward_pre_hook(replace)
    try:
        yield read
    finally:
        hook.remove()


def _plain(base: nn.Module) -> AbstractContextManager[None]:
    """A block in which a model puts no virtual tokens into its rows."""
    state = attachment_of(base)
    return nullcontext() if state is None else state.route.block(Frame())
